"""`benchmarks/goals.py`: which goals the records of a run reach."""

import json
import subprocess
import sys
from pathlib import Path

import published

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(*paths: Path) -> dict[str, tuple[str, str]]:
    """What is reached and what is missed, by goal."""
    command = [sys.executable, str(ROOT / "benchmarks" / "goals.py"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert {row[-1] for row in rows} <= {path.name for path in paths}
    return {goal: (reached, missed) for goal, reached, missed, _ in rows}


def written(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def trip(us: float, size: int, *tokens: int, capacity: int = 4096, **formats: object) -> dict:
    return {"transport": "p2p", "hidden_size": size, "tokens": tokens, "capacity": capacity, "round_trip_us": us, **formats}


def test_round_trips_are_held_against_goals_and_against_workspaces_of_exact_capacity(tmp_path: Path) -> None:
    records = [
        {"transport": "p2p", "what": "parts"},
        trip(4.6, 7168, 1, 1), trip(7.4, 7168, 32, 32), trip(17.0, 2048, 512, 512), trip(300.0, 7168, 4096, 4096),
        trip(391.0, 7168, 1, 4096),
        trip(4.5, 7168, 1, 1, capacity=1), trip(6.9, 7168, 32, 32, capacity=32), trip(16.0, 2048, 512, 512, capacity=512),
        {**trip(30.0, 7168, 1, 1), "transport": "collective"}, {**trip(0, 2048, 1, 1), "round_trip_us": 4.3},
    ]  # fmt: skip
    assert table(written(tmp_path / "run-round-trips.jsonl", *records)) == {
        "round trip, C = 4096": ("3 of 5", "H 2048, T 512: 17, goal 16; H 7168, T 32: 7.4, goal 7.3"),
        "above a workspace of C = T": ("1 of 2", "H 7168, T 32: 0.5, goal 0.4"),
        "round trip, C = 4096, as issued": ("1 of 1", "–"),
        "uneven round trip": ("0 of 1", "H 7168, T 1 and 4096: 391, goal 390"),
    }


def way(us: float, count: int, rows: str, terms: str, before: bool = False, quantized: bool = False) -> dict:
    formats = {"dispatch_format": rows, "quantized": quantized, "combine_format": terms, "quantized_terms": before}
    return {**trip(us, 7168, count, count, **formats), "correct": True}


FORMATS = [
    way(5.0, 1, "same", "same"), way(5.4, 1, "fp8_block128", "same"), way(5.1, 1, "fp8_block128", "same", quantized=True),
    way(4.6, 8, "same", "same"), way(4.9, 8, "fp8_block128", "same"),
    way(350, 4096, "same", "same"), way(265, 4096, "fp8_block128", "same"), way(194, 4096, "same", "fp8_block128", True),
    way(196, 4096, "fp8_block128", "fp8_block128", True), way(214, 4096, "fp8_block128", "fp8_block128"),
]  # fmt: skip


def test_float8_rows_and_terms_have_goals_of_their_own(tmp_path: Path) -> None:
    assert table(written(tmp_path / "run-formats.jsonl", *FORMATS)) == {
        "float8 rows above bfloat16 ones": ("1 of 2", "H 7168, T 1: 0.4, goal 0.3"),
        "round trip, float8 rows": ("1 of 1", "–"),
        "round trip, float8 terms quantized before": ("0 of 1", "H 7168, T 4096: 196, goal 195"),
        "round trip, float8 terms quantized by the combine": ("1 of 1", "–"),
    }


def format_table(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "format_table.py"), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_round_trips_of_formats_stand_side_by_side(tmp_path: Path) -> None:
    done = format_table(written(tmp_path / "run-formats.jsonl", *FORMATS, {"transport": "p2p", "what": "parts"}))
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.split("\n\n")[0].splitlines()
    assert head.endswith("| all bfloat16 | rows kernel, bfloat16 terms | rows before, bfloat16 terms | rows kernel, terms before "
                         "| both kernel | bfloat16 rows, terms before |")  # fmt: skip
    assert rows == [
        "| 7168 | 1 | 5.00 | 5.40 | 5.10 | – | – | – |",
        "| 7168 | 8 | 4.60 | 4.90 | – | – | – | – |",
        "| 7168 | 4096 | 350 | 265 | – | 196 | 214 | 194 |",
    ]


def test_wrong_round_trips_of_formats_make_no_table(tmp_path: Path) -> None:
    done = format_table(written(tmp_path / "run-formats.jsonl", {**FORMATS[0], "correct": False}))
    assert done.returncode == 1
    assert "differed from the reference: [(7168, [1, 1])]" in done.stderr


def test_layers_are_counted_as_their_page_counts_them(tmp_path: Path) -> None:
    rows = {way: {"total_us": us} for way, us in {"same": 20.0, "fp8_block128": 21.0, "fp8_block128_both": 19.0}.items()}
    float8 = {"preset": "deepseek-v3", "tokens": 32, "bfloat16_us": 20.5, **rows}
    lines = (RESULTS / published.LAYERS).read_text().splitlines()
    of_page = [json.loads(line) for line in lines if "bfloat16_us" not in line]
    found = table(written(tmp_path / "run-layer.jsonl", *of_page, float8))
    page = (ROOT / "docs" / "layer.md").read_text()
    for kind in ("total", "floor at T <= 32", "floor at T = 512", "experts", "no slower than collective"):
        assert f"- {kind}: {found[f'layer: {kind}'][0]}\n" in page
    assert found["float8 layer: no slower than bfloat16"] == ("2 of 3", "deepseek-v3, T 32, fp8_block128: 21, goal 20.5")
    assert found["float8 layer: no slower with float8 rows"] == ("0 of 1", "deepseek-v3, T 32: 21, goal 20")


def test_the_worst_misses_are_named_and_the_others_counted(tmp_path: Path) -> None:
    records = [
        {"hidden_size": 2048, "tokens": count, "waits_adds_us": count / 10, "numbers_adds_us": 0.0} for count in (1, 4, 7, 5, 6)
    ]
    found = table(written(tmp_path / "run-telemetry.jsonl", *records, {"preset": "qwen3-30b-a3b", "waits_adds_us": 9.0}))
    worst = "; ".join(f"H 2048, T {count}: {count / 10}, goal 0.3" for count in (7, 6, 5))
    assert found["telemetry adds"] == ("1 of 5", f"{worst}; 1 more")
    assert found["telemetry adds, somebody else's experts"] == ("5 of 5", "–")
