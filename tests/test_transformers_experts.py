"""Loading and running a rank's own experts, without other processes: what is read, and that nothing else leaks in."""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.errors import ConfigError, StateError
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.integrations.transformers.checkpoint import INDEX, check_files
from tokenferry.integrations.transformers.exchange import Rows, exchange_slots, exchange_sums
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel
from tokenferry.integrations.transformers.loading import OwnRows, Shard, own_keys, own_tensors
from tokenferry.integrations.transformers.local_experts import local_choices
from tokenferry.integrations.transformers.one_thread import OneThread
from tokenferry.integrations.transformers.stopwatch import Stopwatch
from tokenferry.testing.tiny_models import make_tiny, tiny_config

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


# --- checkpoints that are not whole ---------------------------------------------------------------------------------


EACH = Shard(4, range(2, 4), 3)
"""The upper half of four experts."""


@pytest.mark.parametrize(
    ("numbers", "own"),
    [((0, 1, 2, 3), (2, 3)), ((3, 2, 1, 0), (2, 3)), ((0, 1, 2, 3, 4, 5, 6, 7), (2, 3, 6, 7))],
    ids=["in-order", "in-any-order", "two-parameters"],
)
def test_experts_are_known_by_their_number(numbers: tuple[int, ...], own: tuple[int, ...]) -> None:
    """ernie fills two parameters from one list."""
    keys = [f"model.layers.7.mlp.experts.{number}.up_proj.weight" for number in numbers]
    assert own_keys(keys, EACH) == [f"model.layers.7.mlp.experts.{number}.up_proj.weight" for number in own]


@pytest.mark.parametrize("numbers", [(0, 2, 3), (0, 2, 3, 4), (0,)], ids=["one", "one-of-two-lists", "all-but-one"])
def test_an_expert_that_is_lacking_is_named(numbers: tuple[int, ...]) -> None:
    keys = [f"layers.7.experts.{number}.up_proj.weight" for number in numbers]
    with pytest.raises(ConfigError, match=r"there is no tensor layers\.7\.experts\.1\.up_proj\.weight"):
        own_keys(keys, EACH)


@dataclass(frozen=True)
class Lack:
    """Tensors that are taken out of a tiny qwen3_moe checkpoint, and what the error names."""

    name: str
    without: str
    told: str


LACKS = [
    Lack("an-expert", "layers.1.mlp.experts.6.up", "there is no tensor model.layers.1.mlp.experts.6.up_proj.weight"),
    Lack("all-ups", "up_proj", "none named mlp.experts.*.up_proj.weight beside them"),
    Lack("a-layer's-experts", "layers.1.mlp.experts", "2 of the model's parameters, such as model.layers.1.mlp.experts.gate_up"),
    Lack("a-norm", "model.norm.weight", "1 of the model's parameters, such as model.norm.weight"),
    Lack("the-head", "lm_head", "1 of the model's parameters, such as lm_head.weight"),
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lack", LACKS, ids=lambda lack: lack.name)
def test_what_a_checkpoint_lacks_is_named_on_every_rank(lack: Lack, rank: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = make_tiny("qwen3_moe", tmp_path)
    tensors = {key: tensor for key, tensor in stored(path).items() if lack.without not in key}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    group = tf.EPGroup.from_store(dist.HashStore(), rank, 2)
    with pytest.raises(ConfigError, match=re.escape(lack.told)):
        from_pretrained(str(path), group=group, max_tokens_per_rank=4, open_timeout_s=1.0)


def test_tied_weights_are_no_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen3_moe")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    model, _ = load_recorded(tmp_path, tf.EPGroup.from_store(dist.HashStore(), 0, 2), monkeypatch)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@dataclass(frozen=True)
class Damage:
    """What became of a safetensors file, and what the error says of it."""

    name: str
    change: Callable[[bytes], bytes]
    told: str


DAMAGES = [
    Damage("in-its-tensors", lambda data: data[: len(data) * 2 // 3], r"is cut off: \d+ bytes of \d+"),
    Damage("in-its-header", lambda data: data[:100], r"is cut off: 100 bytes, of which the header alone needs \d+"),
    Damage("in-its-size", lambda data: data[:7], "is cut off: it has 7 bytes"),
    Damage("empty", lambda data: b"", "an empty file"),
    Damage("lfs", lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS .`git lfs pull`"),
    Damage("page", lambda data: b"<html><body>404</body></html>", "text that begins '<html>"),
    Damage("noise", lambda data: b"\xff" * 100, "does not begin with the size of a header"),
    Damage("no-header", lambda data: (9).to_bytes(8, "little") + b"\x01" * 99, "its header is not one"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_a_damaged_file_is_named_with_what_it_seems_to_be(damage: Damage, tmp_path: Path) -> None:
    from safetensors.torch import save

    data = save({"a": torch.zeros(100), "b": torch.zeros(100)})
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(data)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    check_files(tmp_path)
    (tmp_path / names[1]).write_bytes(damage.change(data))
    with pytest.raises(ConfigError, match=f"00002-of-00002.safetensors .*{damage.told}"):
        check_files(tmp_path)


def test_a_file_that_the_index_lists_and_the_folder_lacks(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ConfigError, match=r"00001-of-00001.safetensors is lacking, and model.safetensors.index.json lists it"):
        check_files(tmp_path)


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


# --- threads ----------------------------------------------------------------------------------------------------------


def in_another_thread(call: Callable[[], object]) -> BaseException | None:
    """What `call` raises there."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_second_thread_is_refused_and_the_first_goes_on() -> None:
    turn = OneThread(waits=False)
    with turn.inside("generate"), turn.inside("forward"):
        error = in_another_thread(lambda: turn.enter("generate"))
        assert isinstance(error, StateError)
        assert "generate: another thread (MainThread) is in the middle of a call" in str(error)
        assert turn.is_mine()
    assert in_another_thread(turn.inside("generate").__enter__) is None


def test_a_second_thread_waits_if_it_is_asked_to() -> None:
    turn, came = OneThread(waits=True), []
    thread = threading.Thread(target=lambda: (turn.enter("generate"), came.append(None), turn.leave()))
    with turn.inside("generate"):
        thread.start()
        thread.join(0.2)
        assert not came
    thread.join(10.0)
    assert came


def test_the_thread_for_which_the_owner_waits_is_let_in_and_no_third() -> None:
    """As continuous batching has it."""
    turn = OneThread(waits=False)

    def guest() -> None:
        turn.enter("forward", as_guest=True)
        turn.leave()
        assert isinstance(in_another_thread(lambda: turn.enter("forward", as_guest=True)), StateError)
        turn.enter("forward", as_guest=True)
        turn.leave()

    with turn.hosting("generate_batch"):
        assert isinstance(in_another_thread(lambda: turn.enter("generate")), StateError)
        assert in_another_thread(guest) is None
    assert in_another_thread(lambda: turn.enter("generate")) is None


def test_a_thread_that_ended_amid_a_call_blocks_nobody() -> None:
    turn = OneThread(waits=False)
    assert in_another_thread(lambda: turn.enter("forward")) is None
    turn.enter("forward")
    assert turn.is_mine()


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
