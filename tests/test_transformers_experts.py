"""Loading and running a rank's own experts, without other processes: what is read, and that nothing else leaks in."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.integrations.transformers.exchange import Rows, exchange_slots, exchange_sums
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel
from tokenferry.integrations.transformers.loading import OwnRows, Shard, own_tensors
from tokenferry.integrations.transformers.local_experts import local_choices
from tokenferry.integrations.transformers.stopwatch import Stopwatch
from tokenferry.testing.tiny_models import make_tiny

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

CPU = torch.device("cpu")


class Opened(Exception):
    """Raised in the place of opening a workspace: loading is over."""


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rank", "owned"),
    [("qwen3_moe", 0, range(3)), ("qwen3_moe", 2, range(6, 8)), ("gpt_oss", 1, range(3, 6)), ("llama4", 0, range(2))],
    ids=lambda value: f"{value.start}-{value.stop}" if isinstance(value, range) else str(value),
)
def test_a_rank_reads_its_own_experts_only(
    family: str, rank: int, owned: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three ranks. qwen3_moe stores each expert by itself; gpt_oss and llama4 all in one tensor."""
    model, reads = load_recorded(make_tiny(family, tmp_path), tf.EPGroup.from_store(dist.HashStore(), rank, 3), monkeypatch)
    whole = stored(tmp_path)
    for key, rows in reads.items():
        if ".experts." not in key:
            assert rows == [range(whole[key].shape[0])]
        elif family == "qwen3_moe":
            assert int(key.split(".experts.")[1].split(".")[0]) in owned
        else:
            assert rows == [owned]
    skipped = whole.keys() - reads.keys()
    assert all(".experts." in key for key in skipped)
    assert bool(skipped) == (family == "qwen3_moe")
    for layer in model.expert_parallel.installed:
        assert {shard.rows for shard in layer.shards.values()} == {owned}
        assert all(getattr(layer.module, name).shape[0] == len(owned) for name in layer.shards)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_weights_are_those_of_the_whole_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    path = make_tiny(family, tmp_path)
    model, _ = load_recorded(path, tf.EPGroup.from_store(dist.HashStore(), 1, 3), monkeypatch)
    shards = model.expert_parallel.shards(model)
    assert shards
    for name, tensor in AutoModelForCausalLM.from_pretrained(path).state_dict().items():
        rows = shards[name].rows if name in shards else range(tensor.shape[0] if tensor.dim() else 0)
        assert torch.equal(model.state_dict()[name], tensor[rows.start : rows.stop] if tensor.dim() else tensor), name


def test_packed_experts_are_cut_before_they_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real gpt_oss checkpoints hold MXFP4 blocks and scales, which transformers makes bfloat16 while it loads."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    path = pack_experts(make_tiny("gpt_oss", tmp_path))
    quantization = {"quantization_config": Mxfp4Config(dequantize=True)}
    group = tf.EPGroup.from_store(dist.HashStore(), 1, 3)
    model, reads = load_recorded(path, group, monkeypatch, "bfloat16", **quantization)
    assert {tuple(rows) for key, rows in reads.items() if key.endswith(("_blocks", "_scales"))} == {(range(3, 6),)}
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **quantization).state_dict()
    for name, shard in model.expert_parallel.shards(model).items():
        assert torch.equal(model.state_dict()[name], whole[name][shard.rows.start : shard.rows.stop]), name


def test_own_rows_reads_rows_of_dimension_0() -> None:
    recorder = Recorder("experts", torch.arange(12).view(4, 3), {})
    own = OwnRows(recorder, range(1, 3))
    assert torch.equal(own[...], torch.tensor([[3, 4, 5], [6, 7, 8]]))
    assert own.get_shape() == [2, 3]
    assert own.get_dtype() == "I64"
    assert recorder.reads == {"experts": [range(1, 3)]}


def test_a_tensor_that_holds_neither_one_expert_nor_all(tmp_path: Path) -> None:
    model = SimpleNamespace(base_model_prefix="model", state_dict=lambda: {"experts": torch.empty(2, 3, 5)})
    tensors = {"experts": torch.empty(7, 3, 5)}
    with pytest.raises(ConfigError, match=r"experts has shape \[7, 3, 5\], which holds neither one expert nor all 4"):
        own_tensors(tensors, model, None, {"experts": Shard(4, range(2), 3)})


# --- running --------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(exchange_slots(dispatcher, layer.experts, rows, [5], Stopwatch(CPU)), expected)


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


def test_stopwatch_adds_up() -> None:
    stopwatch = Stopwatch(CPU)
    assert stopwatch.total_s == 0.0
    for _ in range(2):
        before_s = stopwatch.total_s
        with stopwatch.running():
            sum(range(1000))
        assert stopwatch.total_s > before_s


# --- stand-ins --------------------------------------------------------------------------------------------------------


class Recorder:
    """A stored tensor that notes which rows of it are read."""

    def __init__(self, key: str, tensor: torch.Tensor, reads: dict[str, list[range]]) -> None:
        self._key, self._tensor, self.reads = key, tensor, reads

    def __getitem__(self, index: Any) -> torch.Tensor:
        size = self._tensor.shape[0] if self._tensor.dim() else 0
        rows = range(size) if index is Ellipsis else range(*index.indices(size))
        self.reads.setdefault(self._key, []).append(rows)
        return self._tensor[index].clone()

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}[self._tensor.dtype]


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
        assert partial.shape == self._input.shape
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


def stored(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def pack_experts(path: Path) -> Path:
    """Puts random MXFP4 blocks in the place of a gpt_oss checkpoint's expert matrices."""
    from safetensors.torch import save_file

    packed, generator = {}, torch.Generator().manual_seed(0)
    for key, tensor in stored(path).items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, num_inputs, num_outputs = tensor.shape
            shape = (num_experts, num_outputs, num_inputs // 32)
            packed[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            packed[f"{key}_scales"] = torch.full(shape, 124, dtype=torch.uint8)
        else:
            packed[key] = tensor
    save_file(packed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def load_recorded(
    path: Path, group: tf.EPGroup, monkeypatch: pytest.MonkeyPatch, dtype: str = "auto", **kwargs: Any
) -> tuple[Any, dict[str, list[range]]]:
    """A model as one rank has it, with no peers and no workspace, and the rows that were read of each stored tensor."""
    reads: dict[str, list[range]] = {}

    @contextlib.contextmanager
    def recorded(files: Sequence[str]) -> Iterator[dict[str, Any]]:
        yield {key: Recorder(key, tensor, reads) for file in files for key, tensor in loading_file(file).items()}

    kept: list[Any] = []
    whole_open = ExpertParallel.open

    def keep_and_open(parallel: ExpertParallel, model: Any) -> None:
        kept.append(model)
        whole_open(parallel, model)

    def stop(*_: Any, **__: Any) -> None:
        raise Opened

    from safetensors.torch import load_file as loading_file

    monkeypatch.setattr("tokenferry.integrations.transformers.model.open_tensors", recorded)
    monkeypatch.setattr("tokenferry.integrations.transformers.expert_parallel.Workspace", stop)
    monkeypatch.setattr(ExpertParallel, "open", keep_and_open)
    with pytest.raises(Opened):
        from_pretrained(str(path), group=group, max_tokens_per_rank=16, dtype=dtype, **kwargs)
    return kept[0], reads
