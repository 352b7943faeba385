"""vLLM's own classes on two GPUs, without an engine: what its exchange gives and what ours gives. benchmarks/vllm_engine.py runs
the engine."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenferry.testing import same_bits
from vllm_runs import TESTS, finished, free_port

MISSING = "" if importlib.util.find_spec("vllm") else "no vLLM: put 0.26 on the path"

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.timeout(400), pytest.mark.skipif(bool(MISSING), reason=MISSING)]


def run_classes(mode: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks gets from vLLM's own prepare and finalize, eagerly and from a graph."""
    finished([str(TESTS / "vllm_unit.py"), mode, str(folder), str(free_port())], folder / f"{mode}.log", VLLM_HOST_IP="127.0.0.1")
    return [torch.load(folder / f"{mode}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_classes("plain", tmp_path_factory.mktemp("classes"))


@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_its_own_classes_get_the_bits_of_its_own_exchange(transport: str, plain: list[dict[str, Any]], tmp_path: Path) -> None:
    """Of two ranks NCCL's sum has one order, which is ours: two terms, added in float32 and rounded once."""
    for theirs, ours in zip(plain, run_classes(transport, tmp_path), strict=True):
        assert (theirs["manager"], ours["manager"]) == ("AgRsAll2AllManager", "TokenferryAll2AllManager")
        assert ours["transports"] == [transport] * 2, "of 16-bit rows, and of quantized ones"
        nobodys = [[row for row, ids in enumerate(layer) if ids == [-1, -1]] for layer in ours["masked"]]
        assert nobodys == [[0, 1, 2, 3]] * 3 + [[3, 7]] * 3, "rank 0 without requests, then three real rows of each rank"
        for place, (want, got) in enumerate(zip(theirs["results"], ours["results"], strict=True)):
            assert all(same_bits(left, right) for left, right in zip(got, want, strict=True)), f"layer {place}"
