"""The supervisor of rank processes: who is blamed, when, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch_workers import (
    add_rank,
    die,
    fail_in_a_race,
    hang,
    leave,
    meet_through_store,
    read_environment,
    report,
)
from patience import PATIENT_S, SLACK_S, once
from tokenferry.errors import ConfigError, RankFailedError, UsageError
from tokenferry.supervisor import run_processes
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks


def test_results_come_back_in_rank_order():
    assert run_processes(add_rank, 3, (10,), timeout_s=30) == [(10, 3, 1), (11, 3, 1), (12, 3, 1)]


def test_ranks_meet_in_a_private_folder_that_is_removed():
    results = run_processes(meet_through_store, 2, timeout_s=30)
    assert [(total, mode) for total, mode, _ in results] == [(3, "700"), (3, "700")]
    assert not Path(results[0][2]).exists()


@pytest.mark.parametrize("num_runs", [3, pytest.param(20, marks=pytest.mark.long)])
def test_first_failure_is_blamed_every_time(num_runs):
    for attempt in range(num_runs):
        with pytest.raises(RankFailedError, match=f"rank {attempt % 3} says no") as failed:
            run_processes(fail_in_a_race, 3, (attempt % 3,), timeout_s=30)
        assert failed.value.rank == attempt % 3
        assert "ValueError" in failed.value.traceback


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda s: s.name)
def test_killed_rank_is_blamed_by_its_signal(signum):
    with pytest.raises(RankFailedError, match=f"killed by {signum.name}") as failed:
        run_processes(die, 3, (signum,), timeout_s=30)
    assert failed.value.rank == 1


@pytest.mark.alone
def test_deadline_names_the_stuck_ranks_and_shows_where_they_stand():
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=r"not finished within 3.0 s: ranks \[0, 2\] of 3") as failed:
        run_processes(hang, 3, ((0, 2),), timeout_s=3.0)
    assert time.monotonic() - start < 3.0 + SLACK_S
    assert failed.value.traceback.count("in hang") == 2


def test_rank_that_leaves_without_a_result_has_failed():
    with pytest.raises(RankFailedError, match=r"SystemExit: 3|exited with code 0 before it returned"):
        run_processes(leave, 2, timeout_s=30)


def test_environment_is_given_not_inherited_from_the_fork_server(monkeypatch):
    for value in ("first", "second"):
        monkeypatch.setenv("TOKENFERRY_TEST", value)
        assert run_processes(read_environment, 1, timeout_s=30)[0][0] == value
    assert run_processes(read_environment, 1, timeout_s=30, env={"TOKENFERRY_TEST": "over"})[0][0] == "over"


def test_messages_arrive_in_order_before_the_result():
    seen = []
    assert run_processes(report, 2, timeout_s=30, on_message=lambda rank, message: seen.append((rank, message))) == ["done"] * 2
    assert [message["step"] for rank, message in seen if rank == 1] == [0, 1, 2]
    assert len(seen) == 6


def test_an_error_in_on_message_ends_all_ranks():
    def fail(rank, message):
        raise LookupError("no such bar")

    with pytest.raises(LookupError, match="no such bar"):
        run_processes(report, 2, timeout_s=30, on_message=fail)


@pytest.mark.parametrize(("target", "world_size"), [(add_rank, 0), (lambda rank, world_size, store_path: None, 1)])
def test_wrong_use_raises_before_anything_starts(target, world_size, monkeypatch):
    # As in a program with a file; pytest-xdist's workers have none, like a notebook, from which a lambda travels by cloudpickle.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    with pytest.raises(ConfigError):
        run_processes(target, world_size, timeout_s=30)


SUPERVISOR = """
import sys
sys.path.insert(0, {tests!r})
from launch_workers import hold
from tokenferry.supervisor import run_processes
if __name__ == "__main__":
    run_processes(hold, 2, ({folder!r},), timeout_s=250, store_dir={folder!r})
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pids_in(folder):
    return [path.read_text() for path in folder.glob("pid?") if path.read_text()]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_no_orphan_when_the_supervisor_dies(tmp_path, signum):
    script = tmp_path / "supervisor.py"
    script.write_text(SUPERVISOR.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    supervisor = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.PIPE, text=True)
    once(lambda: len(pids_in(tmp_path)) == 2)
    pids = pids_in(tmp_path)
    # Ctrl-C reaches the whole foreground group, the ranks too; the other signals reach the supervisor only.
    os.killpg(supervisor.pid, signum) if signum == signal.SIGINT else os.kill(supervisor.pid, signum)
    _, stderr = supervisor.communicate(timeout=PATIENT_S)
    once(lambda: not any(alive(pid) for pid in pids))
    assert not list(tmp_path.glob("tokenferry-*"))
    assert stderr.count("KeyboardInterrupt") == (1 if signum == signal.SIGINT else 0)


TYPED = """
from tokenferry.supervisor import run_processes
def worker(rank, world_size, store): return rank
if __name__ == "__main__": run_processes(worker, 1, timeout_s=20)
"""


@pytest.mark.parametrize("way", ["standard-input", "command-line"])
def test_program_without_a_file_is_told_to_have_one(way):
    without = "import sys\nsys.modules['cloudpickle'] = None\n" + TYPED  # as if it were not installed
    command, text = ([sys.executable, "-"], TYPED) if way == "standard-input" else ([sys.executable, "-c", without], None)
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert "this one has no file; save it as a .py file" in ended.stderr.strip().splitlines()[-1]


DEFINED_HERE = """
import tokenferry as tf
from tokenferry.testing import run_ranks
class Scale:
    def __init__(self, factor): self.factor = factor
def times(scale, value): return scale.factor * value
def worker(group, scale): return times(scale, group.rank)
print(run_ranks(worker, 2, Scale(3)), run_ranks(lambda group: group.size, 2))
"""


@pytest.mark.ranks
def test_functions_and_classes_of_a_program_without_a_file_travel_by_cloudpickle():
    pytest.importorskip("cloudpickle", reason="cloudpickle is not installed")
    ended = subprocess.run([sys.executable, "-c", DEFINED_HERE], capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "[0, 3] [2, 2]", ended.stderr


# --- programs that rank processes cannot serve, told at once -----------------------------------------------------------------

PROGRAM = """
from tokenferry.testing import run_ranks

def worker(group):
    return {result}

def outer():
    def inner(group):
        return 0
    return inner

{start}
"""
GUARDED = 'if __name__ == "__main__":\n    print(run_ranks({what}, 2, timeout_s=20.0))'
PROGRAMS = {
    "no-guard": ("group.rank", "print(run_ranks(worker, 2))", r"ConfigError: line \d+ of .*program\.py starts .* `if __name__"),
    "a-lambda": ("0", GUARDED.format(what="lambda group: 0"), "ConfigError: .*no lambda and none within another"),
    "a-function-within-another": ("0", GUARDED.format(what="outer()"), "ConfigError: .*no lambda and none within another"),
    "no-function": ("0", GUARDED.format(what="3"), "UsageError: worker must be"),
    "an-unpicklable-result": ("open(__file__)", GUARDED.format(what="worker"), "UsageError: a rank's result .* TextIOWrapper"),
    "a-generator-as-result": ("(i for i in ())", GUARDED.format(what="worker"), "UsageError: a rank's result .* generator"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_rank_processes_cannot_serve_is_told_so_in_a_line(name: str, tmp_path: Path) -> None:
    result, start, said = PROGRAMS[name]
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(result=result, start=start))
    begun = time.monotonic()
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.search(said, done.stderr), done.stderr
    assert "bootstrapping" not in done.stderr, "Python's own page about it"
    assert time.monotonic() - begun < PATIENT_S / 2


@pytest.mark.ranks
def test_a_guard_within_another_statement_is_one(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    start = 'try:\n    if __name__ == "__main__":\n        print(run_ranks(worker, 2))\nfinally:\n    pass'
    path.write_text(PROGRAM.format(result="group.rank", start=start))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[0, 1]", done.stderr


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "start", "how"),
    [
        ("program.py", '__name__ == "__main__" and print(run_ranks(worker, 2))', ["program.py"]),
        ("pkg/__main__.py", "print(run_ranks(work.worker, 2))", ["-m", "pkg"]),
    ],
    ids=["a-condition", "a-package"],
)
def test_other_programs_that_rank_processes_can_import_run(name: str, start: str, how: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(("from pkg import work\n" if "pkg" in name else "") + PROGRAM.format(result="group.rank", start=start))
    (path.parent / "work.py").write_text("def worker(group):\n    return group.rank\n")
    done = subprocess.run([sys.executable, *how], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "[0, 1]", done.stderr


def test_run_ranks_is_refused_under_torchrun_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=r"RANK=1 and WORLD_SIZE=2 .*EPGroup\(torch\.distributed\.group\.WORLD\)"):
        run_ranks(print, 2)
