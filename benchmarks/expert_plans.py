"""Which kernels `benchmarks/experts.py` tries: tile sizes for few and for many rows, and whole plans; compiled many at a time."""

import dataclasses
import time

import torch

from compiling import compile_all
from expert_layers import num_local
from tokenferry.experts import variants
from tokenferry.experts.plan import Plan, Tiles, plan


def few_candidates():
    """Cuts for experts with few rows, each with its kind."""
    for rows, rows_few, read, depth, warps, stages, per_sm in (
        (64, 16, 32, 128, 4, 4, 16),
        (64, 16, 32, 256, 4, 3, 16),
        (64, 16, 64, 64, 4, 6, 16),
        (64, 16, 64, 128, 4, 3, 16),
        (64, 16, 64, 128, 4, 4, 16),
        (64, 16, 64, 128, 8, 4, 16),
        (64, 16, 64, 256, 4, 2, 16),
        (64, 16, 64, 256, 8, 3, 16),
        (64, 16, 128, 64, 4, 4, 16),
        (64, 16, 128, 128, 4, 3, 16),
        (64, 16, 128, 64, 8, 5, 16),
        (64, 16, 128, 128, 8, 4, 16),
        (64, 16, 64, 128, 4, 3, 2),
        (64, 16, 64, 64, 4, 4, 16),
    ):
        yield rows, rows_few, read, depth, warps, stages, per_sm, "few"


def many_candidates():
    """Cuts for experts with many rows, each with its kind."""
    for rows, read, depth, warps, stages, per_sm in (
        (128, 256, 64, 8, 3, 1),
        (128, 256, 64, 8, 4, 1),
        (128, 128, 64, 4, 4, 2),
        (128, 128, 64, 8, 4, 2),
        (128, 128, 64, 8, 3, 2),
        (64, 256, 64, 4, 3, 2),
        (64, 256, 64, 8, 4, 1),
        (256, 128, 64, 8, 4, 1),
        (256, 128, 64, 8, 3, 1),
        (64, 128, 64, 4, 4, 2),
    ):
        yield rows, 0, read, depth, warps, stages, per_sm, "many"


def tiles_of(candidate, gated):
    """A candidate as the tiles of a product."""
    rows, rows_few, read, depth, warps, stages, per_sm, _ = candidate
    return Tiles(
        rows=rows, rows_few=rows_few or rows, columns=read // (2 if gated else 1), depth=depth, num_warps=warps,
        num_stages=stages, programs_per_sm=per_sm,
    )  # fmt: skip


def plan_of(candidate):
    """Both products with the same kernel, whatever the number of rows."""
    return Plan(up=(tiles_of(candidate, True),), down=(tiles_of(candidate, False),))


def variant_of(preset, **changes):
    """Without tensors, so that processes without a GPU can compile it."""
    L, H, I = num_local(preset), preset.hidden_size, preset.intermediate_size
    known = variants.Variant(
        num_local_experts=L, hidden_size=H, intermediate_size=I, topk=preset.topk, dtype=torch.bfloat16,
        weight_dtype=torch.bfloat16, index_dtype=torch.int32, out_dtype=torch.bfloat16, activation=preset.activation.name,
        gated=preset.activation.gated, interleaved=preset.activation.interleaved, up_bias=preset.bias, down_bias=preset.bias,
        up_strides=(2 * I * H, H, 1), down_strides=(H * I, I, 1), aligned=True, batch_invariant=False, max_rows=None,
    )  # fmt: skip
    return dataclasses.replace(known, **changes)


def specs_of(variant):
    """Every kernel of a variant."""
    return variants.specs(variant, torch.device("cpu")).all


def precompile(wanted_variants):
    """Compiles their kernels; a candidate that needs too much memory is counted, and left out where it is asked for."""
    start = time.monotonic()
    wanted = list(dict.fromkeys(spec for variant in wanted_variants for spec in specs_of(variant)))
    failed = compile_all(wanted, 16)
    print(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s, {len(failed)} failed", flush=True)


def changed(launches, **changes):
    """Tiles with other settings."""
    return tuple(dataclasses.replace(tiles, **changes) for tiles in launches)


def by_rows(launches):
    """Those of experts with few rows, and with many."""
    return sorted(launches, key=lambda tiles: tiles.min_rows)


def few_plans(preset):
    """The default, and other cuts for experts with few rows: rows of a tile, columns read, depth, stages."""
    default = plan(torch.bfloat16, preset.hidden_size, preset.intermediate_size, gated=preset.activation.gated)

    def cut(launches, halves, rows, read, depth, stages):
        new = {"rows": rows, "columns": read // halves, "depth": depth, "num_stages": stages}
        return tuple(dataclasses.replace(tiles, **new) if tiles.max_rows else tiles for tiles in launches)

    def both(*sizes):
        return Plan(up=cut(default.up, 2 if preset.activation.gated else 1, *sizes), down=cut(default.down, 1, *sizes))

    candidates = ((64, 64, 128, 3), (32, 128, 128, 3), (32, 64, 128, 4), (32, 128, 64, 5), (32, 64, 64, 6), (64, 128, 64, 4))
    return {"default": default, **{"/".join(map(str, sizes)): both(*sizes) for sizes in candidates}}


def float8_plans(preset):
    """The default for float8 weights, and what it is compared with: those of experts with many rows, then with few."""
    sizes = torch.bfloat16, preset.hidden_size, preset.intermediate_size
    default = plan(*sizes, gated=preset.activation.gated, scaled=True, in_blocks=True)
    (few_up, many_up), (few_down, many_down) = by_rows(default.up), by_rows(default.down)

    def many(down=None, **changes):
        return Plan(up=(*changed([many_up], **changes), few_up), down=(few_down, *changed([many_down], **(down or changes))))

    def few(**changes):
        return Plan(up=(many_up, *changed([few_up], **changes)), down=(*changed([few_down], **changes), many_down))

    return {
        "before": plan(*sizes, gated=preset.activation.gated, scaled=True),
        "many 4 stages": many({"num_stages": 4}, num_stages=4),
        "many down 64 rows": many({"rows": 64, "rows_few": 64, "num_warps": 4, "num_stages": 3, "programs_per_sm": 3}),
        "many from 33": Plan(
            up=(*changed([many_up], min_rows=33), *changed([few_up], max_rows=32)),
            down=(*changed([few_down], max_rows=32), *changed([many_down], min_rows=33)),
        ),
        "few 2 stages": few(num_stages=2),
        "few first": Plan(up=(few_up, many_up), down=(few_down, many_down)),
        "default again": default,
    }


def named_plans(preset):
    """The default, and what it is compared with."""
    default = plan(torch.bfloat16, preset.hidden_size, preset.intermediate_size, gated=preset.activation.gated)
    (few_up, many_up), (few_down, many_down) = by_rows(default.up), by_rows(default.down)

    def many(**changes):
        return Plan(up=(few_up, *changed([many_up], **changes)), down=(few_down, *changed([many_down], **changes)))

    return {
        "default": default,
        "many first": Plan(up=(many_up, few_up), down=(few_down, many_down)),
        "few alone": Plan(up=changed([few_up], max_rows=0), down=changed([few_down], max_rows=0)),
        "long tails": many(rows_few=many_up.rows),
        "pointers": many(tensor_map=False),
        "four stages": many(num_stages=4),
        "many from 33": Plan(
            up=(*changed([few_up], max_rows=32), *changed([many_up], min_rows=33)),
            down=(*changed([few_down], max_rows=32), *changed([many_down], min_rows=33)),
        ),
        "default again": default,
    }
