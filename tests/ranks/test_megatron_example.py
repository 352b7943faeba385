"""examples/megatron_engine.py under torchrun, on two CPU ranks."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine_harness import missing

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^rank (\d): (\{.*\})$", re.MULTILINE)

LENGTHS = {"0": {0: 6, 1: 4, 2: 8}, "1": {0: 3}}
"""Tokens that the example's requests ask for."""

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(missing()), reason=missing())]


def run_example(*options: str, timeout_s: float = 120.0) -> dict[str, dict[int, list[int]]]:
    """By rank, the tokens of its requests."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "megatron_engine.py"), *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Installation(megatron-core ") == 1
    return {rank: ast.literal_eval(tokens) for rank, tokens in LINE.findall(done.stdout)}


def environment() -> dict[str, str]:
    """As a user would have it: the packages that pytest was told of by its own settings are on the path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NO_VCS_VERSION": "1", "OMP_NUM_THREADS": "1"}


def lengths(tokens: dict[str, dict[int, list[int]]]) -> dict[str, dict[int, int]]:
    return {rank: {number: len(own) for number, own in requests.items()} for rank, requests in tokens.items()}


def test_every_rank_gets_its_tokens() -> None:
    assert lengths(run_example("--cpu", "--dispatcher", "nvls")) == LENGTHS


@pytest.mark.long
def test_both_types_give_the_same_tokens() -> None:
    nvls, nccl = (run_example("--cpu", "--dispatcher", kind) for kind in ("nvls", "nccl"))
    assert nvls == nccl
    assert lengths(nvls) == LENGTHS
