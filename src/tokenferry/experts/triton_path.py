"""Experts by our own kernels: everything is gated by the device's count of valid rows, and nothing asks the host.

Table, first product with its activation, second product, weighted sum: four launches a round, two more where experts may get
many rows. A round serves a fixed number of gathered rows.

Legend of shape suffixes: R gathered rows, K slots of a row, P (row, slot) pairs, H hidden size, I intermediate size, L experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts.launch import INTERPRETED_PROGRAMS, KernelSpec, LoadedKernel
from tokenferry.experts.plan import Plan, Tiles, plan
from tokenferry.experts.scratch import Buffers, ExpertScratch, RowShape
from tokenferry.experts.weights import ExpertWeights
from tokenferry.kernels import wire

TABLE_FEW, TABLE_MANY = 1024, 8192
SUM_BLOCK = 1024
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Variant:
    """Everything that decides which kernels run and how; equal variants share all of them."""

    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    topk: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    index_dtype: torch.dtype
    out_dtype: torch.dtype
    activation: str
    gated: bool
    interleaved: bool
    up_bias: bool
    down_bias: bool
    up_strides: tuple[int, ...]
    down_strides: tuple[int, ...]
    aligned: bool
    batch_invariant: bool
    max_rows: int | None
    plan: Plan | None = None
    """None: the default for these shapes."""


@dataclass(frozen=True, eq=False)
class Product:
    """One launch of a grouped product."""

    kernel: LoadedKernel
    programs: int
    block: tuple[int, ...]
    ahead: bool


@dataclass(frozen=True, eq=False)
class Loaded:
    """The kernels of a variant, with the launches' bounds on programs."""

    table: LoadedKernel
    quantize: tuple[LoadedKernel, ...]
    up: tuple[Product, ...]
    down: tuple[Product, ...]
    sum: LoadedKernel
    programs: int
    """Of the kernels that go over rows."""


def run(
    dispatched: Dispatched,
    weights: ExpertWeights,
    first_expert: int,
    activation: Activation,
    out: torch.Tensor,
    scratch: ExpertScratch,
    *,
    batch_invariant: bool = False,
    max_rows: int | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """`apply_experts` on checked operands, R > 0. Rows >= V of `out` are left as they are."""
    hidden_RH, idx_RK = dispatched.hidden.contiguous(), dispatched.topk_idx.contiguous()
    weights_RK, valid = dispatched.topk_weights.float().contiguous(), dispatched.valid_tokens
    target = out if out.is_contiguous() else out.contiguous()
    aligned = all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in (hidden_RH, idx_RK, weights_RK, target))
    variant = variant_of(
        weights,
        activation,
        idx_RK.shape[1],
        hidden_RH.dtype,
        idx_RK.dtype,
        target.dtype,
        aligned=aligned,
        batch_invariant=batch_invariant,
        max_rows=max_rows,
        plan=plan,
    )
    loaded = load(variant, scratch)
    buffers = scratch.reserve(row_shape(variant), idx_RK.shape[0], variant.num_local_experts, hidden_RH.dtype)
    table = (buffers.counts_L, buffers.offsets_L, buffers.pairs_P)
    dtype = hidden_RH.dtype
    up = (_or(weights.up_scale, valid), valid if weights.up_bias is None else weights.up_bias.to(dtype).contiguous())
    down = (_or(weights.down_scale, valid), valid if weights.down_bias is None else weights.down_bias.to(dtype).contiguous())
    for first_row in range(0, idx_RK.shape[0], buffers.num_rows):
        loaded.table(variant.num_local_experts, idx_RK, valid, *table, first_row, buffers.num_rows, first_expert)
        settings = (*table, first_row, activation.alpha, activation.limit)
        bounds = (first_row, buffers.num_rows)
        rows = _quantized(loaded, 0, hidden_RH, buffers, valid, bounds)
        for product in loaded.up:
            matrices = _described(weights.up_proj, activation, product.block) if product.block else weights.up_proj
            product.kernel(product.programs, *rows[product.ahead], matrices, *up, buffers.activated_PI, *settings)
        rows = _quantized(loaded, 1, buffers.activated_PI, buffers, valid, bounds)
        for product in loaded.down:
            matrices = _described(weights.down_proj, None, product.block) if product.block else weights.down_proj
            product.kernel(product.programs, *rows[product.ahead], matrices, *down, buffers.outputs_PH, *settings)
        loaded.sum(loaded.programs, buffers.outputs_PH, idx_RK, weights_RK, valid, target, *bounds, first_expert)
    return out if target is out else out.copy_(target)


def _quantized(
    loaded: Loaded, which: int, rows: torch.Tensor, buffers: Buffers, valid: torch.Tensor, bounds: tuple[int, int]
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """The rows of product 0 or 1, with scales: as they are (no scales are read), and quantized, if a launch wants that."""
    if not loaded.quantize:
        return ((rows, valid),)
    quantized, scales = buffers.quantized[2 * which : 2 * which + 2]
    loaded.quantize[which](loaded.programs, rows, buffers.counts_L, valid, quantized, scales, *bounds)
    return ((rows, valid), (quantized, scales))


def _described(matrices: torch.Tensor, activation: Activation | None, block: tuple[int, ...]) -> TensorDescriptor:
    """Stacked matrices for the tensor memory accelerator: [experts, gate or up, columns, depth]."""
    L, N, D = matrices.shape
    stride_e, stride_n, _ = matrices.stride()
    if activation is None or not activation.gated:
        return TensorDescriptor(matrices, [L, 1, N, D], [stride_e, stride_e, stride_n, 1], list(block))
    half, column = (stride_n, 2 * stride_n) if activation.interleaved else (N // 2 * stride_n, stride_n)
    return TensorDescriptor(matrices, [L, 2, N // 2, D], [stride_e, half, column, 1], list(block))


def _or(tensor: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    """`unread` stands where a kernel takes a pointer that it does not follow."""
    return unread if tensor is None else tensor


def row_shape(variant: Variant) -> RowShape:
    """What a gathered row of this variant needs."""
    sizes = (variant.topk, variant.hidden_size, variant.intermediate_size, variant.dtype.itemsize)
    return RowShape(*sizes, float8=variant.weight_dtype == torch.float8_e4m3fn)


def variant_of(
    weights: ExpertWeights,
    activation: Activation,
    topk: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    aligned: bool = True,
    batch_invariant: bool = False,
    max_rows: int | None = None,
    plan: Plan | None = None,
) -> Variant:
    """The variant that such operands ask for. `aligned`: those that are not here begin at multiples of 16 bytes."""
    L, H, I = weights.down_proj.shape
    own = (weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias, weights.up_scale, weights.down_scale)
    aligned = aligned and all(tensor is None or tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in own)
    return Variant(
        num_local_experts=L,
        hidden_size=H,
        intermediate_size=I,
        topk=topk,
        dtype=dtype,
        weight_dtype=weights.up_proj.dtype,
        index_dtype=index_dtype,
        out_dtype=out_dtype,
        activation=activation.name,
        gated=activation.gated,
        interleaved=activation.interleaved,
        up_bias=weights.up_bias is not None,
        down_bias=weights.down_bias is not None,
        up_strides=weights.up_proj.stride(),
        down_strides=weights.down_proj.stride(),
        aligned=aligned,
        batch_invariant=batch_invariant,
        max_rows=max_rows,
        plan=plan,
    )


def load(variant: Variant, scratch: ExpertScratch) -> Loaded:
    """The kernels of a variant, loaded."""
    known = scratch.loaded.get(variant)
    if known is None:
        known = scratch.loaded[variant] = _load(variant, scratch)
    return known


def _load(variant: Variant, scratch: ExpertScratch) -> Loaded:
    wanted = specs(variant, scratch.device)
    kernels, num_sms = scratch.kernels, _num_sms(scratch.device)
    chosen = chosen_plan(variant)

    def launches(pieces: tuple[KernelSpec, ...], tiles: tuple[Tiles, ...], width: int) -> tuple[Product, ...]:
        return tuple(
            Product(kernels.load(spec), _programs(tile, width, variant, num_sms), spec.block, dict(spec.constants)["QUANTIZED"])
            for spec, tile in zip(pieces, tiles, strict=True)
        )

    return Loaded(
        kernels.load(wanted.table),
        tuple(kernels.load(spec) for spec in wanted.quantize),
        launches(wanted.up, chosen.up, variant.intermediate_size),
        launches(wanted.down, chosen.down, variant.hidden_size),
        kernels.load(wanted.sum),
        INTERPRETED_PROGRAMS if wire.INTERPRETED else 8 * num_sms,
    )


def chosen_plan(variant: Variant) -> Plan:
    """The variant's own plan, or the default."""
    if variant.plan is not None:
        return variant.plan
    scaled = variant.weight_dtype == torch.float8_e4m3fn
    return plan(
        variant.dtype,
        variant.hidden_size,
        variant.intermediate_size,
        gated=variant.gated,
        batch_invariant=variant.batch_invariant,
        scaled=scaled,
        max_rows=variant.max_rows,
    )


@dataclass(frozen=True)
class Specs:
    """What is to be compiled for a variant."""

    table: KernelSpec
    quantize: tuple[KernelSpec, ...]
    up: tuple[KernelSpec, ...]
    down: tuple[KernelSpec, ...]
    sum: KernelSpec

    @property
    def all(self) -> tuple[KernelSpec, ...]:
        """In the order of their launches, but for the quantizing ones."""
        return (self.table, *self.quantize, *self.up, *self.down, self.sum)


def specs(variant: Variant, device: torch.device) -> Specs:
    """All kernels of a variant."""
    pdl = int(not wire.INTERPRETED and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9))
    chosen = chosen_plan(variant)
    L, K, H = variant.num_local_experts, variant.topk, variant.hidden_size
    table = KernelSpec(
        "table",
        (("IDX", variant.index_dtype),),
        (("K", K), ("FEW", TABLE_FEW), ("MANY", TABLE_MANY), ("PDL", pdl)),
        8,
        1,
        variant.aligned,
    )
    total = KernelSpec(
        "sum",
        (("DTYPE", variant.dtype), ("IDX", variant.index_dtype), ("OUT", variant.out_dtype)),
        (("L", L), ("K", K), ("H", H), ("BLOCK", min(SUM_BLOCK, triton.next_power_of_2(H))), ("PDL", pdl)),
        4,
        1,
        variant.aligned,
    )
    up = tuple(_gemm_spec(variant, tiles, True, pdl) for tiles in chosen.up)
    down = tuple(_gemm_spec(variant, tiles, False, pdl) for tiles in chosen.down)
    quantize = tuple(_quantize_spec(variant, chosen, is_first, pdl) for is_first in (True, False) if _is_ahead(variant, chosen))
    return Specs(table, quantize, up, down, total)


def _is_ahead(variant: Variant, chosen: Plan) -> bool:
    scaled = variant.weight_dtype == torch.float8_e4m3fn
    return scaled and any(tiles.ahead for tiles in (*chosen.up, *chosen.down))


def _quantize_spec(variant: Variant, chosen: Plan, is_first: bool, pdl: int) -> KernelSpec:
    constants = (
        ("L", variant.num_local_experts),
        ("X", variant.hidden_size if is_first else variant.intermediate_size),
        ("FIRST", is_first),
        ("LOW", min(tiles.low for tiles in (*chosen.up, *chosen.down) if tiles.ahead)),
        ("LANES", triton.next_power_of_2(variant.num_local_experts)),
        ("PDL", pdl),
    )
    return KernelSpec("quantize", (("DTYPE", variant.dtype),), constants, 4, 1, variant.aligned)


def _gemm_spec(variant: Variant, tiles: Tiles, is_first: bool, pdl: int) -> KernelSpec:
    strides = variant.up_strides if is_first else variant.down_strides
    depth, width = (
        (variant.hidden_size, variant.intermediate_size) if is_first else (variant.intermediate_size, variant.hidden_size)
    )
    scaled = variant.weight_dtype == torch.float8_e4m3fn
    by_16_bytes = variant.aligned and all(stride * variant.weight_dtype.itemsize % 16 == 0 for stride in strides[:2])
    has_map = tiles.tensor_map and not scaled and bool(pdl or wire.INTERPRETED) and by_16_bytes and strides[2] == 1
    constants = (
        ("L", variant.num_local_experts),
        ("K", variant.topk),
        ("DEPTH", depth),
        ("WIDTH", width),
        ("STRIDE_E", strides[0]),
        ("STRIDE_N", strides[1]),
        ("STRIDE_D", strides[2]),
        ("FIRST", is_first),
        ("GATED", is_first and variant.gated),
        ("INTERLEAVED", is_first and variant.interleaved),
        ("ACTIVATION", variant.activation if is_first else "none"),
        ("BIAS", variant.up_bias if is_first else variant.down_bias),
        ("SCALED", scaled),
        ("QUANTIZED", scaled and tiles.ahead),
        ("TENSOR_MAP", has_map),
        ("LOW", tiles.low),
        ("HIGH", tiles.high),
        ("BM_FEW", tiles.rows_few),
        ("BM", tiles.rows),
        ("BN", tiles.columns),
        ("BD", tiles.depth),
        ("LANES", triton.next_power_of_2(variant.num_local_experts)),
        ("UPCAST", wire.INTERPRETED),
        ("PDL", pdl),
    )
    rows_dtype = variant.weight_dtype if scaled and tiles.ahead else variant.dtype
    types = (("DTYPE", variant.dtype), ("ROWS", rows_dtype), ("WEIGHT", variant.weight_dtype))
    block = (1, 1, tiles.columns, tiles.depth) if has_map else ()
    return KernelSpec("gemm", types, constants, tiles.num_warps, tiles.num_stages, variant.aligned, block)


def _num_sms(device: torch.device) -> int:
    return 1 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def _programs(tiles: Tiles, width: int, variant: Variant, num_sms: int) -> int:
    """From the shape and the tiles alone: an expert with few rows has one tile for each block of columns."""
    if wire.INTERPRETED:
        return INTERPRETED_PROGRAMS
    most = tiles.programs_per_sm * num_sms
    blocks = variant.num_local_experts * -(-width // tiles.columns)
    return most if tiles.high == 0 else min(most, blocks)


__all__ = ["Buffers", "Loaded", "Variant", "load", "run", "specs", "variant_of"]
