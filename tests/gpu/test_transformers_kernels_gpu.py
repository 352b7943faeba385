"""Our expert kernels inside tiny models of transformers on two GPUs: in a graph of a step, with garbage beyond the valid rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from float8_checkpoint import make_float8
from rank_pool import RankPools
from tokenferry.testing.tiny_models import make_tiny, tiny_config
from transformers_work import CAPACITY, load, quiet, unmodified

pytestmark = [pytest.mark.gpu(count=2), pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral")
NO_GRAPH = ("gpt_oss",)
"""transformers' sliding windows keep the length of the cache on the host."""
PROMPTS, STEPS = ((3, 7), (1, 12)), 10
"""Rows and columns of each rank's prompt."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny(family, folder / family) for family in FAMILIES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_graph_of_a_step_gives_the_tokens_of_eager_steps(on_ranks: RankPools, models: list[Path], dtype: torch.dtype) -> None:
    for outcomes in on_ranks(decode_all, 2, models, dtype, backend="nccl", timeout_s=240):
        for family, (eager_is_unmodified, replayed_is_eager) in outcomes.items():
            assert replayed_is_eager == 1.0, family
            # Our kernels round less often than the model's own function. In bfloat16 one other token early on changes all that
            # follow it (seen with qwen3_moe on 2 x H200, 2026-11-26), so that only float32 is compared.
            assert eager_is_unmodified == 1.0 or dtype != torch.float32, family


def test_from_config_has_the_weights_of_one_process(on_ranks: RankPools) -> None:
    for differences in on_ranks(random_weights, 2, backend="nccl", timeout_s=240):
        assert max(differences) < 1e-4


def test_a_float8_checkpoint_runs_in_float8(on_ranks: RankPools, tmp_path: Path) -> None:
    """Rows are rounded to float8 on their way into each product; the weights' own rounding is in the reference too."""
    for is_float8, difference in on_ranks(float8_logits, 2, *make_float8(tmp_path), backend="nccl", timeout_s=240):
        assert is_float8
        assert difference < 0.1


def decode_all(group: tf.EPGroup, paths: list[Path], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    quiet()
    return {path.name: _decode(group, path, dtype) for path in paths}


def _decode(group: tf.EPGroup, path: Path, dtype: torch.dtype) -> tuple[float, float]:
    rows, columns = PROMPTS[group.rank]
    ids = torch.randint(3, 259, (rows, columns), generator=torch.Generator().manual_seed(group.rank)).to(group.device)
    model = load(path, group, transport="p2p", dtype=dtype, cuda_graphs=False)
    assert all(layer.kernels is not None for layer in model.expert_parallel.layers)
    leave_garbage(model.expert_parallel)
    eager = decode(model, ids, by_graph=False)
    leave_garbage(model.expert_parallel)
    replayed = decode(model, ids, by_graph=path.name not in NO_GRAPH)
    model.expert_parallel.close()
    expected = decode(unmodified(path, dtype=dtype).to(group.device).eval(), ids, by_graph=False)
    return ((eager == expected).float().mean().item(), (replayed == eager).float().mean().item())


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, *, by_graph: bool) -> torch.Tensor:
    """Greedy tokens with a static cache. All ranks take equally many steps, whatever their batches are."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + STEPS + 2)
    token = torch.zeros(ids.shape[0], 1, dtype=torch.long, device=ids.device)

    def step(inputs: torch.Tensor) -> None:
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1].float().argmax(-1, keepdim=True))

    step(ids)
    made = [token.clone()]
    step(token)
    made.append(token.clone())
    if not by_graph:
        for _ in range(STEPS):
            step(token)
            made.append(token.clone())
        return torch.cat(made, 1)
    workspace, graph = model.expert_parallel.workspace, torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with workspace.capturing(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step(token)
    for _ in range(STEPS):
        with workspace.replaying():
            graph.replay()
        made.append(token.clone())
    torch.cuda.synchronize()
    workspace.check()
    return torch.cat(made, 1)


def leave_garbage(parallel: Any) -> None:
    """A step of one full layer, after which the gathered rows are NaNs that name local experts."""
    shape, device = parallel.shape, parallel.group.device
    workspace, dispatcher = parallel.workspace, parallel.workspace.dispatcher()
    workspace.begin_step(CAPACITY)
    got = dispatcher.dispatch(
        torch.zeros(CAPACITY, shape.hidden_size, dtype=shape.hidden_dtype, device=device),
        torch.zeros(CAPACITY, shape.topk, dtype=torch.int64, device=device),
        torch.zeros(CAPACITY, shape.topk, dtype=torch.float32, device=device),
    )
    got.hidden.fill_(torch.nan)
    got.topk_weights.fill_(torch.nan)
    got.topk_idx.fill_(parallel.owned_experts(shape.num_experts).start)
    dispatcher.combine(dispatcher.combine_input().zero_(), got)
    torch.cuda.synchronize()


def float8_logits(group: tf.EPGroup, float8: Path, plain: Path) -> tuple[bool, float]:
    """Whether all experts are float8, and the largest difference to the logits of the same weights, by the largest logit."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    quiet()
    # it asks for the package accelerate, which nothing here needs
    FineGrainedFP8HfQuantizer.validate_environment = lambda *_, **__: None  # type: ignore[method-assign]
    model = load(float8, group, transport="p2p", cuda_graphs=False)
    kernels = [layer.kernels for layer in model.expert_parallel.layers]
    is_float8 = all(each is not None and each.borrowed.weights.up_proj.dtype == torch.float8_e4m3fn for each in kernels)
    ids = torch.tensor([[5, 6, 7 + group.rank, 9]], device=group.device)
    with torch.no_grad():
        got = model(ids).logits.float()
        expected = unmodified(plain, dtype=torch.float32).to(group.device).eval()(ids).logits
    model.expert_parallel.finish()
    model.expert_parallel.close()
    return is_float8, ((got - expected).abs().max() / expected.abs().max()).item()


def random_weights(group: tf.EPGroup) -> list[float]:
    """The largest difference of logits to a model of one process with the same seed."""
    from transformers import AutoModelForCausalLM

    from tokenferry.integrations.transformers import from_config, random_state

    quiet()
    differences = []
    for family in ("qwen3_moe", "gpt_oss"):
        config = tiny_config(family)
        config._attn_implementation = "eager"
        model = from_config(config, group=group, max_tokens_per_rank=CAPACITY, dtype=torch.float32, transport="p2p", seed=3)
        ids = torch.tensor([[5, 6, 7 + group.rank]], device=group.device)
        got = model(ids).logits
        model.expert_parallel.finish()
        model.expert_parallel.close()
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        state = random_state(model_class, config, torch.float32, group.device, seed=3)
        alone = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).to(group.device).eval()
        differences.append((got - alone(ids).logits).abs().max().item())
    return differences
