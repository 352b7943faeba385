"""The PTX text of the device functions in `wire`: strings, which need neither Triton nor a GPU.

In each text `$0` and the next few are the outputs, and behind them come the inputs, in the order of the arguments in `wire`.
Masked elements are skipped by the predicate %p0. A text stands in braces, so that its labels and registers are its own.
"""

from __future__ import annotations

from tokenferry.kernels.control_block import (
    COUNTERS_OFFSET,
    COUNTS_DISAGREE,
    GROUP_SIZE_OFFSET,
    LIMITS_OFFSET,
    MIRROR_OFFSET,
    PEER_TABLE_OFFSET,
    PHASE_SHIFT,
    ROUND_OFFSET,
    SENTINEL,
    STEP_OFFSET,
    TICK_SHIFT,
)

LOAD_CONSTRAINTS = "=&r,=&r,=&r,=&r,l,r"
STORE_CONSTRAINTS = "=r,l,r,r,r,r,r"
POLL_CONSTRAINTS = "=&r,=&r,=&r,=&r,l,r,l,l,l"
POLL_BOTH_CONSTRAINTS = "=&r,=&r,=&r,=&r,=&r,l,r,l,r,l,l,l"
PACK_CONSTRAINTS = "=r,f,f"

_STEP = COUNTERS_OFFSET + STEP_OFFSET
_ZERO = "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;"
_WAIT_REGISTERS = ".reg .pred %p0; .reg .u32 %n, %i, %now, %begin, %since, %signs, %longest; .reg .u64 %rec, %w, %bl, %tab;"


def _vector(words: int) -> str:
    names = ", ".join(f"${i}" for i in range(words))
    return f".v{words}.b32 {{{names}}}" if words > 1 else f".b32 {names}"


def _load(words: int, how: str) -> str:
    return f"{{ .reg .pred %p0; {_ZERO} setp.ne.u32 %p0, $5, 0; @%p0 ld{how}.global{_vector(words)}, [$4]; }}"


def _store(words: int, opcode: str, kind: str = "b32") -> str:
    names = ", ".join(f"${2 + i}" for i in range(words))
    operand = f"{{{names}}}" if words > 1 else names
    vector = f".v{words}" if words > 1 else ""
    return f"{{ .reg .pred %p0; setp.ne.u32 %p0, $6, 0; @%p0 {opcode}{vector}.{kind} [$1], {operand}; mov.u32 $0, 0; }}"


def load(words: int) -> str:
    """A packet of this GPU's memory."""
    return _load(words, "")


def load_peer(words: int) -> str:
    """A packet of any rank's memory, past the L1 cache."""
    return _load(words, ".relaxed.sys")


def store(words: int) -> str:
    """A packet to this GPU's memory."""
    return _store(words, "st.global")


def send(words: int) -> str:
    """A packet to any rank's memory, past the caches."""
    return _store(words, "st.relaxed.sys.global")


def multicast(words: int) -> str:
    """A packet to all ranks' memory, through the multicast mapping."""
    return _store(words, "multimem.st.relaxed.sys.global", "f32")


def _waiting(done: str, control: str, blame: str, hint: str) -> str:
    """The rest of a polling loop, after a poll that may have set %p0 = arrived: goes to GOT, back to W, or to LEFT.

    Every 256 polls (about 0.2 ms) it looks at the abort record, at the signs of life of busy peers, and at the clock, which
    begins anew with each sign. The first rank whose time is up writes the record here and at every peer. `hint` is the step of
    the packet that would prove the peer to be one step ahead.
    """
    return f"""
      @%p0 bra {done};
      add.u32 %n, %n, 1; and.b32 %i, %n, 255; setp.ne.u32 %p0, %i, 0; @%p0 bra W;
      ld.relaxed.sys.global.v2.u64 {{%rec, %w}}, [{control}]; setp.ne.u64 %p0, %rec, 0; @%p0 bra LEFT;
      cvt.u32.u64 %i, %w; mov.u64 %w, %globaltimer; shr.u64 %w, %w, {TICK_SHIFT}; cvt.u32.u64 %now, %w;
      setp.eq.u32 %p0, %n, 256; @%p0 mov.u32 %begin, %now;
      setp.ne.or.u32 %p0, %i, %signs, %p0; @%p0 mov.u32 %since, %now; mov.u32 %signs, %i;
      ld.relaxed.sys.global.v2.u32 {{%i, %longest}}, [{control} + {LIMITS_OFFSET}];
      add.u32 %i, %i, %since; sub.u32 %i, %i, %now; setp.gt.s32 %p0, %i, 0;
      sub.u32 %now, %now, %begin; setp.lt.and.u32 %p0, %now, %longest, %p0; @%p0 bra W;
      mov.u64 %bl, {blame}; ld.relaxed.sys.global.u32 %i, [{hint}]; ld.global.u32 %n, [{control} + {_STEP}];
      add.u32 %n, %n, 1; setp.ne.u32 %p0, %i, %n; @%p0 bra CLAIM; or.b64 %bl, %bl, {COUNTS_DISAGREE << PHASE_SHIFT};
      CLAIM: atom.relaxed.sys.global.cas.b64 %rec, [{control}], 0, %bl;
      setp.ne.u64 %p0, %rec, 0; @%p0 bra TELL; mov.u64 %rec, %bl;
      TELL: ld.global.u64 %tab, [{control} + {PEER_TABLE_OFFSET}]; ld.global.u32 %n, [{control} + {GROUP_SIZE_OFFSET}];
      NEXT: ld.global.u64 %w, [%tab]; atom.relaxed.sys.global.cas.b64 %bl, [%w], 0, %rec;
      add.u64 %tab, %tab, 8; sub.u32 %n, %n, 1; setp.ne.u32 %p0, %n, 0; @%p0 bra NEXT;
      LEFT: ld.global.u64 %w, [{control} + {MIRROR_OFFSET}]; setp.eq.u64 %p0, %w, 0; @%p0 bra GONE;
      st.relaxed.sys.global.u64 [%w], %rec;
      GONE: """


def poll_and_clear(words: int) -> str:
    """Polls a packet until no word of it is the sentinel, then puts the sentinel back."""
    largest = "mov.u32 %i, $0;" + "".join(f" max.u32 %i, %i, ${j};" for j in range(1, words))
    restore = ", ".join(["%i"] * words)
    restore = f".v{words}.b32 [$4], {{{restore}}}" if words > 1 else f".b32 [$4], {restore}"
    return f"""{{ {_WAIT_REGISTERS} {_ZERO}
      setp.eq.u32 %p0, $5, 0; @%p0 bra END; mov.u32 %n, 0;
      W: ld.relaxed.sys.global{_vector(words)}, [$4];
      {largest} setp.ne.u32 %p0, %i, {SENTINEL:#x};
      {_waiting("GOT", "$6", "$7", "$8")} {_ZERO} bra END;
      GOT: mov.u32 %i, {SENTINEL:#x}; st.relaxed.sys.global{restore};
      END: }}"""


POLL_AND_CLEAR_BOTH = f"""{{ {_WAIT_REGISTERS} .reg .pred %p1; {_ZERO} mov.u32 $4, 0;
      setp.eq.u32 %p0, $6, 0; @%p0 bra END; setp.ne.u32 %p1, $8, 0; mov.u32 %n, 0;
      W: ld.relaxed.sys.global{_vector(4)}, [$5]; @%p1 ld.relaxed.sys.global.b32 $4, [$7];
      max.u32 %i, $0, $1; max.u32 %i, %i, $2; max.u32 %i, %i, $3; max.u32 %i, %i, $4; setp.ne.u32 %p0, %i, {SENTINEL:#x};
      {_waiting("GOT", "$9", "$10", "$11")} {_ZERO} mov.u32 $4, 0; bra END;
      GOT: mov.u32 %i, {SENTINEL:#x}; st.relaxed.sys.global.v4.b32 [$5], {{%i, %i, %i, %i}};
      @%p1 st.relaxed.sys.global.b32 [$7], %i;
      END: }}"""
"""Polls a packet of four words and a single word elsewhere, until no word of both is the sentinel; then puts it back."""

SEND_COUNT = """{ .reg .pred %p0; .reg .b128 %q; .reg .b64 %lo, %hi; setp.ne.u32 %p0, $6, 0; mov.u32 $0, 0;
      mov.b64 %lo, {$2, $3}; mov.b64 %hi, {$4, $5}; mov.b128 %q, {%lo, %hi}; @%p0 st.relaxed.sys.global.b128 [$1], %q; }"""


def await_count(clock: str = "") -> str:
    """Polls a count packet until it is that of the step. `clock`: the number of a further output, the clock at the last poll."""
    first = 2 + bool(clock)
    packet, mask, step, generation, control, blame = (f"${first + place}" for place in range(6))
    read_clock = f"mov.u64 {clock}, %clock64;" if clock else ""
    return f"""{{ {_WAIT_REGISTERS} .reg .pred %p1; .reg .b128 %q; .reg .b64 %lo, %hi; .reg .u32 %s, %g;
      mov.u32 $0, 0; mov.u32 $1, 0; {read_clock} setp.eq.u32 %p0, {mask}, 0; @%p0 bra END; mov.u32 %n, 0;
      W: ld.relaxed.sys.global.b128 %q, [{packet}]; mov.b128 {{%lo, %hi}}, %q; mov.b64 {{%s, %g}}, %hi; {read_clock}
      setp.eq.u32 %p0, %s, {step}; setp.eq.u32 %p1, %g, {generation}; and.pred %p0, %p0, %p1;
      {_waiting("GOT", control, blame, f"{packet} + 8")} bra END;
      GOT: mov.b64 {{$0, $1}}, %lo;
      END: }}"""


SIGNAL = """{ .reg .pred %p0; .reg .b64 %v; setp.ne.u32 %p0, $4, 0; mov.b64 %v, {$3, $2}; mov.u32 $0, 0;
      @%p0 st.release.sys.global.b64 [$1], %v; }"""


def await_signal(clock: str = "") -> str:
    """Polls a flag until it has the epoch. `clock`: as in `await_count`."""
    first = 1 + bool(clock)
    flag, mask, epoch, units, control, blame, hint = (f"${first + place}" for place in range(7))
    read_clock = f"mov.u64 {clock}, %clock64;" if clock else ""
    return f"""{{ {_WAIT_REGISTERS} .reg .pred %p1; .reg .b64 %v; .reg .u32 %u, %e; mov.u32 $0, 0; {read_clock}
      setp.eq.u32 %p0, {mask}, 0; @%p0 bra END; mov.u32 %n, 0;
      W: ld.acquire.sys.global.b64 %v, [{flag}]; mov.b64 {{%u, %e}}, %v; {read_clock}
      setp.eq.u32 %p0, %e, {epoch}; setp.ge.u32 %p1, %u, {units}; and.pred %p0, %p0, %p1;
      {_waiting("END", control, blame, hint)} END: }}"""


CLOCK = "mov.u64 $0, %clock64;"
GLOBAL_CLOCK = "mov.u64 $0, %globaltimer;"

NOTE_WAIT = """{ .reg .pred %p0; .reg .u32 %t; .reg .u64 %w; mov.u32 $0, 0; mov.u32 %t, %tid.x; setp.eq.u32 %p0, %t, 0;
      setp.ne.and.u32 %p0, $5, 0, %p0; mov.u64 %w, %clock64; sub.u64 %w, %w, $3;
      @%p0 red.relaxed.gpu.global.add.u64 [$1], %w; or.b64 %w, %w, $4; @%p0 st.global.u64 [$2], %w; }"""

TAKE_TICKET = f"""{{ .reg .pred %p0; .reg .u32 %t; mov.u32 %t, %tid.x; setp.eq.u32 %p0, %t, 0; mov.u64 $0, 0;
      @%p0 atom.relaxed.gpu.global.add.u64 $0, [$1 + {ROUND_OFFSET}], 1; }}"""

END_ROUND = f"""{{ .reg .pred %p0; .reg .u32 %t; .reg .u64 %w; mov.u32 %t, %tid.x; setp.eq.u32 %p0, %t, 0;
      cvt.u32.u64 %t, $2; add.u32 %t, %t, 1; setp.eq.and.u32 %p0, %t, $3, %p0;
      add.u32 %t, $4, 1; cvt.u64.u32 %w, %t; shl.b64 %w, %w, 32;
      @%p0 st.global.u64 [$1 + {ROUND_OFFSET}], %w; mov.u32 $0, 0; }}"""

MULTICAST_SUM = (
    f"{{ .reg .pred %p0; {_ZERO} setp.ne.u32 %p0, $5, 0; "
    "@%p0 multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {$0, $1, $2, $3}, [$4]; }"
)

RECIPROCAL = "rcp.approx.ftz.f32 $0, $1;"
PACK_BFLOAT16 = "cvt.rn.bf16x2.f32 $0, $1, $2;"
PACK_FLOAT16 = "cvt.rn.f16x2.f32 $0, $1, $2;"
PACK_FLOAT8 = (
    "{ .reg .b16 %l, %h; cvt.rn.satfinite.e4m3x2.f32 %l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 %h, $4, $3; mov.b32 $0, {%l, %h}; }"
)
UNPACK_FLOAT8 = (
    "{ .reg .b16 %l, %h; .reg .b32 %a, %b; mov.b32 {%l, %h}, $4; cvt.rn.f16x2.e4m3x2 %a, %l; cvt.rn.f16x2.e4m3x2 %b, %h; "
    "mov.b32 {%l, %h}, %a; cvt.f32.f16 $0, %l; cvt.f32.f16 $1, %h; "
    "mov.b32 {%l, %h}, %b; cvt.f32.f16 $2, %l; cvt.f32.f16 $3, %h; }"
)
UNPACK_FLOAT16 = "{ .reg .f16 %l, %h; mov.b32 {%l, %h}, $2; cvt.f32.f16 $0, %l; cvt.f32.f16 $1, %h; }"

UNPACK_MXFP4 = """{ .reg .b32 %s, %t, %u, %a, %b, %c, %d, %z; mov.b32 %z, 0x80008000; mul.lo.u32 %s, $9, 0x00800080;
      and.b32 %a, $8, 0x81C081C0;
      shl.b32 %t, $8, 3; and.b32 %b, %t, 0x81C081C0;
      shl.b32 %t, $8, 6; and.b32 %c, %t, 0x81C081C0;
      shl.b32 %t, $8, 1; shr.b32 %u, $8, 3; lop3.b32 %t, %t, %u, 0x81808180, 0x28;
      shr.b32 %u, $8, 7; lop3.b32 %d, %u, 0x00400040, %t, 0xEA;
      fma.rn.bf16x2 %a, %a, %s, %z; fma.rn.bf16x2 %b, %b, %s, %z; fma.rn.bf16x2 %c, %c, %s, %z; fma.rn.bf16x2 %d, %d, %s, %z;
      mov.b32 {$0, $1}, %a; mov.b32 {$2, $3}, %b; mov.b32 {$4, $5}, %c; mov.b32 {$6, $7}, %d; }"""

SAME_FOR_ALL = "redux.sync.or.b32 $0, $1, 0xFFFFFFFF;"

UNCHANGED = "mov.b32 $0, $1;"
