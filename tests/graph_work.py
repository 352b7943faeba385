"""What the graph runner's tests do on every rank, on CPUs and GPUs alike: a small model, random counts, and a float64 oracle.

Rows are independent of one another, so the oracle is computed once for a pool of rows, from which every step takes some.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import nn

import tokenferry as tf
from plain_moe import plain_moe
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.graphs import GraphRunner
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig

H, LATENT, INTERMEDIATE, E, K = 64, 32, 48, 7, 3
POOL = 320
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Of the largest expected number; bfloat16 rounds products, activation, each rank's term, and the sum with the row itself."""


FLOAT8_TOLERANCE = 6e-2
"""A number of float8 is off by up to one part in 16, and a row's products are sums of these."""


@dataclass(frozen=True)
class Setup:
    """A workspace, a model of `layers` layers, and the runner's buckets."""

    transport: str = "collective"
    dtype: torch.dtype = torch.float32
    capacity: int = POOL
    buckets: tuple[int, ...] = (64, 256)
    layers: int = 1
    shared: bool = False
    latent: bool = False
    overlap: str = "off"
    counts: str = "uneven"
    draft: str = ""
    """What follows the layers: "rows": one more layer on every second row, in the same step; "step": in a step of its own."""
    timeout_s: float = 20.0
    partial_rows: int = 0
    """How many rows the experts return, if not all gathered ones."""
    dispatch_format: str = "same"
    float8: bool = False
    """Whether the experts have float8 weights, in blocks that are smaller than 128 x 128 here."""
    float8_terms: bool = False
    """Whether partial rows travel as float8."""

    @property
    def tolerance(self) -> float:
        """Of the largest expected number."""
        has_float8 = self.float8 or self.float8_terms or self.dispatch_format != "same"
        return FLOAT8_TOLERANCE if has_float8 else TOLERANCE[self.dtype]

    def __str__(self) -> str:
        parts = [self.transport, str(self.dtype).removeprefix("torch."), self.overlap, self.counts, self.draft]
        parts += ["shared" * self.shared, "latent" * self.latent, "float8" * self.float8, "terms" * self.float8_terms]
        return "-".join(part for part in (*parts, self.dispatch_format.replace("same", "")) if part)


class FewerRows(Experts):
    """Experts that return the first `num_rows` partial rows alone."""

    num_rows = 0

    def forward(self, dispatched: tf.Dispatched, out: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(dispatched, out)[: self.num_rows]


SEEDED = threading.Lock()
"""Virtual ranks are threads with one generator of random numbers: drawn from at once, each got a model of its own."""


class Model:
    """All parameters, the same on every rank, and the pool of rows. On the CPU."""

    def __init__(self, setup: Setup) -> None:
        with SEEDED:
            torch.manual_seed(11)
            self._make(setup)

    def _make(self, setup: Setup) -> None:
        dtype, inner = setup.dtype, LATENT if setup.latent else H
        self.router = Router(RouterConfig(hidden_size=H, num_experts=E, topk=K, renormalize=True), dtype=dtype)
        shape = ExpertsConfig(hidden_size=inner, intermediate_size=INTERMEDIATE, num_experts=E)
        self.experts = Experts(shape, range(E), dtype=dtype)
        self.shared = SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=40, output_gate=True), dtype=dtype)
        self.down, self.up = (nn.Linear(*sizes, bias=False, dtype=dtype) for sizes in ((H, LATENT), (LATENT, H)))
        self.pool = torch.randn(POOL, H).to(dtype)

    def expected(self, setup: Setup) -> torch.Tensor:
        """[POOL, H] float64: what the forward makes of each row of the pool."""
        optional = [self.shared if setup.shared else None, *((self.down, self.up) if setup.latent else (None, None))]
        hidden = self.pool.double()
        for _ in range(setup.layers):
            hidden = hidden + plain_moe(hidden, self.router, self.experts, *optional)
        return hidden

    def layer(self, setup: Setup, ws: tf.Workspace) -> MoELayer:
        """This rank's part of the one layer that the model repeats."""
        device = ws.device
        kind = FewerRows if setup.partial_rows else Experts
        experts = kind(self.experts.config, ws.group.expert_range(E), dtype=setup.dtype, device=device)
        experts.num_rows = setup.partial_rows
        experts.load(self.experts.up_proj, self.experts.down_proj)
        if setup.float8:
            experts.quantize()
        optional = {}
        if setup.shared:
            optional["shared_experts"] = self.shared.to(device)
        if setup.latent:
            optional |= {"latent_down": self.down.to(device), "latent_up": self.up.to(device)}
        return MoELayer(ws, self.router.to(device), experts, shared_overlap=setup.overlap, **optional)


def open_workspace(group: tf.EPGroup, setup: Setup) -> tf.Workspace:
    config = tf.MoEConfig(hidden_size=LATENT if setup.latent else H, num_experts=E, topk=K, dtype=setup.dtype)
    return tf.Workspace(
        config,
        group,
        max_tokens_per_rank=setup.capacity,
        transport=setup.transport,
        counts=setup.counts,
        dispatch_format=setup.dispatch_format,
        combine_dtype=torch.float8_e4m3fn if setup.float8_terms else None,
        timeout_s=setup.timeout_s,
    )


class Forward:
    """The model's forward on one rank, as a runner takes it."""

    def __init__(self, setup: Setup, ws: tf.Workspace) -> None:
        model = Model(setup)
        self.setup, self.ws = setup, ws
        self.expected = model.expected(setup).detach()
        self.pool = model.pool.to(ws.device)
        self.layers = [model.layer(setup, ws) for _ in range(setup.layers)]
        self.draft = model.layer(setup, ws) if setup.draft else None
        self.calls = 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        if self.draft is None:
            return hidden
        rows = hidden[: hidden.shape[0] // 2]  # T' <= T, as a draft model's forward has
        if self.setup.draft == "step":
            self.ws.begin_step(rows.shape[0])
        return hidden, self.draft(rows)

    def rows(self, rank: int, step: int, count: int) -> torch.Tensor:
        """Which rows of the pool rank `rank` brings to `step`."""
        return (torch.arange(count) + 37 * rank + 13 * step) % POOL

    def error(self, output: torch.Tensor, chosen: torch.Tensor) -> float:
        """The largest deviation, as a part of the largest expected number; a NaN is infinitely wrong."""
        assert output.shape == (len(chosen), H), (output.shape, len(chosen))
        if not len(chosen):
            return 0.0
        deviation = (output.cpu().double() - self.expected[chosen]).abs().max() / self.expected.abs().max()
        return float(deviation) if deviation == deviation else float("inf")


def expected_bucket(setup: Setup, tokens: tuple[int, ...], rank: int) -> int | None:
    """By hand: on the collective transport the largest count of all ranks decides, elsewhere the rank's own."""
    count = max(tokens) if setup.transport == "collective" else tokens[rank]
    fitting = [bucket for bucket in (0, *setup.buckets) if bucket >= count]
    return min(fitting) if fitting else None


def run_steps(group: tf.EPGroup, setup: Setup, steps: list[tuple[int, ...]]) -> dict:
    """Runs the steps through one runner and compares every output. Padding rows are NaN. Ranks stop when all are done."""
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        runner = GraphRunner(ws, forward, setup.buckets, inputs=[forward.pool])
        return check_steps(ws, runner, forward, steps)


def check_steps(ws: tf.Workspace, runner: GraphRunner, forward: Forward, steps: list[tuple[int, ...]]) -> dict:
    setup, rank = forward.setup, ws.group.rank
    worst, buckets, used = 0.0, [], []
    for number, tokens in enumerate(steps):
        chosen = forward.rows(rank, number, tokens[rank])
        runner.static_inputs[0].fill_(torch.nan)
        output = runner(forward.pool[chosen.to(ws.device)])
        output = output[0] if setup.draft else output
        worst = max(worst, forward.error(output, chosen))
        buckets.append(runner.last_bucket)
        del output  # an eager step's is as large as the step
        if number % 50 == 0:
            used.append(memory(ws.device))
    num_idle = 1
    while not runner.idle(done=True):
        num_idle += 1
        assert num_idle < 100, "the ranks do not find that all are done"
    wanted = [expected_bucket(setup, tokens, rank) for tokens in steps]
    assert buckets == wanted, [(step, got, want) for step, got, want in zip(steps, buckets, wanted, strict=True) if got != want]
    assert worst < setup.tolerance, worst
    runner.close()
    return {"memory": used, "calls": forward.calls, "num_idle": num_idle}


def memory(device: torch.device) -> int:
    """Bytes in use: of the device's allocator, or of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_stats(device)["allocated_bytes.all.current"]
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


KINDS = {"eager": 300, "graph-64": 50, "graph-256": 200, "idle": 0}
ALL_PAIRS = [(first, second) for first in KINDS.values() for second in KINDS.values()]
"""The 16 combinations on two ranks, by their numbers of tokens."""
