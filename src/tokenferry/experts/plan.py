"""How the grouped products are cut into tiles. Chosen from shapes, dtype and settings alone; which of its launches serves
an expert is decided on the device, by its number of rows, and for packed weights also by that of all experts together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class WarpTiles:
    """Tiles of packed weights of which each warp has columns for itself: see `product_of_few`.

    Attributes:
        max_pairs: a launch takes these where all experts that it serves together have at most so many rows.
        rows, columns: of a tile.
        steps: of 64 depths, as many as are written out, and asked for ahead; fewer where they do not divide the depth.
    """

    max_pairs: int
    columns: int
    rows: int = 8
    steps: int = 3


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One launch of the grouped product.

    Attributes:
        tensor_map: weights come by the tensor memory accelerator (Hopper and newer), where their layout allows it.
        prequantize: rows for float8 weights are quantized once, by a launch of their own; else in every tile that reads them.
        in_blocks: rows and weights are float8, and the first product quantizes what it writes: see `kernels/expert_scaled.py`.
        swapped: then, weights take the place of rows in the tensor core, which wants 64 of these: for few rows.
        min_rows, max_rows: it serves experts with min_rows <= rows <= max_rows; max_rows 0 means no upper limit.
        rows_few: where at most so many rows of an expert are left, the tile has so many.
        rows_wide: of packed weights: tiles of so many rows, more than `rows`, as long as they are full; 0: none.
        after: of packed weights: it serves what another launch, of tiles of so many rows, leaves of an expert, which is at most
            `max_rows`; the other one has `min_rows` rows at least in its last tile. 0: it leaves no row that it could serve.
        rows, columns, depth: of a tile; `columns` are of the output, so a gated product reads twice as many.
        num_warps, num_stages: of a program, and of its pipeline.
        programs_per_sm: the launch has at most so many programs for each SM, which take tiles in turn.
        by_warp: of packed weights: other tiles for very few rows.
        max_registers: of a thread, so that more programs fit on an SM at once; None: as the assembler likes.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    rows_few: int
    tensor_map: bool = False
    prequantize: bool = False
    in_blocks: bool = False
    swapped: bool = False
    min_rows: int = 1
    max_rows: int = 0
    rows_wide: int = 0
    after: int = 0
    by_warp: WarpTiles | None = None
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The launches of the first and of the second product, in order."""

    up: tuple[Tiles, ...]
    down: tuple[Tiles, ...]


FEW_ROWS = 64
"""Experts with at most so many rows are bound by reading their weights: small tiles, so that all SMs read. H100 80GB HBM3,
2026-11-23, sweep of 24 cuts over qwen3-30b-a3b, gpt-oss-20b and deepseek-v3 (benchmarks/results): at 64 rows an expert both kinds
take the same time, within 2 %."""


def classes_of_rows(max_rows: int, batch_invariant: bool) -> tuple[int, ...]:
    """The values of `plan(max_rows=...)` that calls with at most `max_rows` rows an expert ask for. All of them are prepared, so
    that no step loads a kernel."""
    return (max_rows,) if batch_invariant or max_rows <= FEW_ROWS else (max_rows, FEW_ROWS)


def class_of_rows(max_rows: int | None, max_expert_rows: int | None, batch_invariant: bool) -> int | None:
    """Which of them serves a step that has promised at most `max_expert_rows` rows an expert. `max_rows`: None if nothing is
    prepared.

    Example:
        class_of_rows(8192, 64, False) == 64; class_of_rows(8192, 65, False) == 8192; class_of_rows(8192, 64, True) == 8192
    """
    if max_rows is None or max_expert_rows is None or max_expert_rows > FEW_ROWS:
        return max_rows
    return classes_of_rows(max_rows, batch_invariant)[-1]


def plan(
    dtype: torch.dtype,
    up_depth: int,
    down_depth: int,
    *,
    gated: bool = True,
    batch_invariant: bool = False,
    scaled: bool = False,
    packed: bool = False,
    in_blocks: bool = False,
    max_rows: int | None = None,
) -> Plan:
    """The cut for one configuration.

    Args:
        dtype: of the rows.
        up_depth, down_depth: numbers that each output of the two products sums: H and I.
        gated: whether the first product has a gate.
        batch_invariant: one cut for every number of rows, so that a row's bits do not depend on it.
        scaled: float8 weights with block scales.
        packed: MXFP4 weights.
        in_blocks: these are laid out for `Tiles.in_blocks`.
        max_rows: most rows that an expert can get (C·EP, or what a step has promised), None if unknown. No plan leaves out an
            expert that gets more all the same.
    """
    halves = 2 if gated else 1
    if dtype == torch.float32:  # no tensor cores: meant for checks
        tiles = Tiles(rows=32, rows_few=32, columns=64 // halves, depth=32, num_warps=4, num_stages=2, programs_per_sm=4)
        return Plan(up=(tiles,), down=(tiles,))
    if packed:
        return _packed(halves, batch_invariant, max_rows)
    if in_blocks:
        return _plan_in_blocks(batch_invariant, max_rows)
    if batch_invariant:
        return Plan(up=(_one_cut(up_depth, halves, scaled),), down=(_one_cut(down_depth, 1, scaled),))
    if max_rows is not None and max_rows <= FEW_ROWS:
        return Plan(up=(_few(up_depth, halves, scaled, 0),), down=(_few(down_depth, 1, scaled, 0),))
    up_limit, down_limit = _few_limit(up_depth, scaled), _few_limit(down_depth, scaled)
    up, many_up = _few(up_depth, halves, scaled, up_limit), _many(halves, scaled, up_limit + 1)
    down, many_down = _few(down_depth, 1, scaled, down_limit), _many(1, scaled, down_limit + 1)
    if scaled:  # the second product for few rows comes right after the first one's, so that it starts while that one ends
        return Plan(up=(many_up, up), down=(down, many_down))
    # Few rows first: they wait for the table alone, and not for a launch that finds no expert with many. Layers of qwen3-30b-a3b,
    # 2 x H200, 2026-11-26: 50.8 instead of 53.3 microseconds at T = 1, within 0.6 % from 8 to 128, and not slower up to 4096.
    return Plan(up=(up, many_up), down=(down, many_down))


BY_WARP_PAIRS = 16
"""Where packed experts have at most so many rows together, warps multiply that have columns for themselves. gpt-oss-20b,
one H100 80GB HBM3, 2026-11-26 (benchmarks/results/1xH100-2026-11-26-mxfp4-plans.jsonl): 42 instead of 51 microseconds at 5
pairs, the same time at 30, 112 instead of 93 at 127."""


def _packed(halves: int, batch_invariant: bool, max_rows: int | None) -> Plan:
    """Of MXFP4 weights, whose columns are what tensor cores take as rows: 64 at a time for each four warps, or 16 for a warp."""
    few = Tiles(
        rows=32, rows_few=16, columns=128, depth=64, num_warps=4, num_stages=4, programs_per_sm=8, max_rows=FEW_ROWS, after=128,
        by_warp=WarpTiles(max_pairs=BY_WARP_PAIRS, columns=64, steps=5),
    )  # fmt: skip
    many = Tiles(
        rows=128, rows_few=128, columns=128, depth=64, num_warps=4, num_stages=4, programs_per_sm=2, min_rows=FEW_ROWS + 1,
    )  # fmt: skip
    if batch_invariant:
        few = replace(few, rows=64, rows_few=64, by_warp=None)
    if batch_invariant or (max_rows is not None and max_rows <= FEW_ROWS):
        few = replace(few, max_rows=0, after=0)
        return Plan(up=(_halved(few, halves),), down=(few,))
    return Plan(up=(_halved(few, halves), _halved(many, halves)), down=(few, many))


def _halved(tiles: Tiles, halves: int) -> Tiles:
    """The same for a product of which each output takes `halves` columns."""
    by_warp = tiles.by_warp and replace(tiles.by_warp, columns=tiles.by_warp.columns // halves)
    return replace(tiles, columns=tiles.columns // halves, by_warp=by_warp)


def _plan_in_blocks(batch_invariant: bool, max_rows: int | None) -> Plan:
    """The best of six cuts for few rows and five for many, over T = 1 to 4096 per rank of qwen3-30b-a3b and deepseek-v3; H200,
    2026-11-26. Tiles of 64 rows for few took 1 to 30 % longer than those of 32, since one program with them fills an SM; 256
    columns of the second product spilled registers."""
    few = Tiles(
        rows=32, rows_few=16, columns=128, depth=128, num_warps=4, num_stages=3, programs_per_sm=16, tensor_map=True,
        prequantize=True, in_blocks=True, swapped=True,
    )  # fmt: skip
    if batch_invariant:
        few = replace(few, rows=64, rows_few=64)
    if batch_invariant or (max_rows is not None and max_rows <= FEW_ROWS):
        return Plan(up=(few,), down=(few,))
    few = replace(few, max_rows=FEW_ROWS)
    many = Tiles(
        rows=128, rows_few=64, columns=128, depth=128, num_warps=8, num_stages=3, programs_per_sm=1, min_rows=FEW_ROWS + 1,
        tensor_map=True, prequantize=True, in_blocks=True,
    )  # fmt: skip
    return Plan(up=(many, few), down=(few, replace(many, num_stages=4)))


def _few_limit(depth: int, scaled: bool) -> int:
    """Most rows of an expert for the tiles of `_few`. Where these have 32 rows, an expert with more would have all its weights
    read twice: at T = 512 deepseek-v3, with about 32 rows an expert, takes 3889 instead of 4065 microseconds, and qwen3-30b-a3b,
    with about 64, 262 instead of 270. H100 80GB HBM3, 2026-11-26 (1xH100-2026-11-26-expert-cuts.jsonl)."""
    return FEW_ROWS // 2 if not scaled and depth % 128 == 0 else FEW_ROWS


def _few(depth: int, halves: int, scaled: bool, max_rows: int) -> Tiles:
    """Steps of 128 through bfloat16 weights: the best of 15 cuts at 2 to 256 valid rows of H 2048, I 768, 32 experts, top-8, with
    and without a gate; H200, 2026-11-26. Tiles of 64 rows and 64 columns, as before, read rows as often as weights where an
    expert had 17 to 64. The others: the best of 14 cuts over T = 1 to 128 per rank of three models; H100 80GB HBM3, 2026-11-23.
    """
    if scaled:
        rows, step, stages, read = 64, 128, 3, 64
    elif depth % 128 == 0:
        rows, step, stages, read = 32, 128, 3, 128
    else:
        rows, step, stages, read = (64, 64, 6, 64) if halves == 2 else (64, 64, 4, 128)
    return Tiles(
        rows=rows,
        rows_few=16,
        columns=read // halves,
        depth=step,
        num_warps=4,
        num_stages=stages,
        programs_per_sm=16,
        max_rows=max_rows,
    )


def _many(halves: int, scaled: bool, min_rows: int) -> Tiles:
    """The best of 10 cuts at T = 512 and 4096. Tensor maps: 14 and 16 % less time for gpt-oss-20b and mixtral at T = 4096, within
    4 % for the others. Same GPU and date as `_few`."""
    step, read = (128, 128) if scaled else (64, 256)  # float8 at 256 spills: its sums are kept twice
    return Tiles(
        rows=128, rows_few=64, columns=read // halves, depth=step, num_warps=8, num_stages=3, programs_per_sm=1,
        min_rows=min_rows, tensor_map=True, prequantize=scaled,
    )  # fmt: skip


def _one_cut(depth: int, halves: int, scaled: bool) -> Tiles:
    step, stages = (128, 3) if scaled or depth % 128 == 0 else (64, 4)
    return Tiles(rows=64, rows_few=64, columns=128 // halves, depth=step, num_warps=4, num_stages=stages, programs_per_sm=2)
