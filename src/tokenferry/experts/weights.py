"""The shape and the stacked weights of the routed experts, and what must fit what.

Legend of shape suffixes: R gathered rows, H hidden size, I intermediate size, N columns of the first product (2·I with a gate,
else I), L experts of this rank (`e` elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tokenferry.activations import Activation
from tokenferry.config import HIDDEN_DTYPES
from tokenferry.dispatched import FLOAT8, SCALE_BLOCK, HiddenRows, QuantizedRows
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError, check_kind


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
    """Stacked weights of L experts, bfloat16, float16, float32 or block-scaled float8_e4m3fn, one dtype and device.

    Attributes:
        up_proj: [L, N, H]: gate rows, then up rows (or interleaved, as the `Activation` says); [L, I, H] without a gate.
            A transposed view of [L, H, N] serves too, without a copy.
        down_proj: [L, H, I], likewise.
        up_bias: [L, N] or None.
        down_bias: [L, H] or None.
        up_scale, down_scale: of float8_e4m3fn weights: [L, ceil(N / 128), ceil(H / 128)] and [L, ceil(H / 128), ceil(I / 128)]
            float32, what each 128 x 128 block is to be multiplied by; see `quantize_weights`. None for other dtypes.
        norm_scale, norm_epsilon: of a norm behind each expert: [H] float32, by which an output is multiplied before it is divided
            by the root of the mean of its squares and `norm_epsilon`. None: there is no norm.
    """

    up_proj: torch.Tensor
    down_proj: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    norm_scale: torch.Tensor | None = None
    norm_epsilon: float = 0.0

    @classmethod
    def view(
        cls,
        up: torch.Tensor,
        down: torch.Tensor,
        *,
        transposed: bool = False,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        up_scale: torch.Tensor | None = None,
        down_scale: torch.Tensor | None = None,
        norm_scale: torch.Tensor | None = None,
        norm_epsilon: float = 0.0,
    ) -> ExpertWeights:
        """Another library's stacked parameters as they lie, without a copy: what they hold is read anew by each call.

        Args:
            up, down: [L, N, H] and [L, H, I]; `transposed`: [L, H, N] and [L, I, H]. Any strides: at full speed where either the
                depth or the columns of a matrix lie side by side.
            up_bias, down_bias, up_scale, down_scale, norm_scale, norm_epsilon: as attributes. up_scale and down_scale too are of
                the matrices as they are stored.

        Raises:
            ShapeError: not three-dimensional.

        Example:
            gpt-oss of transformers: view(gate_up_proj, down_proj, transposed=True, up_bias=gate_up_proj_bias,
            down_bias=down_proj_bias) with Activation("clamped_swiglu", interleaved=True).
        """

        def turned(name: str, tensor: torch.Tensor | None) -> Any:
            if tensor is None:
                return None
            check_kind(name, tensor, torch.Tensor)
            if tensor.dim() != 3:
                raise ShapeError(f"{name} must be [experts, rows, columns], got {list(tensor.shape)}; stack the matrices")
            return tensor.detach().transpose(1, 2) if transposed else tensor.detach()

        return cls(
            up_proj=turned("up", up),
            down_proj=turned("down", down),
            up_bias=up_bias,
            down_bias=down_bias,
            up_scale=turned("up_scale", up_scale),
            down_scale=turned("down_scale", down_scale),
            norm_scale=norm_scale,
            norm_epsilon=norm_epsilon,
        )


def check_operands(hidden_RH: HiddenRows, weights: ExpertWeights, activation: Activation) -> None:
    """Raises where hidden rows, weights and activation do not fit one another."""
    L, H, I = weights.down_proj.shape
    rows_RH = hidden_RH.values if isinstance(hidden_RH, QuantizedRows) else hidden_RH
    if rows_RH.dim() != 2 or rows_RH.shape[1] != H:
        raise ShapeError(f"hidden must be [R, {H}] (down_proj is {[L, H, I]}), got {list(rows_RH.shape)}")
    if weights.up_proj.shape != (L, activation.num_columns(I), H):
        raise ShapeError(
            f"up_proj must be {[L, activation.num_columns(I), H]} for {activation.name} and a down_proj of {[L, H, I]}, "
            f"got {list(weights.up_proj.shape)}"
        )
    _check_biases(weights)
    _check_scales(weights)
    scale = weights.norm_scale
    if scale is not None and (scale.shape != (H,) or scale.dtype != torch.float32 or scale.device != hidden_RH.device):
        raise ShapeError(
            f"norm_scale must be float32 [{H}] on {hidden_RH.device}, got {scale.dtype} {list(scale.shape)} on {scale.device}"
        )
    _check_hidden_dtype(hidden_RH, weights)
    if hidden_RH.device != weights.up_proj.device:
        raise DeviceError(f"hidden is on {hidden_RH.device} but the experts are on {weights.up_proj.device}; move one of them")


def _check_hidden_dtype(hidden_RH: HiddenRows, weights: ExpertWeights) -> None:
    if isinstance(hidden_RH, QuantizedRows):
        wanted = (hidden_RH.shape[0], -(-hidden_RH.shape[1] // SCALE_BLOCK))
        values, scales = hidden_RH.values, hidden_RH.scales
        if values.dtype != FLOAT8 or scales.dtype != torch.float32:
            raise DtypeError(f"hidden must have float8_e4m3fn values and float32 scales, got {values.dtype} and {scales.dtype}")
        if scales.shape != wanted:
            raise ShapeError(f"hidden.scales must be {list(wanted)} for values {list(values.shape)}, got {list(scales.shape)}")
    elif weights.up_scale is not None:
        if hidden_RH.dtype not in (torch.bfloat16, torch.float16):
            raise DtypeError(f"hidden is {hidden_RH.dtype} but float8 experts take bfloat16 or float16; convert it")
    elif hidden_RH.dtype != weights.up_proj.dtype:
        raise DtypeError(f"hidden is {hidden_RH.dtype} but the experts are {weights.up_proj.dtype}; convert one of them")


def check_out(out: torch.Tensor, hidden_RH: HiddenRows) -> None:
    """Raises where `out` does not fit the gathered rows."""
    if out.shape != hidden_RH.shape:
        raise ShapeError(f"out is {list(out.shape)} but there are {list(hidden_RH.shape)} gathered rows; use combine_input()")
    if out.dtype not in HIDDEN_DTYPES:
        raise DtypeError(f"out must be {', '.join(map(str, HIDDEN_DTYPES))}, got {out.dtype}")
    if out.device != hidden_RH.device:
        raise DeviceError(f"out is on {out.device} but hidden is on {hidden_RH.device}; use combine_input()")


def _check_scales(weights: ExpertWeights) -> None:
    pairs = (("up", weights.up_proj, weights.up_scale), ("down", weights.down_proj, weights.down_scale))
    for name, matrices, scale in pairs:
        if (matrices.dtype == FLOAT8) != (scale is not None):
            has = "no " if scale is None else ""
            raise DtypeError(
                f"{name}_proj is {matrices.dtype} but there is {has}{name}_scale; use quantize_weights, for both products"
            )
        L, Y, X = matrices.shape
        expected = (L, -(-Y // SCALE_BLOCK), -(-X // SCALE_BLOCK))
        if scale is not None and (scale.shape != expected or scale.dtype != torch.float32 or not scale.is_contiguous()):
            raise ShapeError(
                f"{name}_scale must be contiguous float32 {list(expected)} for {name}_proj {[L, Y, X]}, "
                f"got {scale.dtype} {list(scale.shape)}"
            )


def _check_biases(weights: ExpertWeights) -> None:
    pairs = (("up", weights.up_proj, weights.up_bias), ("down", weights.down_proj, weights.down_bias))
    for name, matrices, bias in pairs:
        if bias is None:
            continue
        if bias.shape != matrices.shape[:2]:
            raise ShapeError(f"{name}_bias must be {list(matrices.shape[:2])} ({name}_proj's rows), got {list(bias.shape)}")
        if bias.device != matrices.device:
            raise DeviceError(f"{name}_bias is on {bias.device} but {name}_proj is on {matrices.device}; move it there")
