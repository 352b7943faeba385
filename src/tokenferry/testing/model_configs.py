"""Configurations of known mixture-of-experts models, for models with random weights: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from tokenferry.errors import ConfigError

COMMON: Final[Mapping[str, Any]] = MappingProxyType(
    {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
)
"""Generation never stops by itself, so lengths are known."""

GPT_OSS_20B: Final[Mapping[str, Any]] = MappingProxyType({
    "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
    "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
})  # fmt: skip

# model_type in transformers, and the sizes of the published configuration
MODEL_CONFIGS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType({
    "qwen3-30b-a3b": ("qwen3_moe", {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "max_position_embeddings": 40960,
    }),
    "gpt-oss-20b": ("gpt_oss", GPT_OSS_20B),
    "gpt-oss-20b-mxfp4": ("gpt_oss", {**GPT_OSS_20B, "quantization_config": {"quant_method": "mxfp4"}}),
    "mixtral-8x7b": ("mixtral", {
        "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    }),
})  # fmt: skip


def config_values(spec: str) -> dict[str, Any]:
    """What a configuration says, by name.

    Args:
        spec: a name in `MODEL_CONFIGS`, with `:LAYERS` behind it for another number of layers, or the path of a `config.json`
            or of a folder that has one.

    Raises:
        ConfigError: there is no such model or file, or it names no model type.

    Example:
        "qwen3-30b-a3b:8": the first 8 layers of Qwen3-30B-A3B.
    """
    name, _, layers = spec.partition(":")
    if name in MODEL_CONFIGS:
        if layers and not (layers.isdecimal() and int(layers)):
            raise ConfigError(f"the layers of {name} must be a positive int, got {layers!r}")
        model_type, sizes = MODEL_CONFIGS[name]
        changed = {"num_hidden_layers": int(layers)} if layers else {}
        return {"model_type": model_type, **COMMON, **sizes, **changed}
    path = Path(spec) / "config.json" if Path(spec).is_dir() else Path(spec)
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"no configuration {spec}: give {', '.join(MODEL_CONFIGS)}, or the path of a config.json") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(f"{path} is no configuration of a transformers model: it names no model_type")
    return values


def model_config(spec: str) -> Any:
    """The transformers configuration; see `config_values`."""
    from transformers import AutoConfig

    values = config_values(spec)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except ValueError as error:
        raise ConfigError(f"transformers knows no such model as {spec}: {error}") from error
