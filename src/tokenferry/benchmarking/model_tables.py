"""The records of `run_model` as a table in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenferry.benchmarking.machine import NO_GPU

COLUMNS: Final = ("step_ms", "host_ms", "token_ms", "around_ms", "ttft_ms", "first_call_s", "tokens_per_s")
"""What a record may have, beside the two that are divided by the layers."""


def model_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line for each point, way and mode, in the order of the points; then what failed or was left out.

    `step/layer` and `host/layer` are microseconds; the last column is the share of tokens that are the plain model's.
    Lines of a rehearsal have that share alone, and no figures.
    """
    heading = (
        f"{'configuration':<20}{'batch':>6}{'prompt':>7}  {'way':<13}{'mode':<16}"
        + "".join(f"{name.removesuffix('_ms').removesuffix('_s'):>11}" for name in COLUMNS)
        + f"{'step/layer':>12}{'host/layer':>12}  agreement"
    )
    measured = sorted((record for record in records if "mode" in record), key=_place(records))
    others = [record for record in records if "mode" not in record and ("loaded_s" not in record or "held_gb" in record)]
    return "\n".join([heading, *map(_line, measured), *map(_remark, others)])


def _place(records: Sequence[Mapping[str, Any]]) -> Any:
    """By point as they come first, then as measured."""
    points = list(dict.fromkeys(_point(record) for record in records if "mode" in record))
    return lambda record: points.index(_point(record))


def _point(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["config"], record["batch"], record["prompt"]


def _line(record: Mapping[str, Any]) -> str:
    named = f"{record['config']:<20}{record['batch']:>6}{record['prompt']:>7}  {record['way']:<13}{record['mode']:<16}"
    measured = {} if record.get("gpu") == NO_GPU else record
    figures = "".join(f"{shown(measured.get(name)):>11}" for name in COLUMNS)
    by_layer = "".join(f"{shown(per_layer_us(measured, name)):>12}" for name in ("step_ms", "host_ms"))
    return f"{named}{figures}{by_layer}  {record.get('agreement', '-')}"


def _remark(record: Mapping[str, Any]) -> str:
    if "family" in record and "error" in record:
        return f"tiny {record['family']}: {record['error']}"
    if "family" in record:
        return f"tiny {record['family']} in {record['dtype']}: tokens {'equal' if record['equal_tokens'] else 'DIFFER'}"
    where = f"{record['config']}, {record['way']}"
    if "error" in record:
        return f"{where}: {record['error']}"
    if "held_gb" in record:
        return f"{where}: {record['held_gb']} GB on each GPU, {record['loading_peak_gb']} at most while loading"
    word = "not run" if "not_run" in record else "left out"
    left = ", ".join(f"{mode} at {batch} x {prompt}" for mode, batch, prompt in record[word.replace(" ", "_")])
    return f"{where}: {word} {left}: {record['reason']}"


def per_layer_us(record: Mapping[str, Any], name: str) -> float | None:
    """Microseconds a layer of a record's milliseconds a step; what is no layer of the model is in them."""
    return None if record.get(name) is None else 1e3 * record[name] / record["layers"]


def shown(value: float | None) -> str:
    """A figure in a table; "-" where there is none."""
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}"
