"""The device functions of `wire` in numpy, for Triton's interpreter: one program a rank, in one thread.

Addresses are those of the process, so that ranks in processes of their own share memory as GPUs do. An `Observer` can watch it.
"""

from __future__ import annotations

import ctypes
import time

import numpy as np
import triton
import triton.language as tl

from tokenferry.kernels.control_block import (
    COUNTERS_OFFSET,
    COUNTS_DISAGREE,
    GROUP_SIZE_OFFSET,
    LIMITS_OFFSET,
    OBSERVER_OFFSET,
    PEER_TABLE_OFFSET,
    PHASE_SHIFT,
    RECORD_OFFSET,
    ROUND_OFFSET,
    SENTINEL,
    SIGNS_OFFSET,
    STEP_OFFSET,
    TICK_SHIFT,
)
from tokenferry.kernels.wire_observer import Observer

# --- memory and tensors ---------------------------------------------------------------------------------------------------


class _Memory:
    """Lets numpy see `count` 32-bit words at `address`."""

    def __init__(self, address: int, count: int) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (count,), "typestr": "<u4", "version": 3}


def _array(value, shape=()):
    data = value.handle.data if isinstance(value, tl.tensor) else np.asarray(getattr(value, "value", value))
    if shape == ():
        return data
    return np.broadcast_to(data if data.shape == shape else data.reshape(()), shape)


def _scalar(value) -> int:
    return int(_array(value).reshape(-1)[0])


def _tensor(data, dtype):
    handle = triton.runtime.interpreter.TensorHandle(np.ascontiguousarray(data), dtype)
    return tl.core.tensor(handle, tl.block_type(dtype, list(data.shape)) if data.shape else dtype)


def _words(addresses, count):
    """A window of memory that covers all packets, and the index of each packet's first word in it."""
    low = int(addresses.min())
    window = np.asarray(_Memory(low, (int(addresses.max()) - low) // 4 + count))
    return window, (addresses - low) // 4


def _int32(address: int):
    """The int32 at an address, to be read and written as element 0."""
    return np.asarray(_Memory(address, 1)).view(np.int32)


def _int64(address: int, count: int = 1):
    """As `_int32`, for `count` words of 64 bits."""
    return np.asarray(_Memory(address, 2 * count)).view(np.int64)


def _observer(control: int) -> Observer:
    identity = int(_int64(control + OBSERVER_OFFSET)[0])
    return ctypes.cast(identity, ctypes.py_object).value if identity else Observer()


def _live(address, mask):
    addresses = _array(address).astype(np.int64)
    return addresses, np.flatnonzero(_array(mask, addresses.shape).astype(bool))


def _get(address, mask, words):
    addresses, live = _live(address, mask)
    outputs = [np.zeros(addresses.shape, np.uint32) for _ in range(4)]
    if live.size:
        window, index = _words(addresses[live], words)
        for j in range(words):
            outputs[j][live] = window[index + j]
    return tuple(_tensor(output, tl.uint32) for output in outputs)


def _put(address, values, mask, words, observer=None, kind=""):
    addresses, live = _live(address, mask)
    if not live.size:
        return
    data = [_array(value, addresses.shape)[live].astype(np.uint32) for value in values[:words]]
    window, index = _words(addresses[live], words)
    for piece in [np.arange(live.size)] if observer is None else observer.pieces(kind, live.size):
        for j in range(words):
            window[index[piece] + j] = data[j][piece]
        if observer is not None:
            observer.event(kind, addresses[live][piece])


def load(address, mask, WORDS):
    return _get(address, mask, _scalar(WORDS))


load_peer = load


def store(address, a, b, c, d, mask, WORDS):
    _put(address, (a, b, c, d), mask, _scalar(WORDS))


def send(address, a, b, c, d, mask, control_ptr, WORDS):
    _put(address, (a, b, c, d), mask, _scalar(WORDS), _observer(_scalar(control_ptr)), "send")


def _clones(address, control_ptr):
    """The same place in every rank's buffer. Without a switch, a multicast address is one in this rank's own buffer."""
    control = _scalar(control_ptr)
    offsets = _array(address).astype(np.int64) - control
    return [offsets + int(base) for base in _peer_table(control)]


def _peer_table(control: int):
    """The addresses of all buffers of the group, as the hardware knows it: the size that a kernel was given is not asked."""
    table, size = _int64(control + PEER_TABLE_OFFSET)[0], _int32(control + GROUP_SIZE_OFFSET)[0]
    return _int64(int(table), int(size))


def multicast(address, a, b, c, d, mask, control_ptr, WORDS):
    observer = _observer(_scalar(control_ptr))
    for clone in _clones(address, control_ptr):
        _put(_tensor(clone, tl.int64), (a, b, c, d), mask, _scalar(WORDS), observer, "send")


def multicast_sum(address, mask, control_ptr):
    totals = None
    for clone in _clones(address, control_ptr):
        words = [_array(word).view(np.float32) for word in _get(_tensor(clone, tl.int64), mask, 4)]
        totals = words if totals is None else [total + word for total, word in zip(totals, words, strict=True)]
    return tuple(_tensor(total.view(np.uint32), tl.uint32) for total in totals)


def _wait(waiting, poll, control: int, blamed, hint) -> None:
    """Polls until no element of `waiting` is left, or gives up for the reasons for which the PTX form does."""
    begin = since = time.monotonic_ns() >> TICK_SHIFT
    signs = _int64(control + SIGNS_OFFSET)[0]
    while waiting.size:
        arrived = poll(waiting)
        waiting = waiting[~arrived]
        if not waiting.size:
            return
        time.sleep(0)
        if _int64(control + RECORD_OFFSET)[0] != 0:
            return
        now, before, signs = time.monotonic_ns() >> TICK_SHIFT, signs, _int64(control + SIGNS_OFFSET)[0]
        since = now if signs != before else since
        timeout, longest = _int32(control + LIMITS_OFFSET)[0], _int32(control + LIMITS_OFFSET + 4)[0]
        if now - since >= timeout or now - begin >= longest:
            _give_up(control, int(blamed[waiting[0]]), int(hint[waiting[0]]))
            return


def _give_up(control: int, record: int, hint: int) -> None:
    """Writes the record here and at every peer. Whichever record was here first is the one that the peers are told."""
    step = int(_int32(control + COUNTERS_OFFSET + STEP_OFFSET)[0])
    if int(_int32(hint)[0]) == step + 1:
        record |= COUNTS_DISAGREE << PHASE_SHIFT
    claim_records([control], record)
    claim_records(_peer_table(control), int(_int64(control + RECORD_OFFSET)[0]))


def claim_records(controls, word: int) -> None:
    """Writes an abort record into each control block that has none. Another thread may be inside a kernel meanwhile."""
    addresses = np.array(controls, np.uint64) + np.uint64(RECORD_OFFSET)
    expected, record = np.zeros(addresses.size, np.int64), np.full(addresses.size, word, np.int64)
    atomics = triton.runtime.interpreter._interpreter
    atomics.atomic_cas(addresses, expected, record, atomics.MEM_SEMANTIC.RELAXED)


def add_to_words(addresses, amount: int) -> None:
    """Adds to the int64 at each address, as `wire.add_to_word` does on GPUs. Threads and processes may do so at once."""
    places, amounts = np.array(addresses, np.uint64), np.full(len(addresses), amount, np.int64)
    atomics = triton.runtime.interpreter._interpreter
    everywhere, relaxed = np.ones(places.size, bool), atomics.MEM_SEMANTIC.RELAXED
    atomics.atomic_rmw(atomics.RMW_OP.ADD, places, amounts, everywhere, relaxed)


def poll_and_clear(address, mask, control_ptr, blamed, hint, WORDS):
    words, control = _scalar(WORDS), _scalar(control_ptr)
    addresses, live = _live(address, mask)
    outputs = [np.zeros(addresses.shape, np.uint32) for _ in range(4)]
    if not live.size:
        return tuple(_tensor(output, tl.uint32) for output in outputs)
    observer = _observer(control)
    index = np.zeros(addresses.shape, np.int64)
    window, index[live] = _words(addresses[live], words)

    def poll(waiting):
        seen = [window[index[waiting] + j] for j in range(words)]
        arrived = np.all([word != SENTINEL for word in seen], axis=0)
        ready = waiting[arrived]
        if ready.size:
            observer.event("poll", addresses[ready])
            for j in range(words):
                outputs[j][ready] = seen[j][arrived]
                window[index[ready] + j] = SENTINEL
            observer.event("restore", addresses[ready])
        return arrived

    _wait(live, poll, control, _array(blamed, addresses.shape), _array(hint, addresses.shape))
    return tuple(_tensor(output, tl.uint32) for output in outputs)


def take_ticket(counters_ptr):
    return tl.full([], 0, tl.int64)  # of the one program


def end_round(counters_ptr, ticket, programs, current):
    _int64(_scalar(counters_ptr) + ROUND_OFFSET)[0] = (_scalar(current) + 1) << 32


def send_count(address, num_tokens, flags, step, generation, mask, control_ptr):
    # Word by word, with the step last: x86 keeps the order of stores, and the step is what the receiver waits for.
    addresses, live = _live(address, mask)
    values = [_scalar(value) for value in (num_tokens, flags, generation, step)]
    observer = _observer(_scalar(control_ptr))
    for piece in observer.pieces("count", live.size):
        for element in live[piece]:
            words = np.asarray(_Memory(int(addresses[element]), 4))
            for index, value in zip((0, 1, 3, 2), values, strict=True):
                words[index] = value
        observer.event("count", addresses[live[piece]])


def await_count(address, mask, step, generation, control_ptr, blamed):
    return await_count_timed(address, mask, step, generation, control_ptr, blamed)[:2]


def await_count_timed(address, mask, step, generation, control_ptr, blamed):
    addresses, live = _live(address, mask)
    results = [np.zeros(addresses.shape, np.int32) for _ in range(2)]
    clocks = np.full(addresses.shape, time.monotonic_ns(), np.int64)
    expected = (_scalar(step), _scalar(generation))

    def poll(waiting):
        arrived = []
        for element in waiting:
            words = np.asarray(_Memory(int(addresses[element]), 4))
            arrived.append((int(words[2]), int(words[3])) == expected)
            if arrived[-1]:
                results[0][element], results[1][element] = words[0], words[1]
        clocks[waiting] = time.monotonic_ns()
        return np.array(arrived, bool)

    _wait(live, poll, _scalar(control_ptr), _array(blamed, addresses.shape), addresses + 8)
    return (*(_tensor(result, tl.int32) for result in results), _tensor(clocks, tl.int64))


def signal(address, epoch, units, mask, control_ptr):
    addresses, live = _live(address, mask)
    word = np.uint64((_scalar(epoch) & 0xFFFFFFFF) << 32 | _scalar(units)).view(np.int64)
    observer = _observer(_scalar(control_ptr))
    for piece in observer.pieces("signal", live.size):
        for element in live[piece]:
            _int64(int(addresses[element]))[0] = word
        observer.event("signal", addresses[live[piece]])


def await_signal(address, epoch, units, mask, control_ptr, blamed, hint):
    await_signal_timed(address, epoch, units, mask, control_ptr, blamed, hint)


def await_signal_timed(address, epoch, units, mask, control_ptr, blamed, hint):
    addresses, live = _live(address, mask)
    clocks = np.full(addresses.shape, time.monotonic_ns(), np.int64)
    wanted_epoch, wanted_units = _scalar(epoch) & 0xFFFFFFFF, _scalar(units)

    def poll(waiting):
        seen = np.array([int(_int64(int(addresses[element]))[0]) for element in waiting])
        clocks[waiting] = time.monotonic_ns()
        return (seen >> 32 & 0xFFFFFFFF == wanted_epoch) & (seen & 0xFFFFFFFF >= wanted_units)

    _wait(live, poll, _scalar(control_ptr), _array(blamed, addresses.shape), _array(hint, addresses.shape))
    return _tensor(clocks, tl.int64)


def pack(low, high, DTYPE):
    low, high, dtype = _array(low), _array(high), getattr(DTYPE, "value", DTYPE)
    if dtype == tl.float32:
        return _tensor(low.view(np.uint32), tl.uint32)
    halves = [_to_bfloat16(half) if dtype == tl.bfloat16 else _to_float16(half) for half in (low, high)]
    return _tensor(halves[0] | halves[1] << np.uint32(16), tl.uint32)


def _to_bfloat16(value):
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def _to_float16(value):
    with np.errstate(all="ignore"):
        return value.astype(np.float16).view(np.uint16).astype(np.uint32)


def unpack(word, DTYPE):
    word, dtype = _array(word), getattr(DTYPE, "value", DTYPE)
    if dtype == tl.float32:
        return (_tensor(word.view(np.float32), tl.float32),) * 2
    if dtype == tl.bfloat16:
        halves = (word << np.uint32(16)).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)
    else:
        with np.errstate(all="ignore"):
            halves = (word & np.uint32(0xFFFF)), word >> np.uint32(16)
            halves = tuple(half.astype(np.uint16).view(np.float16).astype(np.float32) for half in halves)
    return tuple(_tensor(half, tl.float32) for half in halves)


def wait_for_previous_kernel(PDL):
    return


let_next_kernel_start = wait_for_previous_kernel
