"""Everything that crosses between GPUs, word by word: the kernels' only atomics and inline PTX.

Addresses are int64 tensors, not pointers: a block of addresses may point into several ranks' memory. Data travels in packets
of up to four 32-bit words. A word that has not arrived reads as the sentinel, which no payload word can be: `escape` turns
the two payloads that have its bits (a pair of NaNs, the expert number -1) into a neighbour that means the same.

Each device function has two forms with one meaning: PTX for GPUs (its text is in `wire_ptx`), and numpy for Triton's
interpreter (`wire_interpreter`), which this module takes instead where TRITON_INTERPRET=1.

Waits are bounded. A rank that waits longer than the time-out writes an abort record (`blame`) to every rank. A rank that
finds a record in its own control block stops waiting, in all its kernels, until the workspace is reset.

A program of Triton's is one CTA on the GPU; "the CTA with the same index" is the program of that number at another rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry import env
from tokenferry.kernels import control_block, wire_ptx

INTERPRETED = env.read(env.TritonSettings).interpret

# Kernels may read module-level values only if they are tl.constexpr. `control_block` says what each of these means.
MIRROR_OFFSET: tl.constexpr = tl.constexpr(control_block.MIRROR_OFFSET)
RECORD_OFFSET: tl.constexpr = tl.constexpr(control_block.RECORD_OFFSET)
DIRTY_ROWS_OFFSET: tl.constexpr = tl.constexpr(control_block.DIRTY_ROWS_OFFSET)
STEP_OFFSET: tl.constexpr = tl.constexpr(control_block.STEP_OFFSET)
ROUND_OFFSET: tl.constexpr = tl.constexpr(control_block.ROUND_OFFSET)
NUM_REAL_OFFSET: tl.constexpr = tl.constexpr(control_block.NUM_REAL_OFFSET)
MODE_SEND: tl.constexpr = tl.constexpr(control_block.MODE_SEND)
MODE_RECEIVE: tl.constexpr = tl.constexpr(control_block.MODE_RECEIVE)
COUNT_PACKETS_OFFSET: tl.constexpr = tl.constexpr(control_block.CONTROL_BYTES)
COUNT_PACKET_BYTES: tl.constexpr = tl.constexpr(control_block.COUNT_PACKET_BYTES)
COUNT_PACKET_STEP_OFFSET: tl.constexpr = tl.constexpr(control_block.COUNT_PACKET_STEP_OFFSET)
FLAG_BYTES: tl.constexpr = tl.constexpr(control_block.FLAG_BYTES)
NOT_ENTERED: tl.constexpr = tl.constexpr(control_block.NOT_ENTERED)
DATA_MISSING: tl.constexpr = tl.constexpr(control_block.DATA_MISSING)
TOO_FEW_ROWS: tl.constexpr = tl.constexpr(control_block.TOO_FEW_ROWS)
_ESCAPED_SENTINEL: tl.constexpr = tl.constexpr(control_block.ESCAPED_SENTINEL)
_PHASE_SHIFT: tl.constexpr = tl.constexpr(control_block.PHASE_SHIFT)
_REPORTER_SHIFT: tl.constexpr = tl.constexpr(control_block.REPORTER_SHIFT)
_RANK_SHIFT: tl.constexpr = tl.constexpr(control_block.RANK_SHIFT)
_LAYER_SHIFT: tl.constexpr = tl.constexpr(control_block.LAYER_SHIFT)
_VALID_RECORD: tl.constexpr = tl.constexpr(control_block.VALID_RECORD)
_STEP_MASK: tl.constexpr = tl.constexpr(control_block.NUM_RECORD_STEPS - 1)

_LOAD1, _LOAD2, _LOAD4 = (tl.constexpr(wire_ptx.load(words)) for words in (1, 2, 4))
_LOAD_PEER2, _LOAD_PEER4 = (tl.constexpr(wire_ptx.load_peer(words)) for words in (2, 4))
_STORE1, _STORE2, _STORE4 = (tl.constexpr(wire_ptx.store(words)) for words in (1, 2, 4))
_SEND2, _SEND4 = (tl.constexpr(wire_ptx.send(words)) for words in (2, 4))
_MULTICAST2, _MULTICAST4 = (tl.constexpr(wire_ptx.multicast(words)) for words in (2, 4))
_POLL2, _POLL4 = (tl.constexpr(wire_ptx.poll_and_clear(words)) for words in (2, 4))
_MULTICAST_SUM: tl.constexpr = tl.constexpr(wire_ptx.MULTICAST_SUM)
_SEND_COUNT: tl.constexpr = tl.constexpr(wire_ptx.SEND_COUNT)
_AWAIT_COUNT: tl.constexpr = tl.constexpr(wire_ptx.await_count())
_SIGNAL: tl.constexpr = tl.constexpr(wire_ptx.SIGNAL)
_AWAIT_SIGNAL: tl.constexpr = tl.constexpr(wire_ptx.await_signal())
_TAKE_TICKET: tl.constexpr = tl.constexpr(wire_ptx.TAKE_TICKET)
_END_ROUND: tl.constexpr = tl.constexpr(wire_ptx.END_ROUND)
_PACK_BFLOAT16: tl.constexpr = tl.constexpr(wire_ptx.PACK_BFLOAT16)
_PACK_FLOAT16: tl.constexpr = tl.constexpr(wire_ptx.PACK_FLOAT16)
_UNPACK_FLOAT16: tl.constexpr = tl.constexpr(wire_ptx.UNPACK_FLOAT16)
_LOAD_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.LOAD_CONSTRAINTS)
_STORE_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.STORE_CONSTRAINTS)
_POLL_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.POLL_CONSTRAINTS)
_PACK_CONSTRAINTS: tl.constexpr = tl.constexpr(wire_ptx.PACK_CONSTRAINTS)

# --- in plain Triton, which both forms share ------------------------------------------------------------------------------


@triton.jit
def blame(step, layer, reporter, phase):
    """The abort record that `reporter` writes if it waits in vain. `set_blamed_rank` adds the rank to blame."""
    word = (step & _STEP_MASK).to(tl.int64) | ((layer + 1).to(tl.int64) << _LAYER_SHIFT)
    return word | (reporter.to(tl.int64) << _REPORTER_SHIFT) | (tl.full([], phase, tl.int64) << _PHASE_SHIFT) | _VALID_RECORD


@triton.jit
def set_blamed_rank(word, rank):
    """A record of `blame` with the rank to blame; of a block of ranks, a block of records."""
    return word + ((tl.full([], 0, tl.int64) + rank) << _RANK_SHIFT)


@triton.jit
def add_mod(number, size):
    """`number` modulo `size` for 0 <= number < 2 * size. A division takes a fifth of a global-memory latency."""
    return tl.where(number >= size, number - size, number)


@triton.jit
def rank_and_flag(pair, pid, programs, size, num_flags):
    """Spreads the flags of all ranks over the CTAs of a launch that has fewer CTAs than a rank has flags: CTA `pid` sees to the
    flags pid, pid + programs, ... of every rank, in pairs that are numbered rank by rank. Returns the rank, the flag, and whether
    there is such a flag.

    Example:
        2 ranks with 5 flags each, CTA 1 of 3: its pairs 0 to 3 are (0, 1), (1, 1), (0, 4), (1, 4).
    """
    flag = pid + pair // size * programs
    return pair % size, flag, flag < num_flags


@triton.jit
def field(address, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to a word of the control block, or of any other structure."""
    return (address + OFFSET).to(tl.pointer_type(DTYPE))


@triton.jit
def read_record(control_ptr):
    """The abort record, 0 if there is none. Kernels read it first, beside everything else that they need to begin, so that all
    of it together costs one global-memory latency.

    The load may be served by the L1 cache, as those of the step's counts beside it: a thousand warps that ask the L2 for one
    word wait for one another. So it may miss a record that came while this launch or the one before it began. Nothing rests on
    it: what is sent then does no harm, and every wait looks again, past the caches.
    """
    return tl.load(field(control_ptr, RECORD_OFFSET, tl.int64))


@triton.jit
def report(control_ptr, record):
    """Copies the record to where the host sees it without asking the device."""
    mirror = tl.load(field(control_ptr, MIRROR_OFFSET, tl.int64))
    if mirror != 0:
        tl.store(mirror.to(tl.pointer_type(tl.int64)), record)


@triton.jit
def claim_record(control_ptr, record):
    """Writes an abort record unless there is one."""
    pointer = field(control_ptr, RECORD_OFFSET, tl.int64)
    tl.atomic_cas(pointer, tl.full([], 0, tl.int64), record.to(tl.int64), sem="relaxed", scope="sys")


@triton.jit
def add_to_word(address, amount):
    """Adds to an int64 of any rank's control block."""
    tl.atomic_add(address.to(tl.pointer_type(tl.int64)), amount.to(tl.int64), sem="relaxed", scope="sys")


@triton.jit
def read_round(counters_ptr):
    """The number of bulk rounds that are done. A program that takes a ticket reads it first, so that it cannot read the next."""
    return (tl.load(field(counters_ptr, ROUND_OFFSET, tl.int64)) >> 32).to(tl.int32)


@triton.jit
def escape(word):
    """A payload word as it travels, which is never the sentinel. The only payloads with its bits are NaNs and the number -1."""
    return tl.minimum(word, tl.full([], _ESCAPED_SENTINEL, tl.uint32))


if not INTERPRETED:

    @triton.jit
    def load(address, mask, WORDS: tl.constexpr):
        """WORDS words of this GPU's memory, as four uint32 tensors that are 0 where masked or beyond WORDS."""
        if WORDS == 4:
            return tl.inline_asm_elementwise(
                _LOAD4, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )
        elif WORDS == 2:
            return tl.inline_asm_elementwise(
                _LOAD2, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                _LOAD1, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )

    @triton.jit
    def load_peer(address, mask, WORDS: tl.constexpr):
        """`load` from any rank's memory, and never from this GPU's L1 cache."""
        if WORDS == 4:
            return tl.inline_asm_elementwise(
                _LOAD_PEER4, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                _LOAD_PEER2, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )

    @triton.jit
    def store(address, a, b, c, d, mask, WORDS: tl.constexpr):
        """Writes the first WORDS of four words to this GPU's memory."""
        m = mask.to(tl.int32)
        if WORDS == 4:
            tl.inline_asm_elementwise(
                _STORE4, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1
            )
        elif WORDS == 2:
            tl.inline_asm_elementwise(
                _STORE2, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            tl.inline_asm_elementwise(
                _STORE1, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def send(address, a, b, c, d, mask, control_ptr, WORDS: tl.constexpr):
        """`store` to a peer's memory. The words of a packet, and packets among themselves, arrive in any order."""
        m = mask.to(tl.int32)
        if WORDS == 4:
            tl.inline_asm_elementwise(_SEND4, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_SEND2, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def multicast(address, a, b, c, d, mask, control_ptr, WORDS: tl.constexpr):
        """`send` to all ranks at once, whatever peers the kernel was given. `address` lies in the multicast mapping."""
        m = mask.to(tl.int32)
        if WORDS == 4:
            tl.inline_asm_elementwise(
                _MULTICAST4, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1
            )
        else:
            tl.inline_asm_elementwise(
                _MULTICAST2, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1
            )

    @triton.jit
    def poll_and_clear(address, mask, control_ptr, blamed, hint, WORDS: tl.constexpr):
        """Waits for a packet, returns it, and puts the sentinel back.

        The word at `hint` is the step of the packet that the peer would have sent if it were a step ahead. Each element needs
        exactly one owner thread: a second one would wait for ever for what the first has taken.
        """
        tl.static_assert(address.shape[0] % tl.extra.cuda.num_threads() == 0, "a packet needs exactly one owner thread")
        if WORDS == 4:
            return tl.inline_asm_elementwise(
                _POLL4,
                _POLL_CONSTRAINTS,
                [address, mask.to(tl.int32), control_ptr, blamed, hint],
                dtype=(tl.uint32,) * 4,
                is_pure=False,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                _POLL2,
                _POLL_CONSTRAINTS,
                [address, mask.to(tl.int32), control_ptr, blamed, hint],
                dtype=(tl.uint32,) * 4,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def take_ticket(counters_ptr):
        """Takes one ticket for this program; returns how many were taken before it, in the lower half. The round, in the upper
        half, is not touched. The program's first thread alone knows the ticket: to tell the others would cost each of them a
        global-memory latency.

        The last ticket lets the round end, and every warp of a program has loaded the round for itself. So a barrier stands
        here: a warp that was held up before its load would otherwise read the next round.
        """
        tl.debug_barrier()
        return tl.inline_asm_elementwise(_TAKE_TICKET, "=&l,l", [counters_ptr], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def end_round(counters_ptr, ticket, programs, current):
        """The holder of the last ticket alone takes all tickets back and ends the round."""
        tl.inline_asm_elementwise(
            _END_ROUND, "=r,l,l,r,r", [counters_ptr, ticket, programs, current], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def send_count(address, num_tokens, flags, step, generation, mask, control_ptr):
        """Sends a count packet, in one 16-byte store that arrives whole."""
        tl.inline_asm_elementwise(
            _SEND_COUNT,
            _STORE_CONSTRAINTS,
            [address, num_tokens, flags, step, generation, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def await_count(address, mask, step, generation, control_ptr, blamed):
        """Waits for the count packet of `step`; returns (num_tokens, flags), 0 where masked. The packet stays where it is, since
        its step number tells it from the next one."""
        return tl.inline_asm_elementwise(
            _AWAIT_COUNT,
            "=&r,=&r,l,r,r,r,l,l",
            [address, mask.to(tl.int32), step, generation, control_ptr, blamed],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def signal(address, epoch, units, mask, control_ptr):
        """Sets a flag at a peer to (epoch, units), after everything that this program's threads have stored and read so far."""
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            _SIGNAL, "=r,l,r,r,r", [address, epoch, units, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def await_signal(address, epoch, units, mask, control_ptr, blamed, hint):
        """Waits until a flag of this rank has this epoch and at least so many units. What the peer's CTA stored before it set the
        flag is then visible to all threads of this one.

        Epochs are compared for equality: a flag that was not written for 2**31 rounds would look as if it were ahead.
        """
        tl.inline_asm_elementwise(
            _AWAIT_SIGNAL,
            "=&r,l,r,r,r,l,l,l",
            [address, mask.to(tl.int32), epoch, units, control_ptr, blamed, hint],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()

    @triton.jit
    def multicast_sum(address, mask, control_ptr):
        """The float32 sum of four words over all ranks, in the switch's own order. `address` lies in the multicast mapping."""
        return tl.inline_asm_elementwise(
            _MULTICAST_SUM,
            _LOAD_CONSTRAINTS,
            [address, mask.to(tl.int32)],
            dtype=(tl.uint32,) * 4,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def pack(low, high, DTYPE: tl.constexpr):
        """The word that holds two float32 values, rounded to nearest even; for float32 the bits of `low` alone."""
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                _PACK_BFLOAT16, _PACK_CONSTRAINTS, [high, low], dtype=tl.uint32, is_pure=True, pack=1
            )
        elif tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(_PACK_FLOAT16, _PACK_CONSTRAINTS, [high, low], dtype=tl.uint32, is_pure=True, pack=1)
        else:
            return low.to(tl.uint32, bitcast=True)

    @triton.jit
    def unpack(word, DTYPE: tl.constexpr):
        """The two values of a word, exactly, as float32; for float32 the one value twice."""
        if tl.bfloat16 == DTYPE:
            return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        elif tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(
                _UNPACK_FLOAT16,
                "=&f,=&f,r",
                [word],
                dtype=(tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            return word.to(tl.float32, bitcast=True), word.to(tl.float32, bitcast=True)

    @triton.jit
    def wait_for_previous_kernel(PDL: tl.constexpr):
        """Programmatic dependent launch: before this, nothing that the previous kernel wrote is visible."""
        if PDL:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def let_next_kernel_start(PDL: tl.constexpr):
        """Programmatic dependent launch: the next kernel may be brought onto the GPU now."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

else:
    from tokenferry.kernels.wire_interpreter import (  # noqa: F401  # the names that are defined above
        await_count,
        await_signal,
        end_round,
        let_next_kernel_start,
        load,
        load_peer,
        multicast,
        multicast_sum,
        pack,
        poll_and_clear,
        send,
        send_count,
        signal,
        store,
        take_ticket,
        unpack,
        wait_for_previous_kernel,
    )
