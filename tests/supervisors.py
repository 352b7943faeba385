"""A supervisor in a session of its own, whose ranks make steps for ever; how it is ended, and what is then left."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import tokenferry as tf
from faults import CAPACITY, CONFIG, SHARED, Setting, one_step
from patience import SLACK_S
from processes import Process, of_session, once_gone

ENDS = (
    "ctrl-c-in-the-terminal",
    "ctrl-c-to-the-supervisor-alone",
    "supervisor-killed",
    "supervisor-killed-while-a-rank-is-stopped",
    "rank-killed",
)
IN_MAKE_TEST = ("rank-killed",)
EACH_END = [pytest.param(how, marks=() if how in IN_MAKE_TEST else pytest.mark.long) for how in ENDS]
"""Over gloo `make test` has them all, which is enough for the supervisor; interpreted kernels add what they hold."""
STEPS_BEFORE = 5
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from faults import Setting
from supervisors import make_steps
from tokenferry.testing import run_ranks
if __name__ == "__main__":
    setting = {setting!r}
    run_ranks(make_steps, 2, setting, {folder!r}, backend=setting.backend, timeout_s=150, env=dict(setting.env))
"""


@dataclass(frozen=True)
class End:
    """What came of it. `left` is what still lives after the time-out and some patience."""

    exit_code: int
    stderr: str
    left: tuple[Process, ...]
    left_in_shared_memory: tuple[str, ...]
    left_folders: tuple[str, ...]


def make_steps(group: tf.EPGroup, setting: Setting, folder: str) -> None:
    """Steps whose bits are checked, until somebody ends this process. Says when it is in the middle of them."""
    with tf.Workspace(
        CONFIG, group, max_tokens_per_rank=CAPACITY, transport=setting.transport, timeout_s=setting.timeout_s
    ) as ws:
        dispatchers = [ws.dispatcher() for _ in range(2)]
        for seed in itertools.count():
            assert one_step(ws, dispatchers, seed)
            if seed == STEPS_BEFORE:
                written = Path(folder, f"writing-{group.rank}")
                written.write_text(str(os.getpid()))
                written.rename(Path(folder, f"at-work-{group.rank}"))


def end_while_ranks_work(setting: Setting, how: str, folder: Path, start_s: float = 90.0) -> End:
    """Starts supervisor and ranks, waits until all ranks are at work, ends the run in the way `how` says."""
    # Not below `folder`: the fork server listens on a socket there, whose whole path may have 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="ends-"))
    script = folder / "supervisor.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), setting=setting, folder=str(folder)))
    before = shared_files()
    with (folder / "stderr").open("w") as stderr:
        supervisor = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "TMPDIR": str(temporary)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        ranks = wait_until_at_work(supervisor, folder, start_s)
        deadline_s = time.monotonic() + setting.timeout_s + SLACK_S
        send(how, supervisor.pid, ranks)
        try:
            exit_code = supervisor.wait(deadline_s - time.monotonic())
        except subprocess.TimeoutExpired:
            exit_code = 0  # which no end gives
        left = once_gone(lambda: of_session(supervisor.pid), deadline_s - time.monotonic())
    finally:
        for process in of_session(supervisor.pid).values():
            os.kill(process.pid, signal.SIGKILL)
        supervisor.wait(10)
        left_folders = tuple(sorted(path.name for path in temporary.glob("tokenferry-*")))
        shutil.rmtree(temporary)
    return End(
        exit_code,
        (folder / "stderr").read_text(),
        left,
        tuple(sorted(shared_files() - before)),
        left_folders,
    )


def shared_files() -> set[str]:
    return {name for name in os.listdir(SHARED) if name.startswith("tokenferry")}


def wait_until_at_work(supervisor: subprocess.Popen, folder: Path, limit_s: float) -> list[int]:
    """Process numbers of the ranks."""
    deadline = time.monotonic() + limit_s
    while len(files := sorted(folder.glob("at-work-*"))) < 2:
        said = (folder / "stderr").read_text()
        assert supervisor.poll() is None, f"the supervisor ended with {supervisor.returncode} before ranks worked:\n{said}"
        assert time.monotonic() < deadline, f"ranks are not at work after {limit_s} s:\n{said}"
        time.sleep(0.02)
    return [int(path.read_text()) for path in files]


def send(how: str, supervisor: int, ranks: list[int]) -> None:
    if how == "ctrl-c-in-the-terminal":
        os.killpg(supervisor, signal.SIGINT)
    elif how == "ctrl-c-to-the-supervisor-alone":
        os.kill(supervisor, signal.SIGINT)
    elif how.startswith("supervisor-killed"):
        if how.endswith("stopped"):
            os.kill(ranks[1], signal.SIGSTOP)
        os.kill(supervisor, signal.SIGKILL)
    else:
        os.kill(ranks[1], signal.SIGKILL)


def assert_ended(end: End, how: str) -> None:
    """In time, with one traceback at most, and nothing is left."""
    assert end.left == ()
    assert end.left_in_shared_memory == ()
    assert end.left_folders == ()
    last = end.stderr.strip().rpartition("\n")[2]
    if how.startswith("ctrl-c"):
        assert end.exit_code == -signal.SIGINT, end.stderr
        assert last == "KeyboardInterrupt"
        assert end.stderr.count("Traceback") == 1, end.stderr
    elif how.startswith("supervisor-killed"):
        assert end.exit_code == -signal.SIGKILL
        assert end.stderr == "", "ranks end in silence"
    else:
        assert end.exit_code == 1
        assert "RankFailedError" in end.stderr
        assert "killed by SIGKILL" in end.stderr or "rank 1" in last
