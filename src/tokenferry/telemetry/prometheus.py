"""Telemetry as Prometheus metrics, through `prometheus_client` (the extra `metrics`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tokenferry.errors import ConfigError, StateError
from tokenferry.telemetry.snapshot import Snapshot


def register(snapshot: Callable[[], Snapshot], registry: Any = None) -> Any:
    """Lets `registry` (default: a new one) ask `snapshot` for figures at each scrape. Returns the registry. From the moment on at
    which `snapshot` raises StateError, as it does once its workspace is closed, there are none.

    Raises:
        ConfigError: `prometheus_client` is not installed.
    """
    try:
        import prometheus_client
        from prometheus_client import core
    except ImportError as error:
        raise ConfigError("telemetry.prometheus needs prometheus_client; pip install 'tokenferry[metrics]'") from error

    class Collector:
        """Its metrics are made anew at each scrape."""

        def collect(self) -> Iterator[Any]:
            with contextlib.suppress(StateError):  # a registry serves others too, when this workspace is closed
                yield from _families(core, snapshot())

    registry = prometheus_client.CollectorRegistry() if registry is None else registry
    registry.register(Collector())
    return registry


def _families(core: Any, taken: Snapshot) -> Iterator[Any]:
    rank, sources = str(taken.rank), [str(source) for source in range(taken.size)]
    counter = core.CounterMetricFamily

    steps = counter("tokenferry_steps", "Steps that were begun.", labels=["rank"])
    steps.add_metric([rank], taken.num_steps)
    yield steps
    rounds = counter("tokenferry_rounds", "Dispatches with their combines.", labels=["rank", "layer"])
    for layer in taken.layers:
        rounds.add_metric([rank, str(layer.layer)], layer.num_rounds)
    yield rounds
    for name, what, values in (
        ("tokenferry_rows", "Rows that dispatches brought.", taken.rows),
        ("tokenferry_row_bytes", "Bytes of hidden rows that dispatches brought.", taken.num_bytes),
        ("tokenferry_term_bytes", "Bytes of terms that combines brought.", taken.num_term_bytes),
    ):
        if values is None:  # an older version's, read back
            continue
        family = counter(name, what, labels=["rank", "source"])
        for source, value in zip(sources, values, strict=True):
            family.add_metric([rank, source], value)
        yield family
    waits = counter("tokenferry_wait_seconds", "Time waited for a rank.", labels=["rank", "source", "phase"])
    for phase in ("counts", "dispatch", "combine"):
        for source, value in zip(sources, getattr(taken.waits, f"{phase}_ns"), strict=True):
            waits.add_metric([rank, source, phase], value / 1e9)
    yield waits
    loads = counter("tokenferry_expert_rows", "Rows that came for an expert.", labels=["rank", "layer", "expert"])
    for number, row in enumerate(taken.loads):
        for expert, value in enumerate(row):
            loads.add_metric([rank, str(number), str(expert)], value)
    yield loads
