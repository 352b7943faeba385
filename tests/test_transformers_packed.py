"""gpt-oss checkpoints as released: their experts stay packed, and compute what the dequantised ones do."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tokenferry as tf
from packed_checkpoint import HIDDEN, NUM_EXPERTS, dequantized, make_released
from recorded_model import load_recorded, stored
from test_experts import gathered
from tokenferry.errors import ConfigError, DtypeError, StateError
from tokenferry.experts import BorrowedExperts, ExpertWeights, mxfp4
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.testing.numeric import same_bits
from transformers_work import Work, generate, generate_batch, load

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

IDS = torch.tensor([[5, 6, 7, 8, 200, 30, 40, 41]])
MATRICES = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_released(tmp_path_factory.mktemp("released"))


@pytest.fixture
def model(path: Path) -> Iterator[Any]:
    loaded = load(path, tf.EPGroup(device="cpu"))
    yield loaded
    loaded.expert_parallel.close()


def rank_of(size: int, rank: int) -> tf.EPGroup:
    return tf.EPGroup.from_store(dist.HashStore(), rank, size)


# --- what is loaded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "owned"), [(0, range(3)), (2, range(6, 8))], ids=["first", "last"])
def test_a_rank_reads_and_holds_its_own_experts_packed(
    rank: int, owned: range, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three ranks."""
    model, reads = load_recorded(path, rank_of(3, rank), monkeypatch)
    packed = {key: ranges for key, ranges in reads.items() if key.endswith(("_blocks", "_scales"))}
    assert len(packed) == 8
    assert all({row for rows in ranges for row in rows} == set(owned) for ranges in packed.values())
    whole = stored(path)
    for number, layer in enumerate(model.expert_parallel.installed):
        held = layer.packed.weights(layer.module)
        for name, product, gated in (("gate_up_proj", "up", True), ("down_proj", "down", False)):
            assert not hasattr(layer.module, name)
            words, factors = getattr(held, f"{product}_proj"), getattr(held, f"{product}_scale")
            blocks, scales = (whole[f"model.layers.{number}.mlp.experts.{name}_{kind}"] for kind in ("blocks", "scales"))
            for place, expert in enumerate(owned):
                expected = mxfp4.dequantize(blocks[expert], scales[expert])
                found = mxfp4.unpack(words[place], factors[place], *expected.shape, gated=gated, interleaved=gated)
                assert torch.equal(found, expected), f"{name} of expert {expert}"
        assert torch.equal(held.up_bias, whole[f"model.layers.{number}.mlp.experts.gate_up_proj_bias"][owned.start : owned.stop])


class LargestFloats(TorchDispatchMode):
    """Notes how many floating numbers the largest tensor has that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and made.device.type != "meta":
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dequantized"])
def test_no_matrix_of_bfloat16_is_ever_made(packed: bool, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest other tensor is the embedding, 384 x 64, half as large as a layer's down matrices."""
    from transformers.utils.quantization_config import Mxfp4Config

    asked = {} if packed else {"quantization_config": Mxfp4Config(dequantize=True)}
    with LargestFloats() as largest:
        load_recorded(path, tf.EPGroup(device="cpu"), monkeypatch, **asked)
    assert (largest.numel < NUM_EXPERTS * HIDDEN * 64) == packed


def test_packed_experts_take_4_25_bits_a_weight(model: Any, path: Path) -> None:
    num_weights = sum(tensor.numel() for name, tensor in dequantized(path).state_dict().items() if name.endswith(MATRICES))
    held = sum(tensor.nbytes for name, tensor in model.state_dict().items() if "_packed" in name)
    assert held * 8 == 4.25 * num_weights
    saved = dequantized(path).get_memory_footprint() - model.get_memory_footprint()
    assert saved == num_weights * 2 - held


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"quantization": True}, ""),
        ({"dtype": torch.float32}, "the model is loaded in torch.float32, and packed experts take bfloat16"),
        ({"exact": True}, "with exact=True"),
        ({"experts_implementation": "grouped_mm"}, "another experts_implementation, the model's own function runs them"),
    ],
    ids=["asked-for", "float32", "exact", "grouped_mm"],
)
def test_what_unpacks_experts(kwargs: dict[str, Any], said: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for, nothing is said of it; where it follows from something else, the log says from what."""
    from transformers.utils.quantization_config import Mxfp4Config

    if kwargs.pop("quantization", False):
        kwargs = {"quantization_config": Mxfp4Config(dequantize=True)}
    with caplog.at_level(logging.WARNING, logger="tokenferry"):
        model = load(path, tf.EPGroup(device="cpu"), **kwargs)
    assert [said in message for message in caplog.messages] == ([True] if said else [])
    expected = dequantized(path, **{key: value for key, value in kwargs.items() if key == "dtype"})
    assert all(layer.packed is None for layer in model.expert_parallel.layers)
    names = [name for name in expected.state_dict() if name.endswith(MATRICES)]
    assert len(names) == 4
    assert all(torch.equal(model.state_dict()[name], expected.state_dict()[name]) for name in names)
    model.expert_parallel.close()


def test_a_quantization_config_that_asks_for_packed_experts(path: Path) -> None:
    from transformers.utils.quantization_config import Mxfp4Config

    model = load(path, tf.EPGroup(device="cpu"), quantization_config=Mxfp4Config())
    assert all(layer.packed is not None for layer in model.expert_parallel.layers)
    model.expert_parallel.close()


def test_a_configuration_that_asks_for_unpacked_experts(path: Path) -> None:
    """Its `dequantize` was overlooked once, and experts stayed packed against the caller's wish."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    config.quantization_config["dequantize"] = True
    model = load(path, tf.EPGroup(device="cpu"), config=config)
    assert all(layer.packed is None for layer in model.expert_parallel.layers)
    model.expert_parallel.close()


def test_blocks_and_scales_in_different_files(model: Any, path: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    files: dict[str, dict[str, torch.Tensor]] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = files
    where = {key: second if key.endswith("_scales") else first for key in stored(path)}
    for key, tensor in stored(path).items():
        files[where[key]][key] = tensor
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    split = load(tmp_path, tf.EPGroup(device="cpu"))
    assert torch.equal(split(IDS).logits, model(IDS).logits)
    split.expert_parallel.close()


# --- what is computed -----------------------------------------------------------------------------------------------------


def test_experts_have_the_bits_of_dequantised_ones(model: Any, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, HIDDEN, generator=generator).bfloat16()
    idx = torch.rand(9, NUM_EXPERTS, generator=generator).topk(2).indices.int()
    rows = gathered(hidden, idx, torch.rand(9, 2, generator=generator), num_valid=9)
    for layer, whole in zip(model.expert_parallel.layers, dequantized(path).model.layers, strict=True):
        experts = whole.mlp.experts
        weights = ExpertWeights.view(
            experts.gate_up_proj,
            experts.down_proj,
            transposed=True,
            up_bias=experts.gate_up_proj_bias,
            down_bias=experts.down_proj_bias,
        )
        plain = BorrowedExperts(weights, range(NUM_EXPERTS), layer.packed.activation, dtype=torch.bfloat16)
        for out_dtype in (torch.float32, torch.bfloat16):
            out, expected = (torch.empty(9, HIDDEN, dtype=out_dtype) for _ in range(2))
            assert same_bits(layer.kernels(rows, out), plain(rows, expected))


def test_the_model_writes_what_the_dequantised_one_does(model: Any, path: Path) -> None:
    """Roundings to bfloat16 come in other places, so that logits differ, but not more from those of float32."""
    whole, exact = dequantized(path), dequantized(path, dtype=torch.float32)(IDS).logits
    errors = [(each(IDS).logits.float() - exact).square().mean().sqrt() for each in (model, whole)]
    assert 0 < errors[0] < 1.1 * errors[1]
    for work in (Work((5, 17, 9), 8), Work((30,), 24)):
        assert generate(model, work, 0)[0] == generate(whole, work, 0)[0]


@pytest.mark.parametrize("combine_dtype", [None, torch.float8_e4m3fn], ids=["bfloat16 terms", "float8 terms"])
def test_formats_of_the_wire(combine_dtype: torch.dtype | None, path: Path) -> None:
    """Rows that travel as float8 cost packed experts no more than dequantised ones."""
    from transformers.utils.quantization_config import Mxfp4Config

    exact, errors = dequantized(path, dtype=torch.float32)(IDS).logits, []
    for kwargs in ({}, {"quantization_config": Mxfp4Config(dequantize=True)}):
        model = load(path, tf.EPGroup(device="cpu"), combine_dtype=combine_dtype, dispatch_format="fp8_block128", **kwargs)
        errors.append((model(IDS).logits.float() - exact).square().mean().sqrt())
        model.expert_parallel.close()
    assert 0 < errors[0] < 1.1 * errors[1]


def test_continuous_batching(model: Any, path: Path) -> None:
    work = Work((5, 17, 9), 8)
    assert generate_batch(model, work, 0)[0] == generate_batch(dequantized(path), work, 0)[0]


def test_compiled(model: Any) -> None:
    expected = model(IDS).logits
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(IDS).logits, expected)


# --- checkpoints that do not fit --------------------------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.experts.down_proj"
LACKS = {
    "no-scales": ([f"{DOWN}_scales"], f"has {DOWN}_blocks but no {DOWN}_scales beside it"),
    "no-blocks": ([f"{DOWN}_blocks"], f"has {DOWN}_scales but no {DOWN}_blocks beside it"),
    "no-matrix": ([f"{DOWN}_blocks", f"{DOWN}_scales"], f"has no {DOWN}_blocks"),
    "no-bias": ([f"{DOWN}_bias"], f"lacks 1 of the model's parameters, such as {DOWN}_bias"),
}


def changed(path: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint with other tensors, or (None) without some."""
    from safetensors.torch import save_file

    tensors = {key: tensor for key, tensor in {**stored(path), **change}.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((path / "config.json").read_text())
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lack", LACKS)
def test_what_is_lacking_is_named_on_every_rank(lack: str, rank: int, path: Path, tmp_path: Path) -> None:
    without, told = LACKS[lack]
    broken = changed(path, tmp_path, dict.fromkeys(without))
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        from_pretrained(str(broken), group=rank_of(2, rank), max_tokens_per_rank=4, open_timeout_s=1.0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("rows", "groups"), [(63, 2), (64, 1)], ids=["a-row-less", "a-group-less"])
def test_truncated_scales_are_named_on_every_rank(rows: int, groups: int, rank: int, path: Path, tmp_path: Path) -> None:
    scales = stored(path)[f"{DOWN}_scales"][:, :rows, :groups].contiguous()
    broken = changed(path, tmp_path, {f"{DOWN}_scales": scales})
    with pytest.raises(ConfigError, match=rf"down_proj_scales has shape \[8, {rows}, {groups}\], but \[8, 64, 2\] is needed"):
        from_pretrained(str(broken), group=rank_of(2, rank), max_tokens_per_rank=4, open_timeout_s=1.0)


def test_a_scale_that_packed_weights_cannot_hold(path: Path, tmp_path: Path) -> None:
    scales = stored(path)[f"{DOWN}_scales"]
    scales[5, 3, 1] = 200
    broken = changed(path, tmp_path, {f"{DOWN}_scales": scales})
    told = (
        r"expert 5 of model\.layers\.1\.mlp\.experts cannot stay packed: .* scale byte of 200, .*Mxfp4Config\(dequantize=True\)"
    )
    with pytest.raises(ConfigError, match=told):
        load(broken, tf.EPGroup(device="cpu"))


def test_rows_that_do_not_divide_into_groups(path: Path, tmp_path: Path) -> None:
    up = "model.layers.0.mlp.experts.gate_up_proj"
    longer = {f"{up}_blocks": torch.zeros(8, 144, 2, 16).byte(), f"{up}_scales": torch.zeros(8, 144, 2).byte()}
    broken = changed(path, tmp_path, longer)
    config = json.loads((path / "config.json").read_text()) | {"intermediate_size": 72}
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="its 72 columns are no multiple of 32"):
        load(broken, tf.EPGroup(device="cpu"))


# --- what a loaded model may be asked ---------------------------------------------------------------------------------------


def test_state_dict_holds_packed_experts_and_takes_them_back(model: Any, path: Path) -> None:
    kept, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(IDS).logits
    other = load(path, tf.EPGroup(device="cpu"))
    for layer in other.expert_parallel.layers:
        layer.module.down_proj_packed.zero_()
    assert not torch.equal(other(IDS).logits, expected)
    other.load_state_dict(kept)
    assert torch.equal(other(IDS).logits, expected)
    other.expert_parallel.close()


def test_packed_models_are_not_saved_nor_cast(model: Any, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="save the model from a process that loads it with transformers alone"):
        model.save_pretrained(tmp_path)
    with pytest.raises(DtypeError):
        model.to(torch.float16)
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.experts.down_proj_packed.dtype == torch.int32


def test_a_change_that_only_unpacked_experts_could_follow_is_an_error(model: Any) -> None:
    """An eager layer of bfloat16 would go back to the model's own function."""
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(StateError, match=r"MoE layer 0 of 2 has packed experts.*another experts_implementation was set; undo"):
        model(IDS)
    model.set_experts_implementation("tokenferry")
    model.expert_parallel.reset()
    assert model(IDS).logits.isfinite().all()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj_packed = experts.down_proj_packed.clone()
    with pytest.raises(StateError, match="MoE layer 1 of 2 has packed experts"):
        model(IDS)


def test_kernels_that_cannot_be_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenferry.integrations.transformers import fallbacks

    class Scratch:
        serves = staticmethod(lambda _device: True)

    def fail(kernels: Any, *_: Any) -> Any:
        return None, dict.fromkeys(kernels, "its kernels could not be loaded: no compiler")

    monkeypatch.setattr(fallbacks, "ExpertScratch", Scratch)
    monkeypatch.setattr(fallbacks, "prepare_together", fail)
    with pytest.raises(ConfigError, match=r"packed experts run by .* alone, and its kernels could not be loaded: no compiler"):
        load(path, tf.EPGroup(device="cpu"))


# --- random weights -------------------------------------------------------------------------------------------------------


def test_random_packed_experts_are_those_of_the_unmodified_model() -> None:
    from tokenferry.benchmarking.model_request import configured
    from tokenferry.benchmarking.model_ways import ours, unmodified

    config, group = configured("gpt-oss-20b-mxfp4:2", rehearse=True), tf.EPGroup(device="cpu")
    model, whole = ours(group, config, 16, "local", torch.bfloat16), unmodified(group, config, torch.bfloat16)
    assert all(layer.packed is not None for layer in model.expert_parallel.layers)
    experts = whole.model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == torch.bfloat16
    assert 0.7 < experts.gate_up_proj.float().std() / config.initializer_range < 1.4
    logits, expected = model(IDS).logits.float(), whole(IDS).logits.float()
    assert (logits - expected).square().mean().sqrt() < 0.03 * expected.std()
    model.expert_parallel.close()
