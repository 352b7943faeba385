"""How many warps, programs and slot rows: times round trips of the bare transport over a grid of settings, on 2 GPUs.

python benchmarks/tune.py OUTPUT.jsonl [small] [slots] [bulk]
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import tokenferry as tf
from tokenferry.benchmarking import GroupTimer, RoundTripPoint, copy_rate
from tokenferry.benchmarking.host_times import begin_step_and_host_times
from tokenferry.benchmarking.round_trip_data import differences, inputs_of, partial_of
from tokenferry.step import StepRequest, StepTensors
from tokenferry.testing import run_ranks
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.symmetric import loading
from tokenferry.transports.symmetric.transport import SymmetricTransport
from tokenferry.transports.symmetric.tuning import Tuning


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
        longest_wait_s=120,
        max_ctas=None,
        name=group.unique_name("tune"),
        generation=0,
    )
    step_tensors = StepTensors(group.rank, group.size, group.device)
    loading.INDEX_DTYPES, loading.FLOAT_DTYPES = (torch.int32,), (torch.float32, torch.bfloat16)  # compile what is used here
    return SymmetricTransport(settings, step_tensors, slot_rows=slot_rows, tuning=tuning)


def measure(group, timer, hidden_size, count, tuning, slot_rows):
    transport = open_bare(group, hidden_size, count, tuning, slot_rows)
    point = RoundTripPoint(transport="p2p", hidden_size=hidden_size, tokens=(count,) * group.size, capacity=count)
    inputs = inputs_of(point, group.rank, 1, group.device)
    terms = transport.combine_input()
    terms[: sum(point.tokens)] = partial_of(point, group.rank, 1, group.device)
    result = []

    def step():
        transport.begin_step(StepRequest(1, count, count), -1)

    def dispatch():
        return transport.dispatch(0, inputs.hidden, inputs.topk_idx, inputs.topk_weights)

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

    median, spread = timer.time_graph(chain, 20)
    record = {"H": hidden_size, "T": count, "warps": tuning.num_warps, "programs": transport.grid, "limit": tuning.max_programs,
              "slots": slot_rows, "us": round(median, 2), "spread": round(spread, 2)}  # fmt: skip
    got = SimpleNamespace(hidden=result[0].hidden_RH, topk_idx=result[0].topk_idx_RK, topk_weights=result[0].topk_weights_RK)
    record["wrong"] = differences(point, group.rank, 1, got, result[1])
    transport.check()
    if count == 8:
        record["begin_step_us"] = round(timer.time_graph(steps, 20)[0], 2)
    timer.meet()
    transport.close()
    return record


def worker(group, grid, path):
    timer = GroupTimer(group, repeats=7)
    records = [{"copy": round(copy_rate(timer), 1)}]
    point = RoundTripPoint(transport="p2p", hidden_size=7168, tokens=(8,) * group.size, capacity=8)
    records += [begin_step_and_host_times(timer, point, 20) for _ in range(2)]
    if group.rank == 0:
        print(*records, sep="\n", flush=True)
    for hidden_size, count, slots, tuning in grid:
        record = measure(group, timer, hidden_size, count, tuning, slots)
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
