"""`generate()` with decode steps as CUDA graphs, on two GPUs: the tokens of the unmodified model on one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, load, prompts, quiet, unmodified

pytestmark = [
    pytest.mark.gpu(count=2),
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3")
TURNS = (
    (Work((9, 9, 9), 12), Work((21,), 17)),
    (Work((9, 9, 9), 8), Work((21,), 10)),
    (Work(), Work((30,), 5)),
    (Work((5, 5, 5), 20), Work()),
)
"""Each rank has a batch size of its own, and compiles once. The second turn finds the caches of the first; then one rank has no
requests."""
OTHER_SIZES = (Work((6, 6), 5), Work((4, 4, 4, 4), 5))
TIMEOUT_S = 10.0
"""Less than it takes to compile: a rank that does says that it is busy."""
WHOLE = ("qwen3_moe", "mixtral", "deepseek_v3")
"""Families whose forward can be recorded as it is. gpt_oss copies a number to the device once its window is full."""
IN_WINDOWS = (Work((9, 9, 9), 6), Work((8,), 7))
"""What leaves a window of 16 tokens unfilled."""


@dataclass(frozen=True)
class Outcome:
    """What a rank saw of a model.

    Attributes:
        same_tokens: in each turn, those of the unmodified model.
        num_graphs: kept at the end.
        said: by our logs, once the model was loaded.
    """

    same_tokens: list[bool]
    num_graphs: int
    said: list[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, folder / family) for family in FAMILIES}


@pytest.mark.parametrize("family", WHOLE)
def test_graphs_of_the_forward_as_it_is(on_ranks: RankPools, models: dict[str, Path], family: str) -> None:
    for outcome in on_ranks(compare, 2, models[family], False, backend="nccl", timeout_s=240):
        assert all(outcome.same_tokens)
        assert outcome.num_graphs
        assert outcome.said == []


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_of_the_compiled_forward(on_ranks: RankPools, models: dict[str, Path], family: str) -> None:
    for outcome in on_ranks(compare, 2, models[family], True, backend="nccl", timeout_s=400):
        assert all(outcome.same_tokens)
        assert outcome.num_graphs
        assert outcome.said == []


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_graphs_of_layers_that_are_compiled_one_by_one(on_ranks: RankPools, models: dict[str, Path], family: str) -> None:
    for outcome in on_ranks(compare, 2, models[family], True, True, backend="nccl", timeout_s=400):
        assert all(outcome.same_tokens)
        assert outcome.num_graphs
        assert outcome.said == []


def test_a_family_that_cannot_be_recorded_as_it_is_goes_on_eagerly(on_ranks: RankPools, models: dict[str, Path]) -> None:
    for outcome in on_ranks(compare, 2, models["gpt_oss"], False, backend="nccl", timeout_s=240):
        assert all(outcome.same_tokens)
        [said] = outcome.said
        assert said.startswith("decode steps of generate() go on without CUDA graphs of the eager forward:")


def test_in_bfloat16_a_graph_gives_the_tokens_of_the_same_forward_without_one(
    on_ranks: RankPools, models: dict[str, Path]
) -> None:
    for same in on_ranks(compare_bfloat16, 2, [models[family] for family in FAMILIES], backend="nccl", timeout_s=240):
        assert same == [True] * len(FAMILIES)


def test_a_forward_that_reads_the_device_goes_on_eagerly(on_ranks: RankPools, models: dict[str, Path]) -> None:
    """On rank 0 alone; rank 1 has its graphs, and notices nothing. Afterwards rank 0 can record another model."""
    zero, one = on_ranks(compare_failing, 2, models["qwen3_moe"], backend="nccl", timeout_s=240)
    assert zero.same_tokens == one.same_tokens == [True, True, True]
    assert one.said == []
    [said] = zero.said
    assert said.startswith("decode steps of generate() go on without CUDA graphs of the eager forward:")


def test_a_peer_that_fails_is_heard_of_between_replays(on_ranks: RankPools, models: dict[str, Path]) -> None:
    zero, one = on_ranks(fail_while_decoding, 2, models["qwen3_moe"], backend="nccl", timeout_s=240)
    assert "enough" in zero
    assert zero.startswith("PeerFailedError")
    assert one.startswith("PeerFailedError")


# --- workers ----------------------------------------------------------------------------------------------------------------


def compare(group: tf.EPGroup, path: Path, compiled: bool, by_layers: bool = False) -> Outcome:
    quiet()
    torch._dynamo.reset()
    with said_by_us() as said:
        model = load(path, group, transport="p2p", dtype=torch.float32, timeout_s=TIMEOUT_S, cuda_graphs=True)
        said.clear()
        model.expert_parallel.graphs.decode.by_layers = by_layers
        turns = TURNS if compiled else (*TURNS, OTHER_SIZES)
        made = []
        for turn in turns:
            made.append(run(model, turn[group.rank], group.rank, disable_compile=not compiled))
            model.expert_parallel.finish()
        num_graphs = model.expert_parallel.graphs.decode.num_graphs
        model.expert_parallel.close()
    reference = unmodified(path, dtype=torch.float32).to(group.device)
    expected = [run(reference, turn[group.rank], group.rank) for turn in turns]
    return Outcome([a == b for a, b in zip(made, expected, strict=True)], num_graphs, [*said])


def run(model: Any, work: Work, rank: int, **kwargs: Any) -> list[list[int]]:
    """New tokens of prompts of one length."""
    if not work.prompt_lengths:
        return []
    ids = torch.tensor(prompts(work.prompt_lengths, rank), device=model.device)
    made: list[list[int]] = model.generate(ids, max_new_tokens=work.new_tokens, **kwargs)[:, ids.shape[1] :].tolist()
    return made


def compare_bfloat16(group: tf.EPGroup, paths: list[Path]) -> list[bool]:
    quiet()
    same = []
    for path in paths:
        model = load(path, group, transport="p2p", dtype=torch.bfloat16, timeout_s=TIMEOUT_S)
        parallel, work = model.expert_parallel, (TURNS[0] if path.name in WHOLE else IN_WINDOWS)[group.rank]
        with_graphs = run(model, work, group.rank, disable_compile=True)
        assert parallel.graphs.decode.num_graphs
        parallel.finish()
        graphs, parallel.graphs = parallel.graphs, None
        same.append(with_graphs == run(model, work, group.rank, cache_implementation="static", disable_compile=True))
        parallel.finish()
        parallel.graphs = graphs
        parallel.close()
    return same


def compare_failing(group: tf.EPGroup, path: Path) -> Outcome:
    quiet()
    reference = unmodified(path, dtype=torch.float32).to(group.device)
    expected = run(reference, TURNS[0][group.rank], group.rank)
    same, heard, num_graphs = [], [], 0
    for fails in (True, False):
        with said_by_us() as said:
            model = load(path, group, transport="p2p", dtype=torch.float32, timeout_s=TIMEOUT_S)
            said.clear()
            if fails and group.rank == 0:
                norm = model.model.layers[1].input_layernorm
                norm.register_forward_hook(lambda _module, _args, hidden: hidden + 0 * hidden.sum().item())
            for _ in range(2 if fails else 1):
                same.append(expected == run(model, TURNS[0][group.rank], group.rank, disable_compile=True))
                model.expert_parallel.finish()
            num_graphs = model.expert_parallel.graphs.decode.num_graphs
            model.expert_parallel.close()
        heard += said
    assert num_graphs, "the second model was not recorded"
    return Outcome(same, num_graphs, heard)


def fail_while_decoding(group: tf.EPGroup, path: Path) -> str:
    quiet()
    model = load(path, group, transport="p2p", dtype=torch.float32, timeout_s=TIMEOUT_S)
    work = TURNS[0][group.rank]
    run(model, work, group.rank, disable_compile=True)
    model.expert_parallel.finish()
    seen = []

    def give_up(token_ids: torch.Tensor, _scores: torch.Tensor) -> torch.Tensor:
        seen.append(token_ids.shape[1])
        if group.rank == 1 and len(seen) == 5:
            model.expert_parallel.workspace.fail("enough")
        return _scores

    try:
        run(model, work, group.rank, disable_compile=True, logits_processor=[give_up])
        return "nothing"
    except tf.PeerError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.expert_parallel.close()


@contextmanager
def said_by_us() -> Iterator[list[str]]:
    """Warnings of our logs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tokenferry")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
