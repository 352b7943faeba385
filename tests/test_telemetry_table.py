"""The tables that scripts make of records: those of docs/telemetry.md and docs/formats.md."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRIP = {
    "hidden_size": 2048, "tokens": 32, "correct": True, "off_us": [5.5, 5.54], "waits_adds_us": 0.14, "numbers_adds_us": 1.17,
    "stopped_adds_us": 0.1,
}  # fmt: skip
LAYER = {"preset": "qwen3-30b-a3b", "tokens": 1, "off_us": [40.0, 40.2], "waits_adds_us": 0.25}


def table(path: Path, *records: dict) -> subprocess.CompletedProcess[str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, str(ROOT / "benchmarks" / "telemetry.py"), str(path), "--table"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_tables_of_records(tmp_path: Path) -> None:
    done = table(tmp_path / "records.jsonl", LAYER, TRIP, {**TRIP, "hidden_size": 7168})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2:4] == [f"| {size} | 32 | 5.50 / 5.54 | 0.14 | 1.03 | 0.10 |" for size in (7168, 2048)]
    assert lines[-1] == "| qwen3-30b-a3b | 1 | 40.00 / 40.20 | 0.25 |"


def test_results_that_were_wrong_make_no_table(tmp_path: Path) -> None:
    done = table(tmp_path / "records.jsonl", {**TRIP, "correct": False})
    assert done.returncode == 1
    assert "differed from the reference: [(2048, 32)]" in done.stderr


@pytest.mark.parametrize("page", ["telemetry", "formats"])
def test_a_page_has_the_tables_of_the_record_that_it_names(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    [command] = re.findall(r"<!-- python (benchmarks/(?:telemetry|format_table)\.py .*) -->", text)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) > 8
    assert [row for row in rows if row not in text.splitlines()] == []
