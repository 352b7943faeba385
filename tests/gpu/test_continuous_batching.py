"""Continuous batching with CUDA graphs on two GPUs: tokens of the unmodified model, persistent managers, failed captures."""

from pathlib import Path

import pytest
import torch

import tokenferry as tf
from batching_work import generate_batch, serve, settings
from rank_pool import RankPools
from tokenferry.integrations.transformers.continuous_batching import StepGraph
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, generate, load, prompts, quiet, unmodified

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral")
WORK = (Work((5, 17, 9), 12), Work((21,), 17))
IDLE = (Work((5, 17, 9), 12), Work())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, folder / family) for family in FAMILIES}


def compare(group: tf.EPGroup, path: Path, works: tuple[Work, Work], is_async: bool) -> list[bool]:
    """The second time after a reset, with the manager of the first, whose graphs hold the buffers of before."""
    quiet()
    model = load(path, group, transport="p2p", dtype=torch.float32)
    work, made = works[group.rank], []
    for _ in range(2):
        results = model.generate_batch(
            prompts(work.prompt_lengths, group.rank),
            *settings(max(work.new_tokens, 1), use_cuda_graph=True, use_async_batching=is_async),
            persistent_manager=True,
        )
        made.append([result.generated_tokens for result in results.values()])
        model.expert_parallel.finish()
        model.expert_parallel.reset()
    model.destroy_cached_continuous_batching_manager()
    model.expert_parallel.close()
    plain = unmodified(path, dtype=torch.float32).to(group.device)
    wanted = generate_batch(plain, work, group.rank, use_cuda_graph=False)
    return [tokens == wanted for tokens in made]


@pytest.mark.parametrize(
    ("family", "works", "is_async"),
    [
        ("qwen3_moe", WORK, False),
        ("qwen3_moe", IDLE, False),
        ("qwen3_moe", WORK, True),
        ("gpt_oss", WORK, False),
        ("mixtral", IDLE, False),
    ],
    ids=["qwen3_moe", "qwen3_moe-one idle", "qwen3_moe-async", "gpt_oss", "mixtral-one idle"],
)
def test_tokens_in_float32_with_graphs_and_default_attention(
    on_ranks: RankPools, models: dict[str, Path], family: str, works: tuple[Work, Work], is_async: bool
) -> None:
    for equal in on_ranks(compare, 2, models[family], works, is_async, backend="nccl", timeout_s=120):
        assert equal == [True, True]


def count_replays(group: tf.EPGroup, path: Path) -> tuple[int, list[int]]:
    """Replays of rank 0, and the lengths of what every rank made in bfloat16."""
    quiet()
    replayed = []
    replay = StepGraph.replay
    StepGraph.replay = lambda graph: (replayed.append(1), replay(graph))[1]  # type: ignore[method-assign]
    try:
        model = load(path, group, transport="p2p", dtype=torch.bfloat16)
        tokens = generate_batch(model, WORK[group.rank], group.rank, use_cuda_graph=True)
        model.expert_parallel.finish()
        model.expert_parallel.close()
    finally:
        StepGraph.replay = replay  # type: ignore[method-assign]
    return len(replayed), [len(each) for each in tokens]


def test_decoding_replays_graphs_in_bfloat16(on_ranks: RankPools, models: dict[str, Path]) -> None:
    (first, lengths), (second, others) = on_ranks(count_replays, 2, models["qwen3_moe"], backend="nccl", timeout_s=120)
    assert (lengths, others) == ([12, 12, 12], [17])
    assert first >= 10, "most of 12 decode steps have the same padded sizes"
    assert second >= 15


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_manager_without_requests_takes_part(on_ranks: RankPools, models: dict[str, Path], graphs: bool) -> None:
    for equal, took_s in on_ranks(serve, 2, models["qwen3_moe"], "p2p", graphs, backend="nccl", timeout_s=120):
        assert equal
        assert took_s < 10


def refuse(group: tf.EPGroup, path: Path) -> list[str]:
    quiet()
    said = []
    for options in ({"exact": True}, {"experts_implementation": "grouped_mm"}):
        model = load(path, group, transport="p2p", dtype=torch.float32, **options)
        try:
            generate_batch(model, Work((3,), 2), group.rank, use_cuda_graph=True)
            said.append("none")
        except tf.ConfigError as error:
            said.append(str(error))
        model.expert_parallel.finish()
        generate_batch(model, Work((3,), 2), group.rank)
        model.expert_parallel.finish()
        model.expert_parallel.close()
    return said


def test_what_cannot_be_captured_is_refused_before_anything_starts(on_ranks: RankPools, models: dict[str, Path]) -> None:
    for exact, grouped in on_ranks(refuse, 2, models["qwen3_moe"], backend="nccl", timeout_s=120):
        assert "use_cuda_graph is True, but exact=True has the host read" in exact
        assert "grouped_mm has the host read the rows of each" in grouped


def fail_capturing(group: tf.EPGroup, path: Path, warmup: bool) -> tuple[str, bool]:
    """Rank 0's forward asks the device for a value, which only a capture minds. Afterwards both ranks generate as ever."""
    quiet()
    model = load(path, group, transport="p2p", dtype=torch.float32)
    said, work = "none", WORK[group.rank]
    if group.rank == 0:
        asking = model.model.norm.register_forward_hook(lambda _module, _args, output: output + 0 * output.sum().item())
        try:
            model.generate_batch(prompts((5,), 0), *settings(2, use_cuda_graph=True), warmup=warmup)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
        asking.remove()
    generated = generate(model, work, group.rank)[0]
    model.expert_parallel.finish()
    tokens = generate_batch(model, work, group.rank, use_cuda_graph=True)
    model.expert_parallel.finish()
    model.expert_parallel.close()
    plain = unmodified(path, dtype=torch.float32).to(group.device)
    equal = generated == generate(plain, work, group.rank)[0]
    return said, equal and tokens == generate_batch(plain, work, group.rank, use_cuda_graph=False)


@pytest.mark.parametrize("warmup", [True, False], ids=["warming up", "generating"])
def test_a_capture_that_fails_raises_its_own_error_and_both_go_on(
    on_ranks: RankPools, models: dict[str, Path], warmup: bool
) -> None:
    (said, first), (other, second) = on_ranks(fail_capturing, 2, models["qwen3_moe"], warmup, backend="nccl", timeout_s=120)
    assert said.startswith("AcceleratorError: CUDA error: operation not permitted when stream is capturing"), said
    assert (other, first, second) == ("none", True, True)


def peer_fails(group: tf.EPGroup, path: Path) -> tuple[str, int]:
    """Rank 1 gives up while rank 0 decodes by replays, which by themselves would go on and hand out tokens."""
    quiet()
    model = load(path, group, transport="p2p", dtype=torch.float32)
    if group.rank == 1:
        for _ in range(30):
            model.expert_parallel.take_part(done=False)
        model.expert_parallel.workspace.fail("gone home")
        model.expert_parallel.close()
        return "none", 0
    handed_out = []
    said = "none"
    try:
        results = model.generate_batch(prompts((5,), 0), *settings(200, use_cuda_graph=True), record_timestamps=True)
        handed_out = [len(result.generated_tokens) for result in results.values()]
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    model.expert_parallel.close()
    return said, sum(handed_out)


def test_a_peer_that_fails_ends_replays_with_its_error(on_ranks: RankPools, models: dict[str, Path]) -> None:
    (said, handed_out), _ = on_ranks(peer_fails, 2, models["qwen3_moe"], backend="nccl", timeout_s=120)
    assert said.startswith("PeerFailedError"), said
    assert "gone home" in said
    assert handed_out == 0
