"""Experts by our own kernels: the device's count of valid rows decides what they work on, and nothing asks the host.

Table, first product with its activation, second product, weighted sum: four launches for each chunk of gathered rows, two more
where experts may get many rows, and two more that quantize rows for float8 weights. A chunk has a fixed number of gathered rows.

Legend of shape suffixes: R gathered rows, K choices of a row, P pairs (row, choice), H hidden size, I intermediate size,
L experts of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched, PartialRows, QuantizedRows
from tokenferry.experts.plan import FEW_ROWS, Plan, Tiles, classes_of_rows
from tokenferry.experts.scratch import Buffers, ExpertScratch, RowShape
from tokenferry.experts.variants import (
    Variant,
    chosen_plan,
    descriptor_block,
    fields_of,
    is_in_blocks,
    row_shape,
    specs,
    table_spec,
    variant_of,
)
from tokenferry.experts.weights import ExpertWeights
from tokenferry.kernels import wire
from tokenferry.kernels.launch import POINTER_ALIGNMENT, BoundLaunch, KernelSpec, KernelStore

INTERPRETED_PROGRAMS = 3
"""Programs run one after another in the interpreter; there are several, so that the sharing of tiles is tried."""
KERNELS_NAME = "loaded_expert_kernels"
"""Under which a scratch keeps what was loaded for the experts that share it."""

Rows = tuple[torch.Tensor, torch.Tensor, int]
"""Rows of a product, their scales, and the stride of these."""

TABLE_ARGUMENTS = ("topk_idx", "valid_tokens", "counts", "offsets", "pairs", "first_row", "num_rows", "first_expert")
QUANTIZE_ARGUMENTS = ("rows", "counts", "valid_tokens", "out", "scales", "first_row", "num_rows")
PRODUCT_ARGUMENTS = (
    "rows", "row_scales", "scale_stride", "weights", "scales", "bias", "out", "out_scales", "counts", "offsets", "pairs",
    "first_row", "alpha", "limit",
)  # fmt: skip
SUM_ARGUMENTS = (
    "outputs", "topk_idx", "topk_weights", "valid_tokens", "out", "out_scales", "out_scale_stride", "first_row", "num_rows",
    "first_expert", "norm_scale", "norm_epsilon",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Product:
    """One launch of a grouped product.

    Attributes:
        launch: takes `PRODUCT_ARGUMENTS`.
        descriptor_block: of the descriptor that it takes the weights by; empty where it takes a pointer.
        prequantized: whether it takes the rows that a launch before it has quantized.
    """

    launch: BoundLaunch
    descriptor_block: tuple[int, ...]
    prequantized: bool


@dataclass(frozen=True, eq=False)
class LoadedExperts:
    """The launches of a variant, their numbers of programs in place."""

    num_local_experts: int
    row_shape: RowShape
    """What a gathered row needs of the scratch."""
    table: BoundLaunch
    counting_table: BoundLaunch | None
    """The same for telemetry, which takes the counters and the number of the first behind the table's arguments. None where the
    scratch serves no workspace that has it."""
    quantize: Mapping[bool, BoundLaunch]
    """Of the rows of the first (True) and of the second product (False), where a launch wants them quantized and nobody else has
    done so: gathered rows may come so, and tiles in blocks quantize activated rows where they make them."""
    in_blocks: bool
    """Whether the first product writes quantized rows."""
    up: tuple[Product, ...]
    down: tuple[Product, ...]
    sum: BoundLaunch


@dataclass(frozen=True, eq=False)
class ExpertKernels:
    """What is loaded for the experts that share a scratch. Variants that differ in part share the kernels that do not."""

    store: KernelStore
    by_variant: dict[Variant, LoadedExperts] = field(default_factory=dict)
    by_fields: dict[tuple[Any, ...], LoadedExperts] = field(default_factory=dict)
    """The same by `fields_of` a variant, of calls that have been made."""


def kernels_of(scratch: ExpertScratch) -> ExpertKernels:
    """What is loaded for the experts that work in this scratch."""
    kernels: ExpertKernels | None = scratch.attached.get(KERNELS_NAME)
    if kernels is None:
        kernels = scratch.attached[KERNELS_NAME] = ExpertKernels(KernelStore(scratch.device))
    return kernels


def prepare(
    scratch: ExpertScratch,
    weights: ExpertWeights,
    activation: Activation,
    *,
    topk: int,
    index_dtype: torch.dtype,
    out_dtype: torch.dtype,
    batch_invariant: bool,
    max_rows: int,
    hidden_dtype: torch.dtype | None = None,
    quantized_rows: bool = False,
) -> None:
    """Loads the kernels, and takes the memory, for calls with up to `max_rows` gathered rows, and for steps that promise few.

    Args:
        weights, activation: of the experts.
        topk: K.
        index_dtype: of the ids that a dispatch gives.
        out_dtype: of the partial rows.
        batch_invariant: see `apply_experts`.
        max_rows: C·EP.
        hidden_dtype: of the rows; default: the weights'.
        quantized_rows: whether a dispatch gives `QuantizedRows`.
    """
    dtype = hidden_dtype or (torch.bfloat16 if weights.is_packed else weights.up_proj.dtype)
    for rows in classes_of_rows(max_rows, batch_invariant):
        variant = variant_of(
            weights,
            activation,
            topk,
            dtype,
            index_dtype,
            out_dtype,
            batch_invariant=batch_invariant,
            max_rows=rows,
            quantized_rows=quantized_rows,
        )
        load(variant, scratch)
    scratch.reserve(row_shape(variant), max_rows, variant.num_local_experts, dtype)


def run(
    dispatched: Dispatched,
    weights: ExpertWeights,
    first_expert: int,
    activation: Activation,
    out: PartialRows,
    scratch: ExpertScratch,
    *,
    batch_invariant: bool = False,
    max_rows: int | None = None,
    plan: Plan | None = None,
    dtype: torch.dtype | None = None,
) -> PartialRows:
    """`apply_experts` on checked operands, R > 0. Rows >= V of `out` are left as they are. `QuantizedRows` have a `dtype`."""
    scratch.poison()
    hidden, idx_RK = dispatched.hidden, dispatched.topk_idx.contiguous()
    weights_RK, valid = dispatched.topk_weights.float().contiguous(), dispatched.valid_tokens
    target, target_scales = _written_to(out)
    gathered: Rows
    if isinstance(hidden, QuantizedRows):
        scales = hidden.scales if hidden.scales.stride(1) == 1 else hidden.scales.contiguous()
        gathered = hidden.values.contiguous(), scales, scales.stride(0)
    else:
        gathered, dtype = (hidden.contiguous(), valid, 0), hidden.dtype
    assert dtype is not None, "quantized rows come with the dtype of what is made of them"
    given = (gathered[0], gathered[1], idx_RK, weights_RK, target, *(() if target_scales is None else (target_scales,)))
    aligned = all(t.data_ptr() % POINTER_ALIGNMENT == 0 for t in given)
    settings = (aligned, batch_invariant, max_rows, plan, isinstance(hidden, QuantizedRows))
    loaded = _asked_for(fields_of(weights, activation, idx_RK.shape[1], dtype, idx_RK.dtype, target.dtype, *settings), scratch)
    buffers = scratch.reserve(loaded.row_shape, idx_RK.shape[0], loaded.num_local_experts, dtype)
    table = (buffers.counts_L, buffers.offsets_L, buffers.pairs_P)
    no_bias = buffers.outputs_PH  # unread, but of the dtype that the kernel rounds activated rows to
    up = (_or(weights.up_scale, valid), no_bias if weights.up_bias is None else weights.up_bias.to(dtype).contiguous())
    down = (_or(weights.down_scale, valid), no_bias if weights.down_bias is None else weights.down_bias.to(dtype).contiguous())
    norm = (_or(weights.norm_scale, valid), weights.norm_epsilon)
    quantized_to = (valid, 0) if target_scales is None else (target_scales, target_scales.stride(0))
    activated: Rows = (buffers.activated_PI, valid, 0)
    if loaded.in_blocks:
        values, scales = buffers.quantized[2:]
        activated = values, scales, scales.shape[1]
    make_table, counters = _table_of(loaded, dispatched, range(first_expert, first_expert + loaded.num_local_experts))
    for first_row in range(0, idx_RK.shape[0], buffers.num_rows):
        make_table(idx_RK, valid, *table, first_row, buffers.num_rows, first_expert, *counters)
        numbers = (*table, first_row, activation.alpha, activation.limit)
        bounds = (first_row, buffers.num_rows)
        rows = _quantized(loaded, True, gathered, buffers, valid, bounds)
        for product in loaded.up:
            matrices = weights_argument(weights.up_proj, activation, product)
            product.launch(*rows[product.prequantized], matrices, *up, *activated[:2], *numbers)
        rows = _quantized(loaded, False, activated, buffers, valid, bounds)
        for product in loaded.down:
            matrices = weights_argument(weights.down_proj, None, product)
            product.launch(*rows[product.prequantized], matrices, *down, buffers.outputs_PH, valid, *numbers)
        loaded.sum(buffers.outputs_PH, idx_RK, weights_RK, valid, target, *quantized_to, *bounds, first_expert, *norm)
    return _with_what_was_written(out, target, target_scales)


def _table_of(
    loaded: LoadedExperts, dispatched: Dispatched, experts: range
) -> tuple[BoundLaunch, tuple[torch.Tensor, int] | tuple[()]]:
    """What makes the table of these experts, and what it takes besides: with telemetry it counts their rows."""
    loads, counting = dispatched.loads, loaded.counting_table
    if loads is None or counting is None or not loads.take(experts):
        return loaded.table, ()
    return counting, (loads.words, loads.first + experts.start)


def _written_to(out: PartialRows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the sum writes to: `out` itself, or a copy where its layout is none that kernels take; and the scales, if any."""
    if not isinstance(out, QuantizedRows):
        return out.contiguous(), None
    return out.values.contiguous(), out.scales if out.scales.stride(1) == 1 else out.scales.contiguous()


def _with_what_was_written(out: PartialRows, target: torch.Tensor, scales: torch.Tensor | None) -> PartialRows:
    if not isinstance(out, QuantizedRows):
        return out if target is out else out.copy_(target)
    if target is not out.values:
        out.values.view(torch.uint8).copy_(target.view(torch.uint8))
    if scales is not None and scales is not out.scales:
        out.scales.copy_(scales)
    return out


def _quantized(
    loaded: LoadedExperts, is_first: bool, rows: Rows, buffers: Buffers, valid: torch.Tensor, bounds: tuple[int, int]
) -> tuple[Rows, Rows]:
    """Rows of a product as they are, and quantized: the same if they are so already, or if no launch wants that."""
    if is_first not in loaded.quantize:
        return rows, rows
    quantized, scales = buffers.quantized[:2] if is_first else buffers.quantized[2:]
    loaded.quantize[is_first](rows[0], buffers.counts_L, valid, quantized, scales, *bounds)
    return rows, (quantized, scales, scales.shape[1])


def weights_argument(matrices: torch.Tensor, activation: Activation | None, product: Product) -> torch.Tensor | TensorDescriptor:
    """Stacked matrices as a launch takes them: as a pointer, or for the tensor memory accelerator as a descriptor (see
    `expert_gemm_kernel`). `activation`: None for the second product."""
    if not product.descriptor_block:
        return matrices
    L, N, D = matrices.shape
    stride_e, stride_n, stride_d = matrices.stride()
    block = list(product.descriptor_block)
    is_transposed, is_gated = stride_d != 1, activation is not None and activation.gated
    if is_transposed and (not is_gated or (activation is not None and activation.interleaved)):
        return TensorDescriptor(matrices, [L, 1, D, N], [stride_e, stride_e, stride_d, 1], block)
    if is_transposed:
        return TensorDescriptor(matrices, [L, 2, D, N // 2], [stride_e, N // 2, stride_d, 1], block)
    if activation is None or not is_gated:
        return TensorDescriptor(matrices, [L, 1, N, D], [stride_e, stride_e, stride_n, 1], block)
    half, column = (stride_n, 2 * stride_n) if activation.interleaved else (N // 2 * stride_n, stride_n)
    return TensorDescriptor(matrices, [L, 2, N // 2, D], [stride_e, half, column, 1], block)


def _or(tensor: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    """`unread` where a kernel takes a pointer that it does not follow."""
    return unread if tensor is None else tensor


def load(variant: Variant, scratch: ExpertScratch) -> LoadedExperts:
    """The launches of a variant; what they need is loaded at its first mention."""
    by_variant = kernels_of(scratch).by_variant
    known = by_variant.get(variant)
    if known is None:
        known = by_variant[variant] = _load(variant, scratch)
    return known


def _asked_for(fields: tuple[Any, ...], scratch: ExpertScratch) -> LoadedExperts:
    """The launches of the variant that has these fields."""
    by_fields = kernels_of(scratch).by_fields
    known = by_fields.get(fields)
    if known is None:
        known = by_fields[fields] = load(Variant(*fields), scratch)
    return known


def _load(variant: Variant, scratch: ExpertScratch) -> LoadedExperts:
    wanted, chosen = specs(variant, scratch.device), chosen_plan(variant, scratch.device)
    store, num_sms = kernels_of(scratch).store, _num_sms(scratch.device)
    store.load_all(wanted.all)

    def bind(spec: KernelSpec, arguments: tuple[str, ...], programs: int) -> BoundLaunch:
        return store.load(spec).bind({}, arguments, grid=programs)

    def products(pieces: tuple[KernelSpec, ...], tiles: tuple[Tiles, ...], width: int) -> tuple[Product, ...]:
        return tuple(
            _product(spec, bind(spec, PRODUCT_ARGUMENTS, _programs(tile, width, variant, num_sms)), variant, tile)
            for spec, tile in zip(pieces, tiles, strict=True)
        )

    over_rows = INTERPRETED_PROGRAMS if wire.INTERPRETED else 8 * num_sms
    return LoadedExperts(
        num_local_experts=variant.num_local_experts,
        row_shape=row_shape(variant),
        table=bind(wanted.table, TABLE_ARGUMENTS, variant.num_local_experts),
        counting_table=_counting_table(variant, scratch) if scratch.counts_loads else None,
        quantize={
            dict(spec.constants)["IS_FIRST_PRODUCT"]: bind(spec, QUANTIZE_ARGUMENTS, over_rows) for spec in wanted.quantize
        },
        in_blocks=is_in_blocks(chosen),
        up=products(wanted.up, chosen.up, variant.intermediate_size),
        down=products(wanted.down, chosen.down, variant.hidden_size),
        sum=bind(wanted.sum, SUM_ARGUMENTS, over_rows),
    )


def _counting_table(variant: Variant, scratch: ExpertScratch) -> BoundLaunch:
    spec = table_spec(variant, scratch.device, counts_loads=True)
    arguments = (*TABLE_ARGUMENTS, "loads", "first_load")
    return kernels_of(scratch).store.load(spec).bind({}, arguments, grid=variant.num_local_experts)


def _product(spec: KernelSpec, launch: BoundLaunch, variant: Variant, tiles: Tiles) -> Product:
    constants = dict(spec.constants)
    if variant.is_packed:
        return Product(launch, (), False)
    block = descriptor_block(variant, tiles, constants["IS_FIRST_PRODUCT"]) if constants["TENSOR_MAP"] else ()
    return Product(launch, block, constants["QUANTIZED"])


def _num_sms(device: torch.device) -> int:
    return 1 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def _programs(tiles: Tiles, width: int, variant: Variant, num_sms: int) -> int:
    """Of a product, from the shape and the tiles alone: an expert with few rows has one tile for each block of columns."""
    if wire.INTERPRETED:
        return INTERPRETED_PROGRAMS
    most = tiles.programs_per_sm * num_sms
    columns = tiles.columns if tiles.by_warp is None else min(tiles.columns, tiles.by_warp.columns)
    blocks = variant.num_local_experts * -(-width // columns)
    has_few_rows = tiles.max_rows > 0 or (variant.max_rows is not None and variant.max_rows <= FEW_ROWS)
    return min(most, blocks) if has_few_rows else most
