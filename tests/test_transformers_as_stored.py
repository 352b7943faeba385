"""Checkpoints and configurations that say otherwise than transformers expects how their numbers are stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from float8_checkpoint import make_float8
from packed_checkpoint import make_released
from recorded_model import stored
from tokenferry.errors import ConfigError
from tokenferry.integrations.transformers import from_config, from_pretrained
from transformers_work import load

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_released(tmp_path_factory.mktemp("released"))


def as_object(dequantize: bool) -> Any:
    from transformers.utils.quantization_config import Mxfp4Config

    return Mxfp4Config(dequantize=dequantize)


def as_dictionary(dequantize: bool) -> dict[str, Any]:
    return {"quant_method": "mxfp4", "dequantize": dequantize}


@pytest.mark.parametrize("loading", ["from_pretrained", "from_config"])
@pytest.mark.parametrize("dequantize", [False, True], ids=["packed", "dequantized"])
@pytest.mark.parametrize("form", [as_object, as_dictionary], ids=["object", "dictionary"])
def test_a_configuration_holds_its_quantization_as_either(
    form: Callable[[bool], Any], dequantize: bool, loading: str, released: Path
) -> None:
    """The configuration of a loaded model holds an object, of which transformers 5.23 itself asks for what dictionaries have."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(released)
    given = config.quantization_config = form(dequantize)
    group = tf.EPGroup(device="cpu")
    if loading == "from_pretrained":
        model = load(released, group, config=config)
    else:
        model = from_config(config, group=group, max_tokens_per_rank=16)
    assert all((layer.packed is None) == dequantize for layer in model.expert_parallel.layers)
    assert config.quantization_config is given, "the caller's own configuration stays as it was"
    model.expert_parallel.close()


@pytest.mark.parametrize("dequantize", [False, True], ids=["packed", "dequantized"])
@pytest.mark.parametrize("form", [as_object, as_dictionary], ids=["object", "dictionary"])
def test_the_argument_is_taken_as_either(form: Callable[[bool], Any], dequantize: bool, released: Path) -> None:
    model = load(released, tf.EPGroup(device="cpu"), quantization_config=form(dequantize))
    assert all((layer.packed is None) == dequantize for layer in model.expert_parallel.layers)
    model.expert_parallel.close()


def test_an_argument_of_another_method_is_refused(released: Path) -> None:
    """It was once overlooked, and experts stayed packed."""
    from transformers import FineGrainedFP8Config

    with pytest.raises(ValueError, match="quantized with Mxfp4Config but you are passing a FineGrainedFP8Config"):
        load(released, tf.EPGroup(device="cpu"), quantization_config=FineGrainedFP8Config())


def in_two_files(path: Path, folder: Path, is_first: Callable[[torch.Tensor], bool]) -> Path:
    """The checkpoint without a dtype in its configuration, with the tensors of which `is_first` is true in a file before the
    others'."""
    from safetensors.torch import save_file

    files: dict[str, dict[str, torch.Tensor]] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = files
    where = {key: first if is_first(tensor) else second for key, tensor in stored(path).items()}
    for key, tensor in stored(path).items():
        files[where[key]][key] = tensor
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    settings = json.loads((path / "config.json").read_text())
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_the_first_file_of_packed_experts_holds_integers_alone(released: Path, tmp_path: Path) -> None:
    split = in_two_files(released, tmp_path, lambda tensor: tensor.dtype == torch.uint8)
    model, whole = (load(path, tf.EPGroup(device="cpu")) for path in (split, released))
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, whole(ids).logits)
    for each in (model, whole):
        each.expert_parallel.close()


def test_the_first_file_of_a_float8_checkpoint_holds_float8_alone(tmp_path: Path) -> None:
    """Its scales, float32, are in the other file, and are fewer than its other numbers."""
    (tmp_path / "split").mkdir()
    float8, _ = make_float8(tmp_path)
    split = in_two_files(float8, tmp_path / "split", lambda tensor: tensor.dtype == torch.float8_e4m3fn)
    model = load(split, tf.EPGroup(device="cpu"))
    assert model.dtype == torch.bfloat16
    model.expert_parallel.close()


def test_a_checkpoint_of_integers_alone_says_what_to_do(released: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    integers = {key: tensor for key, tensor in stored(released).items() if tensor.dtype == torch.uint8}
    save_file(integers, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(released / "config.json", tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"holds torch\.uint8 alone, .*dtype=torch\.bfloat16"):
        from_pretrained(str(tmp_path), group=tf.EPGroup(device="cpu"), max_tokens_per_rank=4)


def test_a_dtype_in_which_no_model_can_be_loaded(released: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of torch\.float64, .*; got torch\.uint8"):
        from_pretrained(str(released), group=tf.EPGroup(device="cpu"), max_tokens_per_rank=4, dtype=torch.uint8)
