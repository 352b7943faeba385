"""This rank's experts on the rows that a dispatch gathered: the torch path, for CPUs and GPUs.

Legend of shape suffixes: R gathered rows, K slots of a row, P (row, slot) pairs sorted by expert, H hidden size, I intermediate
size, N columns of the first product (2·I with a gate, else I), E experts of the group, L experts of this rank (`e` elsewhere).

Three ways through, chosen from device, dtype and strides alone (`choose_path`):

    trimmed  CPUs: P is the number of local pairs.
    static   CUDA: nothing asks the device for a value. P is the bound R·K, pairs without a local expert sort to the tail, the
             grouped product stops at the device's offsets, and what lies behind is masked by *selection* (0 · NaN is NaN).
    dense    CUDA where the grouped product would wait for the device: every expert on every row, then selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.activations import Activation
from tokenferry.config import HIDDEN_DTYPES
from tokenferry.dispatched import Dispatched
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError, check_kind

GROUPED_MM_ALIGNMENT_BYTES = 16
"""torch.nn.functional.grouped_mm refuses operands whose rows do not start at multiples of this."""

GROUPED_MM_CUDA_MAJORS = (9, 10)
"""Compute capabilities (major) where grouped_mm in bfloat16 runs without a host synchronisation. In other dtypes it copies the
offsets to the host: H100, torch 2.11, sync debug mode: bfloat16 never waits, float16 and float32 do (2026-11-22). Other
capabilities: read in torch's source, not run."""

Path = Literal["trimmed", "static", "dense"]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The shape of the routed experts.

    Attributes:
        hidden_size: H, of the rows that experts see (the latent size in a latent layer).
        intermediate_size: I, of one expert.
        num_experts: E, of the whole group.
        activation: between the products; says whether there is a gate, and how gate and up half lie in `up_proj`.
        bias: both products have a bias.

    Raises:
        ConfigError: a size below 1.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: Activation = field(default_factory=Activation)
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}; give an int")
        check_kind("activation", self.activation, Activation)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """Stacked weights of L experts, bfloat16, float16 or float32, one dtype and device.

    Attributes:
        up_proj: [L, N, H]: gate rows, then up rows (or interleaved, as the `Activation` says); [L, I, H] without a gate.
            A transposed view of [L, H, N] serves too, without a copy.
        down_proj: [L, H, I], likewise.
        up_bias: [L, N] or None.
        down_bias: [L, H] or None.
    """

    up_proj: torch.Tensor
    down_proj: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


def apply_experts(
    dispatched: Dispatched,
    weights: ExpertWeights,
    first_expert: int,
    activation: Activation,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum, for each gathered row, over this rank's experts.

    Products are in the weights' dtype, the activation in float32 (rounded once), the sum over a row's slots in float32 in slot
    order, rounded once to the dtype of `out`. A row without a local expert gives +0.0. Deterministic: no atomics.

    Args:
        dispatched: R rows; a slot counts if its id is in [first_expert, first_expert + L). Ids -1, other ranks' ids, and
            so rows >= V, are left out, whatever their hidden values and weights are, NaNs included.
        weights: of this rank's L experts.
        first_expert: global number of the first of them.
        activation: between the products.
        out: [R, H] to write into, bfloat16, float16 or float32, e.g. `dispatcher.combine_input()`. None: a new tensor
            in the dtype of `dispatched.hidden`.

    Returns:
        `out`, [R, H].

    Raises:
        ShapeError, DtypeError, DeviceError: operands that do not fit one another; before anything is launched.
    """
    hidden_RH = dispatched.hidden
    _check_operands(hidden_RH, weights, activation)
    if out is None:
        out = torch.empty_like(hidden_RH)
    else:
        _check_out(out, hidden_RH)
    if hidden_RH.shape[0] == 0:
        return out
    num_local_experts = weights.up_proj.shape[0]
    local_RK = _local_ids(dispatched.topk_idx, first_expert, num_local_experts)
    path = choose_path(hidden_RH, weights)
    if path == "dense":
        output_PH, position_RK = _every_expert_on_every_row(hidden_RH, local_RK, weights, activation)
    else:
        output_PH, position_RK = _experts_on_sorted_pairs(hidden_RH, local_RK, weights, activation, trim=path == "trimmed")
    return _weighted_sum(output_PH, position_RK, local_RK < num_local_experts, dispatched.topk_weights, out)


class Experts(nn.Module):
    """The routed experts that this rank holds.

    Parameters (no gradients): `up_proj` [L, N, H], `down_proj` [L, H, I]; with `config.bias` also `up_bias` [L, N] and
    `down_bias` [L, H].

    Args:
        config: the shape, of all experts.
        expert_range: which global experts this rank holds: `group.expert_range(config.num_experts)`.
        dtype: of the parameters, and of the hidden rows.
        device: of the parameters.

    Raises:
        ConfigError: a range that is empty, has gaps, or leaves [0, E).
        DtypeError: a dtype other than bfloat16, float16 and float32.
    """

    up_proj: nn.Parameter
    down_proj: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        config: ExpertsConfig,
        expert_range: range,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_kind("config", config, ExpertsConfig)
        check_kind("expert_range", expert_range, range)
        if not expert_range or expert_range.step != 1 or expert_range.start < 0 or expert_range.stop > config.num_experts:
            raise ConfigError(
                f"expert_range must be a part of range(0, {config.num_experts}) without gaps, got {expert_range}; "
                "take group.expert_range(num_experts)"
            )
        if dtype not in HIDDEN_DTYPES:
            raise DtypeError(f"experts take {', '.join(map(str, HIDDEN_DTYPES))}, got {dtype}")
        self.config, self.expert_range = config, expert_range
        L, H, I = len(expert_range), config.hidden_size, config.intermediate_size
        N = config.activation.num_columns(I)
        shapes = {"up_proj": (L, N, H), "down_proj": (L, H, I), "up_bias": (L, N), "down_bias": (L, H)}
        for name, shape in shapes.items():
            absent = name.endswith("bias") and not config.bias
            tensor = None if absent else nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, tensor)
        nn.init.normal_(self.up_proj, std=H**-0.5)
        nn.init.normal_(self.down_proj, std=I**-0.5)

    @property
    def weights(self) -> ExpertWeights:
        """The parameters, as `apply_experts` takes them."""
        return ExpertWeights(up_proj=self.up_proj, down_proj=self.down_proj, up_bias=self.up_bias, down_bias=self.down_bias)

    @torch.no_grad()
    def load(
        self,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        """Copy weights in, of all E experts (this rank's part is taken) or of this rank's L.

        Args:
            up_proj: [E or L, N, H]; gate and up rows lie as `config.activation.interleaved` says.
            down_proj: [E or L, H, I].
            up_bias, down_bias: [E or L, N], [E or L, H]; given if and only if `config.bias`.
            transposed: the matrices come as [.., H, N] and [.., I, H] (gpt-oss checkpoints).

        Raises:
            ShapeError: a tensor of another shape, or a bias too many or missing.
        """
        if transposed:
            up_proj, down_proj = up_proj.transpose(1, 2), down_proj.transpose(1, 2)
        for name, source in (("up_proj", up_proj), ("down_proj", down_proj), ("up_bias", up_bias), ("down_bias", down_bias)):
            target: torch.Tensor | None = getattr(self, name)
            if (target is None) != (source is None):
                raise ShapeError(f"{name} is {'missing' if source is None else 'given'} but config.bias is {self.config.bias}")
            if target is not None and source is not None:
                target.copy_(self._part_of_this_rank(name, source, target))

    def _part_of_this_rank(self, name: str, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        check_kind(name, source, torch.Tensor)
        if source.dim() and source.shape[0] == self.config.num_experts:
            source = source[self.expert_range.start : self.expert_range.stop]
        if source.shape != target.shape:
            raise ShapeError(
                f"{name} is {list(source.shape)} after transposition and slicing but this rank holds {list(target.shape)}; "
                f"give {self.config.num_experts} (all) or {len(self.expert_range)} (this rank's) experts, or check `transposed`"
            )
        return source

    @torch.no_grad()
    def forward(self, dispatched: Dispatched, out: torch.Tensor | None = None) -> torch.Tensor:
        """`apply_experts` with this rank's weights: [R, H] partial rows, in `out` if given."""
        check_kind("dispatched", dispatched, Dispatched)
        return apply_experts(dispatched, self.weights, self.expert_range.start, self.config.activation, out)

    def extra_repr(self) -> str:
        return f"{self.config}, {self.expert_range}"


def _local_ids(topk_idx_RK: torch.Tensor, first_expert: int, num_local_experts: int) -> torch.Tensor:
    """0 .. L-1 where the slot's expert is here, else L (it sorts behind all of them)."""
    local_RK = topk_idx_RK - first_expert
    return torch.where((local_RK >= 0) & (local_RK < num_local_experts), local_RK, num_local_experts)


def _experts_on_sorted_pairs(
    hidden_RH: torch.Tensor, local_RK: torch.Tensor, weights: ExpertWeights, activation: Activation, *, trim: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert outputs by pair, and where each slot's pair is. Without `trim`, outputs behind the last local pair are undefined."""
    num_local_experts, topk = weights.up_proj.shape[0], local_RK.shape[1]
    sorted_P, order_P = torch.sort(local_RK.flatten(), stable=True)
    experts_L = torch.arange(num_local_experts, dtype=sorted_P.dtype, device=sorted_P.device)
    ends_L = torch.searchsorted(sorted_P, experts_L, right=True, out_int32=True)
    position_RK = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(order_P.numel(), device=order_P.device))
    position_RK = position_RK.view(local_RK.shape)
    if trim:
        num_pairs = int(ends_L[-1])
        sorted_P, order_P = sorted_P[:num_pairs], order_P[:num_pairs]
        position_RK = position_RK.clamp(max=max(num_pairs - 1, 0))  # where it exceeds the end the slot is not local: masked later
    bias_index_P = sorted_P.clamp(max=num_local_experts - 1)
    pairs_PH = hidden_RH.index_select(0, order_P // topk)
    up_PN = _grouped_linear(pairs_PH, weights.up_proj, ends_L)
    if weights.up_bias is not None:
        up_PN += weights.up_bias.index_select(0, bias_index_P)
    output_PH = _grouped_linear(activation(up_PN), weights.down_proj, ends_L)
    if weights.down_bias is not None:
        output_PH += weights.down_bias.index_select(0, bias_index_P)
    return output_PH, position_RK


def _every_expert_on_every_row(
    hidden_RH: torch.Tensor, local_RK: torch.Tensor, weights: ExpertWeights, activation: Activation
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CUDA fall-back where grouped_mm would synchronise: L dense products, each kept in the slots that chose the expert.

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
    position_RK = torch.arange(num_rows * topk, device=local_RK.device).view(num_rows, topk)
    return output_RKH.flatten(0, 1), position_RK


def _grouped_linear(rows_PX: torch.Tensor, weight_LYX: torch.Tensor, ends_L: torch.Tensor) -> torch.Tensor:
    """Each expert's rows times its [Y, X] transposed: [P, Y]. Rows of expert l end at ends[l]; behind the last: undefined."""
    if rows_PX.is_cuda or (_aligned(rows_PX) and _aligned(weight_LYX)):
        return F.grouped_mm(rows_PX, weight_LYX.transpose(1, 2), offs=ends_L)
    output_PY = rows_PX.new_empty(rows_PX.shape[0], weight_LYX.shape[1])
    begin = 0
    for expert, end in enumerate(ends_L.tolist()):  # a CPU tensor: nothing waits
        if end > begin:
            torch.mm(rows_PX[begin:end], weight_LYX[expert].t(), out=output_PY[begin:end])
        begin = end
    return output_PY


def _weighted_sum(
    output_PH: torch.Tensor,
    position_RK: torch.Tensor,
    is_local_RK: torch.Tensor,
    weights_RK: torch.Tensor,
    out_RH: torch.Tensor,
) -> torch.Tensor:
    """Sum over the local slots in slot order, in float32, into `out`.

    The mask selects and does not multiply: the pair behind a slot without a local expert may be NaN.
    """
    sum_RH = out_RH.zero_() if out_RH.dtype == torch.float32 else torch.zeros_like(out_RH, dtype=torch.float32)
    if output_PH.shape[0]:
        for position_R, is_local_R, weights_R in zip(*(x.unbind(1) for x in (position_RK, is_local_RK, weights_RK)), strict=True):
            term_RH = output_PH.index_select(0, position_R).float() * weights_R.unsqueeze(1)
            sum_RH += torch.where(is_local_R.unsqueeze(1), term_RH, 0.0)
    return out_RH if sum_RH is out_RH else out_RH.copy_(sum_RH)


def choose_path(hidden_RH: torch.Tensor, weights: ExpertWeights) -> Path:
    """How `apply_experts` goes through these operands; see the head of this file."""
    if not hidden_RH.is_cuda:
        return "trimmed"
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


def _check_operands(hidden_RH: torch.Tensor, weights: ExpertWeights, activation: Activation) -> None:
    L, H, I = weights.down_proj.shape
    if hidden_RH.dim() != 2 or hidden_RH.shape[1] != H:
        raise ShapeError(f"hidden must be [R, {H}] (down_proj is {[L, H, I]}), got {list(hidden_RH.shape)}")
    if weights.up_proj.shape != (L, activation.num_columns(I), H):
        raise ShapeError(
            f"up_proj must be {[L, activation.num_columns(I), H]} for {activation.name} and a down_proj of {[L, H, I]}, "
            f"got {list(weights.up_proj.shape)}"
        )
    if hidden_RH.dtype != weights.up_proj.dtype:
        raise DtypeError(f"hidden is {hidden_RH.dtype} but the experts are {weights.up_proj.dtype}; convert one of them")
    if hidden_RH.device != weights.up_proj.device:
        raise DeviceError(f"hidden is on {hidden_RH.device} but the experts are on {weights.up_proj.device}; move one of them")


def _check_out(out: torch.Tensor, hidden_RH: torch.Tensor) -> None:
    if out.shape != hidden_RH.shape:
        raise ShapeError(f"out is {list(out.shape)} but there are {list(hidden_RH.shape)} gathered rows; use combine_input()")
    if out.dtype not in HIDDEN_DTYPES:
        raise DtypeError(f"out must be {', '.join(map(str, HIDDEN_DTYPES))}, got {out.dtype}")
    if out.device != hidden_RH.device:
        raise DeviceError(f"out is on {out.device} but hidden is on {hidden_RH.device}; use combine_input()")
