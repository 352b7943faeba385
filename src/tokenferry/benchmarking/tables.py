"""The records of a run as a table in plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenferry.benchmarking.machine import NO_GPU

LAYER_COLUMNS: Final = ("router", "dispatch", "experts", "combine", "total", "floor", "collective", "grouped_mm", "batched_mm")


def round_trip_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of `run_round_trips`, one line for each point: microseconds, spread, GB/s and their share of a copy's.

    Those of a rehearsal have no figures, only whether the results were right.
    """
    heading = f"{'transport':<12}{'format':<24}{'combine':<24}{'order':<6}{'H':>6}{'C':>7} {'T per rank':<14}"
    heading += f"{'us':>9}{'±':>7}{'GB/s':>8}{'of copy':>9}  correct"
    return "\n".join([heading, *(_round_trip_line(record) for record in records)])


def _round_trip_line(record: Mapping[str, Any]) -> str:
    if "what" in record:
        told = (name for name in record if name.endswith(("_us", "_s")) and name != "at_s")
        return ", ".join(f"{name} {record[name]}" for name in told)
    tokens = "x".join(map(str, record["tokens"]))
    given = record["dispatch_format"] + "-quantized" * record["quantized"]
    terms = record["combine_format"] + "-quantized" * record["quantized_terms"]
    point = f"{record['transport']:<12}{given:<24}{terms:<24}{record['combine_order']:<6}"
    point += f"{record['hidden_size']:>6}{record['capacity']:>7} {tokens:<14}"
    if "error" in record:
        return f"{point} {record['error']}"
    of_copy = "-" if record["of_copy"] is None else f"{record['of_copy']:.0%}"
    if record["gpu"] == NO_GPU:
        return f"{point}{'-':>9}{'-':>7}{'-':>8}{'-':>9}  {'yes' if record['correct'] else 'NO'}"
    figures = f"{record['round_trip_us']:>9.2f}{record['spread_us']:>7.2f}{record['gb_per_s']:>8.0f}{of_copy:>9}"
    return f"{point}{figures}  {'yes' if record['correct'] else 'NO'}"


def layer_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of `run_layer` in microseconds, one line for each point; the last column names what gave wrong results.

    Those of a rehearsal have no figures.
    """
    float8 = [record for record in records if record.get("float8")]
    plain = [record for record in records if not record.get("float8")]
    heading = f"{'preset':<18}{'T':>5}" + "".join(f"{name:>11}" for name in LAYER_COLUMNS) + "  right"
    parts = ["\n".join([heading, *(_layer_line(record) for record in plain)])] if plain or not float8 else []
    return "\n".join([*parts, *([_formats_table(float8)] if float8 else [])])


def _formats_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Of layers with float8 weights: a line for each point and each way in which rows and terms travel."""
    columns = (*LAYER_COLUMNS[:5], "bfloat16")
    heading = f"{'preset':<18}{'T':>5} {'rows, terms':<18}" + "".join(f"{name:>11}" for name in columns) + "  right"
    lines = [heading]
    for record in records:
        if "tokens" not in record:
            lines.append(_layer_line(record))
            continue
        for name, is_right in record["correct"].items():
            figures = {"bfloat16_us": record["bfloat16_us"], **record[name]}
            told = _cells(record, [figures.get(f"{column}_us") for column in columns])
            lines.append(f"{record['preset']:<18}{record['tokens']:>5} {name:<18}{told}  {'yes' if is_right else 'no'}")
    return "\n".join(lines)


def _layer_line(record: Mapping[str, Any]) -> str:
    if "tokens" not in record:
        return f"{record['preset']:<18} {record.get('error') or 'left out: T = ' + str(record['left_out'])}"
    figures = _cells(record, [record.get(f"{name}_us") for name in LAYER_COLUMNS])
    wrong = [name for name, right in record["correct"].items() if not right]
    return f"{record['preset']:<18}{record['tokens']:>5}{figures}  {'no: ' + ', '.join(wrong) if wrong else 'yes'}"


def _cells(record: Mapping[str, Any], figures: Sequence[float | None]) -> str:
    is_rehearsal = record.get("gpu") == NO_GPU
    return "".join(f"{'-' if is_rehearsal or figure is None else format(figure, '.1f'):>11}" for figure in figures)
