"""What each launch of a decode layer costs: a chain of layers in one graph, with launches left out, on 2 GPUs.

python benchmarks/launches.py OUTPUT.jsonl

What is left out takes its time along, and the starts and ends that it stood between: the difference is the most that a fused
form of it can gain. Results are wrong where something is missing, and are not looked at.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from tokenferry.benchmarking.layer_model import POSITIONS, LayerModel
from tokenferry.benchmarking.layer_times import PASSES, time_dispatch_and_combine, time_layer
from tokenferry.benchmarking.machine import environment
from tokenferry.benchmarking.presets import PRESETS
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.experts import triton_path, variants
from tokenferry.testing import run_ranks

CAPACITY = 4096
POINTS = (("qwen3-30b-a3b", (1, 8, 32)), ("gpt-oss-20b", (1, 8)))
LEFT_OUT = ("", "many", "table", "sum", "choice", "router", "table many sum", "experts", "")
"""Words of launches: `many` are those for experts with many rows, which find none; `table` is made before the chain; `choice` is
what follows the router's product."""


def chain_of(ws, model, rows, left_out):
    router, experts, dispatcher = model.router, model.experts, ws.dispatcher()
    weights, activation = experts.weights, experts.config.activation
    variant = triton_path.variant_of(
        weights, activation, model.preset.topk, torch.bfloat16, torch.int32, torch.bfloat16, max_rows=CAPACITY * ws.group.size
    )
    loaded = triton_path.load(variant, experts.scratch)
    plan = variants.chosen_plan(variant, experts.scratch.device)
    launches = zip((*plan.up, *plan.down), (*loaded.up, *loaded.down), strict=True)
    for_many = [product for tiles, product in launches if tiles.min_rows > 1]
    buffers = experts.scratch.reserve(
        triton_path.row_shape(variant), CAPACITY * ws.group.size, variant.num_local_experts, torch.bfloat16
    )
    routing, tables, first = [router(hidden) for hidden in rows], [], experts.expert_range.start

    def run_experts(got, out, table):
        valid, bounds = got.valid_tokens, (0, buffers.num_rows)
        if table is None:
            table = (buffers.counts_L, buffers.offsets_L, buffers.pairs_P)
            loaded.table(got.topk_idx, valid, *table, *bounds, first)
        products = [(product, weights.up_proj, activation, weights.up_bias) for product in loaded.up]
        products += [(product, weights.down_proj, None, weights.down_bias) for product in loaded.down]
        for product, matrices, between, bias in products:
            if "many" in left_out and product in for_many:
                continue
            source, target = (buffers.activated_PI, buffers.outputs_PH) if between is None else (got.hidden, buffers.activated_PI)
            argument = triton_path.weights_argument(matrices, between, product)
            settings = (*table, 0, activation.alpha, activation.limit)
            product.launch(source, valid, 0, argument, valid, valid if bias is None else bias, target, valid, *settings)
        if "sum" not in left_out:
            loaded.sum(buffers.outputs_PH, got.topk_idx, got.topk_weights, valid, out, valid, 0, *bounds, first, valid, 0.0)

    def layer(place, hidden, table=None):
        topk_weights, topk_idx = routing[place]
        if "choice" in left_out:
            F.linear(hidden, router.weight, router.bias)
        elif "router" not in left_out:
            topk_weights, topk_idx = router(hidden)
        got = dispatcher.dispatch(hidden, topk_idx, topk_weights)
        out = dispatcher.combine_input()
        if "experts" not in left_out:
            run_experts(got, out, table)
        dispatcher.combine(out, got)

    if "table" in left_out:
        ws.begin_step(len(rows[0]))
        for place, hidden in enumerate(rows):
            layer(place, hidden)
            tables += [tuple(tensor.clone() for tensor in (buffers.counts_L, buffers.offsets_L, buffers.pairs_P))]

    def chain():
        ws.begin_step(len(rows[0]))
        for _ in range(PASSES):
            for place, hidden in enumerate(rows):
                layer(place, hidden, tables[place] if tables else None)

    return chain


@torch.no_grad()
def worker(group, path):
    timer, records = GroupTimer(group), []
    for name, counts in POINTS:
        model = LayerModel(group, next(preset for preset in PRESETS if preset.name == name), CAPACITY)
        with model.open("p2p") as ws:
            layer = model.layer(ws)
            for count in counts:
                rows = model.rows(group.rank, count)
                record = {
                    "preset": name,
                    "tokens": count,
                    "layer_us": round(time_layer(timer, ws, layer, rows, promised=False)[0], 2),
                }
                record["round_trip_us"] = round(time_dispatch_and_combine(timer, ws, layer, rows), 2)
                for number, words in enumerate(LEFT_OUT):
                    us, _ = timer.time_graph(chain_of(ws, model, rows, words.split()), POSITIONS * PASSES)
                    ws.check()
                    record[f"without {words}" if words else f"all_{number}_us"] = round(us, 2)
                records.append(record | environment(group.device))
                if group.rank == 0:
                    print(record, flush=True)
                    Path(path).write_text("".join(json.dumps(each) + "\n" for each in records))
            timer.meet()
    return len(records)


if __name__ == "__main__":
    print(run_ranks(worker, 2, sys.argv[1], backend="nccl", timeout_s=240))
