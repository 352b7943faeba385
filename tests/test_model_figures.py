"""The front table of README.md has the figures of the records that are published."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "2xH200-2026-11-26-model.jsonl"
FORMS = (("p2p", "graph-compiled"), ("transformers", "compile"))


@pytest.mark.parametrize(
    ("title", "points"),
    [
        ("`generate()`, Qwen3-30B-A3B", [("qwen3-30b-a3b:8", batch) for batch in (1, 8, 32)]),
        ("the same, gpt-oss-20b, Mixtral-8x7B", [("gpt-oss-20b:8", 8), ("mixtral-8x7b:8", 8)]),
    ],
    ids=["Qwen3", "gpt-oss and Mixtral"],
)
def test_a_row_has_the_measured_milliseconds_of_a_token(title: str, points: list[tuple[str, int]]) -> None:
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    tokens = {
        (record["way"], record["mode"], record["config"], record["batch"]): record["token_ms"]
        for record in records
        if "token_ms" in record and record["prompt"] == 128
    }
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {title}")]
    cells = [", ".join(f"{tokens[(*form, *point)]:.2f}" for point in points) for form in FORMS]
    assert [cell.strip() for cell in row.split("|")][-3:-1] == cells
