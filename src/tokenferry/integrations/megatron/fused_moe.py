"""This rank's experts on gathered rows, gated by the device's count of valid ones: the role of Megatron's fused expert kernels.

Legend: R gathered rows (G of the NVLS class), K top-k, H hidden size, L local experts, N columns of the first product.
"""

from __future__ import annotations

import re
from typing import Any, Final

import torch

from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched, HiddenRows, PartialRows
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError, UsageError
from tokenferry.experts import ExpertScratch, ExpertWeights, apply_experts


@torch.no_grad()
def fused_moe(
    hidden_states: HiddenRows,
    probs: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc2_weight: torch.Tensor,
    activation_type: Any,
    num_local_experts: int,
    local_expert_start: int,
    valid_tokens: torch.Tensor,
    routing_map: torch.Tensor,
    disable_fused_quant_kernels: bool = False,
    out: PartialRows | None = None,
    num_tokens_hint: int | None = None,
    *,
    scratch: ExpertScratch | None = None,
    batch_invariant: bool = False,
    fc1_scale: torch.Tensor | None = None,
    fc2_scale: torch.Tensor | None = None,
) -> Any:
    """For each row the sum over this rank's experts, weighted by `probs`. Takes the arguments of Megatron's two entries.

    Args:
        hidden_states: [R, H], bfloat16 (float16 and float32 too, as the weights are), or `QuantizedRows`, as a dispatch with
            dispatch_format "fp8_block128" gives them.
        probs: [R, K] float32 (others are converted).
        fc1_weight: [L, N, H]: gate rows, then up rows, where the activation has a gate.
        fc2_weight: [L, H, I].
        activation_type: Megatron's `ActivationType`, its value ("squared_relu", "swiglu"), or an `Activation` of ours.
        num_local_experts: L, as the weights say.
        local_expert_start: number of the first of them.
        valid_tokens: [1] int32 on the same device, V, read there: rows >= V are not computed, whatever they hold.
        routing_map: [R, K] int64 or int32 expert numbers; -1 and other ranks' experts are left out.
        disable_fused_quant_kernels, num_tokens_hint: taken for Megatron's sake. Rows come quantized or not, and kernels are
            not chosen by a host's guess, so that a row's bits do not depend on it.
        out: [R, H] to write into, e.g. the RSV buffer, or `QuantizedRows`. None: a new float32 tensor.
        scratch: on CUDA, one `ExpertScratch(device)` for all layers: our own kernels, gated by `valid_tokens`, several times
            faster. Its first call in a process compiles, so make one before capturing a graph or while no peer waits.
        batch_invariant: with `scratch`: a row's bits do not depend on how many other rows there are. Megatron's
            `batch_invariant_mode`, which this function does not see.
        fc1_scale, fc2_scale: of float8_e4m3fn weights, float32 for every 128 x 128; see `ExpertWeights`.

    Returns:
        `out`. Rows without a local expert are 0. Rows >= V are 0 too; with `scratch` they are not written.

    Raises:
        ConfigError: an activation that is not known.
        ShapeError, DtypeError, DeviceError: operands that do not fit one another, by the names that they have here; before
            anything is launched.
    """
    del disable_fused_quant_kernels, num_tokens_hint
    for name, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        if not isinstance(weight, torch.Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, stacked over the experts, got {type(weight).__name__}")
        if weight.dim() != 3 or weight.shape[0] != num_local_experts:
            raise ShapeError(f"{name} must have num_local_experts, {num_local_experts}, matrices; got {list(weight.shape)}")
    if routing_map.shape != probs.shape or routing_map.dim() != 2 or routing_map.shape[0] != hidden_states.shape[0]:
        raise ShapeError(
            f"routing_map and probs must be [{hidden_states.shape[0]}, K], a row for each hidden row, "
            f"got {list(routing_map.shape)} and {list(probs.shape)}"
        )
    if valid_tokens.dtype != torch.int32 or valid_tokens.numel() != 1:
        raise DtypeError(f"valid_tokens must be one torch.int32, got {list(valid_tokens.shape)} of {valid_tokens.dtype}")
    for name, tensor in (("valid_tokens", valid_tokens), ("routing_map", routing_map), ("probs", probs)):
        if tensor.device != hidden_states.device:
            raise DeviceError(f"{name} is on {tensor.device} but hidden_states is on {hidden_states.device}; move it there")
    if out is None:
        out = torch.empty(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    gathered = Dispatched(
        hidden=hidden_states,
        topk_idx=routing_map if scratch is not None else _valid_only(routing_map, valid_tokens),
        topk_weights=probs.to(torch.float32),
        valid_tokens=valid_tokens,
    )
    weights = ExpertWeights(up_proj=fc1_weight, down_proj=fc2_weight, up_scale=fc1_scale, down_scale=fc2_scale)
    activation = _activation(activation_type)
    settings: dict[str, Any] = {"scratch": scratch, "batch_invariant": batch_invariant}
    try:
        return apply_experts(gathered, weights, local_expert_start, activation, out, **settings)
    except UsageError as error:
        raise type(error)(_by_names_of_here(str(error))) from error


_NAMES: Final = {
    "hidden": "hidden_states",
    "up_proj": "fc1_weight",
    "down_proj": "fc2_weight",
    "up_scale": "fc1_scale",
    "down_scale": "fc2_scale",
}
"""What the experts call the arguments of `fused_moe`."""


def _by_names_of_here(text: str) -> str:
    """An error of the experts, with the names of the arguments that a caller of `fused_moe` gave."""
    text = re.sub(rf"\b({'|'.join(_NAMES)})\b", lambda found: _NAMES[found[1]], text)
    return text.replace("use combine_input()", "give one for each row of hidden_states, beside them")


def _valid_only(routing_RK: torch.Tensor, valid_tokens: torch.Tensor) -> torch.Tensor:
    """-1 beyond the valid rows: another dispatcher than ours may have left stale numbers there."""
    rows_R = torch.arange(routing_RK.shape[0], dtype=torch.int64, device=routing_RK.device)
    return routing_RK.masked_fill((rows_R >= valid_tokens).unsqueeze(1), -1)


def _activation(kind: Any) -> Activation:
    if isinstance(kind, Activation):
        return kind
    name = getattr(kind, "value", kind)
    if name not in ("squared_relu", "swiglu"):
        raise ConfigError(f"activation_type must be squared_relu, swiglu or a tokenferry Activation, got {kind!r}")
    return Activation(name)
