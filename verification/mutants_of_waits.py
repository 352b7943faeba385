"""Seeded changes of how long ranks wait for one another."""

from __future__ import annotations

from verification.mutant import Mutant

ORDER = "tests/test_kernel_order.py::"
BUSY = "test_a_busy_rank_is_waited_for_as_long_as_it_gives_signs_of_life"
INTERPRETED, GLOO = f"tests/interpreter/test_busy.py::{BUSY}", f"tests/ranks/test_busy.py::{BUSY}"
TELEMETRY = "tests/interpreter/test_telemetry.py::"
_KERNELS = "src/tokenferry/kernels"
_TRANSPORTS = "src/tokenferry/transports"

OF_WAITS = (
    Mutant(
        "kernels-take-no-notice-of-signs-of-life",
        f"{_KERNELS}/wire_interpreter.py",
        "since = now if signs != before else since",
        "since = since if signs != before else since",
        (f"{INTERPRETED}[busy-before-a-step]",),
    ),
    Mutant(
        "signs-of-life-count-for-ever-in-kernels",
        f"{_KERNELS}/wire_interpreter.py",
        "if now - since >= timeout or now - begin >= longest:",
        "if now - since >= timeout:",
        (f"{INTERPRETED}[busy-without-end]",),
    ),
    Mutant(
        "signs-of-life-count-for-ever-on-hosts",
        f"{_TRANSPORTS}/busy.py",
        " or now_s - started_s > max(timeout_s, self._longest_s)",
        "",
        ("tests/test_watchdog.py::test_signs_of_life_do_not_put_off_the_end_for_ever",),
    ),
    Mutant(
        "a-busy-rank-gives-one-sign",
        f"{_TRANSPORTS}/busy.py",
        "            stopped.wait(min(LONGEST_PERIOD_S, workspace.timeout_s / _PERIODS_PER_TIMEOUT))\n",
        "            stopped.wait()\n",
        (f"{GLOO}[busy-before-a-step]",),
    ),
    Mutant(
        "a-busy-rank-counts-until-it-says-otherwise",
        f"{_TRANSPORTS}/busy.py",
        "            if num_signs > self._seen:\n",
        "            if num_signs:\n",
        (f"{GLOO}[stopped-while-busy]",),
    ),
    Mutant(
        "gloo-waits-keep-the-limit-they-began-with",
        f"{_TRANSPORTS}/collective/transport.py",
        "        self._communicator.timeout_s = timeout_s\n",
        "        return\n",
        (f"{GLOO}[limit-is-raised-amid-a-wait]",),
    ),
    Mutant(
        "kernels-read-their-limit-in-the-cache",
        f"{_KERNELS}/wire_ptx.py",
        "ld.relaxed.sys.global.v2.u32 {{%i, %longest}}",
        "ld.global.v2.u32 {{%i, %longest}}",
        (f"{ORDER}test_whatever_waits_for_a_peer_looks_at_the_control_block_past_the_caches[dispatch-90]",),
    ),
    Mutant(
        "numbers-are-counted-behind-flags-that-nobody-waits-for",
        f"{_KERNELS}/round_loads.py",
        "tl.minimum(blocks, programs)",
        "programs",
        (f"{TELEMETRY}test_programs_share_out_the_numbers",),
    ),
    Mutant(
        "numbers-are-counted-by-programs-that-only-send",
        f"{_KERNELS}/combine.py",
        "counts_here & sums & (is_bulk == 0)",
        "counts_here & (is_bulk == 0)",
        (f"{TELEMETRY}test_numbers_of_somebody_elses_experts_are_counted[p2p-split]",),
    ),
    Mutant(
        "numbers-beside-rows-of-bytes-are-left-to-the-combine",
        f"{_TRANSPORTS}/symmetric/rank_kernels.py",
        "self._layout.dispatch_slot_rows < self._layout.slot_rows",
        "False",
        ("tests/test_symmetric_layout.py::test_a_combine_counts_numbers_unless_the_dispatch_alone_is_bulk",),
    ),
    Mutant(
        "terms-are-taken-for-as-many-as-rows",
        "src/tokenferry/telemetry/snapshot.py",
        "num_term_bytes=(rows[rank] * term_bytes,) * size",
        "num_term_bytes=tuple(number * term_bytes for number in rows)",
        ("tests/test_telemetry.py::test_what_is_noted_is_what_is_read",),
    ),
)
"""Of time-outs, and of what busy ranks do to them."""
