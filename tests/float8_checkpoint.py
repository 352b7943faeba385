"""A tiny checkpoint whose experts are float8 with a scale for each 128 x 128 weights, as DeepSeek's and Qwen's releases have."""

import json
from pathlib import Path
from typing import Any

import torch

NUM_EXPERTS, HIDDEN, INTERMEDIATE = 4, 256, 128
KEPT = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "embed_tokens", "mlp.gate"]
"""Modules whose weights stay as they are: transformers' own float8 products need kernels from its hub."""


def make_float8(folder: Path) -> tuple[Path, Path]:
    """The checkpoint, and one with the same numbers in float32."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    from tokenferry.experts import quantize_weights
    from tokenferry.testing.tiny_models import byte_tokenizer, tiny_config

    config = tiny_config("qwen3_moe")
    config.update({"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "num_experts": NUM_EXPERTS})
    config.initializer_range = 0.05
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    packed: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            packed[name] = parameter.detach().to(torch.bfloat16)
            continue
        prefix, kind = name.rsplit(".", 1)
        matrices, scales = quantize_weights(parameter.detach())
        spread = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
        parameter.data.copy_(matrices.float() * spread)
        for expert in range(NUM_EXPERTS):
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            pieces = zip(parts, matrices[expert].chunk(len(parts)), scales[expert].chunk(len(parts)), strict=True)
            for part, matrix, scale in pieces:
                packed[f"{prefix}.{expert}.{part}.weight"] = matrix.contiguous()
                packed[f"{prefix}.{expert}.{part}.weight_scale_inv"] = scale.contiguous()
    plain, float8 = folder / "plain", folder / "float8"
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    model.save_pretrained(plain)
    for path in (plain, float8):
        byte_tokenizer().save_pretrained(path)
    save_file(packed, float8 / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((plain / "config.json").read_text())
    settings["dtype"] = "bfloat16"
    settings["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": KEPT,
    }
    (float8 / "config.json").write_text(json.dumps(settings))
    return float8, plain


def dequantized(weights: Any, which: str) -> torch.Tensor:
    """[L, rows, columns] float32 of an `ExpertWeights`."""
    matrices, scale = getattr(weights, f"{which}_proj"), getattr(weights, f"{which}_scale")
    spread: torch.Tensor = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
    return matrices.float() * spread
