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
from tokenferry.dispatched import FLOAT8, SCALE_BLOCK, HiddenRows, PartialRows, QuantizedRows
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError, check_kind
from tokenferry.experts import mxfp4


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
    """Stacked weights of L experts: bfloat16, float16, float32, block-scaled float8_e4m3fn or packed MXFP4, on one device.

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
        packed_sizes: H and I of packed MXFP4 weights, whose matrices and scales have shapes of their own: see `from_mxfp4`, which
            alone makes them. None for other weights.
    """

    up_proj: torch.Tensor
    down_proj: torch.Tensor
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    norm_scale: torch.Tensor | None = None
    norm_epsilon: float = 0.0
    packed_sizes: tuple[int, int] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are packed MXFP4."""
        return self.packed_sizes is not None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """L, H and I."""
        if self.packed_sizes is not None:
            return (self.down_proj.shape[0], *self.packed_sizes)
        L, H, I = self.down_proj.shape
        return L, H, I

    @classmethod
    def from_mxfp4(
        cls,
        up_blocks: torch.Tensor,
        up_scales: torch.Tensor,
        down_blocks: torch.Tensor,
        down_scales: torch.Tensor,
        activation: Activation,
        *,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> ExpertWeights:
        """The matrices of a checkpoint in MXFP4, rearranged once for the kernels, still 4.25 bits a weight.

        Args:
            up_blocks, up_scales: [L, N, H / 32, 16] and [L, N, H / 32] uint8; rows lie as `activation.interleaved` says.
            down_blocks, down_scales: [L, H, I / 32, 16] and [L, H, I / 32] uint8.
            activation: between the products.
            up_bias, down_bias: as attributes.

        Raises:
            ShapeError, DtypeError: parts that do not fit one another, or a scale byte above 128 (a factor of 2).
        """
        mxfp4.check_checkpoint("up", up_blocks, up_scales)
        mxfp4.check_checkpoint("down", down_blocks, down_scales)
        L, H, I = down_blocks.shape[0], up_blocks.shape[2] * mxfp4.GROUP, down_blocks.shape[2] * mxfp4.GROUP
        if up_blocks.shape[:2] != (L, activation.num_columns(I)) or down_blocks.shape[1] != H:
            raise ShapeError(
                f"up_blocks {list(up_blocks.shape)} and down_blocks {list(down_blocks.shape)} do not fit one another with "
                f"{activation.name}: down_blocks of [L, H, I / 32, 16] asks for [L, {activation.num_columns(1)} * I, H / 32, 16]"
            )
        up, up_scale = mxfp4.pack(up_blocks, up_scales, gated=activation.gated, interleaved=activation.interleaved)
        down, down_scale = mxfp4.pack(down_blocks, down_scales, gated=False, interleaved=False)
        return cls(
            up_proj=up,
            down_proj=down,
            up_bias=up_bias,
            down_bias=down_bias,
            up_scale=up_scale,
            down_scale=down_scale,
            packed_sizes=(H, I),
        )

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


def check_weights(weights: ExpertWeights, activation: Activation) -> None:
    """Raises where weights and activation do not fit one another. It takes half of what a call takes the host, so that whoever
    calls with the same weights again does it once."""
    L, H, I = weights.sizes
    if weights.is_packed:
        check_packed(weights, activation)
    elif weights.up_proj.shape != (L, activation.num_columns(I), H):
        raise ShapeError(
            f"up_proj must be {[L, activation.num_columns(I), H]} for {activation.name} and a down_proj of {[L, H, I]}, "
            f"got {list(weights.up_proj.shape)}"
        )
    _check_biases(weights, activation)
    _check_scales(weights)
    scale, device = weights.norm_scale, weights.up_proj.device
    if scale is not None and (scale.shape != (H,) or scale.dtype != torch.float32 or scale.device != device):
        raise ShapeError(f"norm_scale must be float32 [{H}] on {device}, got {scale.dtype} {list(scale.shape)} on {scale.device}")


def check_rows(hidden_RH: HiddenRows, weights: ExpertWeights) -> None:
    """Raises where hidden rows do not fit the weights."""
    L, H, I = weights.sizes
    rows_RH = hidden_RH.values if isinstance(hidden_RH, QuantizedRows) else hidden_RH
    if rows_RH.dim() != 2 or rows_RH.shape[1] != H:
        raise ShapeError(f"hidden must be [R, {H}] (down_proj is {[L, H, I]}), got {list(rows_RH.shape)}")
    _check_hidden_dtype(hidden_RH, weights)
    if hidden_RH.device != weights.up_proj.device:
        raise DeviceError(f"hidden is on {hidden_RH.device} but the experts are on {weights.up_proj.device}; move one of them")


def _check_hidden_dtype(hidden_RH: HiddenRows, weights: ExpertWeights) -> None:
    if isinstance(hidden_RH, QuantizedRows):
        _check_quantized("hidden", hidden_RH)
    elif weights.is_packed:
        if hidden_RH.dtype != torch.bfloat16:
            raise DtypeError(f"hidden is {hidden_RH.dtype} but MXFP4 experts take bfloat16, in which their weights are exact")
    elif weights.up_scale is not None:
        if hidden_RH.dtype not in (torch.bfloat16, torch.float16):
            raise DtypeError(f"hidden is {hidden_RH.dtype} but float8 experts take bfloat16 or float16; convert it")
    elif hidden_RH.dtype != weights.up_proj.dtype:
        raise DtypeError(f"hidden is {hidden_RH.dtype} but the experts are {weights.up_proj.dtype}; convert one of them")


def _check_quantized(name: str, rows: QuantizedRows) -> None:
    wanted = (rows.shape[0], -(-rows.shape[1] // SCALE_BLOCK))
    values, scales = rows.values, rows.scales
    if values.dtype != FLOAT8 or scales.dtype != torch.float32:
        raise DtypeError(f"{name} must have float8_e4m3fn values and float32 scales, got {values.dtype} and {scales.dtype}")
    if scales.shape != wanted:
        raise ShapeError(f"{name}.scales must be {list(wanted)} for values {list(values.shape)}, got {list(scales.shape)}")


def check_out(out: PartialRows, hidden_RH: HiddenRows) -> None:
    """Raises where `out` does not fit the gathered rows."""
    if out.shape != hidden_RH.shape:
        raise ShapeError(f"out is {list(out.shape)} but there are {list(hidden_RH.shape)} gathered rows; use combine_input()")
    if out.device != hidden_RH.device:
        raise DeviceError(f"out is on {out.device} but hidden is on {hidden_RH.device}; use combine_input()")
    if isinstance(out, QuantizedRows):
        _check_quantized("out", out)
    elif out.dtype not in HIDDEN_DTYPES:
        raise DtypeError(f"out must be {', '.join(map(str, HIDDEN_DTYPES))}, or QuantizedRows, got {out.dtype}")


def check_packed(weights: ExpertWeights, activation: Activation) -> None:
    """Raises where packed weights do not have the shapes that `from_mxfp4` gives them."""
    L, H, I = weights.sizes
    rows = {"up": activation.num_columns(I), "down": H}
    for name, depth in (("up", H), ("down", I)):
        outputs, of_block = (I, mxfp4.BLOCK // 2) if name == "up" and activation.gated else (rows[name], mxfp4.BLOCK)
        blocks = (L, -(-outputs // of_block), -(-depth // mxfp4.BLOCK))
        for kind, last in (("proj", mxfp4.WORDS), ("scale", mxfp4.SCALE_WORDS)):
            part = getattr(weights, f"{name}_{kind}")
            if part is None or part.shape != (*blocks, last) or part.dtype != torch.int32 or not part.is_contiguous():
                got = None if part is None else f"{part.dtype} {list(part.shape)}"
                raise ShapeError(
                    f"{name}_{kind} must be contiguous int32 {[*blocks, last]} for packed_sizes {(H, I)} and {activation.name}, "
                    f"got {got}; use ExpertWeights.from_mxfp4"
                )


def _check_scales(weights: ExpertWeights) -> None:
    if weights.is_packed:
        return
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


def _check_biases(weights: ExpertWeights, activation: Activation) -> None:
    L, H, I = weights.sizes
    pairs = (
        ("up", weights.up_proj, weights.up_bias, (L, activation.num_columns(I))),
        ("down", weights.down_proj, weights.down_bias, (L, H)),
    )
    for name, matrices, bias, expected in pairs:
        if bias is None:
            continue
        if bias.shape != expected:
            raise ShapeError(f"{name}_bias must be {list(expected)} ({name}_proj's rows), got {list(bias.shape)}")
        if bias.device != matrices.device:
            raise DeviceError(f"{name}_bias is on {bias.device} but {name}_proj is on {matrices.device}; move it there")
