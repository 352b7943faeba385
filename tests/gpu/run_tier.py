"""Runs the GPU tests a file at a time, each within its own time, and says in a line a file how it went.

    python tests/gpu/run_tier.py LOGS [--files test_layer.py ...] [--limit-s 300] [--budget-s 570] [-- pytest's options]

LOGS is a folder, made if needed: `test_x.log` is what pytest printed for a file, `test_x.xml` its results, and `summary.txt`
holds the table.
Neither the package nor pytest-timeout need be installed. Exit code 0: nothing failed, and every file ran to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GRACE_S = 20.0
"""From the interrupt, after which pytest still writes its results and ends its rank processes, to the kill."""


@dataclass(frozen=True)
class Outcome:
    """What became of one file. `note` is empty if it ran to its end."""

    file: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    failures: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        return not self.failed and not self.note

    def __str__(self) -> str:
        counts = f"{self.passed:4} passed {self.failed:3} failed {self.skipped:3} skipped {self.seconds:6.1f} s"
        return f"{self.file:28} {counts}  {self.note}".rstrip()


def run_file(path: Path, logs: Path, limit_s: float, options: Sequence[str]) -> Outcome:
    """One pytest over one file, interrupted after `limit_s`."""
    results = logs / f"{path.stem}.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={results}", str(path), *options]
    places = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONUNBUFFERED": "1"}
    start_s, note = time.monotonic(), ""
    with open(logs / f"{path.stem}.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            note = "" if code in (0, 1, 5) else f"pytest ended with code {code}"  # 5: it found no test to run
        except subprocess.TimeoutExpired:
            note = f"not finished within {limit_s:.0f} s{under_way(Path(log.name))}"
            process.send_signal(signal.SIGINT)  # to pytest alone, which ends its ranks
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outcome(path.name, results, time.monotonic() - start_s, note)


def under_way(log: Path) -> str:
    """The test whose result pytest has not written behind its name yet."""
    last = log.read_text(errors="replace").rstrip().rsplit("\n", 1)[-1].rstrip()
    return f", in {last.rpartition('::')[2]}" if "::" in last and " " not in last else ""


def outcome(file: str, results: Path, seconds: float, note: str) -> Outcome:
    """Counts what pytest wrote. A test whose set-up and end both failed counts once; an interrupted one has no name there."""
    try:
        cases = ElementTree.parse(results).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError):
        return Outcome(file, seconds=seconds, note=note or "no results")
    kinds: dict[str, set[str]] = {}
    for case in cases:
        if name := case.get("name"):
            kinds.setdefault(name, set()).update(child.tag for child in case)
    failures = tuple(name for name, tags in kinds.items() if tags & {"failure", "error"})
    skipped = sum("skipped" in tags and not tags & {"failure", "error"} for tags in kinds.values())
    passed = len(kinds) - len(failures) - skipped
    return Outcome(file, passed, len(failures), skipped, seconds, note, failures)


def main(arguments: Sequence[str]) -> int:
    own, options = arguments, list[str]()
    if "--" in arguments:
        place = arguments.index("--")
        own, options = arguments[:place], list(arguments[place + 1 :])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, help="folder for logs and results")
    parser.add_argument("--files", nargs="+", default=None, help="names in tests/gpu; default all")
    parser.add_argument("--limit-s", type=float, default=300.0, help="for one file")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="for all; files that do not fit are not run")
    chosen = parser.parse_args(own)
    paths = sorted(HERE.glob("test_*.py")) if chosen.files is None else [HERE / Path(name).name for name in chosen.files]
    if missing := [path.name for path in paths if not path.exists()]:
        parser.error(f"no such file in tests/gpu: {', '.join(missing)}")
    chosen.logs.mkdir(parents=True, exist_ok=True)
    start_s, outcomes = time.monotonic(), []
    for path in paths:
        left_s = chosen.budget_s - (time.monotonic() - start_s) - GRACE_S
        if left_s < GRACE_S:
            outcomes.append(Outcome(path.name, note="not run: the time was up"))
            continue
        outcomes.append(run_file(path, chosen.logs.resolve(), min(chosen.limit_s, left_s), options))
        print(f"... {outcomes[-1]}", flush=True)
        for name in outcomes[-1].failures:
            print(f"      FAILED {name}", flush=True)
    total = Outcome(
        "all",
        *(sum(getattr(each, name) for each in outcomes) for name in ("passed", "failed", "skipped")),
        seconds=time.monotonic() - start_s,
    )
    table = "\n".join(map(str, (*outcomes, total)))
    (chosen.logs / "summary.txt").write_text(table + "\n")
    print("\n" + table, flush=True)
    return 0 if all(each.is_right for each in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
