"""Tables and curves from the records in benchmarks/results, so that the site's figures and the data cannot differ."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drawing import COLOURS, line, picture, text

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROUND_TRIPS, LAYERS, MODELS = "2xH100-2026-11-22.jsonl", "2xH100-2026-11-26-layer.jsonl", "2xH200-2026-11-26-model.jsonl"
Record = dict[str, Any]


def records(name: str) -> list[Record]:
    return [json.loads(text) for text in (RESULTS / name).read_text().splitlines()]


def source(name: str) -> str:
    """Where the figures come from, for a line under the table."""
    first = next(record for record in records(name) if "gpu" in record)
    return (
        f"`benchmarks/results/{name}`: {first['world_size']} × {first['gpu']}, torch {first['torch']}, Triton {first['triton']}, "
        f"{first['date']}, commit {first['commit']}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def round_trip_curves(hidden_size: int) -> dict[str, dict[int, float]]:
    """For each way µs by tokens per rank, where all ranks bring the same number."""
    names = {("p2p", "rank"): "p2p", ("collective", "rank"): "NCCL, rank order", ("collective", "any"): "NCCL, any order"}
    curves: dict[str, dict[int, float]] = {name: {} for name in names.values()}
    for record in records(ROUND_TRIPS):
        if record.get("hidden_size") == hidden_size and "round_trip_us" in record and len(set(record["tokens"])) == 1:
            name = names.get((record["transport"], record["combine_order"]))
            if name is not None:
                curves[name][record["tokens"][0]] = record["round_trip_us"]
    return curves


def round_trips() -> str:
    parts = []
    for hidden_size in (7168, 2048):
        curves = round_trip_curves(hidden_size)
        sizes = sorted(curves["p2p"])
        rows = [[name, *(number(curve.get(size)) for size in sizes)] for name, curve in curves.items() if curve]
        parts += [f"Hidden size {hidden_size}, µs:", table(["tokens per rank", *map(str, sizes)], rows)]
    return "\n\n".join([*parts, source(ROUND_TRIPS)])


def layers() -> str:
    columns = {"p2p": "total_us", "over NCCL": "collective_us", "`grouped_mm` experts": "grouped_mm_us"}
    rows = [
        [record["preset"], record["tokens"], *(number(record.get(key)) for key in columns.values())]
        for record in records(LAYERS)
        if record.get("what") == "layer" and "total_us" in record
    ]
    return table(["model", "tokens per rank", *columns], rows) + "\n\n" + source(LAYERS)


def models() -> str:
    """The fastest form of each side, in the same run."""
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    for record in records(MODELS):
        if (record.get("way"), record.get("mode")) in (("p2p", "graph-compiled"), ("transformers", "compile")):
            key = record["config"], record["batch"], record["prompt"]
            found.setdefault(key, {}).setdefault(record["way"], record["token_ms"])
    rows = [[*key, f"{ways['p2p']:.2f}", f"{ways['transformers']:.2f}"] for key, ways in found.items() if len(ways) == 2]
    return (
        table(["model:layers", "prompts of each rank", "prompt length", "tokenferry", "transformers"], rows)
        + "\n\n"
        + source(MODELS)
    )


def round_trip_picture() -> str:
    """Round trips of hidden size 7168, both axes logarithmic."""
    curves = round_trip_curves(7168)
    left, bottom, width, height = 60, 300, 520, 260

    def x(tokens: float) -> float:
        return left + width * math.log2(tokens) / 12

    def y(microseconds: float) -> float:
        return bottom - height * math.log10(microseconds / 3) / math.log10(1000 / 3)

    parts = []
    for microseconds in (5, 10, 30, 100, 300, 1000):
        parts += [line([(left, y(microseconds)), (left + width, y(microseconds))], "#dddddd")]
        parts += [text(left - 6, y(microseconds) + 4, str(microseconds), anchor="end")]
    parts += [text(x(tokens), bottom + 18, str(tokens), anchor="middle") for tokens in sorted(curves["p2p"])]
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        points = [(x(tokens), y(value)) for tokens, value in sorted(curve.items())]
        last = points[-1][1] + {"NCCL, rank order": -6, "NCCL, any order": 8}.get(name, 4)
        parts += [line(points, colour), text(left + width + 8, last, name)]
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
    parts += [text(left, 20, "dispatch + combine, µs (2 × H100, hidden size 7168, top-8, bfloat16)")]
    parts += [text(left + width / 2, bottom + 36, "tokens per rank", anchor="middle")]
    return picture(720, 345, parts)


TABLES: dict[str, Callable[[], str]] = {"round trips": round_trips, "layers": layers, "models": models}
