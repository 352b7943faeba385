"""The script that runs the GPU tests file by file: what it counts, and that a file which hangs costs its own time alone."""

import subprocess
import time
from pathlib import Path

import pytest

from gpu.run_tier import Outcome, run_file
from patience import PATIENT_S, SLACK_S, once
from processes import of_this_process, once_gone

LIMIT_S = 2.0
MIXED = """
import pytest, subprocess, sys, time

def test_right(): pass

def test_wrong(): assert False, "as it should be"

@pytest.mark.skip(reason="no GPU")
def test_skipped(): pass

@pytest.mark.parametrize("name", ["a", "b"])
def test_both(name): pass
"""
HANGS = (
    MIXED
    + """
def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    time.sleep(300)
"""
)


def run(folder: Path, text: str, limit_s: float) -> Outcome:
    path = folder / "test_file.py"
    path.write_text(text)
    return run_file(path, folder, limit_s, ())


def test_passed_failed_and_skipped_are_counted(tmp_path: Path) -> None:
    got = run(tmp_path, MIXED, 60.0)
    assert (got.passed, got.failed, got.skipped, got.failures, got.note) == (3, 1, 1, ("test_wrong",), "")
    assert not got.is_right
    assert "as it should be" in (tmp_path / "test_file.log").read_text()


def test_a_file_that_hangs_is_ended_with_its_processes_and_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, start_s = of_this_process(), time.monotonic()
    waiting = subprocess.Popen.wait

    def once_it_hangs(process: subprocess.Popen, timeout: float | None = None) -> int:
        """The time limit begins when the four tests before are over, however long pytest takes to start."""
        if timeout == LIMIT_S:
            once(lambda: "::test_hangs" in (tmp_path / "test_file.log").read_text())
        return waiting(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", once_it_hangs)
    got = run(tmp_path, HANGS, LIMIT_S)
    assert (got.passed, got.failed, got.skipped, got.note) == (3, 1, 1, "not finished within 2 s, in test_hangs")
    assert time.monotonic() - start_s < PATIENT_S
    assert not once_gone(lambda: {pid: each for pid, each in of_this_process().items() if pid not in earlier}, SLACK_S)


def test_a_file_that_cannot_be_read_is_not_right(tmp_path: Path) -> None:
    got = run(tmp_path, "import nothing_of_that_name", 60.0)
    assert not got.is_right
    assert str(got).startswith("test_file.py")
