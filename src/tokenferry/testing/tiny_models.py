"""Tiny random mixture-of-experts models of many families, for tests and for a first try without any download.

Each has 2 layers (3 where the first one is dense), a few hundred thousand parameters and a byte tokenizer of 384 ids made
on the spot. The text that such a model writes is noise; its routing and its weight layout are the family's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from tokenferry.errors import ConfigError

SPECIAL_TOKENS: Final = ("<pad>", "<eos>", "<unk>")
VOCAB_SIZE: Final = 384  # 3 special ids, 256 bytes, and spare ids that stand for no text

COMMON: Final[Mapping[str, Any]] = MappingProxyType({
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False,
    # Large for a model of this width: with the usual 0.02 all logits are nearly equal, and a wrong expert changes no token.
    "initializer_range": 0.2,
})  # fmt: skip

GROUPED_SIGMOID: Final[Mapping[str, Any]] = MappingProxyType({
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3,
    "intermediate_size": 96, "moe_intermediate_size": 32,
})  # fmt: skip
"""What DeepSeek-V3 and its descendants share: one dense layer, then sigmoid scores with group-limited choice."""

LATENT_ATTENTION: Final[Mapping[str, Any]] = MappingProxyType({
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
})  # fmt: skip

# model_type in transformers, and what it needs on top of COMMON
FAMILIES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = MappingProxyType({
    "qwen3_moe": ("qwen3_moe", {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16,
        "norm_topk_prob": True,
    }),
    "qwen2_moe": ("qwen2_moe", {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
        "intermediate_size": 96, "norm_topk_prob": False,
    }),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "head_dim": 16}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 32, "norm_topk_prob": False}),
    "deepseek_v2": ("deepseek_v2", {
        **GROUPED_SIGMOID, **LATENT_ATTENTION, "topk_method": "group_limited_greedy", "norm_topk_prob": False,
    }),
    "deepseek_v3": ("deepseek_v3", {**GROUPED_SIGMOID, **LATENT_ATTENTION}),
    "glm4_moe": ("glm4_moe", {**GROUPED_SIGMOID, "n_group": 1, "topk_group": 1, "head_dim": 16}),
    "gpt_oss": ("gpt_oss", {
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 16, "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "llama4": ("llama4_text", {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 48, "intermediate_size_mlp": 96, "head_dim": 16,
        "interleave_moe_layer_step": 1,
    }),
    "ernie4_5_moe": ("ernie4_5_moe", {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "intermediate_size": 96,
        "moe_layer_start_index": 1, "num_hidden_layers": 3,
    }),
    "granitemoe": ("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "nemotron_h": ("nemotron_h", {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 96, "n_group": 1,
        "topk_group": 1, "moe_shared_expert_intermediate_size": 48, "moe_latent_size": 32, "head_dim": 16,
        "layers_block_type": ["attention", "moe"],
    }),
    "phimoe": ("phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}),
})  # fmt: skip


def tiny_config(family: str) -> Any:
    """The transformers configuration of a tiny model.

    Raises:
        ConfigError: `family` is not in `FAMILIES`.
    """
    from transformers import AutoConfig

    if family not in FAMILIES:
        raise ConfigError(f"no tiny model of family {family!r}; there are: {', '.join(sorted(FAMILIES))}")
    model_type, extra = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**COMMON, **extra})


def make_tiny(family: str, path: str | Path, seed: int = 0) -> Path:
    """Write a tiny random float32 model with its tokenizer to the folder `path` (made if needed) and return the folder.

    The same family and seed give the same weights. Generation is greedy and never stops by itself, so lengths are known.

    Raises:
        ConfigError: `family` is not in `FAMILIES`.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = tiny_config(family)
    folder = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise_constants(model)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """A tokenizer with one id for each byte: 0 pads, 1 ends, 2 is unknown, 3 + b is byte b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [_byte_symbols()[byte] for byte in range(256)]
    vocabulary = {token: token_id for token_id, token in enumerate((*SPECIAL_TOKENS, *symbols))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def _byte_symbols() -> dict[int, str]:
    """The printable character by which byte-level tokenizers write each byte: itself, or one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _randomise_constants(model: torch.nn.Module) -> None:
    """Give random values to biases and score corrections, which start at zero: otherwise a test cannot see them missing."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in sorted(tensors.items()):
        if name.endswith(("bias", "e_score_correction_bias", "sinks")) and not tensor.any():
            tensor.data.normal_(std=0.1)
