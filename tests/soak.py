"""Soak: random counts, padding, delays and paths (eager or graph) for as long as asked; every row of every step is checked.

    python tests/soak.py --seconds 480 --ranks 2 --where gpu        # also: interpreter, virtual

All inputs are a hash of (seed, rank, step, layer, row, column), so that every rank knows on its own device what all ranks sent
and what has to come back: rows, ids, weights and sums are compared bit by bit where they lie, and only the number of
differences comes to the host. `twin_is_reference` ties that twin to `tokenferry.reference`. Each rank chooses its counts alone:
what the others see of them is summed up and compared between ranks at every look. No NaNs: they arrive as some NaN.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from pathlib import Path

import torch

import tokenferry as tf
from tokenferry.testing import run_ranks
from tokenferry.testing.ranks import run_virtual

CAPACITY = 1025
"""Here steps of more than 192 rows go the bulk way."""
EXPERTS, TOPK = 11, 3
HIDDEN, IDS, WEIGHTS, PARTIAL, REAL = range(5)
STEPS_PER_BLOCK, LAYERS, GRAPHS = 10, 2, 8
COUNTS = {"gpu": (0, 1, 5, 40, 190, 200, CAPACITY), "virtual": (0, 1, 5, 40, 200), "interpreter": (0, 0, 1, 2, 3, 5)}
RARE = {"gpu": 0, "virtual": 0, "interpreter": 200}
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

    @property
    def config(self) -> tf.MoEConfig:
        return tf.MoEConfig(hidden_size=16 if self.where == "interpreter" else 72, num_experts=EXPERTS, topk=TOPK)


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


def mixed(
    what: int, seed: int, step_1: torch.Tensor, layer: int, rank: torch.Tensor, row: torch.Tensor, columns: int
) -> torch.Tensor:
    """[rows, columns] int64 hash; all arithmetic modulo 2**64."""
    column = torch.arange(columns, device=row.device)
    x = ((rank * 8192 + row) * 8192)[:, None] + column
    x = x * 1_000_003 + step_1 * 7_368_787 + (seed * 64 + layer * 8 + what) * 982_451_653
    x = (x ^ (x >> 31)) * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * 0x1B03738712FAD5C9
    return (x ^ (x >> 32)) & 0xFFFFFFFF


class Twin:
    """What every rank sends and receives, by hash, on this rank's device."""

    def __init__(self, plan: Plan, size: int, device: torch.device) -> None:
        self.plan, self.size, self.config, self.device = plan, size, plan.config, device
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.ranks = torch.arange(size, device=device)
        self.wrong = torch.zeros(5, dtype=torch.int64, device=device)
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)

    def rows(self, what: int, layer: int, rank: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        columns = {IDS: TOPK, WEIGHTS: TOPK, REAL: 1}.get(what, self.config.hidden_size)
        x = mixed(what, self.plan.seed, self.step, layer, rank, row, columns)
        if what == IDS:
            return (x % (EXPERTS + 1) - 1).to(torch.int32)
        if what == WEIGHTS:
            return (x & 0x3FFFFFFF).to(torch.int32).view(torch.float32)  # no infinity, no NaN
        if what == REAL:
            return x
        low = x & 0xBFFF
        return torch.where(low > 0x7FFF, low - 0x10000, low).to(torch.int16).view(torch.bfloat16)

    def real(self, tokens: torch.Tensor) -> torch.Tensor:
        """[size] rows that carry tokens, from each rank's count."""
        return self.rows(REAL, 0, self.ranks, self.ranks * 0)[:, 0] % (tokens + 1)

    def own(self, rank: int, count: int, layer: int) -> tuple[torch.Tensor, ...]:
        row = torch.arange(count, device=self.device)
        return tuple(self.rows(what, layer, row * 0 + rank, row) for what in (HIDDEN, IDS, WEIGHTS))

    def gathered(self, tokens: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
        """Which of the R rows are valid, hidden, ids, weights of all ranks' rows."""
        row = torch.arange(CAPACITY * self.size, device=self.device)
        ends = tokens.cumsum(0)
        source = (row[:, None] >= ends).sum(1).clamp(max=self.size - 1)
        local = row - (ends - tokens)[source]
        valid = row < ends[-1]
        ids = self.rows(IDS, layer, source, local)
        ids = ids.masked_fill(~(valid & (local < self.real(tokens)[source]))[:, None], -1)
        return valid, self.rows(HIDDEN, layer, source, local), ids, self.rows(WEIGHTS, layer, source, local)

    def partial(self, rank: int, layer: int) -> torch.Tensor:
        row = torch.arange(CAPACITY * self.size, device=self.device)
        return self.rows(PARTIAL, layer, row * 0 + rank, row)

    def combined(self, offset: torch.Tensor, count: int, layer: int) -> torch.Tensor:
        row = torch.arange(count, device=self.device) + offset
        total = self.rows(PARTIAL, layer, row * 0, row).float()
        for rank in range(1, self.size):
            total = total + self.rows(PARTIAL, layer, row * 0 + rank, row).float()
        return total.to(torch.bfloat16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


class Rank:
    """One rank's work: blocks of steps, eager or as a graph."""

    def __init__(self, ws: tf.Workspace, plan: Plan) -> None:
        self.ws, self.plan, self.rank = ws, plan, ws.group.rank
        self.layers = [ws.dispatcher() for _ in range(LAYERS)]
        self.twin = Twin(plan, ws.group.size, ws.device)
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
        own_count = torch.full((ws.group.size,), count, device=ws.device)
        real = twin.real(own_count)[self.rank : self.rank + 1].to(torch.int32)
        step = ws.begin_step(count, real)
        tokens = step.tokens_per_rank.to(torch.int64)
        twin.counts.mul_(1_000_003).add_(tokens)
        wrong = [(tokens[self.rank] != count).long() + (step.valid_tokens[0] != tokens.sum()).long()]
        wrong[0] = wrong[0] + (step.max_tokens[0] != tokens.max()).long()
        for number, layer in enumerate(self.layers):
            if delays:
                self.delay()
            got = layer.dispatch(*twin.own(self.rank, count, number))
            valid, hidden, ids, weights = twin.gathered(tokens, number)
            wrong_hidden = ((bits(got.hidden) != bits(hidden)) & valid[:, None]).sum()
            wrong_ids = (got.topk_idx != ids).sum()
            wrong_weights = ((bits(got.topk_weights) != bits(weights)) & valid[:, None]).sum()
            partial = twin.partial(self.rank, number)
            if number:
                partial = layer.combine_input().copy_(partial)
            out = layer.combine(partial, got)
            wrong_out = (bits(out) != bits(twin.combined(step.rank_token_offset.long(), count, number))).sum()
            twin.wrong += torch.stack(
                [wrong.pop() if wrong else wrong_out * 0, wrong_hidden, wrong_ids, wrong_weights, wrong_out]
            )
        if self.plan.where == "virtual":  # a full queue of launches holds a lock of the driver, which the ranks share
            torch.cuda.current_stream(ws.device).synchronize()

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
    twin = Twin(plan, size, device)
    twin.step += 3
    counts = [(5 * rank + 2) % 7 for rank in range(size)]
    tokens = torch.tensor(counts, device=device)
    own = [twin.own(rank, count, 1) for rank, count in enumerate(counts)]
    expected = tf.reference.dispatch(*(list(column) for column in zip(*own, strict=True)), twin.real(tokens).tolist())
    valid, *rows = twin.gathered(tokens, 1)
    for got, want in zip(rows, (expected.hidden, expected.topk_idx, expected.topk_weights), strict=True):
        assert torch.equal(bits(got[valid]), bits(want))
    partials = [twin.partial(rank, 1) for rank in range(size)]
    sums = tf.reference.combine(partials, counts, torch.bfloat16, torch.bfloat16)
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    for count, want in zip(counts, sums, strict=True):
        assert torch.equal(bits(twin.combined(offset, count, 1)), bits(want))
        offset += count


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
    with tf.Workspace(plan.config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=60) as ws:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--where", choices=("interpreter", "gpu", "virtual"), default="interpreter")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    plan = Plan(options.where, options.seconds, options.seed, options.ranks)
    reports = run(plan)
    for report in reports:
        sys.stdout.write(json.dumps(dataclasses.asdict(report)) + "\n")
    trips = min(report.eager + report.graph for report in reports)
    sys.stdout.write(
        f"{plan.where}, {plan.ranks} ranks, seed {plan.seed}: {trips} round trips a rank, no difference, memory flat\n"
    )


if __name__ == "__main__":
    main()
