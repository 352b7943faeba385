"""The tables of docs/layer.md from records of `tokenferry bench layer`, as Markdown: every stage, and what misses its goal.

python benchmarks/layer_table.py RESULTS.jsonl [MORE.jsonl ...]

A figure that stands in several files is the last file's.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenferry.benchmarking.presets import PRESETS

SIZES = {preset.name: preset for preset in PRESETS}
RIVALS = ("collective", "grouped_mm", "batched_mm")
TOTALS = {
    ("qwen3-30b-a3b", 1): 45,
    ("qwen3-30b-a3b", 8): 156,
    ("qwen3-30b-a3b", 32): 219,
    ("gpt-oss-20b", 1): 86,
    ("gpt-oss-20b", 8): 268,
    ("gpt-oss-20b-mxfp4", 1): 48,
    ("gpt-oss-20b-mxfp4", 32): 115,
}
"""Goals in microseconds, set on 2 x H100."""
FLOORS_WHEN_SET = {
    ("qwen3-30b-a3b", 1): 31,
    ("qwen3-30b-a3b", 8): 145,
    ("qwen3-30b-a3b", 32): 208,
    ("gpt-oss-20b", 1): 72,
    ("gpt-oss-20b", 8): 255,
}
"""Microseconds, the floors that those goals were set by: of 2xH100-2026-11-23-layer.jsonl, with a round trip of C = T, which
takes 2 to 3 less than that run's. It had no MXFP4 weights."""
FEW, MANY = 32, 4096
FEW_FACTOR, FEW_START_US = {("mixtral-8x7b", 32): 1.10}, 12.0
MIDDLE_FACTOR = {"mixtral-8x7b": 1.5}
EXPERTS_FACTOR = {"mixtral-8x7b": 1.15, "gpt-oss-120b": 1.45, "deepseek-v3": 1.45}


def read(paths: list[Path]) -> list[dict]:
    """The points of the files: a record each."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return list({(line["preset"], line["tokens"]): line for line in lines if "total_us" in line}.values())


def experts_floor_us(record: dict) -> float:
    """At many rows with one write and one read of each pair's activated and output row."""
    preset = SIZES.get(record["preset"])
    floor = record["experts_floor_us"]
    if preset is None or record["tokens"] < MANY:
        return floor
    of_shared = 6 * preset.hidden_size * preset.shared_size * record["tokens"]
    pairs = (record["gflop"] * 1e9 - of_shared) / (6 * preset.hidden_size * preset.intermediate_size)
    return floor + pairs * (preset.hidden_size + preset.intermediate_size) * 4 / record["read_gb_per_s"] / 1e3


def with_shared_us(record: dict) -> float:
    """The experts' time, and the shared expert's where there is one: the floor counts both."""
    preset = SIZES.get(record["preset"])
    has_shared = preset is not None and preset.shared_size > 0
    return record.get("experts_us", 0.0) + (record.get("shared_us", 0.0) if has_shared else 0.0)


def goals(record: dict) -> Iterator[tuple[str, float, float]]:
    """What is held against what: a name, the figure, and the most that it should be."""
    preset, tokens, total = record["preset"], record["tokens"], record["total_us"]
    if (preset, tokens) in TOTALS:
        yield "total", total, TOTALS[preset, tokens]
    if tokens <= FEW:
        yield "floor", total, few_limit(record)
    elif tokens == 512:
        yield "floor", total, MIDDLE_FACTOR.get(preset, 1.25) * record["floor_us"]
    elif tokens == MANY and "experts_us" in record:
        yield "experts", with_shared_us(record), EXPERTS_FACTOR.get(preset, 1.3) * experts_floor_us(record)
    for rival in RIVALS:
        if record.get(f"{rival}_us"):
            yield rival, total, record[f"{rival}_us"]


def kind_of(name: str, record: dict) -> str:
    """What kind of goal `goals` gives by this name, in words."""
    if name == "floor":
        return "floor at T <= 32" if record["tokens"] <= FEW else "floor at T = 512"
    return name if name in ("total", "experts") else "no slower than " + name


def moved_total(record: dict) -> float | None:
    """The goal in microseconds, moved by what this run's floor is above or below the one that it was set by."""
    at = record["preset"], record["tokens"]
    return TOTALS[at] + record["floor_us"] - FLOORS_WHEN_SET[at] if at in FLOORS_WHEN_SET else None


def few_limit(record: dict) -> float:
    """Most that a layer of few tokens may take above its floor."""
    return FEW_FACTOR.get((record["preset"], record["tokens"]), 1.02) * record["floor_us"] + FEW_START_US


def short(record: dict) -> str:
    """The goals that a row misses, and by how much."""
    missed = [f"{name} {most:.0f}: +{(found / most - 1):.0%}" for name, found, most in goals(record) if found > most]
    return "; ".join(missed)


def cell(record: dict, name: str) -> str:
    """A figure of the table."""
    value = record.get(f"{name}_us")
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def experts(record: dict) -> str:
    """The experts' microseconds, and in brackets how many times their floor."""
    return f"{cell(record, 'experts')} ({with_shared_us(record) / experts_floor_us(record):.2f})"


def table(records: list[dict]) -> Iterator[str]:
    """The lines of the table."""
    titles = ("preset", "T", "router", "dispatch", "experts (× floor)", "combine", "total", "floor", *RIVALS, "short of")
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for record in records:
        stages = [cell(record, "router"), cell(record, "dispatch"), experts(record), cell(record, "combine")]
        rest = [cell(record, name) for name in ("total", "floor", *RIVALS)]
        yield f"| {record['preset']} | {record['tokens']} | {' | '.join([*stages, *rest])} | {short(record)} |"


def summary(records: list[dict]) -> Iterator[str]:
    """How many goals are reached, by kind."""
    counted: dict[str, list[bool]] = {}
    for record in records:
        for name, found, most in goals(record):
            counted.setdefault(kind_of(name, record), []).append(found <= most)
    for kind, reached in counted.items():
        yield f"- {kind}: {sum(reached)} of {len(reached)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    records = read(parser.parse_args().results)
    print("\n".join([*table(records), "", *summary(records)]))


if __name__ == "__main__":
    main()
