"""Managers of continuous batching that stay, on CPUs and gloo: without a request they take part in the other ranks' steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from batching_work import NEW_TOKENS, ask, serve, settings
from patience import PATIENT_S
from rank_pool import RankPools
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, generate, load, quiet, unmodified

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny("qwen3_moe", folder / "qwen3_moe")
    return folder / "qwen3_moe"


def test_a_manager_without_requests_takes_part(on_ranks: RankPools, path: Path) -> None:
    for equal, _ in on_ranks(serve, 2, path, "collective", None, timeout_s=120):
        assert equal


def manager_beside_generate(group: tf.EPGroup, path: Path) -> bool:
    """Rank 0 generates as ever, rank 1 by a manager, at the same time; then the other way round."""
    quiet()
    model = load(path, group, transport="collective", dtype=torch.float32)
    work, equal = Work((6, 9), NEW_TOKENS), True
    plain = unmodified(path, dtype=torch.float32)
    for turn in range(2):
        if group.rank == turn:
            equal &= generate(model, work, group.rank)[0] == generate(plain, work, group.rank)[0]
        else:
            generation, batching = settings(NEW_TOKENS)
            with model.continuous_batching_context_manager(generation, continuous_batching_config=batching) as manager:
                equal &= [len(tokens) for tokens in ask(manager, 3)[0]] == [NEW_TOKENS] * 2
        model.expert_parallel.finish()
    model.expert_parallel.close()
    return equal


def test_a_manager_beside_a_rank_that_generates(on_ranks: RankPools, path: Path) -> None:
    assert on_ranks(manager_beside_generate, 2, path, timeout_s=120) == [True, True]


def peer_goes_away(group: tf.EPGroup, path: Path) -> Any:
    """Rank 1 closes its model while rank 0's manager has nothing to do."""
    quiet()
    model = load(path, group, transport="collective", dtype=torch.float32, timeout_s=PATIENT_S)
    generation, batching = settings(NEW_TOKENS)
    said = None
    if group.rank == 0:
        with model.continuous_batching_context_manager(generation, continuous_batching_config=batching) as manager:
            manager._generation_thread.join(PATIENT_S)
            said = repr(manager.background_thread_status.fatal_error)
    else:
        for _ in range(3):
            model.expert_parallel.take_part(done=False)
        model.expert_parallel.workspace.fail("gone home")
    model.expert_parallel.close()
    return said


def test_the_failure_of_a_peer_ends_a_manager_that_waits(on_ranks: RankPools, path: Path) -> None:
    said, _ = on_ranks(peer_goes_away, 2, path, timeout_s=120)
    assert "PeerFailedError" in said
    assert "gone home" in said
