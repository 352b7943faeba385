"""Reading benchmarks/results, and Markdown of it."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
Record = dict[str, Any]


def records(name: str) -> list[Record]:
    return [json.loads(text) for text in (RESULTS / name).read_text().splitlines()]


def first_of(name: str) -> Record:
    """A record that says what was measured on what."""
    return next(record for record in records(name) if "gpu" in record)


def short(commit: str) -> str:
    """As git shortens it, where a record has it whole."""
    return commit[:7] if re.fullmatch("[0-9a-f]{40}", commit) else commit


def source(name: str) -> str:
    """Where the figures come from, for a line under the table."""
    first = first_of(name)
    return (
        f"`benchmarks/results/{name}`: {first['world_size']} × {first['gpu']}, torch {first['torch']}, Triton {first['triton']}, "
        f"{first['date']}, commit {short(first['commit'])}."
    )


def machine(name: str) -> str:
    """The GPUs in short."""
    first = first_of(name)
    return f"{first['world_size']} × {first['gpu'].split()[1]}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def rounded(value: float) -> str:
    """For a sentence."""
    return f"{value:.1f}" if value < 20 else f"{value:.0f}"
