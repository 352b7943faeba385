"""`benchmarks/publish.py` on CPUs: every part makes its record, and one that overruns its time is stopped and says so."""

import datetime
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "publish.py"
ENDS = "| part | how it ended |"


def publish(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=os.environ | env)


def ends(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """How each part ended, by the last lines of the output."""
    _, _, last = done.stdout.partition(ENDS)
    rows = [line.strip("| ").split(" | ") for line in last.splitlines()[2:]]
    return {name: how for name, how in rows}


def processes_with(mark: str) -> list[str]:
    """Numbers of processes that have it in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(("kernels", "layer"), id="layer"),
        pytest.param(("round-trips", "formats", "telemetry"), id="exchange", marks=[pytest.mark.interpreter, pytest.mark.long]),
    ],
)
def test_a_rehearsal_makes_every_call_and_leaves_a_record_of_each_part(parts: tuple[str, ...], tmp_path: Path) -> None:
    done = publish(tmp_path, "--rehearse", "--parts", ",".join(parts), "--commit", "abcdef0")
    assert done.returncode == 0, done.stderr + done.stdout
    assert {name: how.split()[0] for name, how in ends(done).items()} == dict.fromkeys(parts, "took")
    written = {path.name.split("-", 4)[4]: path for path in tmp_path.iterdir()}
    assert set(written) == {f"{part}.jsonl" for part in parts if part != "kernels"}
    for path in written.values():
        assert path.name.startswith("2xCPU-2")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert {record["commit"] for record in records} == {"abcdef0"}


@pytest.mark.ranks
def test_a_part_that_leaves_points_out_says_so(tmp_path: Path) -> None:
    """All of the time is kept for the last point here."""
    done = publish(tmp_path, "--rehearse", "--parts", "layer", "--budget-s", "45")
    assert done.returncode == 1
    assert ends(done)["layer"].endswith("; 6 points left out")


def test_parts_for_which_no_time_is_left_are_not_begun(tmp_path: Path) -> None:
    done = publish(tmp_path, "--rehearse", "--budget-s", "0", "--parts", "telemetry,formats")
    assert done.returncode == 1
    assert ends(done) == dict.fromkeys(("formats", "telemetry"), "not begun, since the budget is spent")


@pytest.mark.ranks
@pytest.mark.interpreter
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked for in /proc")
def test_a_part_that_overruns_its_time_is_stopped_with_all_of_its_processes(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    done = publish(tmp_path, "--rehearse", "--parts", "telemetry", "--budget-s", "6", PUBLISH_TEST=mark)
    assert done.returncode == 1
    assert ends(done)["telemetry"].startswith("stopped after 6 s")
    assert processes_with(mark) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", "layers"], "a part is one of kernels, round-trips, formats, layer, telemetry; got 'layers'"),
        (["--parts", "layer", "--rehearse"], "there is a record already"),
        pytest.param(
            ["--commit", "abcdef0"],
            "needs 2 CUDA GPUs, found 0; give --rehearse",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here"),
        ),
    ],
    ids=["no such part", "a record is there", "no GPUs"],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(options: list[str], said: str, tmp_path: Path) -> None:
    today = datetime.datetime.now(datetime.UTC).date()
    kept = [tmp_path / f"2xCPU-{today + datetime.timedelta(days)}-layer.jsonl" for days in (0, 1)]  # it may run over midnight
    for path in kept:
        path.write_text("kept")
    done = publish(tmp_path, *options)
    assert done.returncode == 1
    assert said in done.stderr
    assert [path.read_text() for path in kept] == ["kept", "kept"]
