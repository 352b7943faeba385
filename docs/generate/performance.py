"""Tables and curves from the records in benchmarks/results, so that the site's figures and the data cannot differ."""

import math
from collections.abc import Callable

import published
import round_trips as trips
from drawing import COLOURS, line, picture, text
from result_files import first_of, machine, number, records, source, table


def round_trips() -> str:
    parts = []
    for hidden_size in trips.hidden_sizes():
        curves = trips.curves(hidden_size)
        sizes = sorted(curves[trips.P2P])
        names = {name: f"p2p, {trips.in_workspaces()}" if name == trips.P2P else name for name in curves}
        rows = [[names[name], *(number(curve.get(size)) for size in sizes)] for name, curve in curves.items()]
        parts += [f"Hidden size {hidden_size}, µs:", table(["tokens per rank", *map(str, sizes)], rows)]
    return "\n\n".join([*parts, trips.words_on_capacity(), source(published.ROUND_TRIPS)])


def layers() -> str:
    columns = {"p2p": "total_us", "over NCCL": "collective_us", "over p2p, `grouped_mm` experts": "grouped_mm_us"}
    rows = [
        [record["preset"], record["tokens"], *(number(record.get(key)) for key in columns.values())]
        for record in records(published.LAYERS)
        if record.get("what") == "layer" and "total_us" in record
    ]
    opened_for = f"In workspaces opened for {first_of(published.LAYERS)['capacity']} tokens."
    return "\n\n".join([table(["model", "tokens per rank", *columns], rows), opened_for, source(published.LAYERS)])


def models() -> str:
    """The fastest form of each side, in the same run."""
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    for record in records(published.MODELS):
        if (record.get("way"), record.get("mode")) in (("p2p", "graph-compiled"), ("transformers", "compile")):
            key = record["config"], record["batch"], record["prompt"]
            found.setdefault(key, {}).setdefault(record["way"], record["token_ms"])
    rows = [[*key, f"{ways['p2p']:.2f}", f"{ways['transformers']:.2f}"] for key, ways in found.items() if len(ways) == 2]
    head = ["model:layers", "prompts of each rank", "prompt length", "tokenferry", "transformers"]
    return table(head, rows) + "\n\n" + source(published.MODELS)


def round_trip_picture() -> str:
    """Round trips of the main hidden size, both axes logarithmic."""
    curves = {name: curve for name, curve in trips.curves(trips.MAIN_SIZE).items() if name != trips.EXACT}
    left, bottom, width, height = 60, 300, 520, 260

    def x(tokens: float) -> float:
        return left + width * math.log2(tokens) / 12

    def y(microseconds: float) -> float:
        return bottom - height * math.log10(microseconds / 3) / math.log10(1000 / 3)

    parts = []
    for microseconds in (5, 10, 30, 100, 300, 1000):
        parts += [line([(left, y(microseconds)), (left + width, y(microseconds))], "#dddddd")]
        parts += [text(left - 6, y(microseconds) + 4, str(microseconds), anchor="end")]
    parts += [text(x(tokens), bottom + 18, str(tokens), anchor="middle") for tokens in sorted(curves[trips.P2P])]
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        points = [(x(tokens), y(value)) for tokens, value in sorted(curve.items())]
        last = points[-1][1] + {trips.RANK_ORDER: -6, trips.ANY_ORDER: 8}.get(name, 4)
        parts += [line(points, colour), text(left + width + 8, last, name)]
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
    measured = f"{machine(published.ROUND_TRIPS)}, hidden size {trips.MAIN_SIZE}, top-8, bfloat16, {trips.in_workspaces()}"
    parts += [text(left, 20, f"dispatch + combine, µs ({measured})")]
    parts += [text(left + width / 2, bottom + 36, "tokens per rank", anchor="middle")]
    return picture(720, 345, parts)


TABLES: dict[str, Callable[[], str]] = {"round trips": round_trips, "layers": layers, "models": models}
