"""`benchmarks/placement.py`: experts that are laid out by hand give what the layout as is gives, and each has its records."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.placement_layout import load_table, physical_ids, rows_and_touched, zipf_ids

from tokenferry.placement import Placement

ROOT = Path(__file__).parents[2]


@pytest.mark.ranks
def test_every_layout_gives_the_same_rows(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "placement.py"), str(output), "--rehearse", "--orders", "sorted"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 3 * 2 * 3  # presets, numbers of tokens, layouts
    assert all(record["correct"] for record in records)
    assert {record["layout"] for record in records} == {"as is", "rearranged", "rearranged + 2 replicas"}
    assert done.stdout.count("\n") == 2 + len(records)


@pytest.mark.ranks
@pytest.mark.long
def test_a_budget_that_is_spent_leaves_everything_out(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "placement.py"), str(output), "--rehearse", "--budget-s", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(record["left_out"]) == 3 * 2 * 2


def test_the_table_of_the_page_is_what_the_step_model_predicts_for_the_records() -> None:
    """Also the loads of the ranks are drawn again, and are those that were measured."""
    [records] = (ROOT / "benchmarks" / "results").glob("*-placement.jsonl")
    command = [sys.executable, str(ROOT / "benchmarks" / "placement.py"), str(records), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "telemetry.md").read_text()
    assert [line for line in done.stdout.splitlines() if line not in page] == []


def test_ids_follow_the_law_and_name_no_expert_twice() -> None:
    ids = zipf_ids(4000, 8, 1, 1.0, "sorted", seed=1)
    shares = load_table([ids], 8)[0] / 4000
    law = 1 / torch.arange(1, 9)
    torch.testing.assert_close(shares, (law / law.sum()).double(), atol=0.03, rtol=0.0)
    several = zipf_ids(100, 8, 4, 1.0, "random", seed=1)
    assert all(len(set(row)) == 4 for row in several.tolist())


def test_replicas_are_taken_in_turn() -> None:
    placement = Placement.of([[0, 1, 0, 2, 0]], 3, 2)  # expert 0 is in places 0, 2 and 4
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]])
    assert physical_ids(ids, placement).tolist() == [[0, 1], [2, 3], [4, 1], [0, 3]]
    assert physical_ids(ids, placement, rank=1).tolist() == [[2, 1], [4, 3], [0, 1], [2, 3]]


def test_rows_of_ranks_by_hand() -> None:
    placement = Placement.of([[0, 1, 0, 2]], 3, 2)
    assert rows_and_touched([torch.tensor([[0, 1], [2, 3]]), torch.tensor([[3, 0]])], placement) == ([3, 3], [2, 2])
