"""Which kernels serve experts of one shape, dtype and setting: nothing here looks at a row, or needs a GPU.

Legend: K choices of a row, H hidden size, I intermediate size, L experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from tokenferry.activations import Activation
from tokenferry.dispatched import FLOAT8, SCALE_BLOCK
from tokenferry.experts import mxfp4
from tokenferry.experts.plan import Plan, Tiles, WarpTiles, plan
from tokenferry.experts.scratch import RowShape
from tokenferry.experts.weights import ExpertWeights
from tokenferry.kernels import wire
from tokenferry.kernels.expert_gemm import SIGNATURE as GEMM_SIGNATURE
from tokenferry.kernels.expert_gemm import expert_gemm_kernel
from tokenferry.kernels.expert_mxfp4 import SIGNATURE as MXFP4_SIGNATURE
from tokenferry.kernels.expert_mxfp4 import expert_mxfp4_kernel
from tokenferry.kernels.expert_quantize import SIGNATURE as QUANTIZE_SIGNATURE
from tokenferry.kernels.expert_quantize import quantize_rows_kernel
from tokenferry.kernels.expert_sum import SIGNATURE as SUM_SIGNATURE
from tokenferry.kernels.expert_sum import expert_sum_kernel
from tokenferry.kernels.expert_table import COUNTING_SIGNATURE, NO_LOADS, expert_table_kernel
from tokenferry.kernels.expert_table import SIGNATURE as TABLE_SIGNATURE
from tokenferry.kernels.launch import POINTER_ALIGNMENT, KernelSpec, has_pdl, specify

TABLE_FEW, TABLE_MIDDLE, TABLE_MANY = 1024, 2048, 8192
"""Numbers that a program of the table reads at a time: of few rows, and of many."""
SUM_BLOCK = 1024


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
    norm: bool = False
    quantized_rows: bool = False
    """Whether the gathered rows are float8 with scales; `dtype` is then that of the rows between the products."""

    @property
    def has_float8_weights(self) -> bool:
        """With block scales."""
        return self.weight_dtype == FLOAT8

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed MXFP4."""
        return self.weight_dtype == torch.int32


def row_shape(variant: Variant) -> RowShape:
    """What a gathered row of this variant needs."""
    sizes = (variant.topk, variant.hidden_size, variant.intermediate_size, variant.dtype.itemsize)
    return RowShape(*sizes, float8=variant.has_float8_weights)


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
    quantized_rows: bool = False,
) -> Variant:
    """The variant that such operands ask for. `aligned`: operands that are not given here begin at multiples of 16 bytes."""
    settings = (aligned, batch_invariant, max_rows, plan, quantized_rows)
    return Variant(*fields_of(weights, activation, topk, dtype, index_dtype, out_dtype, *settings))


def fields_of(
    weights: ExpertWeights,
    activation: Activation,
    topk: int,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    out_dtype: torch.dtype,
    aligned: bool,
    batch_invariant: bool,
    max_rows: int | None,
    plan: Plan | None,
    quantized_rows: bool,
) -> tuple[Any, ...]:
    """The fields of `variant_of`, in their order. An eager call looks its kernels up by them, since a `Variant` takes longer to
    be made, hashed and compared than the whole of the rest of the search."""
    L, H, I = weights.sizes
    up, down, norm = weights.up_proj, weights.down_proj, weights.norm_scale
    up_bias, down_bias = weights.up_bias, weights.down_bias
    addresses = up.data_ptr() | down.data_ptr()
    for part in (up_bias, down_bias, weights.up_scale, weights.down_scale, norm):
        if part is not None:
            addresses |= part.data_ptr()
    return (
        L,
        H,
        I,
        topk,
        dtype,
        up.dtype,
        index_dtype,
        out_dtype,
        activation.name,
        activation.gated,
        activation.interleaved,
        up_bias is not None,
        down_bias is not None,
        up.stride(),
        down.stride(),
        aligned and addresses % POINTER_ALIGNMENT == 0,
        batch_invariant,
        max_rows,
        plan,
        norm is not None,
        quantized_rows,
    )


def fits_blocks(variant: Variant, device: torch.device) -> bool:
    """Whether float8 weights are laid out for `Tiles.in_blocks`: parts of 128 columns have one scale, and tensor maps serve."""
    if not variant.has_float8_weights or not (has_pdl(device) or wire.INTERPRETED) or not variant.aligned:
        return False
    if variant.gated and (variant.interleaved or variant.intermediate_size % SCALE_BLOCK):
        return False
    strides = (variant.up_strides, variant.down_strides)
    return all(each[2] == 1 and each[0] % POINTER_ALIGNMENT == each[1] % POINTER_ALIGNMENT == 0 for each in strides)


def chosen_plan(variant: Variant, device: torch.device) -> Plan:
    """The variant's own plan, or the default."""
    if variant.plan is not None:
        return variant.plan
    return plan(
        variant.dtype,
        variant.hidden_size,
        variant.intermediate_size,
        gated=variant.gated,
        batch_invariant=variant.batch_invariant,
        scaled=variant.has_float8_weights,
        packed=variant.is_packed,
        in_blocks=fits_blocks(variant, device),
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
        """In the order of their launches, except for the quantizing ones."""
        return (self.table, *self.quantize, *self.up, *self.down, self.sum)


def specs(variant: Variant, device: torch.device) -> Specs:
    """All kernels of a variant."""
    pdl = int(has_pdl(device))
    chosen = chosen_plan(variant, device)
    quantizes = variant.out_dtype == FLOAT8
    total = specify(
        expert_sum_kernel,
        SUM_SIGNATURE,
        {
            "L": variant.num_local_experts,
            "K": variant.topk,
            "H": variant.hidden_size,
            "BLOCK": max(SCALE_BLOCK * quantizes, min(SUM_BLOCK, triton.next_power_of_2(variant.hidden_size))),
            "NORM": variant.norm,
            "QUANTIZES": quantizes,
            "PDL": pdl,
        },
        num_warps=4,
        num_stages=1,
        dtypes={"DTYPE": variant.dtype, "IDX": variant.index_dtype, "OUT": variant.out_dtype},
        aligned=variant.aligned,
    )
    up = tuple(_gemm_spec(variant, tiles, True, pdl, overlaps=place > 0) for place, tiles in enumerate(chosen.up))
    down = tuple(_gemm_spec(variant, tiles, False, pdl, overlaps=place > 0) for place, tiles in enumerate(chosen.down))
    quantize: tuple[KernelSpec, ...] = ()
    if _prequantizes(variant, chosen):
        products = [True] * (not variant.quantized_rows) + [False] * (not is_in_blocks(chosen))
        quantize = tuple(_quantize_spec(variant, chosen, is_first_product, pdl) for is_first_product in products)
    return Specs(table_spec(variant, device, counts_loads=False), quantize, up, down, total)


def table_spec(variant: Variant, device: torch.device, *, counts_loads: bool) -> KernelSpec:
    """The table's kernel, or the one that adds up each expert's pairs besides, for telemetry."""
    constants = {
        "K": variant.topk,
        "FEW": TABLE_FEW,
        "MIDDLE": TABLE_MIDDLE,
        "MANY": TABLE_MANY,
        "TELEMETRY": int(counts_loads),
        "PDL": int(has_pdl(device)),
    }
    return specify(
        expert_table_kernel,
        COUNTING_SIGNATURE if counts_loads else TABLE_SIGNATURE,
        constants if counts_loads else constants | NO_LOADS,
        num_warps=8,
        num_stages=1,
        dtypes={"IDX": variant.index_dtype},
        aligned=variant.aligned,
    )


def is_in_blocks(chosen: Plan) -> bool:
    """Whether all of its tiles are, so that activated rows are quantized where they are made."""
    found = {tiles.in_blocks for tiles in (*chosen.up, *chosen.down)}
    assert len(found) == 1, "activated rows are either quantized or not"
    return True in found


def _prequantizes(variant: Variant, chosen: Plan) -> bool:
    return variant.has_float8_weights and any(tiles.prequantize for tiles in (*chosen.up, *chosen.down))


def _quantize_spec(variant: Variant, chosen: Plan, is_first_product: bool, pdl: int) -> KernelSpec:
    constants = {
        "L": variant.num_local_experts,
        "X": variant.hidden_size if is_first_product else variant.intermediate_size,
        "IS_FIRST_PRODUCT": is_first_product,
        "MIN_ROWS": min(tiles.min_rows for tiles in (*chosen.up, *chosen.down) if tiles.prequantize),
        "LANES": triton.next_power_of_2(variant.num_local_experts),
        "PDL": pdl,
    }
    return specify(
        quantize_rows_kernel,
        QUANTIZE_SIGNATURE,
        constants,
        num_warps=4,
        num_stages=1,
        dtypes={"DTYPE": variant.dtype},
        aligned=variant.aligned,
    )


def uses_tensor_map(variant: Variant, tiles: Tiles, is_first_product: bool, pdl: int) -> bool:
    """Whether weights come by the tensor memory accelerator: where the tiles ask for it, and the layout allows it."""
    strides = list(variant.up_strides if is_first_product else variant.down_strides)
    if 1 not in strides[1:]:
        return False
    is_transposed = strides[2] != 1
    strides.remove(1)
    if is_first_product and variant.gated and is_transposed and not variant.interleaved:
        strides.append(variant.intermediate_size)  # from a gate to its up
    in_steps_of_16_bytes = all(stride * variant.weight_dtype.itemsize % POINTER_ALIGNMENT == 0 for stride in strides)
    is_there = bool(pdl or wire.INTERPRETED) and tiles.tensor_map and tiles.in_blocks == variant.has_float8_weights
    return is_there and variant.aligned and in_steps_of_16_bytes


def descriptor_block(variant: Variant, tiles: Tiles, is_first_product: bool) -> tuple[int, int, int, int]:
    """Of the descriptor by which weights come: see `expert_gemm_kernel`."""
    strides = variant.up_strides if is_first_product else variant.down_strides
    if strides[2] == 1:
        halves = 2 if tiles.in_blocks and tiles.columns > SCALE_BLOCK else 1
        return (1, 1, tiles.columns // halves, tiles.depth)
    is_paired = is_first_product and variant.gated and variant.interleaved
    return (1, 1, tiles.depth, tiles.columns * (2 if is_paired else 1))


def _packed_spec(variant: Variant, tiles: Tiles, is_first_product: bool, pdl: int, *, overlaps: bool) -> KernelSpec:
    sizes = (variant.hidden_size, variant.intermediate_size)
    depth, width = sizes if is_first_product else sizes[::-1]
    gathered = is_first_product and variant.quantized_rows
    constants = {
        "L": variant.num_local_experts,
        "K": variant.topk,
        "DEPTH": depth,
        "WIDTH": width,
        "IS_FIRST_PRODUCT": is_first_product,
        "GATED": is_first_product and variant.gated,
        "INTERLEAVED": is_first_product and variant.interleaved,
        "ACTIVATION": variant.activation if is_first_product else "none",
        "BIAS": variant.up_bias if is_first_product else variant.down_bias,
        "GATHERED": gathered,
        "LARGE_ROWS": tiles.after or (tiles.rows if tiles.min_rows > 1 else 0),
        "MAX_REST": tiles.max_rows if tiles.after else tiles.min_rows - 1,
        "IS_REST": tiles.after > 0,
        "BM_FEW": tiles.rows_few,
        "BM": tiles.rows,
        "BM_WIDE": tiles.rows_wide or tiles.rows,
        "BN": tiles.columns,
        "BD": tiles.depth,
        **_by_warp(tiles.by_warp, depth),
        "LANES": triton.next_power_of_2(variant.num_local_experts),
        "UPCAST": wire.INTERPRETED,
        "OVERLAPS": overlaps,
        "PDL": pdl,
    }
    return specify(
        expert_mxfp4_kernel,
        MXFP4_SIGNATURE,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        dtypes={"DTYPE": variant.dtype, "ROWS": torch.float8_e4m3fn if gathered else variant.dtype},
        aligned=variant.aligned,
        max_registers=tiles.max_registers,
    )


def _by_warp(tiles: WarpTiles | None, depth: int) -> dict[str, int]:
    """Constants of the tiles by warps. The steps that are written out divide the blocks of depth."""
    if tiles is None:
        return {"WARP_PAIRS": 0, "WARP_BM": 0, "WARP_BN": 0, "UNROLL": 0}
    blocks = -(-depth // mxfp4.BLOCK)
    steps = next(steps for steps in range(tiles.steps, 0, -1) if blocks % steps == 0)
    return {"WARP_PAIRS": tiles.max_pairs, "WARP_BM": tiles.rows, "WARP_BN": tiles.columns, "UNROLL": steps}


def _gemm_spec(variant: Variant, tiles: Tiles, is_first_product: bool, pdl: int, *, overlaps: bool) -> KernelSpec:
    if variant.is_packed:
        return _packed_spec(variant, tiles, is_first_product, pdl, overlaps=overlaps)
    strides = variant.up_strides if is_first_product else variant.down_strides
    sizes = (variant.hidden_size, variant.intermediate_size)
    depth, width = sizes if is_first_product else sizes[::-1]
    scaled = variant.has_float8_weights
    gathered = is_first_product and variant.quantized_rows
    quantized = gathered or (scaled and tiles.prequantize)
    has_map = uses_tensor_map(variant, tiles, is_first_product, pdl)
    constants = {
        "L": variant.num_local_experts,
        "K": variant.topk,
        "DEPTH": depth,
        "WIDTH": width,
        "STRIDE_E": strides[0],
        "STRIDE_N": strides[1],
        "STRIDE_D": strides[2],
        "IS_FIRST_PRODUCT": is_first_product,
        "GATED": is_first_product and variant.gated,
        "INTERLEAVED": is_first_product and variant.interleaved,
        "ACTIVATION": variant.activation if is_first_product else "none",
        "BIAS": variant.up_bias if is_first_product else variant.down_bias,
        "SCALED": scaled,
        "QUANTIZED": quantized,
        "GATHERED": gathered,
        "IN_BLOCKS": tiles.in_blocks,
        "SWAPPED": tiles.swapped,
        "TENSOR_MAP": has_map,
        "MIN_ROWS": tiles.min_rows,
        "MAX_ROWS": tiles.max_rows,
        "BM_FEW": tiles.rows_few,
        "BM": tiles.rows,
        "BN": tiles.columns,
        "BD": tiles.depth,
        "LANES": triton.next_power_of_2(variant.num_local_experts),
        "UPCAST": wire.INTERPRETED,
        "OVERLAPS": overlaps,
        "PDL": pdl,
    }
    rows_dtype = FLOAT8 if quantized else variant.dtype
    out_dtype = FLOAT8 if tiles.in_blocks and is_first_product else variant.dtype
    return specify(
        expert_gemm_kernel,
        GEMM_SIGNATURE,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        dtypes={"DTYPE": variant.dtype, "ROWS": rows_dtype, "WEIGHT": variant.weight_dtype, "OUT": out_dtype},
        descriptors={"weights": descriptor_block(variant, tiles, is_first_product)} if has_map else None,
        aligned=variant.aligned,
    )
