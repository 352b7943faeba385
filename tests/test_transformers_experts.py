"""Running a rank's own experts, without other processes: rows that hold no token leak nothing into the sums."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from recorded_model import load_recorded
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.integrations.transformers.exchange import Rows, exchange_choices, exchange_sums
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel
from tokenferry.integrations.transformers.local_experts import local_choices
from tokenferry.integrations.transformers.stopwatch import Stopwatch
from tokenferry.testing.tiny_models import make_tiny, tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

CPU = torch.device("cpu")


def test_local_choices() -> None:
    local_idx, is_own = local_choices(torch.tensor([[3, 0], [2, -1]]), range(2, 4))
    assert local_idx.tolist() == [[1, 2], [0, 2]]
    assert is_own.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize("partial_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h"])
def test_rows_without_a_token_leak_nothing(
    family: str, partial_dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symmetric transports return rows beyond V with id -1 and whatever was in memory. Here it is NaN."""
    model, _ = load_recorded(make_tiny(family, tmp_path), tf.EPGroup.from_store(dist.HashStore(), 0, 2), monkeypatch, "bfloat16")
    layer = model.expert_parallel.installed[0]
    rows = some_rows(model.expert_parallel, num_tokens=5)
    alone = layer.experts.partial(rows.hidden_TH, rows.topk_idx_TK, rows.topk_weights_TK, partial_dtype)
    poisoned = poison(rows, num_rows=9)
    beside = layer.experts.partial(poisoned.hidden_TH, poisoned.topk_idx_TK, poisoned.topk_weights_TK, partial_dtype)
    assert alone.dtype == beside.dtype == partial_dtype
    assert torch.isfinite(beside[:5].float()).all()
    torch.testing.assert_close(beside[:5], alone, rtol=2**-6, atol=2**-6)
    assert alone.abs().sum() > 0


@pytest.mark.parametrize("num_valid_rows", [None, 5], ids=["all-rows", "valid-rows"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_gathered_rows_beyond_those_of_the_ranks(
    family: str, num_valid_rows: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange on a transport whose gathered tensors have C * EP rows, with and without the host knowing V."""
    model, _ = load_recorded(make_tiny(family, tmp_path), tf.EPGroup(device="cpu"), monkeypatch)
    layer = model.expert_parallel.installed[0]
    rows = some_rows(model.expert_parallel, num_tokens=5)
    expected = layer.experts.partial(rows.hidden_TH, rows.topk_idx_TK, rows.topk_weights_TK, torch.float32)
    dispatcher = Static(rows.hidden_TH.shape[1], num_rows=9)
    summed = exchange_sums(dispatcher, layer.experts, rows, num_valid_rows, torch.float32, Stopwatch(CPU))
    torch.testing.assert_close(summed, expected)
    dispatcher = Static(rows.hidden_TH.shape[1] * rows.topk_idx_TK.shape[1], num_rows=9)
    torch.testing.assert_close(exchange_choices(dispatcher, layer.experts, rows, [5], Stopwatch(CPU)), expected)


@pytest.mark.parametrize(
    ("dtype", "kwargs", "combine_dtype"),
    [
        (torch.bfloat16, {}, torch.float32),
        (torch.bfloat16, {"combine_dtype": None}, torch.bfloat16),
        (torch.bfloat16, {"exact": True}, torch.bfloat16),
        (torch.float32, {"combine_dtype": None}, torch.float32),
    ],
    ids=["bf16", "bf16-None", "bf16-exact", "fp32-None"],
)
def test_alone_it_is_the_usual_model(
    dtype: torch.dtype, kwargs: dict[str, Any], combine_dtype: torch.dtype, tmp_path: Path
) -> None:
    """A group of one, on the local transport."""
    from transformers import MixtralForCausalLM

    group = tf.EPGroup(device="cpu")
    model = from_pretrained(str(make_tiny("mixtral", tmp_path)), group=group, max_tokens_per_rank=16, dtype=dtype, **kwargs)
    assert isinstance(model, MixtralForCausalLM)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert model.dtype == dtype
    assert model.expert_parallel.workspace.combine_dtype == combine_dtype
    assert model.expert_parallel.num_local_experts == 4
    assert len(model.expert_parallel.layers) == 2
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = MixtralForCausalLM.from_pretrained(tmp_path, dtype=dtype).generate(ids, max_new_tokens=6)
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    model.expert_parallel.finish()
    assert model.expert_parallel.communication_s > 0
    model.expert_parallel.close()


@pytest.mark.parametrize("at_a_time", [1 << 28, 1], ids=["at-once", "row-by-row"])
def test_rows_that_are_no_multiple_of_16_bytes(at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16, hidden size 36 and intermediate size 20: 72 and 40 bytes, which grouped_mm refuses."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("tokenferry.integrations.transformers.local_experts.GATHERED_BYTES", at_a_time)
    config = tiny_config("qwen3_moe")
    config.hidden_size, config.moe_intermediate_size = 36, 20
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loading = {"dtype": torch.bfloat16}
    model = from_pretrained(str(tmp_path), group=tf.EPGroup(device="cpu"), max_tokens_per_rank=16, **loading)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager", **loading)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=2**-5, atol=2**-4)
    model.expert_parallel.close()


class Static:
    """A dispatcher of one rank with room for `num_rows`, all but the rank's own of them NaN."""

    def __init__(self, hidden_size: int, num_rows: int) -> None:
        self._input = torch.full((num_rows, hidden_size), torch.nan)

    def dispatch(self, hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Any:
        self._num_tokens = hidden.shape[0]
        poisoned = poison(Rows(hidden, topk_idx, topk_weights), self._input.shape[0])
        return SimpleNamespace(
            hidden=poisoned.hidden_TH, topk_idx=poisoned.topk_idx_TK.int(), topk_weights=poisoned.topk_weights_TK.float()
        )

    def combine_input(self) -> torch.Tensor:
        return self._input

    def combine(self, partial: torch.Tensor, _dispatched: Any) -> torch.Tensor:
        num_rows, hidden_size = partial.shape
        assert self._num_tokens <= num_rows <= self._input.shape[0]
        assert hidden_size == self._input.shape[1]
        assert partial.is_contiguous()
        return partial[: self._num_tokens].clone()


def poison(rows: Rows, num_rows: int) -> Rows:
    def longer(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((num_rows - tensor.shape[0], tensor.shape[1]), value)])

    return Rows(longer(rows.hidden_TH, torch.nan), longer(rows.topk_idx_TK, -1), longer(rows.topk_weights_TK, torch.nan))


def some_rows(parallel: ExpertParallel, num_tokens: int) -> Rows:
    """Rows like those of the model's first forward."""
    shape = parallel.shape
    generator = torch.Generator().manual_seed(0)
    idx = torch.stack([torch.randperm(shape.num_experts, generator=generator)[: shape.topk] for _ in range(num_tokens)])
    hidden = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(shape.hidden_dtype)
    return Rows(hidden, idx, torch.rand(num_tokens, shape.topk, generator=generator).to(shape.weight_dtype))
