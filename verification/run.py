"""Runs the protocol models through SPIN: `python verification/run.py [--long] [NAME ...]`. Needs `spin` and `gcc`.

Every variant is either claimed to hold, and then SPIN explores all its states without an error, or has a bug put into it,
and then SPIN must find that bug. Exploration is breadth first, so that a trace is the shortest that there is; the largest
variants go depth first, which needs a quarter of the memory.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parent
DEADLOCK = "invalid end state"


@dataclass(frozen=True)
class Variant:
    """One way to run a model. `finds` is what SPIN must say, or empty: no error."""

    name: str
    model: str
    defines: str = ""
    finds: str = ""
    is_long: bool = False
    ends: bool = False
    """The model's processes end (it checks for itself that they do)."""


@dataclass(frozen=True)
class Result:
    """What SPIN said."""

    error: str
    states: int
    depth: int
    seconds: float

    def is_as_wanted(self, variant: Variant) -> bool:
        """Whether all states were explored without an error, or the bug was found."""
        return self.states > 0 and (variant.finds in self.error if variant.finds else not self.error)


VARIANTS = (
    Variant("slots-2-ranks", "slots", "N=2 ROUNDS=3"),
    Variant("slots-2-ranks-2-words", "slots", "N=2 WORDS=2"),
    Variant("slots-2-ranks-packets", "slots", "N=2 WORDS=2 PACKET"),
    Variant("slots-3-ranks", "slots", "N=3 EPOCHS=4 LATE_RESTORES", is_long=True),
    Variant("bug-one-count-parity", "slots", "N=2 ONE_COUNT_PARITY", finds="overwrote_unread_count"),
    Variant("bug-dispatch-without-combine", "slots", "N=2 ROUNDS=3 NO_COMBINE", finds="overwrote_unread_slot"),
    Variant("bug-zero-rows-skipped", "slots", "N=2 ROUNDS=3 SKIP_ZERO_ROWS", finds="overwrote_unread_slot"),
    Variant("bug-combine-sends-before-dispatch-is-over", "slots", "N=2 ROUNDS=3 EARLY_COMBINE", finds="overwrote_unread_slot"),
    Variant("bug-restore-without-order", "slots", "N=2 UNORDERED_RESTORE", finds=DEADLOCK),
    Variant("bug-torn-packet", "slots", "N=2 WORDS=2 PACKET TORN_POLL", finds="read_stale_row"),
    Variant("bulk-2-ranks", "bulk", "N=2"),
    Variant("bulk-3-ranks-one-empty", "bulk", "N=3 ROUNDS=1 EPOCHS=2 ALWAYS=2 NEVER=4", is_long=True),
    Variant("bulk-3-ranks-two-full", "bulk", "N=3 ROUNDS=1 EPOCHS=2 ALWAYS=3", is_long=True),
    Variant("bulk-dispatch-2-ranks", "bulk", "N=2 COMBINE_IN_SLOTS"),
    Variant("bulk-dispatch-3-ranks-one-empty", "bulk", "N=3 ROUNDS=1 EPOCHS=2 ALWAYS=2 NEVER=4 COMBINE_IN_SLOTS", is_long=True),
    Variant("bug-bulk-dispatch-does-not-count", "bulk", "N=2 COMBINE_IN_SLOTS UNCOUNTED_ROUNDS", finds="read_stale_row"),
    Variant("bug-rounds-in-slots-count", "bulk", "N=2 COUNTED_IN_SLOTS=3", finds="read_stale_row"),
    Variant("bug-signal-without-release", "bulk", "N=2 UNORDERED_SIGNAL", finds="read_stale_row"),
    Variant("bug-terms-written-after-the-step", "bulk", "N=2 WRITE_AFTER_STEP", finds="read_stale_row"),
    Variant("split-rounds", "split"),
    Variant("split-rounds-never", "split", "NEVER"),
    Variant("bug-split-rounds-without-room", "split", "ROOM=2", finds=DEADLOCK),
    Variant("bug-whole-rounds-without-room", "split", "NEVER ROOM=2", finds=DEADLOCK),
    Variant("abort-2-ranks", "abort", "N=2", ends=True),
    Variant("abort-3-ranks-one-operation", "abort", "N=3 PHASES=1", ends=True),
    Variant("abort-3-ranks", "abort", "N=3", is_long=True, ends=True),
    Variant("bug-no-agreement-on-the-record", "abort", "N=3 NO_SETTLING", finds="named_different_ranks", ends=True),
    Variant("bug-buffers-used-again-after-reset", "abort", "N=3 PHASES=1 REUSED_BUFFERS", finds="read_stale_row", ends=True),
    Variant("bug-one-clock", "abort", "N=3 PHASES=1 ONE_CLOCK", finds="nobody_waits_for_ever", ends=True),
    Variant("busy-3-ranks-one-operation", "busy", "OPERATIONS=1", ends=True),
    Variant("busy-3-ranks", "busy", is_long=True, ends=True),
    Variant("bug-signs-of-the-awaited-rank-alone", "busy", "PER_SOURCE", finds="gave_up_beside_a_busy_rank", ends=True),
    Variant("bug-signs-to-one-peer-alone", "busy", "FIRST_PEER_ALONE", finds="gave_up_beside_a_busy_rank", ends=True),
    Variant("bug-signs-need-no-renewal", "busy", "NOT_RENEWED", finds="waited_without_a_sign", ends=True),
    Variant("bug-signs-count-for-ever", "busy", "NO_BOUND", finds="waited_too_long", ends=True),
)


def missing_tools() -> list[str]:
    """What has to be installed first."""
    return [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]


def check(variant: Variant, timeout_s: float = 900.0) -> Result:
    """Translates, compiles and explores one variant."""
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
            if done.returncode and not done.stdout.startswith("pan:"):
                raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
            return done.stdout

        shutil.copy(MODELS / f"{variant.model}.pml", folder)
        run("spin", "-a", *(f"-D{define}" for define in variant.defines.split()), f"{variant.model}.pml")
        search = [] if variant.is_long else ["-DBFS"]
        run("gcc", "-O1", "-w", "-DSAFETY", *search, "-DCOLLAPSE", "-DMEMLIM=8000", "-o", "pan", "pan.c")
        started = time.monotonic()
        said = run("./pan", "-w24", *(["-m20000000"] if variant.is_long else []), *(["-E"] if variant.ends else []))
    return parse(said, time.monotonic() - started)


def parse(said: str, seconds: float) -> Result:
    """Reads pan's report. A search that was cut short (depth, memory) is an error too."""
    error = re.search(r"^pan:\d+: (.*?)(?: \(at depth \d+\))?$|^error: (.*)$", said, re.MULTILINE)
    states = re.search(r"^\s*([\d.e+]+) states, stored", said, re.MULTILINE)
    depth = re.search(r"depth reached (\d+)", said)
    if "Search not completed" in said and not error:
        return Result("search not completed", 0, 0, seconds)
    return Result(
        error=(error.group(1) or error.group(2)) if error else "",
        states=int(float(states.group(1))) if states else 0,
        depth=int(depth.group(1)) if depth else 0,
        seconds=seconds,
    )


def main() -> int:
    """Prints a table; the exit status tells whether all is as wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="variants to run; all by default")
    parser.add_argument("--long", action="store_true", help="also those that take minutes")
    options = parser.parse_args()
    if missing := missing_tools():
        print(f"not run: {' and '.join(missing)} not installed (Debian: apt-get install spin gcc)", file=sys.stderr)
        return 2
    print(f"{'variant':48} {'states':>12} {'depth':>6} {'s':>6}  result")
    wrong = 0
    for variant in VARIANTS:
        if variant.name not in options.names if options.names else variant.is_long and not options.long:
            continue
        result = check(variant)
        good = result.is_as_wanted(variant)
        wrong += not good
        found = (f"found: {result.error}" if result.error else "no error") + ("" if good else "  <-- WRONG")
        print(f"{variant.name:48} {result.states:12,} {result.depth:6} {result.seconds:6.1f}  {found}")
        sys.stdout.flush()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
