"""How many warps, programs and slot rows: times round trips of the bare transport over a grid of settings, on 2 GPUs.

python benchmarks/tune.py OUTPUT.jsonl [small] [slots] [bulk]
"""

import copy
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from tokenferry.benchmarking.roundtrip import Bench, Point

import tokenferry as tf
from tokenferry.kernels.launch import Tuning
from tokenferry.step import StepRequest, StepTensors
from tokenferry.testing import run_ranks
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric import transport as symmetric
from tokenferry.transports.symmetric.transport import SymmetricTransport


def open_bare(group, hidden_size, capacity, tuning, slot_rows):
    config = tf.MoEConfig(hidden_size=hidden_size, num_experts=64, topk=8)
    settings = TransportSettings(
        config=config,
        group=group,
        max_tokens_per_rank=capacity,
        combine_dtype=torch.bfloat16,
        combine_order="rank",
        counts="uneven",
        timeout_s=10,
        open_timeout_s=120,
        max_ctas=None,
        name=group.unique_name("tune"),
        generation=0,
    )
    step_tensors = StepTensors(group.rank, group.size, group.device)
    symmetric.INDEX_DTYPES, symmetric.FLOAT_DTYPES = (torch.int32,), (torch.float32, torch.bfloat16)  # compile what is used here
    return SymmetricTransport(settings, step_tensors, slot_rows=slot_rows, tuning=tuning)


def measure(group, bench, hidden_size, count, tuning, slot_rows):
    transport = open_bare(group, hidden_size, count, tuning, slot_rows)
    point = Point(transport="p2p", hidden_size=hidden_size, tokens=(count,) * group.size, capacity=count)
    own = bench.inputs(point, group.rank, 1)
    terms = transport.combine_input()
    terms[: sum(point.tokens)] = bench.partial(point, group.rank, 1)
    result = []

    def step():
        transport.begin_step(StepRequest(1, count, count), -1)

    def dispatch():
        return transport.dispatch(0, own.hidden, own.topk_idx, own.topk_weights)

    def combine():
        return transport.combine(terms)

    def chain():
        step()
        for _ in range(20):
            got = dispatch()
            out = combine()
        result[:] = [got, out]

    def steps():
        for _ in range(20):
            step()

    median, spread = bench.time_graph(chain, 20)
    record = {"H": hidden_size, "T": count, "warps": tuning.num_warps, "programs": transport._grid, "limit": tuning.max_programs,
              "slots": slot_rows, "us": round(median, 2), "spread": round(spread, 2)}  # fmt: skip
    differences = [
        name
        for name, a, b in (
            (
                "hidden",
                result[0].hidden_RH[: sum(point.tokens)],
                torch.cat([bench.inputs(point, r, 1).hidden for r in range(group.size)]),
            ),
        )
        if not torch.equal(a, b)
    ]
    terms_all = [bench.partial(point, r, 1) for r in range(group.size)]
    total = terms_all[0].float()
    for term in terms_all[1:]:
        total += term.float()
    start = sum(point.tokens[: group.rank])
    if not torch.equal(result[1], total.to(torch.bfloat16)[start : start + count]):
        differences.append("combined")
    transport.check()
    record["wrong"] = differences
    if count == 8:
        record["begin_step_us"] = round(bench.time_graph(steps, 20)[0], 2)
    bench.meet()
    transport.close()
    return record


def host_time(group, bench):
    config = tf.MoEConfig(hidden_size=7168, num_experts=64, topk=8)
    start = time.monotonic()
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="p2p") as ws:
        opened_s = time.monotonic() - start
        point = Point(transport="p2p", hidden_size=7168, tokens=(8,) * group.size, capacity=8)
        own = bench.inputs(point, group.rank, 1)
        layer = ws.dispatcher()
        ws.begin_step(8)
        terms = None
        times = {"dispatch": [], "combine": [], "begin_step": []}
        for _ in range(300):
            a = time.perf_counter()
            ws.begin_step(8)
            b = time.perf_counter()
            layer.dispatch(own.hidden, own.topk_idx, own.topk_weights)
            c = time.perf_counter()
            terms = layer.combine_input()
            d = time.perf_counter()
            layer.combine(terms)
            e = time.perf_counter()
            for name, span in (("begin_step", b - a), ("dispatch", c - b), ("combine", e - d)):
                times[name].append(span)
        torch.cuda.synchronize()
        ws.check()
        transport = ws.active_transport
        alone = transport.solo()
        counts = alone._kernels.counts
        tensor = torch.zeros(64, device=ws.device)
        plain = copy.copy(counts)
        plain._run = copy.copy(counts._run)
        plain._run.launch_pdl = False
        solo_args = (1, alone._buffer.address, alone._buffer.own_table_address, 0, 1, alone._place.state, alone._place.block,
                     alone._step_tensors.packed.data_ptr(), group.rank, group.size, 1, 0, 1, 0)  # fmt: skip
        for name, call in (
            ("torch_add", lambda: tensor.add_(1)),
            ("launch_pdl", lambda: counts(*solo_args)),
            ("launch_plain", lambda: plain(*solo_args)),
            ("raw_stream", lambda: torch._C._cuda_getCurrentRawStream(group.device.index)),
        ):
            spans = []
            for _ in range(200):
                a = time.perf_counter()
                call()
                spans.append(time.perf_counter() - a)
            torch.cuda.synchronize()
            times[name] = spans
    return {"opened_s": round(opened_s, 2), **{f"host_{k}_us": round(sorted(v)[len(v) // 2] * 1e6, 1) for k, v in times.items()}}


def worker(group, grid, path):
    bench = Bench(group, repeats=7)
    records = [{"copy": round(bench.copy_ceiling(), 1)}]
    records += [host_time(group, bench), host_time(group, bench)]
    if group.rank == 0:
        print(*records, sep="\n", flush=True)
    for hidden_size, count, slots, tuning in grid:
        record = measure(group, bench, hidden_size, count, tuning, slots)
        records.append(record)
        if group.rank == 0:
            print(record, flush=True)
            Path(path).write_text("".join(json.dumps(r) + "\n" for r in records))
    return len(records)


if __name__ == "__main__":
    rows = {
        "small": itertools.product((7168, 2048), (1, 8, 32, 128), (192,), (2, 4, 8, 16)),
        "slots": itertools.product((7168, 2048), (256, 512), (512,), (8, 16)),
        "bulk": itertools.product((7168, 2048), (512, 4096), (192,), (8, 16)),
    }
    names = sys.argv[2:] or list(rows)
    grid = [
        (hidden, count, slots, Tuning(num_warps=warps, max_programs=264))
        for name in names
        for hidden, count, slots, warps in rows[name]
    ]
    print(run_ranks(worker, 2, grid, sys.argv[1], backend="nccl", timeout_s=540))
