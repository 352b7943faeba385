"""Clocks, and the waits that are timed by them: a part of `wire`, with the same two forms, for kernels with telemetry."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire, wire_ptx

_AWAIT_COUNT: tl.constexpr = tl.constexpr(wire_ptx.await_count(clock="$2"))
_AWAIT_SIGNAL: tl.constexpr = tl.constexpr(wire_ptx.await_signal(clock="$1"))
_CLOCK: tl.constexpr = tl.constexpr(wire_ptx.CLOCK)
_GLOBAL_CLOCK: tl.constexpr = tl.constexpr(wire_ptx.GLOBAL_CLOCK)
_NOTE_WAIT: tl.constexpr = tl.constexpr(wire_ptx.NOTE_WAIT)

if not wire.INTERPRETED:

    @triton.jit
    def clock():
        """This SM's clock, in cycles; in the interpreter, in nanoseconds."""
        return tl.inline_asm_elementwise(_CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def global_clock():
        """Nanoseconds since 1970, in steps of up to a microsecond: to align what different SMs and ranks have seen."""
        return tl.inline_asm_elementwise(_GLOBAL_CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)

    @triton.jit
    def note_wait(total_ptr, kept_ptr, since, stamp, is_noted):
        """Adds the time since `since` to the int64 at `total_ptr`, and writes it with `stamp` to `kept_ptr`, if `is_noted`: as
        the program's first thread has seen it. Nobody waits for either."""
        tl.inline_asm_elementwise(
            _NOTE_WAIT,
            "=r,l,l,l,l,r",
            [total_ptr, kept_ptr, since, stamp, is_noted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def await_count(address, mask, step, generation, control_ptr, blamed):
        """`wire.await_count`, and the clock at each element's last poll. An element that comes early must not be charged with the
        wait of its warp's last one, so that the clock is read within the loop."""
        return tl.inline_asm_elementwise(
            _AWAIT_COUNT,
            "=&r,=&r,=&l,l,r,r,r,l,l",
            [address, mask.to(tl.int32), step, generation, control_ptr, blamed],
            dtype=(tl.int32, tl.int32, tl.int64),
            is_pure=False,
            pack=1,
        )

    @triton.jit
    def await_signal(address, epoch, units, mask, control_ptr, blamed, hint):
        """`wire.await_signal`; returns the clock at each element's last poll."""
        _, clocks = tl.inline_asm_elementwise(
            _AWAIT_SIGNAL,
            "=&r,=&l,l,r,r,r,l,l,l",
            [address, mask.to(tl.int32), epoch, units, control_ptr, blamed, hint],
            dtype=(tl.int32, tl.int64),
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()
        return clocks

else:
    from tokenferry.kernels.wire_clock_interpreter import (  # noqa: F401  # the names that are defined above
        await_count,
        await_signal,
        clock,
        global_clock,
        note_wait,
    )
