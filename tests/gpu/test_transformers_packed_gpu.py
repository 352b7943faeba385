"""gpt-oss checkpoints as released, on two GPUs: packed experts in graphs, compiled and batched steps.

Greedy tokens are held against the dequantised model's logits for the same text: each must be its best, or nearly, since roundings
to bfloat16 come in other places and decide ties.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from packed_checkpoint import dequantized, make_released
from rank_pool import RankPools
from transformers_work import Work, generate_batch, load, prompts, quiet

pytestmark = [
    pytest.mark.gpu(count=2),
    pytest.mark.filterwarnings("default"),  # transformers warns of its own affairs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's compiler uses what PyTorch deprecates
]

WORK = (Work((9, 9, 9), 12), Work((21,), 17))
IN_WINDOWS = (Work((9, 9, 9), 6), Work((8,), 7))
"""What leaves a window of 16 tokens unfilled: then the forward can be recorded as it is."""
NEAR = 0.2
"""Of the logits' standard deviation."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_released(tmp_path_factory.mktemp("released"))


def test_graphs_of_the_forward_as_it_is(on_ranks: RankPools, path: Path) -> None:
    for found in on_ranks(decode, 2, path, False, backend="nccl", timeout_s=240):
        assert found == {"packed": True, "near": True, "graphs": True, "as without": True}


def test_graphs_of_the_compiled_forward(on_ranks: RankPools, path: Path) -> None:
    for found in on_ranks(decode, 2, path, True, backend="nccl", timeout_s=400):
        assert found == {"packed": True, "near": True, "graphs": True}


def test_continuous_batching(on_ranks: RankPools, path: Path) -> None:
    assert on_ranks(batches, 2, path, backend="nccl", timeout_s=240) == [True, True]


def test_memory_of_packed_and_unpacked(on_ranks: RankPools, path: Path) -> None:
    for packed, unpacked in on_ranks(held, 2, path, backend="nccl", timeout_s=120):
        num_weights = 2 * 4 * (128 * 64 + 64 * 64)  # layers, experts of a rank, both matrices
        assert unpacked - packed > num_weights * (16 - 4.5) / 8


# --- workers ----------------------------------------------------------------------------------------------------------------


def decode(group: tf.EPGroup, path: Path, compiled: bool) -> dict[str, bool]:
    quiet()
    torch._dynamo.reset()
    model = load(path, group, transport="p2p", cuda_graphs=True)
    parallel, work = model.expert_parallel, (WORK if compiled else IN_WINDOWS)[group.rank]
    whole = dequantized(path).to(group.device)
    made = run(model, work, group.rank, disable_compile=not compiled)
    parallel.finish()
    found = {
        "packed": all(layer.packed is not None and layer.kernels is not None for layer in parallel.layers),
        "near": near(whole, prompts(work.prompt_lengths, group.rank), made),
        "graphs": bool(parallel.graphs.decode.num_graphs),
    }
    if not compiled:
        graphs, parallel.graphs = parallel.graphs, None
        without = run(model, work, group.rank, cache_implementation="static", disable_compile=True)
        found["as without"] = made == without
        parallel.finish()
        parallel.graphs = graphs
    parallel.close()
    return found


def run(model: Any, work: Work, rank: int, **kwargs: Any) -> list[list[int]]:
    """New tokens of prompts of one length."""
    ids = torch.tensor(prompts(work.prompt_lengths, rank), device=model.device)
    made: list[list[int]] = model.generate(ids, max_new_tokens=work.new_tokens, **kwargs)[:, ids.shape[1] :].tolist()
    return made


def near(whole: Any, asked: Sequence[list[int]], made: Sequence[list[int]]) -> bool:
    """Whether each token is the dequantised model's best after those before it, or nearly."""
    for prompt, tokens in zip(asked, made, strict=True):
        ids = torch.tensor([prompt + tokens], device=whole.device)
        with torch.no_grad():
            logits = whole(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1)
        if not bool((logits.max(1).values - chosen <= NEAR * logits.std()).all()):
            return False
    return True


def batches(group: tf.EPGroup, path: Path) -> bool:
    quiet()
    model, work = load(path, group, transport="p2p"), WORK[group.rank]
    made = generate_batch(model, work, group.rank)[0]
    model.expert_parallel.finish()
    model.expert_parallel.close()
    return near(dequantized(path).to(group.device), prompts(work.prompt_lengths, group.rank), made)


def held(group: tf.EPGroup, path: Path) -> tuple[int, int]:
    """Bytes on the device for a packed model's weights, and for those of a dequantised one."""
    from transformers.utils.quantization_config import Mxfp4Config

    quiet()
    found = []
    for kwargs in ({}, {"quantization_config": Mxfp4Config(dequantize=True)}):
        model = load(path, group, transport="p2p", max_tokens_per_rank=8, **kwargs)
        found.append(sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_cuda))
        model.expert_parallel.close()
    packed, unpacked = found
    return packed, unpacked
