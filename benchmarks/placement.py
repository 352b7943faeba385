"""A layer whose tokens favour few experts, its experts laid out as they are and as `tokenferry.placement` advises: the predicted
step time beside the measured one.

    python benchmarks/placement.py OUTPUT.jsonl [--presets qwen3-30b-a3b,gpt-oss-20b] [--tokens 512,4096] [--replicas 2]
                                   [--exponent 1.0] [--budget-s 60] [--commit HASH]
    python benchmarks/placement.py OUTPUT.jsonl --rehearse     # CPUs, tiny sizes: every call and comparison, no times
    python benchmarks/placement.py OUTPUT.jsonl --table        # of a file that is there, predicted by the model of today

Every rank runs a whole layer of random weights: router, dispatch, experts, combine, and the shared expert if there is one. The
router's choice is put aside for one that is given: ids of a Zipf law, of which the load table is counted. tokenferry moves no
experts, so that they are laid out by hand: weights by `phy2log`, ids by `log2phy`, replicas in turn, before the timed part.

A figure is of a CUDA graph that holds one `begin_step` and a chain of layers on different rows, divided by their number: the
median of its replays, the slowest rank's, taken twice with the other layouts in between.
"""

import argparse
import dataclasses
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import tokenferry as tf
from placement_layout import ORDERS, experts_of, load_table, physical_ids, rows_and_touched, zipf_ids
from tokenferry.benchmarking import PRESETS, REHEARSAL, GroupTimer, check_output, device_rates, environment
from tokenferry.benchmarking.records import append_record
from tokenferry.experts import ExpertsConfig
from tokenferry.placement import StepModel, judge
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.testing import run_ranks

POSITIONS, PASSES, SERIES = 4, 2, 2
"""Different rows in a chain of layers, how often each comes in it, and how often everything is timed."""
DTYPE = torch.bfloat16
TOLERANCE = 4e-2
"""Of the largest number: terms are rounded to bfloat16 on each rank, so that another layout gives other last bits."""
MEMORY_BYTES_PER_S, FLOPS_PER_S = 2960.5e9, 775.1e12
"""What `tokenferry inspect` predicts with: measured on an H100."""


class OwnTimer(GroupTimer):
    """Of calls that every rank makes by itself: gives this rank's own times."""

    def slowest(self, value):
        return value


class SkewedLayer:
    """One rank's part of a preset's layer, whose experts may be laid out in several ways.

    Args:
        capacity: the most rows of a rank.
        num_physical: the numbers of physical experts of all layouts.
    """

    def __init__(self, group, preset, capacity, num_physical, transport, stack):
        self.group, self.preset = group, preset
        torch.manual_seed(1)
        routing = RouterConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk, **preset.router)
        self.router, self.shared, self.side = Router(routing, dtype=DTYPE, device=group.device), None, None
        self.router.prepare(DTYPE)
        if preset.shared_size:
            sizes = SharedExpertsConfig(hidden_size=preset.hidden_size, intermediate_size=preset.shared_size)
            self.shared = SharedExperts(sizes, dtype=DTYPE, device=group.device)
            self.shared.prepare()
            self.side = torch.cuda.Stream(group.device) if group.device.type == "cuda" else None
        self.workspaces, self.dispatchers, self._shape = {}, {}, (capacity, transport, stack)
        for number in num_physical:
            self._open(number)
        generator = torch.Generator(group.device).manual_seed(100 + group.rank)
        shape = (POSITIONS, capacity, preset.hidden_size)
        self.hidden = torch.randn(shape, generator=generator, device=group.device, dtype=DTYPE)

    def _open(self, num_physical):
        capacity, transport, stack = self._shape
        preset = self.preset
        config = tf.MoEConfig(hidden_size=preset.hidden_size, num_experts=num_physical, topk=preset.topk, dtype=DTYPE)
        ws = tf.Workspace(config, self.group, max_tokens_per_rank=capacity, transport=transport)
        self.workspaces[num_physical] = stack.enter_context(ws)
        self.dispatchers[num_physical] = ws.dispatcher()

    def experts(self, placement):
        """Laid out, and ready to run in the workspace of as many physical experts."""
        preset = self.preset
        sizes = ExpertsConfig(
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_experts=placement.num_physical,
            activation=preset.activation,
            bias=preset.bias,
        )
        experts = experts_of(self.group, placement, sizes, DTYPE)
        experts.prepare(self.workspaces[placement.num_physical])
        return experts

    def __call__(self, experts, hidden, ids, weights):
        """The order of events of a `MoELayer`; no experts: the step without their time."""
        dispatcher = self.dispatchers[self.num_physical(experts)]
        self.router(hidden)
        shared = None if self.shared is None else self.shared.begin(hidden, self.side)
        got = dispatcher.dispatch(hidden, ids, weights)
        partial = dispatcher.combine_input()
        out = dispatcher.combine(partial if experts is None else experts(got, out=partial), got)
        return out if shared is None else out + shared.wait()

    def num_physical(self, experts):
        return self.preset.num_experts if experts is None else experts.config.num_experts

    def time_step(self, timer, experts, ids, weights, count):
        """Microseconds of a layer, the slowest rank's, and the outputs of the last pass."""
        ws, outputs = self.workspaces[self.num_physical(experts)], []

        def chain():
            ws.begin_step(count)
            for _ in range(PASSES):
                outputs[:] = [self(experts, self.hidden[place, :count], ids[place], weights) for place in range(POSITIONS)]

        time_us = timer.time_graph(chain, POSITIONS * PASSES)[0]
        ws.check()
        return time_us, outputs

    def time_experts(self, timer, experts, ids, weights, count):
        """Microseconds of this rank's experts alone, on the rows of the first position."""
        ws, dispatcher = self.workspaces[self.num_physical(experts)], self.dispatchers[self.num_physical(experts)]
        ws.begin_step(count)
        got = dispatcher.dispatch(self.hidden[0, :count], ids[0], weights)
        partial = dispatcher.combine_input()
        own_us = OwnTimer(timer.group, repeats=5).time_graph(lambda: [experts(got, out=partial) for _ in range(PASSES)], PASSES)[
            0
        ]
        dispatcher.combine(partial, got)
        ws.check()
        return own_us


def everyone(timer, value):
    """The ranks' values in rank order, on every rank."""
    return timer.group.channel.exchange(timer.group.unique_name("bench/everyone"), value, 120.0)


def is_same(timer, outputs, expected):
    """Whether every rank's rows are those of the layout as is, within the tolerance."""
    pairs = zip(outputs, expected, strict=True)
    worst = max(float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()) for got, wanted in pairs)
    return timer.slowest(0.0 if worst < TOLERANCE else 1.0) == 0.0


def drawn_ids(preset, order, count, exponent, num_ranks):
    """For each rank and position its [T, K]: the same in every process."""
    law = (preset.num_experts, preset.topk, exponent, order)
    return [[zipf_ids(count, *law, seed=1 + 100 * rank + place) for place in range(POSITIONS)] for rank in range(num_ranks)]


def prediction(preset, ids, replicas, rest_us, memory_bytes_per_s, flops_per_s):
    """The verdict on these ids. What is no experts' time was measured, so that it is not what is predicted here."""
    speeds = {"memory_bytes_per_s": memory_bytes_per_s, "flops_per_s": flops_per_s}
    model = StepModel.of_gated(preset.hidden_size, preset.intermediate_size, 2.0, **speeds, exchange_s=rest_us / 1e6)
    table = load_table([each for of_rank in ids for each in of_rank], preset.num_experts)
    return judge(table, len(ids), model, num_steps=POSITIONS, replicas=replicas)


@torch.no_grad()
def measure_point(timer, layer, laid, order, count, given):
    """A record for each layout, with `count` rows on every rank. Collective."""
    preset, group, device, rates = layer.preset, layer.group, layer.group.device, given["rates"]
    ids = drawn_ids(preset, order, count, given["exponent"], group.size)
    weights = torch.full((count, preset.topk), 1 / preset.topk, dtype=torch.float32, device=device)
    as_they_are = [each.int().to(device) for each in ids[group.rank]]
    rest_us = round(layer.time_step(timer, None, as_they_are, weights, count)[0], 2)
    verdict = prediction(preset, ids, given["replicas"], rest_us, rates["read_gb_per_s"] * 1e9, rates["gemm_tflops"] * 1e12)
    by_constants = prediction(preset, ids, given["replicas"], rest_us, MEMORY_BYTES_PER_S, FLOPS_PER_S)
    records, runs = [], []
    for option, constant in zip(verdict.options, by_constants.options, strict=True):
        placement = option.placement
        mapped = [[physical_ids(each, placement, rank) for each in of_rank] for rank, of_rank in enumerate(ids)]
        rows, touched = rows_and_touched([of_rank[0] for of_rank in mapped], placement)
        key = (order, count, option.name) if option.name != "as is" else ("", 0, option.name)
        experts = laid.get(key)
        if experts is None:
            experts = laid[key] = layer.experts(placement)
        runs.append((experts, [each.int().to(device) for each in mapped[group.rank]]))
        records.append({
            "order": order, "tokens": count, "layout": option.name, "rest_us": rest_us,
            "num_physical": placement.num_physical, "imbalance": round(option.imbalance, 4), "rows": rows, "touched": touched,
            "predicted_us": round(option.step_s * 1e6, 2), "predicted_gain": round(option.gain, 4),
            "predicted_gain_h100": round(constant.gain, 4), "measured_us": [], "pays": verdict.pays,
        })  # fmt: skip
    expected = None
    for number in range(SERIES):
        for record, (experts, mine) in zip(records, runs, strict=True):
            time_us, outputs = layer.time_step(timer, experts, mine, weights, count)
            record["measured_us"].append(round(time_us, 2))
            if number == 0:
                expected = outputs if expected is None else expected
                record["correct"] = is_same(timer, outputs, expected)
                own_us = layer.time_experts(timer, experts, mine, weights, count)
                record["experts_us"] = [round(each, 2) for each in everyone(timer, own_us)]
    for record in records:
        firsts, here = sum(records[0]["measured_us"]), sum(record["measured_us"])
        record["measured_gain"] = round(1 - here / firsts, 4)
    for key in [key for key in laid if key[1]]:  # the advice for another number of rows is another one
        del laid[key]
    return records


def measure_all(group, request, started_s):
    """On every rank: all points of all presets."""
    timer = GroupTimer(group, repeats=request["repeats"], progress=say)
    rates = device_rates(group.device)
    common = rates | environment(group.device) | {"world_size": group.size, "commit": request["commit"]}
    given = {**request, "rates": rates}
    records, left = [], []
    for preset in request["presets"]:
        points = [(order, count) for order in request["orders"] for count in request["tokens"]]
        numbers = dict.fromkeys((preset.num_experts, *(preset.num_experts + number for number in request["replicas"])))
        with ExitStack() as stack:
            layer, laid = None, {}
            for order, count in points:
                if timer.slowest(time.time() - started_s) >= request["budget_s"]:
                    left.append(f"{preset.name} {order} {count}")
                    continue
                if layer is None:
                    timer.say(f"{preset.name}: opening")
                    layer = SkewedLayer(group, preset, max(request["tokens"]), numbers, request["transport"], stack)
                timer.say(f"{preset.name}: {order}, {count} tokens a rank")
                named = {"what": "placement", "preset": preset.name, "exponent": request["exponent"]}
                transport = layer.workspaces[preset.num_experts].transport
                for found in measure_point(timer, layer, laid, order, count, given):
                    records.append(named | {"transport": transport} | found | common)
                    if group.rank == 0:
                        append_record(records[-1], request["output"])
            timer.meet()
        del layer, laid
        if group.device.type == "cuda":
            torch.cuda.empty_cache()
    if left and group.rank == 0:
        append_record({"what": "placement", "left_out": left, "reason": f"budget of {request['budget_s']:.0f} s"} | common,
                      request["output"])  # fmt: skip
    return records


def say(text):
    print(text, file=sys.stderr, flush=True)


def predicted_again(records):
    """The records with what the step model of today predicts for them, by the rates and the rest of their own run."""
    known, points = {preset.name: preset for preset in (*PRESETS, *REHEARSAL)}, {}
    for record in records:
        points.setdefault((record["preset"], record["order"], record["tokens"]), []).append(record)
    for (name, order, count), of_point in points.items():
        preset, first = known[name], of_point[0]
        ids = drawn_ids(preset, order, count, first["exponent"], first["world_size"])
        replicas = [more for record in of_point if (more := record["num_physical"] - preset.num_experts)]
        rates = first["read_gb_per_s"] * 1e9, first["gemm_tflops"] * 1e12
        options = prediction(preset, ids, replicas, first["rest_us"], *rates).options
        for record, option in zip(of_point, options, strict=True):
            mapped = [[physical_ids(each, option.placement, rank) for each in of_rank] for rank, of_rank in enumerate(ids)]
            rows = rows_and_touched([of_rank[0] for of_rank in mapped], option.placement)[0]
            if rows != record["rows"]:
                raise SystemExit(f"{name}, {order}, T {count}: {record['rows']} rows were measured, {rows} are drawn here")
            yield {**record, "predicted_us": option.step_s * 1e6, "predicted_gain": option.gain}


def table(records):
    """As Markdown."""
    names = ("layer", "popular experts", "T", "layout", "rows of the ranks", "predicted µs", "measured µs, twice", "predicted")
    lines = ["".join(f"| {name} " for name in (*names, "measured")) + "|", "|---" * (1 + len(names)) + "|"]
    for record in records:
        where = {"sorted": "on rank 0", "random": "anywhere"}[record["order"]]
        rows = " / ".join(map(str, record["rows"]))
        times = " / ".join(f"{each:.0f}" for each in record["measured_us"])
        gains = [f"{record[name]:.1%}" if record["layout"] != "as is" else "" for name in ("predicted_gain", "measured_gain")]
        name = record["preset"] if record.get("correct") else f"{record['preset']} WRONG"
        figures = f"{rows} | {record['predicted_us']:.0f} | {times} | {gains[0]} | {gains[1]}"
        lines.append(f"| {name} | {where} | {record['tokens']} | {record['layout']} | {figures} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--presets", default="qwen3-30b-a3b,gpt-oss-20b")
    parser.add_argument("--tokens", default="512,4096")
    parser.add_argument("--orders", default=",".join(ORDERS))
    parser.add_argument("--replicas", default="2", help="numbers of further places to try, with commas")
    parser.add_argument("--exponent", type=float, default=1.0, help="of the Zipf law")
    parser.add_argument("--budget-s", type=float, default=60.0, help="no point begins later")
    parser.add_argument("--transport")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        lines = [json.loads(line) for line in given.output.read_text().splitlines()]
        print(table(predicted_again([line for line in lines if "measured_us" in line])))
        return 0
    known = {preset.name: preset for preset in (REHEARSAL if given.rehearse else PRESETS)}
    names = ("tiny", "tiny-oss", "tiny-v3") if given.rehearse else given.presets.split(",")
    request = {
        "presets": [dataclasses.replace(known[name], mxfp4=False) for name in names],
        "tokens": (4, 9) if given.rehearse else tuple(int(count) for count in given.tokens.split(",")),
        "orders": given.orders.split(","),
        "replicas": tuple(int(number) for number in given.replicas.split(",")),
        "exponent": given.exponent, "budget_s": given.budget_s, "repeats": 9, "commit": given.commit, "output": given.output,
        "transport": given.transport or ("collective" if given.rehearse else "p2p"),
    }  # fmt: skip
    check_output(given.output)
    given.output.write_text("")
    backend = "gloo" if given.rehearse else "nccl"
    records = run_ranks(measure_all, given.ranks, request, time.time(), backend=backend, timeout_s=given.budget_s + 120)[0]
    print(table(records))
    return int(not all(record["correct"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
