"""Experts that stay packed in MXFP4, as gpt-oss's checkpoints have them: 4.25 bits a weight in memory.

transformers makes bfloat16 of such experts while it loads, four times as much, or needs kernels that it fetches from a hub. Ours
read them packed. `packed_loading.py` brings them into a module.

H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers.utils.quantization_config import Mxfp4Config

from tokenferry.activations import Activation
from tokenferry.experts import ExpertScratch, ExpertWeights

METHOD: Final = "mxfp4"
"""transformers' name for it, in a `quantization_config`."""
UNPACK: Final = "load the model with quantization_config=Mxfp4Config(dequantize=True), which makes bfloat16 of its experts"


@dataclass(frozen=True)
class PackedExperts:
    """How a module holds its packed experts.

    Attributes:
        sizes: H and I.
        activation: between the products.
        names: of what the module holds, by the attributes of `ExpertWeights`: packed matrices and their scales, which are
            buffers, and biases, which are the parameters that they were.
    """

    sizes: tuple[int, int]
    activation: Activation
    names: Mapping[str, str]

    def weights(self, module: nn.Module) -> ExpertWeights:
        """Views of what the module holds now."""
        held: dict[str, Any] = {role: getattr(module, name).detach() for role, name in self.names.items()}
        return ExpertWeights(**held, packed_sizes=self.sizes)


def stays_packed(stored: Any, given: Any) -> bool:
    """Whether a checkpoint's experts are packed and are to stay so.

    Args:
        stored: the `quantization_config` of its configuration, or None.
        given: that of the caller, or None; then the stored one holds. `dequantize` is the wish for bfloat16. Another method's
            transformers refuses.
    """
    return is_packed(stored) and is_for_packed(given) and not _of(stored if given is None else given, "dequantize")


def is_for_packed(given: Any) -> bool:
    """Whether a caller's `quantization_config`, a dictionary or an object, is one for packed experts; so is None."""
    return _of(given, "quant_method") in (None, METHOD)


def is_packed(stored: Any) -> bool:
    """Whether a configuration with this `quantization_config` (None: without one) is of packed experts."""
    return bool(_of(stored, "quant_method") == METHOD)


def unpacking(stored: Any) -> dict[str, Any]:
    """The argument of transformers' `from_pretrained` that makes bfloat16 of packed experts; nothing for others. Without it, what
    an unmodified model computes with hangs on which packages there are: kernels from a hub may run packed experts."""
    return {"quantization_config": Mxfp4Config(dequantize=True)} if is_packed(stored) else {}


def why_unpacked(module: Any, owns_kernels: bool, device: torch.device) -> str | None:
    """What keeps our kernels from reading a module's experts packed, beside its layout; None: nothing does.

    Args:
        owns_kernels: see `Options.own_kernels`.
        device: where the model goes.
    """
    if not owns_kernels:
        return "with exact=True, or another experts_implementation, the model's own function runs them"
    if device.type == "cuda" and not ExpertScratch.serves(device):
        return "our kernels need a GPU of capability 8.0 or newer, and Triton"
    if module.down_proj.dtype != torch.bfloat16:
        return f"the model is loaded in {module.down_proj.dtype}, and packed experts take bfloat16"
    if getattr(module, "has_post_expert_norm", False):
        return "there is a norm behind each expert"
    return None


def _of(config: Any, name: str) -> Any:
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return getattr(found, "value", found)  # methods are an Enum
