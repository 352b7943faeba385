"""The self-test of `tokenferry doctor`: every transport moves rows here, their bits are compared, and a round trip is timed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from tokenferry import reference
from tokenferry.benchmarking.round_trip import measure_round_trip
from tokenferry.benchmarking.round_trip_data import RoundTripPoint
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.config import MoEConfig
from tokenferry.errors import RankFailedError
from tokenferry.groups import EPGroup
from tokenferry.supervisor import run_processes
from tokenferry.testing.data import make_inputs
from tokenferry.testing.numeric import same_bits
from tokenferry.workspace import Workspace

PRELOAD: Final = ("torch", "tokenferry.workspace", "tokenferry.testing.data", "tokenferry.benchmarking.round_trip")
CAPACITY: Final = 8
STEPS: Final = (1, 0, 5)
"""In step number s rank r brings (STEPS[s] + r) rows, but at most CAPACITY: other numbers on every rank, and none on rank 0."""
TIMED_TOKENS: Final = 8
COMPARED_HIDDEN_SIZE: Final = 256
TIMED_HIDDEN_SIZE: Final = {"cpu": 256, "cuda": 7168}
TIMEOUT_S: Final = {"cpu": 25.0, "cuda": 120.0}
"""Of one run of ranks. On GPUs without a warm cache of compiled kernels the first one compiles for about half a minute."""

Outcome = Literal["passed", "wrong bits", "failed"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Ranks that are started once, and the transports that they try one after another.

    Attributes:
        interpreted: whether kernels run in Triton's interpreter, on CPU tensors.
    """

    device: Literal["cpu", "cuda"]
    num_ranks: int
    transports: tuple[str, ...]
    interpreted: bool = False

    @property
    def environment(self) -> Mapping[str, str]:
        """Of the rank processes, on top of this one's."""
        return {"TRITON_INTERPRET": "1" if self.interpreted else "0"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one transport.

    Attributes:
        num_ranks: of the group; `local` was tried by each rank for itself, and has one.
        detail: what was wrong; empty if it passed.
        round_trip_us: dispatch + combine of 8 rows a rank, the slowest rank; where kernels are interpreted, of the last step
            that was compared. None unless it passed.
        hidden_size: of these rows.
    """

    device: str
    num_ranks: int
    transport: str
    interpreted: bool
    outcome: Outcome
    detail: str = ""
    round_trip_us: float | None = None
    hidden_size: int = 0


def can_interpret(versions: Mapping[str, str]) -> bool:
    """Whether Triton's interpreter runs with these packages: it needs numpy, and before Triton 3.9 one older than 2.4."""
    triton, numpy = (_series(versions.get(name, "")) for name in ("triton", "numpy"))
    return triton is not None and numpy is not None and (triton >= (3, 9) or numpy < (2, 4))


def _series(version: str) -> tuple[int, int] | None:
    parts = version.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


def runs_for(num_gpus: int, versions: Mapping[str, str], *, with_nvls: bool = False) -> list[Run]:
    """What is tried on a machine with that many GPUs, and these packages.

    Kernels are interpreted for tests alone, so that it is no fault where they cannot be.
    `nvls` is tried on GPUs alone, which have the multicast memory that it needs, and only if asked for: it has never run there.
    """
    runs = [Run(device="cpu", num_ranks=2, transports=("local", "collective"))]
    if can_interpret(versions):
        runs.append(Run(device="cpu", num_ranks=2, transports=("p2p",), interpreted=True))
    if num_gpus:
        symmetric = (("p2p", "nvls") if with_nvls else ("p2p",)) if _series(versions.get("triton", "")) else ()
        runs.append(Run(device="cuda", num_ranks=num_gpus, transports=("local", "collective", *symmetric)))
    return runs


def try_transports(run: Run, progress: Callable[[str], None]) -> list[Trial]:
    """Start the ranks, let them try each transport, and say what came of it. Nothing that fails in a rank is raised here."""
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    progress(f"self-test: {run.num_ranks} ranks on {run.device}{', interpreted kernels' if run.interpreted else ''}")
    ended = "it was not reached"
    try:
        run_processes(
            try_as_rank,
            run.num_ranks,
            (run.device, run.transports, run.interpreted),
            timeout_s=TIMEOUT_S[run.device],
            env=run.environment,
            preload=PRELOAD,
            on_message=lambda _, message: answers[message["transport"]].append(message),
        )
    except RankFailedError as error:
        ended = f"rank {error.rank}: {error.traceback.strip().splitlines()[-1]}"
    return [trial_of(run, transport, answers[transport], ended) for transport in run.transports]


def trial_of(run: Run, transport: str, answers: Sequence[Mapping[str, Any]], ended: str) -> Trial:
    """The ranks' answers as one; `ended` is why some did not answer, if so."""
    wrong = [answer["wrong"] for answer in answers if answer["wrong"]]
    errors = [answer["error"] for answer in answers if answer["error"]]
    outcome: Outcome = "passed"
    if wrong:
        outcome = "wrong bits"
    elif errors or len(answers) < run.num_ranks:
        outcome = "failed"
    return Trial(
        device=run.device,
        num_ranks=1 if transport == "local" else run.num_ranks,
        transport=transport,
        interpreted=run.interpreted,
        outcome=outcome,
        detail="" if outcome == "passed" else [*wrong, *errors, ended][0],
        round_trip_us=max(answer["round_trip_us"] for answer in answers) if outcome == "passed" else None,
        hidden_size=COMPARED_HIDDEN_SIZE if run.interpreted else TIMED_HIDDEN_SIZE[run.device],
    )


# --- in a rank process ------------------------------------------------------------------------------------------------


def try_as_rank(
    rank: int,
    world_size: int,
    store_path: str,
    device_type: str,
    transports: Sequence[str],
    interpreted: bool,
    *,
    send: Callable[[Any], None],
) -> None:
    """Tries one transport after another, each with a group of its own, so that one that failed leaves nothing behind for the
    next, and tells of each at once: what comes later may hang."""
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(store_path, world_size)
    for transport in transports:
        alone = transport == "local"
        place = (0, 1) if alone else (rank, world_size)
        group = EPGroup.from_store(dist.PrefixStore(f"{transport}/{rank if alone else 'all'}", store), *place, device)
        answer: dict[str, Any] = {"transport": transport, "wrong": "", "error": "", "round_trip_us": 0.0}
        try:
            answer["wrong"], answer["round_trip_us"] = compare_bits(group, transport)
            if not answer["wrong"] and not interpreted:
                answer["round_trip_us"] = round_trip_us(group, transport)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user wants to hear of
            answer["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        send(answer)


def compare_bits(group: EPGroup, transport: str) -> tuple[str, float]:
    """Steps with other numbers of rows on every rank, and infinities, NaNs and signed zeros among them.

    Returns:
        What differs from the reference on this rank, empty if nothing does; and the microseconds of the last step.
    """
    config = MoEConfig(hidden_size=COMPARED_HIDDEN_SIZE, num_experts=2 * group.size, topk=2, dtype=torch.bfloat16)
    with Workspace(config, group, max_tokens_per_rank=CAPACITY, transport=transport, timeout_s=10.0) as ws:
        layer = ws.dispatcher()
        for number, first in enumerate(STEPS):
            counts = [min(first + rank, CAPACITY) for rank in range(group.size)]
            inputs = make_inputs(config, counts, seed=number, payload="hostile")
            mine, num_valid = inputs[group.rank], sum(counts)
            start = time.perf_counter()
            ws.begin_step(counts[group.rank])
            got = layer.dispatch(*(each.to(group.device) for each in (mine.hidden, mine.topk_idx, mine.topk_weights)))
            arrived = [each[:num_valid].cpu() for each in (got.hidden, got.topk_idx, got.topk_weights)]
            partial = torch.full_like(got.hidden, torch.nan)  # rows behind the valid ones must reach nobody
            partial[:num_valid] = mine.partial.to(group.device)
            out = layer.combine(partial, got).cpu()
            ws.check()
            step_us = (time.perf_counter() - start) * 1e6
            expected = reference.dispatch(
                [each.hidden for each in inputs], [each.topk_idx for each in inputs], [each.topk_weights for each in inputs]
            )
            sums = reference.combine([each.partial for each in inputs], counts, config.dtype, config.dtype)
            pairs = {
                "gathered rows": (arrived[0], expected.hidden),
                "gathered expert numbers": (arrived[1], expected.topk_idx),
                "gathered weights": (arrived[2], expected.topk_weights),
                "combined rows": (out, sums[group.rank]),
            }
            differing = [what for what, (left, right) in pairs.items() if not same_bits(left, right)]
            if differing:
                return f"rank {group.rank}, step {number}: {', '.join(differing)} differ from the reference", step_us
    return "", step_us


def round_trip_us(group: EPGroup, transport: str) -> float:
    """A dispatch and its combine, of 20 in a CUDA graph, or in eager calls on CPUs; the slowest rank's.

    Raises:
        RuntimeError: what it timed had wrong bits.
    """
    hidden_size = TIMED_HIDDEN_SIZE[group.device.type]
    tokens = (TIMED_TOKENS,) * group.size
    point = RoundTripPoint(transport=transport, hidden_size=hidden_size, tokens=tokens, capacity=TIMED_TOKENS)
    record = measure_round_trip(GroupTimer(group, repeats=5), point)
    if not record["correct"]:
        raise RuntimeError("the rows of the timed round trips differ from the reference")
    return float(record["round_trip_us"])
