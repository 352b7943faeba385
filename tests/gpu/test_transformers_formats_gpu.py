"""A model of transformers on two GPUs whose rows and terms travel as float8: graphs of decode steps, and continuous batching."""

from pathlib import Path

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.dispatched import FLOAT8
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import Work, generate_batch, load, prompts, quiet, unmodified

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

WORK = (Work((9, 9), 8), Work((6,), 11))
FORMATS = {"dispatch_format": "fp8_block128", "combine_dtype": FLOAT8}


def new_tokens(model: object, work: Work, rank: int, **kwargs: object) -> list[list[int]]:
    ids = torch.tensor(prompts(work.prompt_lengths, rank), device=model.device)
    return model.generate(ids, max_new_tokens=work.new_tokens, disable_compile=True, **kwargs)[:, ids.shape[1] :].tolist()


def with_formats(group: tf.EPGroup, path: Path) -> tuple[float, bool, int, list[int]]:
    """How far the first logits are from the unmodified model's, whether graphs give the tokens of the same forward without them,
    how many graphs there were, and how many tokens continuous batching made."""
    quiet()
    work = WORK[group.rank]
    model = load(path, group, transport="p2p", dtype=torch.bfloat16, timeout_s=60.0, **FORMATS)
    parallel = model.expert_parallel
    assert all(layer.kernels is not None for layer in parallel.layers)
    ids = torch.tensor(prompts(work.prompt_lengths[:1], group.rank), device=group.device)
    with torch.no_grad():
        got, wanted = model(ids).logits, unmodified(path, dtype=torch.bfloat16).to(group.device)(ids).logits
    tokens = new_tokens(model, work, group.rank)
    parallel.finish()
    num_graphs, graphs = parallel.graphs.decode.num_graphs, parallel.graphs
    parallel.graphs = None
    same = tokens == new_tokens(model, work, group.rank, cache_implementation="static")
    parallel.finish()
    parallel.graphs = graphs
    batched, _ = generate_batch(model, work, group.rank)
    parallel.finish()
    parallel.close()
    return ((got - wanted).norm() / wanted.norm()).item(), same, num_graphs, [len(each) for each in batched]


def test_graphs_and_continuous_batching(on_ranks: RankPools, tmp_path: Path) -> None:
    path = make_tiny("qwen3_moe", tmp_path)
    outcomes = on_ranks(with_formats, 2, path, backend="nccl", timeout_s=240)
    for work, (error, same, num_graphs, made) in zip(WORK, outcomes, strict=True):
        assert 1e-3 < error < 0.2
        assert same and num_graphs > 0
        assert made == [work.new_tokens] * len(work.prompt_lengths)
