"""How the programs of a launch share out blocks of packets: device functions, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire


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
    pid, programs, num_tokens, num_valid, in_slots, mode, PER_ROW: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Of a round: how many programs send, how many receive, whether this one receives, and its number among those that do.

    Where a launch that does both has more packets each way than threads, one program of SPLIT (0: none) only sends and the others
    only receive, so that packets come and go at the same time, and not one after the other. A receiver waits for what other
    programs send, so that all programs must be on the GPU at once; for programs that do both it is the same. Each rank decides
    for itself.

    Example:
        Of 8 programs with 2 packets each, 20 rows of one packet each way, SPLIT 2: 4 and 4; program 1 only
        sends, and program 5 is receiver 1. With 16 rows one way 8 and 8, and program 5 is receiver 5.
    """
    senders = programs
    receivers = programs
    receiver = pid
    receives = pid >= 0
    if SPLIT > 0:
        is_whole = in_slots & (mode == wire.MODE_SEND + wire.MODE_RECEIVE) & (programs >= SPLIT)
        is_split = is_whole & (tl.minimum(num_tokens, num_valid - num_tokens) * PER_ROW > programs * BLOCK)
        senders = tl.where(is_split, programs // SPLIT, programs)
        receivers = tl.where(is_split, programs - senders, programs)
        receives = (pid >= senders) | (is_split == 0)
        receiver = tl.where(is_split & receives, pid - senders, pid)
    return senders, receivers, receives, receiver
