"""`tokenferry.benchmarking` as a program uses it, on CPUs: round trips of every kind, and the program of docs/benchmarking.md."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import tokenferry as tf
from tokenferry import benchmarking
from tokenferry.benchmarking import round_trip
from tokenferry.errors import ConfigError, DeviceError, RankFailedError
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


def append_line(path: Path, text: str) -> None:
    """A callable for progress: rank 0 calls it in a process of its own, so that it must be picklable."""
    with path.open("a") as file:
        file.write(text + "\n")


def test_public_names_are_sorted_and_there() -> None:
    constants_first = sorted(benchmarking.__all__, key=lambda name: (not name.isupper(), name))
    assert benchmarking.__all__ == constants_first
    assert all(hasattr(benchmarking, name) for name in benchmarking.__all__)


def test_round_trips_are_compared_with_the_reference_and_told_as_they_come(tmp_path: Path) -> None:
    points = benchmarking.round_trip_points((16,), (1, 3), ("collective",), 2)
    told, output = partial(append_line, tmp_path / "progress"), tmp_path / "records.jsonl"
    records = benchmarking.run_round_trips(points, 2, device="cpu", output=output, commit="abc", progress=told)
    assert [(record["tokens"], record["combine_order"]) for record in records] == [
        ((1, 1), "rank"),
        ((3, 3), "rank"),
        ((1, 1), "any"),
        ((3, 3), "any"),
    ]
    assert all(record["correct"] and record["round_trip_us"] > 0 for record in records)
    assert [record["wire_bytes"] for record in records[:2]] == [1 * (32 + 64) + 1 * 32, 3 * (32 + 64) + 3 * 32]
    lines = (tmp_path / "progress").read_text().splitlines()
    assert lines[1] == "point 2 of 4: collective, C 3, hidden size 16, tokens 3x3"
    assert len(lines) == len(points)
    assert benchmarking.round_trip_table(records).count("  yes") == len(points)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [json.loads(json.dumps({**record, "commit": "abc"})) for record in records]


def fail_at_the_last(text: str) -> None:
    if text.startswith("point 4 of 4"):
        raise RuntimeError("cut off")


def test_records_are_written_as_they_come(tmp_path: Path) -> None:
    """A run that was cut off lost every point."""
    points, output = benchmarking.round_trip_points((16,), (1, 3), ("collective",), 2), tmp_path / "records.jsonl"
    with pytest.raises(RankFailedError, match="cut off"):
        benchmarking.run_round_trips(points, 2, device="cpu", output=output, progress=fail_at_the_last)
    assert [json.loads(line)["tokens"] for line in output.read_text().splitlines()] == [[1, 1], [3, 3], [1, 1]]


def test_a_transport_that_cannot_serve_is_a_record_of_its_own() -> None:
    points = benchmarking.round_trip_points((16,), (1,), ("local", "collective"), 2)
    records = benchmarking.run_round_trips(points, 2, device="cpu")
    assert records[0]["error"].startswith("TransportUnavailableError: ")
    assert records[-1]["correct"]


def test_usual_points_have_a_lonely_token_beside_a_full_rank() -> None:
    points = benchmarking.round_trip_points((64,), (1, 8), ("p2p", "collective"), 3)
    assert [(point.transport, point.tokens, point.capacity, point.combine_order) for point in points] == [
        ("p2p", (1, 1, 1), 1, "rank"),
        ("p2p", (8, 8, 8), 8, "rank"),
        ("p2p", (1, 8, 8), 8, "rank"),
        ("collective", (1, 1, 1), 1, "rank"),
        ("collective", (8, 8, 8), 8, "rank"),
        ("collective", (1, 1, 1), 1, "any"),
        ("collective", (8, 8, 8), 8, "any"),
    ]


def test_all_points_may_share_the_capacity_of_an_engine() -> None:
    points = benchmarking.round_trip_points((64,), (1, 8), ("p2p",), 2, capacity=4096)
    assert [(point.tokens, point.capacity) for point in points] == [((1, 1), 4096), ((8, 8), 4096), ((1, 8), 4096)]


def test_points_of_exact_capacity_may_stand_beside_them() -> None:
    """What the capacity is for, a step of as many tokens, is not measured twice."""
    points = benchmarking.round_trip_points((64,), (1, 8), ("p2p", "collective"), 2, capacity=8, exact_too=True)
    assert [(point.transport, point.tokens, point.capacity) for point in points] == [
        *[("p2p", tokens, 8) for tokens in ((1, 1), (8, 8), (1, 8))], ("p2p", (1, 1), 1),
        *[("collective", tokens, 8) for tokens in ((1, 1), (8, 8))] * 2,
    ]  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("debug", ["0", "1"], ids="debug-{}".format)
def test_points_that_differ_in_tokens_share_a_workspace(debug: str, tmp_path: Path) -> None:
    """In debug mode a combine poisons what was gathered, which is compared all the same."""
    points = benchmarking.round_trip_points((16,), (1, 3), ("p2p", "collective"), 2, capacity=4, exact_too=True)
    opened = tmp_path / "opened"
    env = {"TRITON_INTERPRET": "1", "TOKENFERRY_DEBUG": debug}
    [records, _] = run_ranks(in_counted_workspaces, 2, points, opened, timeout_s=200, env=env)
    assert [record["correct"] for record in records] == [True] * 10
    assert [record["capacity"] for record in records] == [4, 4, 4, 1, 3, 3, 4, 4, 4, 4]
    assert opened.read_text().splitlines() == ["p2p 4", "p2p 1", "p2p 3", "collective 4", "collective 4"]


def in_counted_workspaces(group: tf.EPGroup, points: list[benchmarking.RoundTripPoint], opened: Path) -> list[dict]:
    """The records of the points; rank 0 writes a line for each workspace that is opened."""
    really_opened = round_trip.opened

    def opened_and_told(group: tf.EPGroup, point: benchmarking.RoundTripPoint):
        if group.rank == 0:
            append_line(opened, f"{point.transport} {point.capacity}")
        return really_opened(group, point)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_trip, "opened", opened_and_told)
        return round_trip._measure_all(group, points, None)


def test_more_tokens_than_the_capacity_are_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match="capacity is 4, but a rank is to bring 8 tokens"):
        benchmarking.round_trip_points((64,), (1, 8), ("p2p",), 2, capacity=4)


def test_fewer_gpus_than_ranks_are_named_with_both_numbers() -> None:
    with pytest.raises(DeviceError, match=r"num_ranks is 99, but this machine has \d+ CUDA GPUs; .*device='cpu'"):
        benchmarking.run_round_trips([], 99)


def test_the_program_of_the_page_runs(tmp_path: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "benchmarking.md").read_text(), re.DOTALL)
    (tmp_path / "measure.py").write_text(program)
    done = subprocess.run([sys.executable, "measure.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^tiny +8 .* yes$", done.stdout, re.MULTILINE), done.stdout


def test_float8_terms_are_measured_and_compared() -> None:
    combine_formats = ("same", "fp8_block128", "fp8_block128-quantized")
    points = benchmarking.round_trip_points((256,), (3,), ("collective",), 2, combine_formats=combine_formats)
    records = benchmarking.run_round_trips([point for point in points if point.combine_order == "rank"], 2, device="cpu")
    assert all(record["correct"] for record in records)
    assert [(record["combine_format"], record["quantized_terms"]) for record in records] == [
        ("same", False),
        ("fp8_block128", False),
        ("fp8_block128", True),
    ]
    assert [record["wire_bytes"] for record in records] == [3 * (512 + 64 + each) for each in (512, 272, 272)]
    assert "fp8_block128-quantized" in benchmarking.round_trip_table(records)


def test_a_format_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="a combine format is one of same, fp8_block128, fp8_block128-quantized; got 'bytes'"):
        benchmarking.round_trip_points((256,), (3,), ("local",), 1, combine_formats=("bytes",))
    with pytest.raises(ConfigError, match=r"a dispatch format is one of same, fp8_block128, bytes, .*; got 'fp8'"):
        benchmarking.round_trip_points((256,), (3,), ("local",), 1, formats=("fp8",))


def test_formats_are_measured_and_compared_like_the_rows_themselves() -> None:
    formats = ("fp8_block128", "fp8_block128-quantized", "bytes")
    points = benchmarking.round_trip_points((256,), (3,), ("local",), 1, formats=formats)
    records = benchmarking.run_round_trips([point for point in points if point.tokens == (3,)], 1, device="cpu")
    assert {(record["dispatch_format"], record["quantized"]) for record in records} == {
        ("fp8_block128", False),
        ("fp8_block128", True),
        ("bytes", False),
    }
    assert all(record["correct"] for record in records)
    assert "fp8_block128-quantized" in benchmarking.round_trip_table(records)


REHEARSED = [
    ("p2p", (1, 1), "rank"),
    ("p2p", (8, 8), "rank"),
    ("p2p", (1, 8), "rank"),
    ("collective", (1, 1), "rank"),
    ("collective", (1, 1), "any"),
    ("collective", (8, 8), "rank"),
    ("collective", (8, 8), "any"),
]
"""Of each pair of formats."""


def rehearse(path: Path, *options: str) -> tuple[list[dict], list[str]]:
    """What `tokenferry bench roundtrip --rehearse` writes, and the lines of its table."""
    command = [sys.executable, "-m", "tokenferry.cli", "bench", "roundtrip", "--rehearse", "--output", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()], done.stdout.splitlines()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="same", marks=pytest.mark.long),
        pytest.param(("--format", "fp8_block128", "--combine-format", "fp8_block128-quantized"), id="fp8"),
        pytest.param(
            ("--format", "fp8_block128-quantized,bytes", "--combine-format", "fp8_block128"), id="others", marks=pytest.mark.long
        ),
    ],
)
def test_a_rehearsal_makes_every_call_and_check_and_tells_no_figures(options: tuple[str, ...], tmp_path: Path) -> None:
    records, lines = rehearse(tmp_path / "records", *options)
    times = 2 if "," in "".join(options) else 1
    assert sorted((r["transport"], tuple(r["tokens"]), r["combine_order"]) for r in records) == sorted(REHEARSED * times)
    assert all(record["correct"] for record in records)
    assert len(lines) == 1 + len(records)
    assert all(line.split()[-5:] == ["-", "-", "-", "-", "yes"] for line in lines[1:])


def test_the_line_of_parts_has_times_of_parts_alone() -> None:
    record = {"transport": "p2p", "what": "parts", "opened_s": 0.65, "begin_step_us": 1.97, "gpu": "NVIDIA H100", "at_s": 3.2}
    assert benchmarking.round_trip_table([record]).splitlines()[1:] == ["opened_s 0.65, begin_step_us 1.97"]
