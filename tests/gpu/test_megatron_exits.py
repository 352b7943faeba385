"""Processes that have run Megatron's engine in CUDA graphs end by themselves after their last line."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine_exits import STAGES, End, Run, ends_of
from engine_failures import environment
from engine_harness import missing

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.timeout(200), pytest.mark.skipif(bool(missing()), reason=missing())]

OVERLAP = {"graph_scope": "layer", "model": {"shared_expert_size": 32}, "config": {"moe_shared_expert_overlap": True}}
RUNS = {
    "nccl-overlap-in-graphs-of-layers": Run(["nccl"], options=OVERLAP),
    "nvls-overlap-in-graphs-of-layers": Run(["nvls"], options=OVERLAP),
    "both-overlap-in-graphs-of-layers": Run(["nccl", "nvls"], options=OVERLAP),
    "nccl-in-graphs-of-all-layers": Run(["nccl"], options={"graph_scope": "block"}),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[End]]:
    """All of them at once: they wait more than they work."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    with environment(NO_VCS_VERSION="1"), ThreadPoolExecutor(len(RUNS)) as pool:
        found = pool.map(lambda name: ends_of(RUNS[name], folders[name], "nccl", 150.0), RUNS)
        return dict(zip(RUNS, found, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_the_process_ends(name: str, ends: Mapping[str, list[End]]) -> None:
    assert ends[name] == [End(0, STAGES[-1])] * 2
