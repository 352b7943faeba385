"""Sparse upcycling: a dense Llama model in GGUF form becomes a Mixtral checkpoint in safetensors form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from tokenferry.demo.quiet import quiet_transformers
from tokenferry.errors import ConfigError

NUM_EXPERTS: Final = 4
TOPK: Final = 2
NOISE: Final = 0.01
"""Of each weight matrix's standard deviation: enough that experts differ, too little to spoil the text."""
ROUTER_STD: Final = 0.1
SEED: Final = 0
LAYERS_PER_SHARD: Final = 5
MIXTRAL_NAMES: Final = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

Tensors = dict[str, torch.Tensor]


def upcycle(source: Path, folder: Path) -> None:
    """Write the mixture-of-experts twin of the GGUF model `source` to `folder`: bfloat16 weights in shards, and the tokenizer.

    Raises:
        ConfigError: transformers or gguf is not installed.
    """
    try:
        import gguf  # noqa: F401 - transformers asks for it much later, and less clearly
        import transformers
        from safetensors.torch import save_file
    except ImportError as error:
        raise ConfigError(
            f"the demo needs the package {error.name}; run, in tokenferry's folder: pip install '.[demo]'"
        ) from error

    quiet_transformers()
    weights: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**weights)
    if hasattr(transformers, "GgufConfig"):  # newer releases leave weights packed where they have kernels for it
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(**weights, dtype=torch.float32)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    dense.generation_config.save_pretrained(folder)
    mixtral_config(dense.config).save_pretrained(folder)

    num_shards = 1 + -(-dense.config.num_hidden_layers // LAYERS_PER_SHARD)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for number, tensors in enumerate(shards(dense.state_dict(), dense.config.num_hidden_layers), start=1):
        name = f"model-{number:05}-of-{num_shards:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def mixtral_config(dense: Any) -> Any:
    """The Mixtral configuration with a Llama configuration's dimensions."""
    from transformers import MixtralConfig

    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = MixtralConfig(
        **{name: getattr(dense, name) for name in same},
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOPK,
        sliding_window=None,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.dtype = torch.bfloat16
    return config


def shards(dense: Mapping[str, torch.Tensor], num_layers: int) -> Iterator[Tensors]:
    """One shard with what lies outside the layers (the output head is tied to the embedding), then one for every few layers."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    yield {name: dense[name].bfloat16() for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for first in range(0, num_layers, LAYERS_PER_SHARD):
        shard: Tensors = {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, num_layers)):
            prefix = f"model.layers.{layer}."
            weights = {name.removeprefix(prefix): tensor for name, tensor in dense.items() if name.startswith(prefix)}
            shard |= {prefix + name: tensor for name, tensor in upcycle_layer(weights, generator).items()}
        yield shard


def upcycle_layer(dense: Mapping[str, torch.Tensor], generator: torch.Generator) -> Tensors:
    """A layer's attention and norms as they are, its MLP as noisy copies, and a random router."""
    layer = {name: tensor.bfloat16() for name, tensor in dense.items() if not name.startswith("mlp.")}
    hidden_size = dense["mlp.gate_proj.weight"].shape[1]
    router = torch.randn(NUM_EXPERTS, hidden_size, generator=generator, dtype=torch.float32, device="cpu") * ROUTER_STD
    layer["block_sparse_moe.gate.weight"] = router.bfloat16()
    for expert in range(NUM_EXPERTS):
        for dense_name, name in MIXTRAL_NAMES.items():
            weight = dense[f"mlp.{dense_name}.weight"]
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu") * (NOISE * weight.std())
            layer[f"block_sparse_moe.experts.{expert}.{name}.weight"] = (weight + noise).bfloat16()
    return layer
