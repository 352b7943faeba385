"""What a layer's exchange consists of: its kernels' own time, and the wait for the rank with more attention or experts' work."""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

Launch = tuple[str, float, float]
"""A kernel's name, its begin and its end, in microseconds."""


def launches_within(work: Callable[[], Any]) -> list[Launch]:
    """All kernels that ran on the device during `work`, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    found = [
        (event.name(), event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3)
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return sorted(found, key=lambda launch: launch[1])


def layers_of(launches: Sequence[Launch], num_layers: int) -> list[tuple[float, ...]]:
    """Of each layer but a forward's last: dispatch, experts, combine, attention until the next dispatch, the gap before the
    dispatch, and that behind the combine; microseconds. The last kernels of `launches` are those of whole forwards."""
    kinds = [kind for kind, (name, _, _) in enumerate(launches) if "dispatch_kernel" in name or "combine_kernel" in name]
    pairs = [
        (send, answer)
        for send, answer in pairwise(kinds)
        if "dispatch_kernel" in launches[send][0] and "combine_kernel" in launches[answer][0]
    ]
    found = []
    for i, ((send, answer), (next_send, _)) in enumerate(pairwise(pairs)):
        if (len(pairs) - i) % num_layers == 1:  # the last of its forward
            continue
        (_, sent, came), (_, summed, done), (_, after, _) = launches[send], launches[answer], launches[next_send]
        gaps = launches[send][1] - launches[send - 1][2], launches[answer + 1][1] - done
        found.append((came - sent, summed - came, done - summed, after - done, *gaps))
    return found


def split(ranks: Sequence[Sequence[tuple[float, ...]]]) -> dict[str, Any]:
    """Means over the layers of all ranks' `layers_of`, counted from the end.

    Returns:
        "own_us": a layer's two kernels on the rank that comes to each last, which waits for nobody. "wait_us": what the layer
        takes longer because in one part the one rank is the slower, and in the other part the other; a rank that is the slower
        in all parts makes any forward longer, without an exchange too. Also each part's medians by rank.
    """
    count = min(map(len, ranks))
    layers = list(zip(*(rank[len(rank) - count :] for rank in ranks), strict=True))
    sends, experts, answers, attention, before, behind = (
        [[layer[rank][part] for rank in range(len(ranks))] for layer in layers] for part in range(6)
    )

    def medians(part: list[list[float]]) -> list[float]:
        return [statistics.median(each) for each in zip(*part, strict=True)]

    def slower(part: list[list[float]]) -> float:
        return statistics.fmean(max(each) for each in part)

    alone = [
        statistics.fmean(one[rank] + other[rank] for one, other in zip(experts, attention, strict=True))
        for rank in range(len(ranks))
    ]
    parts = {
        "dispatch_us": sends, "experts_us": experts, "combine_us": answers, "attention_us": attention,
        "gap_before_dispatch_us": before, "gap_behind_combine_us": behind,
    }  # fmt: skip
    return {
        "layers": count,
        "own_us": sum(statistics.median(min(each) for each in part) for part in (sends, answers)),
        "wait_us": slower(experts) + slower(attention) - max(alone),
        **{name: medians(part) for name, part in parts.items()},
    }
