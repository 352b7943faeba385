"""Configurations by name and by file, and the random weights that are made for them."""

import json
import re
from pathlib import Path

import pytest
import torch

from tokenferry.errors import ConfigError
from tokenferry.testing.model_configs import MODEL_CONFIGS, config_values, model_config
from tokenferry.testing.tiny_models import tiny_config

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs

PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_each_name_is_a_configuration_of_transformers(name: str) -> None:
    config = model_config(f"{name}:3")
    assert (config.num_hidden_layers, config.eos_token_id) == (3, None)
    assert model_config(name).num_hidden_layers > 3


def test_a_file_and_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny_config("mixtral").to_json_string())
    assert config_values(str(tmp_path)) == config_values(str(tmp_path / "config.json"))
    assert model_config(str(tmp_path)).num_local_experts == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "names no model_type"), (json.dumps({"model_type": "none-such"}), "knows no such model")],
    ids=["cut off", "a list", "an unknown type"],
)
def test_a_file_that_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        model_config(str(tmp_path))


def test_random_weights_follow_from_seed_name_and_expert_alone() -> None:
    from transformers import MixtralForCausalLM

    from tokenferry.integrations.transformers import random_state

    config = tiny_config("mixtral")
    state, other = (random_state(MixtralForCausalLM, config, torch.float32, CPU, seed) for seed in (0, 1))
    name = next(name for name in state if name.endswith("experts.down_proj"))
    whole = state[name][...]
    assert whole.shape == state[name].shape == torch.Size([4, 64, 48])
    assert torch.equal(whole[1:3], state[name][1:3])
    assert torch.equal(whole[2, :5], state[name][2:3, :5][0])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, other[name][...])
    assert 0.19 < whole.std() < 0.21  # the configuration's initializer_range is 0.2
    norm = next(name for name in state if name.endswith("norm.weight"))
    assert torch.equal(state[norm][...], torch.ones(64))


def test_random_weights_have_a_dtype_of_checkpoints() -> None:
    from transformers import MixtralForCausalLM

    from tokenferry.integrations.transformers import random_state

    with pytest.raises(ConfigError, match=r"random weights are torch\.float32"):
        random_state(MixtralForCausalLM, tiny_config("mixtral"), torch.int8, CPU)


def test_the_example_of_the_page_runs_as_it_stands() -> None:
    [example] = [text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "from_config" in text]
    exec(compile(example, "docs/transformers.md", "exec"), {})


def test_random_packed_weights_follow_from_the_same() -> None:
    from transformers import GptOssForCausalLM

    from tokenferry.integrations.transformers import random_state

    config = tiny_config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    state = random_state(GptOssForCausalLM, config, torch.bfloat16, CPU)
    name = "model.layers.0.mlp.experts.down_proj"
    assert name not in state
    blocks, scales = state[f"{name}_blocks"], state[f"{name}_scales"]
    whole = blocks[...]
    assert whole.shape == blocks.shape == torch.Size([8, 64, 1, 16])
    assert torch.equal(whole[1:3], blocks[1:3]) and not torch.equal(whole[0], whole[1])
    assert len(whole.unique()) == 256
    assert set(scales[...].flatten().tolist()) == {123}  # 1 / 16, with which codes are 0.18 large; initializer_range is 0.2
    config.intermediate_size = 48
    with pytest.raises(ConfigError, match="its 48 columns are no multiple of 32"):
        random_state(GptOssForCausalLM, config, torch.bfloat16, CPU)
