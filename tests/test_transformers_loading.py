"""What a rank reads of a checkpoint: its own experts and everything that is no expert, and nothing of another rank's."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from recorded_model import Recorder, load_recorded, pack_experts, stored
from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers.loading import OwnRows, Shard, own_tensors
from tokenferry.testing.tiny_models import make_tiny

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

CPU = torch.device("cpu")


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
