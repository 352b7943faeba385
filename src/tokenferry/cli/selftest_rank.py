"""What a rank does in the self-test of `tokenferry doctor`. Apart from `selftest`, since it imports kernels and benchmarks.

A user waits for it, and most of the time goes into what is opened: kernels are compiled, communicators are made. So the bits are
compared and the round trips timed with one configuration, and in one workspace where the transport allows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from tokenferry import reference
from tokenferry.benchmarking.round_trip import measure_in, opened
from tokenferry.benchmarking.round_trip_data import RoundTripPoint
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.groups import EPGroup
from tokenferry.testing.data import make_inputs
from tokenferry.testing.numeric import same_bits
from tokenferry.workspace import Workspace

CAPACITY: Final = 8
STEPS: Final = (1, 0, 5)
"""In step number s rank r brings (STEPS[s] + r) rows, but at most CAPACITY: other numbers on every rank, and none on rank 0."""
SMALL_HIDDEN_SIZE: Final = 256
HIDDEN_SIZE: Final = {"cpu": SMALL_HIDDEN_SIZE, "cuda": 7168}
INTERPRETED_TOPK: Final = 2
TIMEOUT_S: Final = 10.0


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
        start_s = time.monotonic()
        alone = transport == "local"
        place = (0, 1) if alone else (rank, world_size)
        group = EPGroup.from_store(dist.PrefixStore(f"{transport}/{rank if alone else 'all'}", store), *place, device)
        point = point_for(group, transport, interpreted=interpreted)
        answer: dict[str, Any] = {
            "transport": transport,
            "wrong": "",
            "error": "",
            "round_trip_us": 0.0,
            "hidden_size": point.hidden_size,
        }
        try:
            answer["wrong"], answer["round_trip_us"] = compare_and_time(group, point, interpreted=interpreted)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the user wants to hear of
            answer["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        send({**answer, "took_s": round(time.monotonic() - start_s, 2)})


def point_for(group: EPGroup, transport: str, *, interpreted: bool = False) -> RoundTripPoint:
    """The round trip that is timed, and the configuration of all that a transport is tried with."""
    hidden_size = SMALL_HIDDEN_SIZE if interpreted else HIDDEN_SIZE[group.device.type]
    topk = INTERPRETED_TOPK if interpreted else RoundTripPoint.topk
    return RoundTripPoint(
        transport=transport, hidden_size=hidden_size, tokens=(CAPACITY,) * group.size, capacity=CAPACITY, topk=topk
    )


def compare_and_time(group: EPGroup, point: RoundTripPoint, *, interpreted: bool) -> tuple[str, float]:
    """Returns what differs from the reference on this rank, empty if nothing does, and microseconds of a round trip: of those
    that are timed by themselves, or, where kernels are interpreted, of the last step that was compared."""
    with Workspace(point.config, group, max_tokens_per_rank=CAPACITY, transport=point.transport, timeout_s=TIMEOUT_S) as ws:
        wrong, step_us = compare_bits(ws)
        if wrong or interpreted:
            return wrong, step_us
        if point.transport != "collective":
            return "", round_trip_us(ws, point)
    with opened(group, point) as ws:  # with equal counts: those that the host waits for cannot be in a graph
        return "", round_trip_us(ws, point)


def compare_bits(ws: Workspace) -> tuple[str, float]:
    """Steps with other numbers of rows on every rank, and infinities, NaNs and signed zeros among them.

    Returns:
        What differs from the reference on this rank, empty if nothing does; and the microseconds of the last step.
    """
    group, config, layer = ws.group, ws.config, ws.dispatcher()
    for number, first in enumerate(STEPS):
        counts = [min(first + rank, CAPACITY) for rank in range(group.size)]
        inputs = make_inputs(config, counts, seed=number, payload="hostile")
        mine, num_valid = inputs[group.rank], sum(counts)
        start = time.perf_counter()
        ws.begin_step(counts[group.rank])
        got = layer.dispatch(*(each.to(group.device) for each in (mine.hidden, mine.topk_idx, mine.topk_weights)))
        # Copies, since in debug mode a combine poisons what was gathered: on CPUs such a machine was called broken.
        arrived = [each[:num_valid].to("cpu", copy=True) for each in (got.hidden, got.topk_idx, got.topk_weights)]
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


def round_trip_us(ws: Workspace, point: RoundTripPoint) -> float:
    """A dispatch and its combine, of 20 in a CUDA graph, or in eager calls on CPUs; the slowest rank's.

    Raises:
        RuntimeError: what it timed had wrong bits.
    """
    record = measure_in(ws, GroupTimer(ws.group, repeats=5), point)
    if not record["correct"]:
        raise RuntimeError("the rows of the timed round trips differ from the reference")
    return float(record["round_trip_us"])
