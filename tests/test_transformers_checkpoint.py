"""Checkpoints that are not whole: the error names the file, the expert or the parameter that is lacking, on every rank."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from recorded_model import load_recorded, stored
from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.integrations.transformers.checkpoint import INDEX, check_files
from tokenferry.integrations.transformers.loading import Shard, own_keys
from tokenferry.testing.tiny_models import make_tiny, tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

CPU = torch.device("cpu")


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
