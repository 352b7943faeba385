"""benchmarks/router.py without a GPU: it runs to its end, and its comparison lets ties pass and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.router import compare

from tokenferry.router import Router, RouterConfig

pytestmark = pytest.mark.interpreter

ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 4, "num_experts": 8, "topk": 2, "score_function": "sigmoid"}
PLAIN, GROUPS = RouterConfig(**SMALL), RouterConfig(**SMALL, num_groups=4, topk_groups=2)
CHOSEN_FIRST = RouterConfig(hidden_size=4, num_experts=8, topk=2, topk_before_score=True)


def test_a_rehearsal_runs_every_preset_to_the_end(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "benchmarks/router.py", str(tmp_path / "out.jsonl"), "--rehearse", "--tokens", "1,3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {(each["preset"], each["tokens"]) for each in records} >= {("gpt-oss-120b", 1), ("deepseek-v3", 3)}
    assert all(each["same"] == each["tokens"] and each["commit"] and each["torch"] for each in records)
    assert ended.stdout.splitlines()[-1].startswith(records[-1]["preset"])


# Logits of one row, what either side chose of it, and whether it is the same, a tie, or another choice.
COMPARISONS = {
    "another order": (PLAIN, [3.0, 2.0, 0, 0, 0, 0, 0, 0], (0, 1), (1, 0), "same"),
    "equal logits": (CHOSEN_FIRST, [3.0, 2.0, 2.0, 0, 0, 0, 0, 0], (0, 1), (0, 2), "ties"),
    "equal scores": (PLAIN, [3.0, 2.0, 2.0, 0, 0, 0, 0, 0], (0, 1), (2, 0), "ties"),
    "a worse expert": (PLAIN, [3.0, 2.0, 1.9, 0, 0, 0, 0, 0], (0, 1), (0, 2), "other"),
    "one expert twice": (PLAIN, [3.0, 2.0, 2.0, 0, 0, 0, 0, 0], (0, 0), (0, 1), "other"),
    "equal groups": (GROUPS, [3.0, 2.0, 1.5, 0.5, 0.5, 1.5, 0, 0], (0, 2), (0, 5), "ties"),
    "a worse group": (GROUPS, [3.0, 2.0, 1.5, 0.5, 0.4, 1.0, 0, 0], (0, 1), (0, 5), "other"),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_lets_ties_pass_and_nothing_else(name: str) -> None:
    config, logits, got, expected, kind = COMPARISONS[name]
    weights = {0: 0.5}
    got, expected = (
        (torch.tensor([[weights.get(expert, 0.25) for expert in side]]), torch.tensor([side])) for side in (got, expected)
    )
    result = compare(got, expected, torch.tensor([logits]), Router(config, dtype=torch.float32))
    assert {each: getattr(result, each) for each in ("same", "ties", "other")} == dict.fromkeys(("same", "ties", "other"), 0) | {
        kind: 1
    }
    assert result.weight_difference == (0.0 if kind == "same" else None)
    assert result.is_right == (kind != "other")
