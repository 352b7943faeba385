"""A tiny gpt-oss checkpoint as such models are released: experts in MXFP4, all else in bfloat16, no dtype in config.json."""

import json
from pathlib import Path
from typing import Any

import torch

from tokenferry.testing.tiny_models import make_tiny

NUM_EXPERTS, HIDDEN = 8, 64
SCALES = (122, 126)
"""Random powers of two around 1 / 8: as large as the tiny models' other weights."""


def make_released(folder: Path, intermediate_size: int = 64) -> Path:
    """Rows of `gate_up_proj` are gates and ups in turn, columns the inputs: [experts, rows, columns / 32, 16 bytes]."""
    from safetensors.torch import load_file, save_file

    path = make_tiny("gpt_oss", folder)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        of_up = "gate_up_proj" in key
        rows, columns = (2 * intermediate_size, HIDDEN) if of_up else (HIDDEN, intermediate_size)
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            groups = (NUM_EXPERTS, rows, columns // 32)
            tensors[f"{key}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.randint(*SCALES, groups, generator=generator, dtype=torch.uint8)
        elif key.endswith(("experts.gate_up_proj_bias", "experts.down_proj_bias")):
            tensors[key] = torch.randn(NUM_EXPERTS, rows, generator=generator).mul(0.1).bfloat16()
        else:
            tensors[key] = tensor.bfloat16()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    config.pop("dtype", None)
    config["intermediate_size"] = intermediate_size
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def dequantized(path: Path, **kwargs: Any) -> Any:
    """The unmodified model, which makes bfloat16 of its experts."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    return AutoModelForCausalLM.from_pretrained(path, quantization_config=Mxfp4Config(dequantize=True), **kwargs)
