"""Everything that crosses between GPUs, word by word: the only file with atomics and inline PTX.

Addresses are int64 tensors, not pointers: a block of addresses may point into several ranks' memory. Data travels in
packets of up to four 32-bit words. A word that has not arrived reads as `SENTINEL`, which no payload word can be: `escape`
turns the two payloads that have its bits (a pair of NaNs, the expert number -1) into a neighbour that means the same.

Each operation has two forms with one meaning: PTX for GPUs, and numpy for Triton's interpreter, where TRITON_INTERPRET=1
makes this module define the second. The interpreted form can be delayed between packets and watched (see `Observer`).

Waits are bounded. Whoever waits longer than the time-out writes an abort record (`blame`) to every rank; a rank that
finds a record in its own control block stops waiting, in all its kernels, until the workspace is reset.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from tokenferry import env

INTERPRETED = env.read(env.TritonSettings).interpret

# --- the control block: first bytes of every rank's buffer ----------------------------------------------------------------

CONTROL_BYTES = 256
RECORD: tl.constexpr = tl.constexpr(0)  # int64: abort record, 0 = none; the one word here that peers write
TIMEOUT_NS: tl.constexpr = tl.constexpr(8)  # int64
MIRROR: tl.constexpr = tl.constexpr(16)  # int64: address of a host word that gets a copy of the record, or 0
OBSERVER: tl.constexpr = tl.constexpr(24)  # int64: id() of the observer, interpreter only
PEER_TABLE: tl.constexpr = tl.constexpr(32)  # int64: address of the table of all ranks' buffers
GROUP_SIZE: tl.constexpr = tl.constexpr(40)  # int32
DIRTY_ROWS: tl.constexpr = tl.constexpr(44)  # int32: gathered rows from here on have id -1 already

STATE = 128  # a line of its own; another one for `solo`, whose steps and rounds are counted apart
SOLO_STATE = 192
STATE_STEP: tl.constexpr = tl.constexpr(0)  # int32: number of the step, the epoch of count packets
STATE_ROUND: tl.constexpr = tl.constexpr(8)  # int64: rounds (dispatch + combine) done << 32 | tickets taken in this combine
STATE_NUM_REAL: tl.constexpr = tl.constexpr(16)  # int32: num_real_tokens of the step, when the host knows it

SEND: tl.constexpr = tl.constexpr(1)  # parts of an operation: what a launch of it does
RECEIVE: tl.constexpr = tl.constexpr(2)
WHOLE = 3

# --- abort records --------------------------------------------------------------------------------------------------------

SENTINEL = 0xFFFFFFFF
ESCAPE: tl.constexpr = tl.constexpr(0xFFFFFFFE)
PHASES = ("failed", "not-entered", "data-missing", "counts-disagree")
NOT_ENTERED: tl.constexpr = tl.constexpr(1)
DATA_MISSING: tl.constexpr = tl.constexpr(2)
MAX_LAYERS = (1 << 16) - 1
"""Dispatchers of a workspace: an abort record has 16 bits for the layer, of which one value stands for none."""
_PHASE_SHIFT: tl.constexpr = tl.constexpr(56)
_REPORTER_SHIFT: tl.constexpr = tl.constexpr(48)
_RANK_SHIFT: tl.constexpr = tl.constexpr(40)
_LAYER_SHIFT: tl.constexpr = tl.constexpr(24)
_VALID: tl.constexpr = tl.constexpr(1 << 62)
NUM_RECORD_STEPS = 1 << 24
_STEP_MASK: tl.constexpr = tl.constexpr(NUM_RECORD_STEPS - 1)


@dataclass(frozen=True)
class Record:
    """An abort record: rank `rank` is blamed by rank `reporter`. One 64-bit word, so that it is written whole.

    Bits, from the lowest: step 24, layer + 1 16, rank 8, reporter 8, phase 2, four unused, one that is always set.
    """

    rank: int
    reporter: int
    phase: str
    step: int
    layer: int

    def pack(self) -> int:
        """The word. Steps are kept modulo 2**24.

        Example:
            Record(rank=1, reporter=0, phase="data-missing", step=7, layer=-1).pack() == 0x4200010000000007
        """
        fields = (self.step & _STEP_MASK.value) | (self.layer + 1) << _LAYER_SHIFT.value | self.rank << _RANK_SHIFT.value
        phase = PHASES.index(self.phase) << _PHASE_SHIFT.value
        return fields | self.reporter << _REPORTER_SHIFT.value | phase | _VALID.value

    @staticmethod
    def unpack(word: int) -> Record:
        """The inverse of `pack`."""
        return Record(
            rank=word >> _RANK_SHIFT.value & 0xFF,
            reporter=word >> _REPORTER_SHIFT.value & 0xFF,
            phase=PHASES[word >> _PHASE_SHIFT.value & 3],
            step=word & _STEP_MASK.value,
            layer=(word >> _LAYER_SHIFT.value & 0xFFFF) - 1,
        )

    def step_near(self, step: int) -> int:
        """The whole number of the step, of which the word has the lower 24 bits: the nearest one to `step`, the reader's own.

        Example:
            A record of step 3, read by a rank in step 2**24 - 1: step 2**24 + 3.
        """
        half = NUM_RECORD_STEPS // 2
        return max(0, step + (self.step - step + half) % NUM_RECORD_STEPS - half)


class Observer:
    """Sees the words that an interpreted rank puts on the wire, and may delay them. Subclass it in tests.

    Kinds: count, send, take, restore, signal. `addresses` are int64, one a packet.
    """

    def pieces(self, kind: str, num_packets: int) -> list[np.ndarray]:
        """The order in which the packets of one block go out, in pieces; it may sleep between two of them."""
        return [np.arange(num_packets)]

    def event(self, kind: str, addresses: np.ndarray) -> None:
        """Called after each piece."""


# --- PTX ------------------------------------------------------------------------------------------------------------------


def _vector(words: int, first: int = 0) -> str:
    names = ", ".join(f"${first + i}" for i in range(words))
    return f".v{words}.b32 {{{names}}}" if words > 1 else f".b32 {names}"


_ZERO = "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
_OUT4 = "=&r,=&r,=&r,=&r"


def _load_text(words: int, how: str) -> str:
    return f"{{ .reg .pred %p0; {_ZERO} setp.ne.u32 %p0, $5, 0; @%p0 ld{how}.global{_vector(words)}, [$4]; }}"


def _store_text(words: int, opcode: str, kind: str = "b32") -> str:
    names = ", ".join(f"${2 + i}" for i in range(words))
    operand = f"{{{names}}}" if words > 1 else names
    vector = f".v{words}" if words > 1 else ""
    return f"{{ .reg .pred %p0; setp.ne.u32 %p0, $6, 0; @%p0 {opcode}{vector}.{kind} [$1], {operand}; mov.u32 $0, 0; }}"


def _waiting_text(done: str, control: str, blame: str, hint: str) -> str:
    """The rest of a polling loop, after a poll that may have set %p0 = arrived: goes to GOT, back to W, or to LEFT.

    Every 256 polls (about 0.2 ms) it looks at the abort record and the clock. The first in this rank whose time is up
    writes the record here and at every peer. `hint` is the step of the packet that would prove the peer to be one step on.
    """
    return f"""
      @%p0 bra {done};
      add.u32 %n, %n, 1; and.b32 %i, %n, 255; setp.ne.u32 %p0, %i, 0; @%p0 bra W;
      ld.relaxed.sys.global.u64 %rec, [{control}]; setp.ne.u64 %p0, %rec, 0; @%p0 bra LEFT;
      mov.u64 %t1, %globaltimer; setp.ne.u32 %p0, %n, 256; @%p0 bra HAVE; mov.u64 %t0, %t1;
      HAVE: sub.u64 %t1, %t1, %t0; ld.global.u64 %lim, [{control} + {TIMEOUT_NS.value}];
      setp.lt.u64 %p0, %t1, %lim; @%p0 bra W;
      mov.u64 %bl, {blame}; ld.relaxed.sys.global.u32 %i, [{hint}]; ld.global.u32 %n, [{control} + {STATE}];
      add.u32 %n, %n, 1; setp.ne.u32 %p0, %i, %n; @%p0 bra CLAIM; or.b64 %bl, %bl, {3 << _PHASE_SHIFT.value};
      CLAIM: atom.relaxed.sys.global.cas.b64 %rec, [{control}], 0, %bl;
      setp.ne.u64 %p0, %rec, 0; @%p0 bra TELL; mov.u64 %rec, %bl;
      TELL: ld.global.u64 %tab, [{control} + {PEER_TABLE.value}]; ld.global.u32 %n, [{control} + {GROUP_SIZE.value}];
      NEXT: ld.global.u64 %t0, [%tab]; atom.relaxed.sys.global.cas.b64 %t1, [%t0], 0, %rec;
      add.u64 %tab, %tab, 8; sub.u32 %n, %n, 1; setp.ne.u32 %p0, %n, 0; @%p0 bra NEXT;
      LEFT: ld.global.u64 %t0, [{control} + {MIRROR.value}]; setp.eq.u64 %p0, %t0, 0; @%p0 bra GONE;
      st.relaxed.sys.global.u64 [%t0], %rec;
      GONE: """


_REGISTERS = ".reg .pred %p0; .reg .u32 %n; .reg .u32 %i; .reg .u64 %rec, %t0, %t1, %lim, %bl, %tab;"


def _take_text(words: int) -> str:
    largest = "mov.u32 %i, $0;" + "".join(f" max.u32 %i, %i, ${j};" for j in range(1, words))
    restore = ", ".join(["%i"] * words)
    restore = f".v{words}.b32 [$4], {{{restore}}}" if words > 1 else f".b32 [$4], {restore}"
    return f"""{{ {_REGISTERS} {_ZERO}
      setp.eq.u32 %p0, $5, 0; @%p0 bra END; mov.u32 %n, 0;
      W: ld.relaxed.sys.global{_vector(words)}, [$4];
      {largest} setp.ne.u32 %p0, %i, {SENTINEL:#x};
      {_waiting_text("GOT", "$6", "$7", "$8")} {_ZERO} bra END;
      GOT: mov.u32 %i, {SENTINEL:#x}; st.relaxed.sys.global{restore};
      END: }}"""


_AWAIT_COUNT = f"""{{ {_REGISTERS} .reg .pred %p1; .reg .b128 %q; .reg .b64 %lo, %hi; .reg .u32 %s, %g;
      mov.u32 $0, 0; mov.u32 $1, 0; setp.eq.u32 %p0, $3, 0; @%p0 bra END; mov.u32 %n, 0;
      W: ld.relaxed.sys.global.b128 %q, [$2]; mov.b128 {{%lo, %hi}}, %q; mov.b64 {{%s, %g}}, %hi;
      setp.eq.u32 %p0, %s, $4; setp.eq.u32 %p1, %g, $5; and.pred %p0, %p0, %p1;
      {_waiting_text("GOT", "$6", "$7", "$2 + 8")} bra END;
      GOT: mov.b64 {{$0, $1}}, %lo;
      END: }}"""

_SEND_COUNT = """{ .reg .pred %p0; .reg .b128 %q; .reg .b64 %lo, %hi; setp.ne.u32 %p0, $6, 0; mov.u32 $0, 0;
      mov.b64 %lo, {$2, $3}; mov.b64 %hi, {$4, $5}; mov.b128 %q, {%lo, %hi}; @%p0 st.relaxed.sys.global.b128 [$1], %q; }"""

_SIGNAL = """{ .reg .pred %p0; .reg .b64 %v; setp.ne.u32 %p0, $4, 0; mov.b64 %v, {$3, $2}; mov.u32 $0, 0;
      @%p0 st.release.sys.global.b64 [$1], %v; }"""

_AWAIT_SIGNAL = f"""{{ {_REGISTERS} .reg .pred %p1; .reg .b64 %v; .reg .u32 %u, %e; mov.u32 $0, 0;
      setp.eq.u32 %p0, $2, 0; @%p0 bra END; mov.u32 %n, 0;
      W: ld.acquire.sys.global.b64 %v, [$1]; mov.b64 {{%u, %e}}, %v;
      setp.eq.u32 %p0, %e, $3; setp.ge.u32 %p1, %u, $4; and.pred %p0, %p0, %p1;
      {_waiting_text("END", "$5", "$6", "$7")} END: }}"""

_TICKET = f"""{{ .reg .pred %p0; .reg .u32 %t; mov.u32 %t, %tid.x; setp.eq.u32 %p0, %t, 0; mov.u64 $0, 0;
      @%p0 atom.relaxed.gpu.global.add.u64 $0, [$1 + {STATE_ROUND.value}], 1; }}"""

_END_ROUND = f"""{{ .reg .pred %p0; .reg .u32 %t; .reg .u64 %w; mov.u32 %t, %tid.x; setp.eq.u32 %p0, %t, 0;
      cvt.u32.u64 %t, $2; add.u32 %t, %t, 1; setp.eq.and.u32 %p0, %t, $3, %p0;
      add.u32 %t, $4, 1; cvt.u64.u32 %w, %t; shl.b64 %w, %w, 32;
      @%p0 st.global.u64 [$1 + {STATE_ROUND.value}], %w; @%p0 st.global.u32 [$5], $6; mov.u32 $0, 0; }}"""

_LOAD1, _LOAD2, _LOAD4 = (tl.constexpr(_load_text(words, "")) for words in (1, 2, 4))
_PEER1, _PEER2, _PEER4 = (tl.constexpr(_load_text(words, ".relaxed.sys")) for words in (1, 2, 4))
_STORE1, _STORE2, _STORE4 = (tl.constexpr(_store_text(words, "st.global")) for words in (1, 2, 4))
_SEND1, _SEND2, _SEND4 = (tl.constexpr(_store_text(words, "st.relaxed.sys.global")) for words in (1, 2, 4))
_CAST2, _CAST4 = (tl.constexpr(_store_text(words, "multimem.st.relaxed.sys.global", "f32")) for words in (2, 4))
_CAST_REDUCE = (
    f"{{ .reg .pred %p0; {_ZERO} setp.ne.u32 %p0, $5, 0; "
    "@%p0 multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {$0, $1, $2, $3}, [$4]; }"
)
_CAST_REDUCE_TEXT: tl.constexpr = tl.constexpr(_CAST_REDUCE)
_TAKE2, _TAKE4 = (tl.constexpr(_take_text(words)) for words in (2, 4))
_AWAIT_COUNT_TEXT: tl.constexpr = tl.constexpr(_AWAIT_COUNT)
_SEND_COUNT_TEXT: tl.constexpr = tl.constexpr(_SEND_COUNT)
_TICKET_TEXT: tl.constexpr = tl.constexpr(_TICKET)
_END_ROUND_TEXT: tl.constexpr = tl.constexpr(_END_ROUND)
_SIGNAL_TEXT: tl.constexpr = tl.constexpr(_SIGNAL)
_AWAIT_SIGNAL_TEXT: tl.constexpr = tl.constexpr(_AWAIT_SIGNAL)
_LOAD_CONSTRAINTS: tl.constexpr = tl.constexpr(f"{_OUT4},l,r")
_STORE_CONSTRAINTS: tl.constexpr = tl.constexpr("=r,l,r,r,r,r,r")
_TAKE_CONSTRAINTS: tl.constexpr = tl.constexpr(f"{_OUT4},l,r,l,l,l")
_PACK_CONSTRAINTS: tl.constexpr = tl.constexpr("=r,f,f")

# --- one meaning, two forms -----------------------------------------------------------------------------------------------


@triton.jit
def blame(step, layer, reporter, phase):
    """The abort record that `reporter` would write if it waited in vain; `accuse` adds the rank to blame."""
    word = (step & _STEP_MASK).to(tl.int64) | ((layer + 1).to(tl.int64) << _LAYER_SHIFT)
    return word | (reporter.to(tl.int64) << _REPORTER_SHIFT) | (tl.full([], phase, tl.int64) << _PHASE_SHIFT) | _VALID


@triton.jit
def accuse(word, rank):
    """`blame` with the rank, or the ranks, to blame."""
    return word + ((tl.full([], 0, tl.int64) + rank) << _RANK_SHIFT)


@triton.jit
def wrap(number, size):
    """`number` modulo `size` for 0 <= number < 2 * size. A division takes as long as a fifth of a trip to memory."""
    return tl.where(number >= size, number - size, number)


@triton.jit
def field(address, OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Pointer to a word of the control block, or of any structure."""
    return (address + OFFSET).to(tl.pointer_type(DTYPE))


@triton.jit
def read_record(control):
    """The abort record, 0 if there is none. Read first, with everything else that a kernel needs to begin: one trip to memory."""
    return tl.load(field(control, RECORD, tl.int64), volatile=True)


@triton.jit
def report(control, record):
    """Leaves a copy of the record where the host sees it without asking the device."""
    mirror = tl.load(field(control, MIRROR, tl.int64))
    if mirror != 0:
        tl.store(mirror.to(tl.pointer_type(tl.int64)), record)


@triton.jit
def claim_record(control, record):
    """Writes an abort record unless there is one."""
    pointer = field(control, RECORD, tl.int64)
    tl.atomic_cas(pointer, tl.full([], 0, tl.int64), record.to(tl.int64), sem="relaxed", scope="sys")


@triton.jit
def read_round(state):
    """The number of rounds done. A program that takes a ticket reads it before: then it cannot read the next one."""
    return (tl.load(field(state, STATE_ROUND, tl.int64)) >> 32).to(tl.int32)


@triton.jit
def escape(word):
    """A payload word, never the sentinel: the only payloads with its bits are NaNs and the expert number -1."""
    return tl.minimum(word, tl.full([], ESCAPE, tl.uint32))


if not INTERPRETED:

    @triton.jit
    def load(address, mask, WORDS: tl.constexpr):
        """WORDS words of this GPU's memory as four uint32 tensors; 0 where masked or beyond WORDS."""
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
        """`load` from any rank's memory, never from this GPU's L1 cache."""
        if WORDS == 4:
            return tl.inline_asm_elementwise(
                _PEER4, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                _PEER2, _LOAD_CONSTRAINTS, [address, mask.to(tl.int32)], dtype=(tl.uint32,) * 4, is_pure=False, pack=1
            )

    @triton.jit
    def store(address, a, b, c, d, mask, WORDS: tl.constexpr):
        """The first WORDS of four words to this GPU's memory."""
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
    def send(address, a, b, c, d, mask, control, WORDS: tl.constexpr):
        """`store` to a peer's memory; the words of a packet and packets among themselves arrive in any order."""
        m = mask.to(tl.int32)
        if WORDS == 4:
            tl.inline_asm_elementwise(_SEND4, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)
        elif WORDS == 2:
            tl.inline_asm_elementwise(_SEND2, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_SEND1, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def multicast(address, a, b, c, d, mask, control, WORDS: tl.constexpr):
        """`send` to all ranks at once, whatever the kernel takes for its peers; `address` is in the multicast mapping."""
        m = mask.to(tl.int32)
        if WORDS == 4:
            tl.inline_asm_elementwise(_CAST4, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)
        else:
            tl.inline_asm_elementwise(_CAST2, _STORE_CONSTRAINTS, [address, a, b, c, d, m], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def take(address, mask, control, blamed, hint, WORDS: tl.constexpr):
        """Waits for a packet, returns it, and puts the sentinel back.

        The word at `hint` is the step of the packet that the peer would have sent if it were a step ahead. Each element has
        exactly one owner thread, or a second one would wait for ever for what the first took.
        """
        tl.static_assert(address.shape[0] % tl.extra.cuda.num_threads() == 0, "a packet needs exactly one owner thread")
        if WORDS == 4:
            return tl.inline_asm_elementwise(
                _TAKE4,
                _TAKE_CONSTRAINTS,
                [address, mask.to(tl.int32), control, blamed, hint],
                dtype=(tl.uint32,) * 4,
                is_pure=False,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                _TAKE2,
                _TAKE_CONSTRAINTS,
                [address, mask.to(tl.int32), control, blamed, hint],
                dtype=(tl.uint32,) * 4,
                is_pure=False,
                pack=1,
            )

    @triton.jit
    def take_ticket(state):
        """One ticket a program, known to its first thread alone: telling the others would cost all a trip to memory. Returns how
        many were taken before, in the lower half. The round, in the upper half, is not touched.

        The last ticket lets the round end, and every warp of a program has loaded the round itself. So all of them come here
        first: a warp that was held up before its load would read the next round.
        """
        tl.debug_barrier()
        return tl.inline_asm_elementwise(_TICKET_TEXT, "=&l,l", [state], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def end_round(control, state, ticket, programs, current, valid):
        """By the holder of the last ticket alone: all tickets are taken back, the round is over, and gathered rows from `valid`
        on have id -1."""
        dirty = control + DIRTY_ROWS
        tl.inline_asm_elementwise(
            _END_ROUND_TEXT,
            "=r,l,l,r,r,l,r",
            [state, ticket, programs, current, dirty, valid],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def send_count(address, num_tokens, flags, step, generation, mask, control):
        """The 16-byte count packet, in one store that arrives whole."""
        tl.inline_asm_elementwise(
            _SEND_COUNT_TEXT,
            _STORE_CONSTRAINTS,
            [address, num_tokens, flags, step, generation, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def await_count(address, mask, step, generation, control, blamed):
        """Waits for the count packet of `step`; returns (num_tokens, flags), 0 where masked. The packet stays: its step number
        tells it from the next one."""
        return tl.inline_asm_elementwise(
            _AWAIT_COUNT_TEXT,
            "=&r,=&r,l,r,r,r,l,l",
            [address, mask.to(tl.int32), step, generation, control, blamed],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def signal(address, epoch, units, mask, control):
        """Sets a flag at a peer to (epoch, units), after all that this program's threads have stored, and read, before."""
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            _SIGNAL_TEXT, "=r,l,r,r,r", [address, epoch, units, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def await_signal(address, epoch, units, mask, control, blamed, hint):
        """Waits until a flag of this rank has this epoch and at least so many units. What the peer's program stored before is
        then visible to all threads of this one.

        Epochs are compared for equality: one that was not written for 2**31 rounds would look as if it were ahead.
        """
        tl.inline_asm_elementwise(
            _AWAIT_SIGNAL_TEXT,
            "=&r,l,r,r,r,l,l,l",
            [address, mask.to(tl.int32), epoch, units, control, blamed, hint],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()

    @triton.jit
    def multicast_sum(address, mask, control):
        """The float32 sum of four words over all ranks, in the switch's own order; `address` is in the multicast mapping."""
        return tl.inline_asm_elementwise(
            _CAST_REDUCE_TEXT,
            _LOAD_CONSTRAINTS,
            [address, mask.to(tl.int32)],
            dtype=(tl.uint32,) * 4,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def pack(low, high, DTYPE: tl.constexpr):
        """Two float32 -> the word that holds both, rounded to nearest even; for float32 the bits of `low` alone."""
        if tl.bfloat16 == DTYPE:
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $1, $2;", _PACK_CONSTRAINTS, [high, low], dtype=tl.uint32, is_pure=True, pack=1
            )
        elif tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $1, $2;", _PACK_CONSTRAINTS, [high, low], dtype=tl.uint32, is_pure=True, pack=1
            )
        else:
            return low.to(tl.uint32, bitcast=True)

    @triton.jit
    def unpack(word, DTYPE: tl.constexpr):
        """A word -> its two float32 values, exactly; for float32 the value twice."""
        if tl.bfloat16 == DTYPE:
            return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
        elif tl.float16 == DTYPE:
            return tl.inline_asm_elementwise(
                "{ .reg .f16 %l, %h; mov.b32 {%l, %h}, $2; cvt.f32.f16 $0, %l; cvt.f32.f16 $1, %h; }",
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
        """Programmatic dependent launch: nothing of the previous kernel is visible before this."""
        if PDL:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def let_next_kernel_start(PDL: tl.constexpr):
        """Programmatic dependent launch: the next kernel may be brought onto the GPU now."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()

else:

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
        """A window of memory that covers all packets, and each packet's place in it."""
        low = int(addresses.min())
        window = np.asarray(_Memory(low, (int(addresses.max()) - low) // 4 + count))
        return window, (addresses - low) // 4

    def _word64(address: int):
        return np.asarray(_Memory(address, 2)).view(np.int64)

    def _observer(control: int) -> Observer:
        identity = int(_word64(control + OBSERVER.value)[0])
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

    def send(address, a, b, c, d, mask, control, WORDS):
        _put(address, (a, b, c, d), mask, _scalar(WORDS), _observer(_scalar(control)), "send")

    def _clones(address, control):
        """The same place in every rank's buffer: without a switch, a multicast address is one in the own buffer.

        All ranks of the group, as the hardware does it: the size that a kernel was given is not asked.
        """
        control = _scalar(control)
        offsets = _array(address).astype(np.int64) - control
        return [offsets + int(base) for base in _word64_table(control, _group_size(control))]

    def _group_size(control: int) -> int:
        return int(np.asarray(_Memory(control + GROUP_SIZE.value, 1))[0])

    def _word64_table(control: int, size: int):
        table = int(_word64(control + PEER_TABLE.value)[0])
        return np.asarray(_Memory(table, 2 * size)).view(np.int64)

    def multicast(address, a, b, c, d, mask, control, WORDS):
        for clone in _clones(address, control):
            _put(_tensor(clone, tl.int64), (a, b, c, d), mask, _scalar(WORDS), _observer(_scalar(control)), "send")

    def multicast_sum(address, mask, control):
        totals = None
        for clone in _clones(address, control):
            words = [_array(word).view(np.float32) for word in _get(_tensor(clone, tl.int64), mask, 4)]
            totals = words if totals is None else [total + word for total, word in zip(totals, words, strict=True)]
        return tuple(_tensor(total.view(np.uint32), tl.uint32) for total in totals)

    def _wait(waiting, poll, control, blamed, hint):
        """Polls until no element of `waiting` is left; gives up as the PTX form does."""
        deadline_ns = time.monotonic_ns() + int(_word64(control + TIMEOUT_NS.value)[0])
        while waiting.size:
            arrived = poll(waiting)
            waiting = waiting[~arrived]
            if not waiting.size:
                return True
            time.sleep(0)
            if _word64(control)[0] != 0:
                return False
            if time.monotonic_ns() > deadline_ns:
                word, step = int(blamed[waiting[0]]), int(np.asarray(_Memory(control + STATE, 1))[0])
                if int(np.asarray(_Memory(int(hint[waiting[0]]), 1))[0]) == step + 1:
                    word |= 3 << _PHASE_SHIFT.value
                _claim(control, word)
                return False
        return True

    def _claim(control: int, word: int) -> None:
        claim_record(tl.full([], control, tl.int64), tl.full([], word, tl.int64))
        agreed = int(_word64(control)[0])
        for peer in _word64_table(control, _group_size(control)):
            claim_record(tl.full([], int(peer), tl.int64), tl.full([], agreed, tl.int64))

    def claim_records(controls, word: int) -> None:
        """`claim_record` at each address, by the host, while another thread may be inside a kernel."""
        addresses = np.array(controls, np.uint64)
        expected, record = np.zeros(addresses.size, np.int64), np.full(addresses.size, word, np.int64)
        atomics = triton.runtime.interpreter._interpreter
        atomics.atomic_cas(addresses, expected, record, atomics.MEM_SEMANTIC.RELAXED)

    def take(address, mask, control, blamed, hint, WORDS):
        words, control = _scalar(WORDS), _scalar(control)
        addresses, live = _live(address, mask)
        outputs = [np.zeros(addresses.shape, np.uint32) for _ in range(4)]
        observer = _observer(control)
        if live.size:
            place = np.zeros(addresses.shape, np.int64)
            window, place[live] = _words(addresses[live], words)

            def poll(waiting):
                seen = [window[place[waiting] + j] for j in range(words)]
                arrived = np.all([word != SENTINEL for word in seen], axis=0)
                ready = waiting[arrived]
                if ready.size:
                    observer.event("take", addresses[ready])
                    for j in range(words):
                        outputs[j][ready] = seen[j][arrived]
                        window[place[ready] + j] = SENTINEL
                    observer.event("restore", addresses[ready])
                return arrived

            _wait(live, poll, control, _array(blamed, addresses.shape), _array(hint, addresses.shape))
        return tuple(_tensor(output, tl.uint32) for output in outputs)

    def take_ticket(state):
        return tl.full([], 0, tl.int64)  # of the one program

    def end_round(control, state, ticket, programs, current, valid):
        tl.store(field(state, STATE_ROUND, tl.int64), (current + 1).to(tl.int64) << 32)
        tl.store(field(control, DIRTY_ROWS, tl.int32), valid)

    def send_count(address, num_tokens, flags, step, generation, mask, control):
        # Word by word, the step last: x86 keeps the order of stores, and the step is what the receiver waits for.
        addresses, live = _live(address, mask)
        values = [_scalar(value) for value in (num_tokens, flags, generation, step)]
        observer = _observer(_scalar(control))
        for piece in observer.pieces("count", live.size):
            for element in live[piece]:
                words = np.asarray(_Memory(int(addresses[element]), 4))
                for place, value in zip((0, 1, 3, 2), values, strict=True):
                    words[place] = value
            observer.event("count", addresses[live[piece]])

    def await_count(address, mask, step, generation, control, blamed):
        addresses, live = _live(address, mask)
        results = [np.zeros(addresses.shape, np.int32) for _ in range(2)]
        expected = (_scalar(step), _scalar(generation))

        def poll(waiting):
            arrived = []
            for element in waiting:
                words = np.asarray(_Memory(int(addresses[element]), 4))
                arrived.append((int(words[2]), int(words[3])) == expected)
                if arrived[-1]:
                    results[0][element], results[1][element] = words[0], words[1]
            return np.array(arrived, bool)

        _wait(live, poll, _scalar(control), _array(blamed, addresses.shape), addresses + 8)
        return tuple(_tensor(result, tl.int32) for result in results)

    def signal(address, epoch, units, mask, control):
        addresses, live = _live(address, mask)
        word = np.uint64((_scalar(epoch) & 0xFFFFFFFF) << 32 | _scalar(units)).view(np.int64)
        observer = _observer(_scalar(control))
        for piece in observer.pieces("signal", live.size):
            for element in live[piece]:
                _word64(int(addresses[element]))[0] = word
            observer.event("signal", addresses[live[piece]])

    def await_signal(address, epoch, units, mask, control, blamed, hint):
        addresses, live = _live(address, mask)
        wanted_epoch, wanted_units = _scalar(epoch) & 0xFFFFFFFF, _scalar(units)

        def poll(waiting):
            seen = np.array([int(_word64(int(addresses[element]))[0]) for element in waiting])
            return (seen >> 32 & 0xFFFFFFFF == wanted_epoch) & (seen & 0xFFFFFFFF >= wanted_units)

        _wait(live, poll, _scalar(control), _array(blamed, addresses.shape), _array(hint, addresses.shape))

    def pack(low, high, DTYPE):
        low, high, dtype = _array(low), _array(high), getattr(DTYPE, "value", DTYPE)
        if dtype == tl.float32:
            return _tensor(low.view(np.uint32), tl.uint32)
        halves = [_to_bfloat16(part) if dtype == tl.bfloat16 else _to_float16(part) for part in (low, high)]
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
                parts = (word & np.uint32(0xFFFF)), word >> np.uint32(16)
                halves = tuple(part.astype(np.uint16).view(np.float16).astype(np.float32) for part in parts)
        return tuple(_tensor(half, tl.float32) for half in halves)

    def wait_for_previous_kernel(PDL):
        return

    let_next_kernel_start = wait_for_previous_kernel
