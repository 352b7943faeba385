"""This rank's experts on the rows that a dispatch gathered: the torch path, for CPUs and GPUs.

Legend of shape suffixes: R gathered rows, K choices of a row, P pairs (row, choice) sorted by expert, H hidden size,
I intermediate size, N columns of the first product (2·I with a gate, else I), E experts of the group, L experts of this rank (`e`
elsewhere).

Three ways through, chosen from device, dtype and strides alone (`choose_path`):

    trimmed  CPUs: P is the number of local pairs.
    static   CUDA: nothing asks the device for a value. P is the bound R·K, pairs without a local expert sort to the tail, the
             grouped product stops at the device's offsets, and what lies behind is masked by *selection* (0 · NaN is NaN).
    dense    CUDA where the grouped product would wait for the device: every expert on every row, then selection.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from tokenferry import reference
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched, PartialRows, QuantizedRows
from tokenferry.errors import DtypeError
from tokenferry.experts import float8, mxfp4
from tokenferry.experts.weights import ExpertWeights

GROUPED_MM_ALIGNMENT_BYTES = 16
"""torch.nn.functional.grouped_mm refuses operands whose rows do not start at multiples of this."""

GROUPED_MM_CUDA_MAJORS = (9, 10)
"""Compute capabilities (major) where grouped_mm in bfloat16 runs without a host synchronisation. In other dtypes it copies the
offsets to the host: H100, torch 2.11, sync debug mode: bfloat16 never waits, float16 and float32 do (2026-11-22). Other
capabilities: read in torch's source, not run."""

Path = Literal["trimmed", "static", "dense"]


def run(
    path: Path,
    dispatched: Dispatched,
    weights: ExpertWeights,
    first_expert: int,
    activation: Activation,
    out: PartialRows,
    *,
    dtype: torch.dtype | None = None,
    is_rounded: bool = False,
) -> PartialRows:
    """`apply_experts` by `path`, on checked operands. With `is_rounded` the hidden rows are what quantized ones stand for, and
    the rows between the products have `dtype`."""
    hidden_RH, num_local_experts = dispatched.hidden, weights.up_proj.shape[0]
    local_RK = _local_ids(dispatched.topk_idx, first_expert, num_local_experts)
    if path == "dense":
        output_PH, position_RK = _every_expert_on_every_row(hidden_RH, local_RK, weights, activation)
    else:
        output_PH, position_RK = _experts_on_sorted_pairs(
            hidden_RH, local_RK, weights, activation, dtype or hidden_RH.dtype, trim=path == "trimmed", is_rounded=is_rounded
        )
    if weights.norm_scale is not None:
        output_PH = _norm(output_PH, weights.norm_scale, weights.norm_epsilon)
    return _weighted_sum(output_PH, position_RK, local_RK < num_local_experts, dispatched.topk_weights, out)


def _local_ids(topk_idx_RK: torch.Tensor, first_expert: int, num_local_experts: int) -> torch.Tensor:
    """0 .. L-1 for choices of an expert that is here, else L (it sorts behind all of them)."""
    local_RK = topk_idx_RK - first_expert
    return torch.where((local_RK >= 0) & (local_RK < num_local_experts), local_RK, num_local_experts)


def _experts_on_sorted_pairs(
    hidden_RH: torch.Tensor,
    local_RK: torch.Tensor,
    weights: ExpertWeights,
    activation: Activation,
    dtype: torch.dtype,
    *,
    trim: bool,
    is_rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs by pair, and where each choice's pair is. Without `trim`, outputs behind the last local pair are undefined."""
    num_local_experts, topk = weights.up_proj.shape[0], local_RK.shape[1]
    sorted_P, order_P = torch.sort(local_RK.flatten(), stable=True)
    experts_L = torch.arange(num_local_experts, dtype=sorted_P.dtype, device=sorted_P.device)
    ends_L = torch.searchsorted(sorted_P, experts_L, right=True, out_int32=True)
    in_order_P = torch.arange(order_P.numel(), dtype=order_P.dtype, device=order_P.device)
    position_RK = torch.empty_like(order_P).scatter_(0, order_P, in_order_P).view(local_RK.shape)
    if trim:
        num_pairs = int(ends_L[-1])
        sorted_P, order_P = sorted_P[:num_pairs], order_P[:num_pairs]
        position_RK = position_RK.clamp(max=max(num_pairs - 1, 0))  # beyond the end the choice is not local: masked later
    bias_index_P = sorted_P.clamp(max=num_local_experts - 1)
    pairs_PH = hidden_RH.index_select(0, order_P // topk)
    up_PN = _product(pairs_PH, weights, "up", ends_L, activation, is_rounded=is_rounded)
    if weights.up_bias is not None:
        up_PN += weights.up_bias.index_select(0, bias_index_P)
    activated_PI = activation(up_PN).to(dtype)
    output_PH = _product(activated_PI, weights, "down", ends_L, activation)
    if weights.down_bias is not None:
        output_PH += weights.down_bias.index_select(0, bias_index_P)
    return output_PH.to(dtype), position_RK


def _every_expert_on_every_row(
    hidden_RH: torch.Tensor, local_RK: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CUDA fall-back where grouped_mm would synchronise: L dense products, each kept for the choices of its expert.

    About L·R / (local pairs) times the work of the sorted path; meant for float32 and float16 checks, and for GPUs before Hopper.
    """
    num_rows, topk = local_RK.shape
    output_RKH = hidden_RH.new_zeros(num_rows, topk, hidden_RH.shape[1])
    nothing = [None] * weights.up_proj.shape[0]
    up_biases = nothing if weights.up_bias is None else weights.up_bias.unbind()
    down_biases = nothing if weights.down_bias is None else weights.down_bias.unbind()
    for expert, (up_proj, down_proj) in enumerate(zip(weights.up_proj.unbind(), weights.down_proj.unbind(), strict=True)):
        up_RN = F.linear(hidden_RH, up_proj, up_biases[expert])
        expert_output_RH = F.linear(activation(up_RN), down_proj, down_biases[expert])
        output_RKH = torch.where((local_RK == expert).unsqueeze(-1), expert_output_RH.unsqueeze(1), output_RKH)
    position_RK = torch.arange(num_rows * topk, dtype=torch.int64, device=local_RK.device).view(num_rows, topk)
    return output_RKH.flatten(0, 1), position_RK


def _product(
    rows_PX: torch.Tensor,
    weights: ExpertWeights,
    name: Literal["up", "down"],
    ends_L: torch.Tensor,
    activation: Activation,
    *,
    is_rounded: bool = False,
) -> torch.Tensor:
    matrices: torch.Tensor = getattr(weights, f"{name}_proj")
    scale: torch.Tensor | None = getattr(weights, f"{name}_scale")
    if not weights.is_packed:
        return _grouped_linear(rows_PX, matrices, ends_L, scale, is_rounded=is_rounded)
    assert scale is not None, "packed weights were checked"
    (_, H, I), is_up = weights.sizes, name == "up"
    num_rows, num_columns = (activation.num_columns(I), H) if is_up else (H, I)
    layout = {"gated": is_up and activation.gated, "interleaved": is_up and activation.interleaved}
    output_PY = rows_PX.new_empty(rows_PX.shape[0], num_rows)
    begin = 0
    for expert, end in enumerate(ends_L.tolist()):
        if end > begin:
            weight_YX = mxfp4.unpack(matrices[expert], scale[expert], num_rows, num_columns, **layout)
            torch.mm(rows_PX[begin:end], weight_YX.t(), out=output_PY[begin:end])
        begin = end
    return output_PY


def _grouped_linear(
    rows_PX: torch.Tensor,
    weight_LYX: torch.Tensor,
    ends_L: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    is_rounded: bool = False,
) -> torch.Tensor:
    """Each expert's rows times its [Y, X] transposed: [P, Y]. Rows of expert l end at ends[l]; behind the last: undefined."""
    if scale is not None:
        return _scaled_grouped_linear(rows_PX, weight_LYX, ends_L, scale, is_rounded=is_rounded)
    if rows_PX.is_cuda or (_aligned(rows_PX) and _aligned(weight_LYX)):
        return F.grouped_mm(rows_PX, weight_LYX.transpose(1, 2), offs=ends_L)
    output_PY = rows_PX.new_empty(rows_PX.shape[0], weight_LYX.shape[1])
    begin = 0
    for expert, end in enumerate(ends_L.tolist()):  # a CPU tensor: nothing waits
        if end > begin:
            torch.mm(rows_PX[begin:end], weight_LYX[expert].t(), out=output_PY[begin:end])
        begin = end
    return output_PY


def _scaled_grouped_linear(
    rows_PX: torch.Tensor, weight_LYX: torch.Tensor, ends_L: torch.Tensor, scale: torch.Tensor, *, is_rounded: bool
) -> torch.Tensor:
    """The same for block-scaled float8, on CPUs: what the kernel computes, in float32, as its sums are until they are stored.

    Rounded to bfloat16 before the activation, they moved some activated numbers by a step of float8, and outputs by 1 to 3 %.
    """
    output_PY = rows_PX.new_empty(rows_PX.shape[0], weight_LYX.shape[1], dtype=torch.float32)
    begin = 0
    for expert, end in enumerate(ends_L.tolist()):
        if end > begin:
            weight_YX = float8.dequantize(weight_LYX[expert], scale[expert])
            rows = rows_PX[begin:end] if is_rounded else float8.rounded_rows(rows_PX[begin:end])
            output_PY[begin:end] = rows @ weight_YX.t()
        begin = end
    return output_PY


def _norm(output_PH: torch.Tensor, scale_H: torch.Tensor, epsilon: float) -> torch.Tensor:
    """A norm behind each expert: scaled, then divided by the root of the mean square, rounded after both."""
    scaled_PH = (output_PH.float() * scale_H).to(output_PH.dtype).float()
    return (scaled_PH * torch.rsqrt(scaled_PH.square().mean(1, keepdim=True) + epsilon)).to(output_PH.dtype)


def _weighted_sum(
    output_PH: torch.Tensor,
    position_RK: torch.Tensor,
    is_local_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    out_RH: PartialRows,
) -> PartialRows:
    """Sum over the local choices of a row, in their order, in float32, into `out`, rounded once.

    The mask selects and does not multiply: the pair of a choice without a local expert may be NaN.
    """
    sum_RH = torch.zeros(out_RH.shape, dtype=torch.float32, device=out_RH.device)
    if isinstance(out_RH, torch.Tensor) and out_RH.dtype == torch.float32:
        sum_RH = out_RH.zero_()
    if output_PH.shape[0]:
        for position_R, is_local_R, weights_R in zip(*(x.unbind(1) for x in (position_RK, is_local_RK, weights_RK)), strict=True):
            term_RH = output_PH.index_select(0, position_R).float() * weights_R.unsqueeze(1)
            sum_RH += torch.where(is_local_R.unsqueeze(1), term_RH, 0.0)
    if isinstance(out_RH, QuantizedRows):
        quantized = reference.quantize(sum_RH)
        out_RH.values.view(torch.uint8).copy_(quantized.values.view(torch.uint8))
        out_RH.scales.copy_(quantized.scales)
        return out_RH
    return out_RH if sum_RH is out_RH else out_RH.copy_(sum_RH)


def choose_path(hidden_RH: torch.Tensor, weights: ExpertWeights) -> Path:
    """How `apply_experts` goes through these operands; see the head of this file."""
    if not hidden_RH.is_cuda:
        return "trimmed"
    if weights.is_packed:
        raise DtypeError("MXFP4 experts on CUDA run by our own kernels alone; give apply_experts a scratch")
    if weights.up_scale is not None:
        raise DtypeError("float8 experts on CUDA run by our own kernels alone; give apply_experts a scratch")
    bytes_of_activated_row = weights.down_proj.shape[2] * weights.down_proj.element_size()
    grouped_mm_serves = (
        hidden_RH.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(hidden_RH.device)[0] in GROUPED_MM_CUDA_MAJORS
        and hidden_RH.shape[1] * hidden_RH.element_size() % GROUPED_MM_ALIGNMENT_BYTES == 0
        and bytes_of_activated_row % GROUPED_MM_ALIGNMENT_BYTES == 0
        and _aligned(weights.up_proj)
        and _aligned(weights.down_proj)
    )
    return "static" if grouped_mm_serves else "dense"


def _aligned(matrices: torch.Tensor) -> bool:
    """Whether every stride but the unit one is a multiple of 16 bytes."""
    strides = matrices.stride()[-2:]
    return 1 in strides and max(strides) * matrices.element_size() % GROUPED_MM_ALIGNMENT_BYTES == 0
