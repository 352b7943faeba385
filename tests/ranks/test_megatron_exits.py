"""Processes that have run Megatron's engine end by themselves after their last line; tests/gpu has it with graphs and streams."""

from pathlib import Path

import pytest

from engine_exits import STAGES, End, Run, ends_of
from engine_failures import environment
from engine_harness import ENVIRONMENT, missing

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.long,
    pytest.mark.timeout(150),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


def test_the_process_ends(tmp_path: Path) -> None:
    options = {"model": {"shared_expert_size": 32}, "config": {"moe_shared_expert_overlap": True}}
    run = Run(["nccl", "nvls"], transport="p2p", options=options)
    with environment(**ENVIRONMENT):
        assert ends_of(run, tmp_path, "gloo", 100.0) == [End(0, STAGES[-1])] * 2
