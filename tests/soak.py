"""Soak: random counts, padding, delays and paths (eager or graph) for as long as asked; every row of every step is checked.

    python tests/soak.py --seconds 480 --ranks 2 --where gpu        # --where interpreter, virtual; --format, --combine

All inputs are a hash of (seed, rank, step, layer, row, column), so that every rank knows on its own device what all ranks sent
and what has to come back: rows, ids, weights and sums are compared bit by bit where they lie, and only the number of
differences comes to the host. `twin_is_reference` ties that twin to `tokenferry.reference`. Each rank chooses its counts alone:
what the others see of them is summed up and compared between ranks at every look. No NaNs: they arrive as some NaN.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path

import torch

import tokenferry as tf
from tokenferry.dispatched import FLOAT8, QuantizedRows
from tokenferry.testing import run_ranks
from tokenferry.testing.ranks import run_virtual
from tokenferry.transports.symmetric.layout import SLOT_ROWS

CAPACITY = 1025
"""So that steps of more than SLOT_ROWS rows go the bulk way."""
EXPERTS, TOPK = 11, 3
HIDDEN, IDS, WEIGHTS, PARTIAL, REAL = range(5)
STEPS_PER_BLOCK, LAYERS, GRAPHS = 10, 3, 8
COUNTS = {
    "gpu": (0, 1, 5, 40, 200, SLOT_ROWS, SLOT_ROWS + 8, CAPACITY),
    "virtual": (0, 1, 5, 40, SLOT_ROWS + 8),
    "interpreter": (0, 0, 1, 2, 3, 5),
}
TERMS = {"same": torch.bfloat16, "fp8": FLOAT8}
FEW_CTAS = 8
"""Programs on GPUs where terms are float8, so that a bulk step has several rounds of blocks: terms are copied in turn."""
RARE = {"gpu": 0, "virtual": 0, "interpreter": SLOT_ROWS + 8}
"""One block in 40 of the interpreter has a step as large as this."""
VIRTUAL_ENV = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
GROWTH_BYTES = 48 * 2**20
"""Of a rank process's memory after its first quarter, at most: allocators keep what they were given. Device memory: none."""


@dataclasses.dataclass(frozen=True)
class Plan:
    where: str
    seconds: float
    seed: int
    ranks: int
    dispatch_format: str = "same"
    combine: str = "same"  # or "fp8": float8 terms

    @property
    def config(self) -> tf.MoEConfig:
        return tf.MoEConfig(hidden_size=16 if self.where == "interpreter" else 144, num_experts=EXPERTS, topk=TOPK)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one rank did. `eager` and `graph` are round trips."""

    rank: int
    eager: int
    graph: int
    steps: int
    looks: int
    seconds: float
    device_growth: int
    process_growth: int


def mixed(row_keys: torch.Tensor, column_keys: torch.Tensor) -> torch.Tensor:
    """[rows, columns] int64 hash, 0 to 2**32 - 1; all arithmetic modulo 2**64. Few operators: they are most of a soak's time."""
    x = row_keys[..., None] + column_keys
    x = (x ^ (x >> 31)) * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * 0x1B03738712FAD5C9
    return (x ^ (x >> 32)) & 0xFFFFFFFF


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Numbers between -2 and 2 from the hash's low bits: no infinity, no NaN."""
    low = x & 0xBFFF
    return torch.where(low > 0x7FFF, low - 0x10000, low).to(torch.int16).view(torch.bfloat16)


class Twin:
    """The hash on this rank's device, its keys, and what was found wrong so far."""

    def __init__(self, plan: Plan, rank: int, size: int, device: torch.device) -> None:
        self.plan, self.rank, self.size, self.device = plan, rank, size, device
        self.hidden_size = plan.config.hidden_size
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.wrong = torch.zeros(5, dtype=torch.int64, device=device)
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.ranks = torch.arange(size, device=device)
        self.row = torch.arange(CAPACITY * size, device=device)
        sizes = {HIDDEN: self.hidden_size, IDS: TOPK, WEIGHTS: TOPK}
        layers = range(LAYERS)
        self.sent = [torch.cat([self.columns(what, layer, sizes[what]) for what in sizes]) for layer in layers]
        self.returned = [self.columns(PARTIAL, layer, self.hidden_size) for layer in layers]

    def columns(self, what: int, layer: int, size: int) -> torch.Tensor:
        column = torch.arange(size, device=self.device)
        return column * 1_000_003 + (self.plan.seed * 64 + layer * 8 + what) * 982_451_653

    def row_keys(self, rank: torch.Tensor | int, row: torch.Tensor) -> torch.Tensor:
        return (row + rank * 8192) * (8192 * 1_000_003) + self.step * 7_368_787

    def own_real(self, count: int) -> torch.Tensor:
        """[1] int32: how many of this rank's rows carry tokens."""
        return self.real(torch.full((self.size,), count, device=self.device))[self.rank : self.rank + 1].to(torch.int32)

    def real(self, tokens: torch.Tensor) -> torch.Tensor:
        """[size] rows that carry tokens, from each rank's count."""
        return mixed(self.row_keys(self.ranks, self.ranks * 0), self.columns(REAL, 0, 1))[:, 0] % (tokens + 1)


class StepTwin:
    """What every rank sends and receives in one step. `tokens`: [size] int64, all ranks' counts; `count`: this rank's own."""

    def __init__(self, twin: Twin, tokens: torch.Tensor, count: int) -> None:
        self.twin = twin
        ends = tokens.cumsum(0)
        source = (twin.row[:, None] >= ends).sum(1).clamp_(max=twin.size - 1)
        local = twin.row - (ends - tokens)[source]
        self.valid = (twin.row < ends[-1])[:, None]
        self.not_real = ~(self.valid & (local < twin.real(tokens)[source])[:, None])
        self.gathered_keys = twin.row_keys(source, local)
        self.own_keys = twin.row_keys(twin.rank, twin.row[:count])
        self.partial_keys = twin.row_keys(twin.rank, twin.row)
        offset = (ends - tokens)[twin.rank]
        self.combined_keys = twin.row_keys(twin.ranks[:, None], twin.row[:count] + offset)

    def parts(self, row_keys: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
        """hidden, ids, weights of these rows. Weights are neither infinite nor NaN."""
        hidden, ids, weights = mixed(row_keys, self.twin.sent[layer]).split([self.twin.hidden_size, TOPK, TOPK], dim=1)
        weights = (weights & 0x3FFFFFFF).to(torch.int32).view(torch.float32)
        return bfloat16(hidden), (ids % (EXPERTS + 1) - 1).to(torch.int32), weights

    def own(self, layer: int) -> tuple[torch.Tensor, ...]:
        return self.parts(self.own_keys, layer)

    def gathered(self, layer: int) -> tuple[torch.Tensor, ...]:
        """hidden, ids, weights of all ranks' rows; `valid` says which of the R rows they are."""
        hidden, ids, weights = self.parts(self.gathered_keys, layer)
        return hidden, ids.masked_fill_(self.not_real, -1), weights

    def partial(self, layer: int) -> torch.Tensor:
        return bfloat16(mixed(self.partial_keys, self.twin.returned[layer]))

    def combined(self, layer: int) -> torch.Tensor:
        terms = self.as_they_travel(bfloat16(mixed(self.combined_keys, self.twin.returned[layer])))
        total = terms[0]
        for rank in range(1, self.twin.size):
            total = total + terms[rank]
        return total.to(torch.bfloat16)

    def as_they_travel(self, terms: torch.Tensor) -> torch.Tensor:
        """float32 numbers of terms [rank, row, H] of bfloat16."""
        if self.twin.plan.combine == "same":
            return terms.float()
        return tf.reference.quantize(terms.flatten(0, 1)).dequantize(torch.float32).view(terms.shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


class Rank:
    """One rank's work: blocks of steps, eager or as a graph."""

    def __init__(self, ws: tf.Workspace, plan: Plan) -> None:
        self.ws, self.plan, self.rank = ws, plan, ws.group.rank
        self.layers = [ws.dispatcher() for _ in range(LAYERS)]
        self.twin = Twin(plan, self.rank, ws.group.size, ws.device)
        self.random = random.Random(plan.seed * 1000 + self.rank)
        self.is_cuda = ws.device.type == "cuda"

    def draw(self) -> list[int]:
        counts = [self.random.choice(COUNTS[self.plan.where]) for _ in range(STEPS_PER_BLOCK)]
        if RARE[self.plan.where] and self.random.random() < 1 / 40:
            counts[-1] = RARE[self.plan.where]
        return counts

    def block(self, counts: list[int], delays: bool = True) -> None:
        for count in counts:
            self.one_step(count, delays)

    def delay(self) -> None:
        if self.random.random() < 0.05:
            if self.is_cuda:
                torch.cuda._sleep(self.random.randint(1_000, 200_000))
            else:
                time.sleep(self.random.random() * 0.003)

    def one_step(self, count: int, delays: bool) -> None:
        twin, ws = self.twin, self.ws
        twin.step += 1
        step = ws.begin_step(count, twin.own_real(count))
        tokens = step.tokens_per_rank.to(torch.int64)
        twin.counts.mul_(1_000_003).add_(tokens)
        told = torch.stack([tokens[self.rank] - count, step.valid_tokens[0] - tokens.sum(), step.max_tokens[0] - tokens.max()])
        twin.wrong[0] += (told != 0).sum()
        expected = StepTwin(twin, tokens, count)
        for number, layer in enumerate(self.layers):
            if delays:
                self.delay()
            own, *routing = expected.own(number)
            got = layer.dispatch(self.handed(own, number), *routing)
            hidden, ids, weights = expected.gathered(number)
            wrong_hidden = self.wrong_hidden(got.hidden, hidden, expected.valid)
            wrong_ids = (got.topk_idx != ids).sum()
            wrong_weights = ((bits(got.topk_weights) != bits(weights)) & expected.valid).sum()
            out = layer.combine(self.terms(layer, number, expected.partial(number)), got)
            wrong_out = (bits(out) != bits(expected.combined(number))).sum()
            twin.wrong[1:] += torch.stack([wrong_hidden, wrong_ids, wrong_weights, wrong_out])
        if self.plan.where == "virtual":  # a full queue of launches holds a lock of the driver, which the ranks share
            torch.cuda.current_stream(ws.device).synchronize()

    def handed(self, own: torch.Tensor, layer: int) -> torch.Tensor | QuantizedRows:
        """Own rows as the format takes them; those of the second layer are quantized already."""
        if self.plan.dispatch_format == "bytes":
            return own.view(torch.uint8)
        return tf.reference.quantize(own) if self.plan.dispatch_format == "fp8_block128" and layer == 1 else own

    def terms(self, dispatcher: tf.Dispatcher, layer: int, partial: torch.Tensor) -> torch.Tensor | QuantizedRows:
        """Partial rows as a combine takes them: as they are, in `combine_input()`, and float8 ones also quantized elsewhere."""
        if layer == 0:
            return partial
        if self.plan.combine == "same":
            return dispatcher.combine_input().copy_(partial)
        quantized, place = tf.reference.quantize(partial), dispatcher.combine_input()
        if layer == 1:
            return quantized
        place.values.view(torch.uint8).copy_(quantized.values.view(torch.uint8))
        place.scales.copy_(quantized.scales)
        return place

    def wrong_hidden(self, got: torch.Tensor | QuantizedRows, wanted: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        if isinstance(got, QuantizedRows):
            quantized = tf.reference.quantize(wanted)
            values = got.values.view(torch.uint8) != quantized.values.view(torch.uint8)
            return (values & valid).sum() + ((bits(got.scales) != bits(quantized.scales)) & valid).sum()
        return ((bits(got.view(torch.bfloat16)) != bits(wanted)) & valid).sum()

    def look(self, block: int) -> None:
        """The host's look: no differences, counts as the others say, no error of a peer."""
        ws = self.ws
        if self.is_cuda:
            torch.cuda.current_stream(ws.device).synchronize()
        ws.check()
        wrong = dict(zip(("counts", "hidden", "ids", "weights", "combined"), self.twin.wrong.tolist(), strict=True))
        assert not any(wrong.values()), f"differences by block {block}: {wrong}"
        told = ws.group.channel.exchange(f"soak/{self.plan.seed}/{block}", self.twin.counts.tolist(), 60.0)
        assert all(each == told[0] for each in told), f"ranks saw different counts by block {block}: {told}"


def twin_is_reference(plan: Plan, size: int, device: torch.device) -> None:
    """The twin's expectations are the specification's."""
    counts = [(5 * rank + 2) % 7 for rank in range(size)]
    tokens = torch.tensor(counts, device=device)
    twins = [Twin(plan, rank, size, device) for rank in range(size)]
    for twin in twins:
        twin.step += 3
    steps = [StepTwin(twin, tokens, count) for twin, count in zip(twins, counts, strict=True)]
    own = [step.own(1) for step in steps]
    real = torch.cat([twin.own_real(count) for twin, count in zip(twins, counts, strict=True)]).tolist()
    expected = tf.reference.dispatch(*(list(column) for column in zip(*own, strict=True)), real)
    sums = tf.reference.combine([step.partial(1) for step in steps], counts, TERMS[plan.combine], torch.bfloat16)
    for step, want_sum in zip(steps, sums, strict=True):
        valid = step.valid[:, 0]
        for got, want in zip(step.gathered(1), (expected.hidden, expected.topk_idx, expected.topk_weights), strict=True):
            assert torch.equal(bits(got[valid]), bits(want))
        assert torch.equal(bits(step.combined(1)), bits(want_sum))


def captured(rank: Rank) -> list[torch.cuda.CUDAGraph]:
    """Graphs of whole blocks, with counts of their own each."""
    ws, stream = rank.ws, torch.cuda.Stream(rank.ws.device)
    graphs = []
    for _ in range(GRAPHS):
        counts = rank.draw()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(ws.device)
        with ws.capturing(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            rank.block(counts)
        graphs.append(graph)
    return graphs


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def device_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def soak(group: tf.EPGroup, plan: Plan) -> Report:
    """The worker. Ranks agree to stop at a look, when rank 0's time is over."""
    twin_is_reference(plan, group.size, group.device)
    with tf.Workspace(
        plan.config,
        group,
        max_tokens_per_rank=CAPACITY,
        transport="p2p",
        dispatch_format=plan.dispatch_format,
        combine_dtype=TERMS[plan.combine],
        max_ctas=FEW_CTAS if plan.combine == "fp8" and plan.where == "gpu" else None,
        timeout_s=60,
    ) as ws:
        rank = Rank(ws, plan)
        rank.block(sorted(COUNTS[plan.where])[:: max(1, len(COUNTS[plan.where]) // 3)], delays=False)
        rank.look(0)
        graphs = captured(rank) if plan.where == "gpu" else []
        start, block, eager, replayed, looks = time.monotonic(), 0, 0, 0, 0
        per_look = {"gpu": 50, "virtual": 5, "interpreter": 2}[plan.where]
        held: list[tuple[float, int, int]] = []
        while True:
            for _ in range(per_look):
                block += 1
                if rank.random.random() < 0.05:
                    time.sleep(rank.random.random() * 0.002)
                if graphs and rank.random.random() < 0.97:
                    with ws.replaying(STEPS_PER_BLOCK):
                        rank.random.choice(graphs).replay()
                    replayed += STEPS_PER_BLOCK * LAYERS
                else:
                    rank.block(rank.draw())
                    eager += STEPS_PER_BLOCK * LAYERS
            rank.look(block)
            looks += 1
            elapsed = time.monotonic() - start
            held.append((elapsed, device_bytes(ws.device), resident_bytes()))
            if max(group.channel.exchange(f"soak/{plan.seed}/time/{block}", elapsed, 60.0)) > plan.seconds:
                break
        settled = [each for each in held if each[0] >= plan.seconds / 4] or held[-1:]
        device_growth = max(each[1] for each in settled) - settled[0][1]
        process_growth = settled[-1][2] - settled[0][2]
        if plan.where != "virtual":  # threads share both
            assert device_growth == 0, f"device memory grew by {device_growth} bytes"
        assert process_growth < GROWTH_BYTES, f"the process grew by {process_growth} bytes"
        del graphs
    steps = block * STEPS_PER_BLOCK
    return Report(group.rank, eager, replayed, steps, looks, elapsed, device_growth, process_growth)


def virtual(group: tf.EPGroup, plan: Plan) -> list[Report]:
    return run_virtual(soak, plan.ranks, plan, device=group.device)


def run(plan: Plan) -> list[Report]:
    """Soaks and returns every rank's report; raises if one row differed, a peer failed, or memory grew."""
    limit_s = plan.seconds + 180
    if plan.where == "virtual":
        return run_ranks(virtual, 1, plan, backend="nccl", timeout_s=limit_s, env=VIRTUAL_ENV)[0]
    backend, env = ("nccl", None) if plan.where == "gpu" else ("gloo", {"TRITON_INTERPRET": "1"})
    return run_ranks(soak, plan.ranks, plan, backend=backend, timeout_s=limit_s, env=env)


def environment() -> dict[str, object]:
    import triton  # not above: whether kernels are interpreted is settled when it is imported, and ranks import this file first

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    debug = os.environ.get("TOKENFERRY_DEBUG", "") == "1"
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "debug": debug}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--where", choices=("interpreter", "gpu", "virtual"), default="interpreter")
    parser.add_argument("--format", choices=("same", "fp8_block128", "bytes"), default="same")
    parser.add_argument("--combine", choices=TERMS, default="same")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file of JSON lines, one for each rank, to append to")
    parser.add_argument("--commit", default="unknown", help="for --out")
    options = parser.parse_args()
    plan = Plan(options.where, options.seconds, options.seed, options.ranks, options.format, options.combine)
    reports = run(plan)
    common = {**dataclasses.asdict(plan), **environment(), "commit": options.commit, "date": time.strftime("%Y-%m-%d")}
    lines = [json.dumps({**common, **dataclasses.asdict(report)}) + "\n" for report in reports]
    sys.stdout.writelines(lines)
    if options.out is not None:
        with options.out.open("a") as file:
            file.writelines(lines)
    trips = min(report.eager + report.graph for report in reports)
    sys.stdout.write(f"{plan.where}, {plan.ranks} ranks, seed {plan.seed}: {trips} right round trips each, memory flat\n")


if __name__ == "__main__":
    main()
