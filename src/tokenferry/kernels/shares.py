"""How the programs of a launch share out blocks of packets: device functions, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def next_share(begin, blocks, programs):
    """Where this program begins in the next list of blocks, so that all lists together are dealt out evenly.

    Example:
        Of 4 programs the one that began at 1 in a list of 3 blocks begins at 2 in the next: programs 3, 0 and 1 go first.
    """
    begin -= tl.where(blocks < programs, blocks, blocks % programs)
    return tl.where(begin < 0, begin + programs, begin)


@triton.jit
def senders_and_receivers(
    pid, programs, num_tokens, num_valid, in_slots, PER_ROW: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a round that goes both ways: how many programs send, how many receive, whether this one does, and its number then.

    Where each way has more packets than the launch has threads, one program of SPLIT only sends and the others only receive:
    packets then come and go at the same time, and not one after the other. A receiver waits for what other programs send, so
    that all programs must be on the GPU at once; for those that do both it is the same. Each rank decides for itself.

    Example:
        Of 8 programs with 2 packets each, 20 rows of one packet each way, SPLIT 2: 4 and 4; program 1 only
        sends, and program 5 is receiver 1. With 16 rows one way 8 and 8, and program 5 is receiver 5.
    """
    least = tl.minimum(num_tokens, num_valid - num_tokens)
    is_split = in_slots & (least * PER_ROW > programs * BLOCK) & (programs >= SPLIT)
    senders = tl.where(is_split, programs // SPLIT, programs)
    receivers = tl.where(is_split, programs - senders, programs)
    receives = (pid >= senders) | (is_split == 0)
    return senders, receivers, receives, tl.where(is_split & receives, pid - senders, pid)
