"""The figures in committed pages are those of the published records, and one command publishes other records."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import figures
import performance
import published
import result_files
import round_trips
from tokenferry.benchmarking import RoundTripPoint, round_trip_points

ROOT = Path(__file__).parents[1]
CAPACITY, TOKENS = 4096, (1, 8, 32, 128, 512, 4096)


def made_up(point: RoundTripPoint) -> float:
    """µs, so that every point differs: workspaces of a larger capacity take 0.25 more, and 0.5 more at a hidden size of 2048."""
    above = 0.0 if point.capacity == max(point.tokens) else 0.5 if point.hidden_size == 2048 else 0.25
    return 4.5 + point.tokens[0] * point.hidden_size / 86000 + above + (0 if point.transport == "p2p" else 30)


@pytest.fixture
def engine_run(tmp_path: Path) -> Path:
    """Made-up records of a run in workspaces of 4096 tokens, with those of C = T and NCCL beside them."""
    path = tmp_path / "2xH200-made-up.jsonl"
    points = round_trip_points((7168, 2048), TOKENS, ("p2p", "collective"), 2, capacity=CAPACITY, exact_too=True)
    common = {"copy_gb_per_s": 380.0, "gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "world_size": 2}
    common |= {"date": "2000-01-01", "commit": "abcdef0" + "1" * 33}
    path.write_text("".join(json.dumps(asdict(point) | common | {"round_trip_us": made_up(point)}) + "\n" for point in points))
    return path


@pytest.mark.parametrize("name", figures.PAGES)
def test_a_page_has_the_figures_of_the_published_records(name: str) -> None:
    page = (ROOT / name).read_text()
    assert figures.PAGES[name](page) == page, "run `make figures`"


@pytest.mark.parametrize(
    ("us", "goal_us", "said"),
    [(5.0, 5.0, "reached"), (5.01, 5.0, "missed by less than 1 %"), (5.5, 5.0, "missed by 10 %")],
    ids=["equal", "a little", "more"],
)
def test_a_verdict(us: float, goal_us: float, said: str) -> None:
    assert figures.verdict(us, goal_us) == said


def test_a_run_of_exact_capacities_says_so() -> None:
    """The published one. Once another one is published, its own pages are looked at by the tests above."""
    if round_trips.capacity() is None:
        assert "C = T" in figures.readme_lines()["| round trip"]
        assert "opened for just as many tokens as are sent (C = T)" in performance.round_trips()


def test_a_run_as_engines_open_workspaces_is_named_by_its_capacity(engine_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(result_files.RESULTS / published.LAYERS, engine_run.parent)
    monkeypatch.setattr(result_files, "RESULTS", engine_run.parent)
    monkeypatch.setattr(published, "ROUND_TRIPS", engine_run.name)
    assert round_trips.capacity() == CAPACITY
    first, second, *_ = [line for line in performance.round_trips().splitlines() if line.startswith("| p2p")]
    assert first.startswith("| p2p, C = 4096 | 4.8 | 5.4 |")
    assert second.startswith("| p2p, C = T | 4.6 | 5.2 |")
    assert "The goal is 0.4 at most, which 4 of 8 points reach." in figures.above_exact()
    assert figures.above_exact().endswith("where the goal for them is 18 µs, it takes 17.2: reached.")
    rows = figures.round_trip_rows()
    assert rows[0] == ["7168", "1", "4.83", "4.58", "34.8", "4.7", "missed by 3 %"]
    assert [row[1] for row in rows].count("1 and 4096") == 2
    assert "C = 4096, bfloat16" not in figures.readme_lines()["¹ "]
    assert ", C = 4096, µs" in figures.readme_lines()["| round trip"]


def test_one_command_publishes_another_run(engine_run: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "docs", tree / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    results = tree / "benchmarks" / "results"
    results.mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tree)
    for script in ("layer_docs.py", "layer_table.py"):
        shutil.copy(ROOT / "benchmarks" / script, tree / "benchmarks")
    for path in (engine_run, *(result_files.RESULTS / name for name in (published.LAYERS, published.MODELS))):
        shutil.copy(path, results)
    given = ["--round-trips", results / engine_run.name, "--layers", published.LAYERS]
    subprocess.run([sys.executable, tree / "docs" / "generate" / "figures.py", *given], check=True, timeout=120)
    assert f"2000-01-01, commit abcdef0: `benchmarks/results/{engine_run.name}`." in (tree / "README.md").read_text()
    assert "| 7168 | 1 | 4.83 | 4.58 | 34.8 | 4.7 | missed by 3 % |" in (tree / "docs" / "symmetric.md").read_text()
    assert "A plain copy to the peer ran at 380 GB/s." in " ".join((tree / "docs" / "symmetric.md").read_text().split())
    assert "2 × H200, C = 4096, hidden size 7168" in (tree / "docs" / "which-transport.md").read_text()
    assert "C = 4096" in (tree / "docs" / "pictures" / "round-trips.svg").read_text()
    assert f'ROUND_TRIPS = "{engine_run.name}"' in (tree / "docs" / "generate" / "published.py").read_text()
    assert published.LAYERS in (tree / "docs" / "layer.md").read_text()
