"""In which order models are measured: what is quick of all of them first, then what compiles, a point after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenferry.benchmarking.model_modes import MODES
from tokenferry.benchmarking.model_request import ModelPoint, ModelRequest, configured
from tokenferry.benchmarking.model_ways import WAYS
from tokenferry.groups import EPGroup


@dataclass(frozen=True)
class Part:
    """What is measured of a model while it is loaded.

    Attributes:
        config: its name, and `values` its configuration of transformers.
        steps: modes and points, in order.
    """

    config: str
    values: Any
    way: str
    steps: tuple[tuple[str, ModelPoint], ...]


def parts_of(request: ModelRequest, group: EPGroup) -> list[Part]:
    """All that is to be measured, without parts that have nothing. A model is loaded again for each point that compiles: that
    takes a second or two, and lets the budget cut off the last points instead of the last models."""
    configs = list(dict.fromkeys(point.config for point in request.points))
    values = {config: configured(config, request.rehearse) for config in configs}

    def part(way: str, modes: tuple[str, ...], points: list[ModelPoint]) -> Part:
        config = points[0].config
        steps = [(mode, point) for mode in modes if request.wants(way, mode) for point in points]
        served = tuple(step for step in steps if MODES[step[0]].serves(values[config], step[1], group))
        return Part(config, values[config], way, served)

    of_config = [[point for point in request.points if point.config == config] for config in configs]
    quick = [part(way, WAYS[way].modes, points) for points in of_config for way in request.ways]
    slow = [part(way, WAYS[way].slow_modes, [point]) for point in request.points for way in request.ways]
    return [each for each in (*quick, *slow) if each.steps]
