"""The tables of README.md and docs/transformers.md from records of `tokenferry bench model`, as Markdown.

python benchmarks/model_table.py RESULTS.jsonl [MORE.jsonl ...]            # README.md: what a user gets, in short
python benchmarks/model_table.py RESULTS.jsonl [MORE.jsonl ...] --all      # docs/transformers.md: every way and mode

A figure that stands in several files is the last file's.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenferry.benchmarking.model_tables import shown

Point = tuple[str, int, int]
"""Configuration, batch of each rank, tokens of each prompt."""
Records = dict[tuple[Point, str, str], dict]
"""By point, way and mode."""

NAMES = {
    "p2p": "tokenferry, `p2p`",
    "collective": "tokenferry over NCCL",
    "transformers": "transformers' own expert parallelism",
    "plain": "the whole model on each GPU",
}
THEIRS = ("compile", "compile-batched", "eager", "eager-batched")
OURS = ("graph-compiled", "graph", "eager")
GRAPHS = ("graph", "graph-batched")


NOT_RUN = "cannot be captured"
"""The model's own forward does what no capture allows; the record has torch's words."""


def read(paths: list[Path]) -> Records:
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    found = {(point_of(line), line["way"], line["mode"]): line for line in lines if "mode" in line}
    for line in lines:
        for mode, batch, prompt in line.get("not_run", ()):
            found.setdefault(((line["config"], batch, prompt), line["way"], mode), {"not_run": line["reason"]})
    return found


def point_of(record: dict) -> Point:
    return record["config"], record["batch"], record["prompt"]


def best(records: Records, point: Point, way: str, modes: tuple[str, ...], name: str) -> tuple[float, str] | None:
    """The smallest figure of those modes, and its mode."""
    found = [(records[point, way, mode][name], mode) for mode in modes if name in records.get((point, way, mode), {})]
    return min(found, default=None)


def row(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def short_table(records: Records) -> Iterator[str]:
    """A row for each point at which transformers' own form was compiled too: ms a token in `generate()`, and of a step alone."""
    titles = ("tokenferry", "transformers", "ratio")
    yield row("model, batch of each rank, prompt", [*titles, *(f"step alone: {title}" for title in titles)])
    yield "|---" * (2 * len(titles) + 1) + "|"
    for point in dict.fromkeys(point for point, _, mode in records if mode == "compile"):
        config, batch, prompt = point
        token = compared(records, point, "token_ms", OURS, THEIRS)
        yield row(f"{config}, {batch}, {prompt}", [*token, *compared(records, point, "step_ms", OURS[:2], GRAPHS)])


def compared(records: Records, point: Point, name: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> list[str]:
    """Our figure, theirs, and how many times ours it is."""
    found = []
    for way, modes in (("p2p", ours), ("transformers", theirs)):
        figure = best(records, point, way, modes, name)
        is_refused = any("not_run" in records.get((point, way, mode), {}) for mode in modes)
        found.append((figure, "-" if not is_refused else NOT_RUN))
    (mine, _), (other, _) = found
    ratio = "-" if mine is None or other is None else f"{other[0] / mine[0]:.2f}"
    return [*(word if figure is None else f"{shown(figure[0])} ({figure[1]})" for figure, word in found), ratio]


def whole_table(records: Records) -> Iterator[str]:
    """A table for each configuration: every way and mode, and by point the token and the step alone."""
    for config in dict.fromkeys(point[0] for point, _, _ in records):
        points = [point for point in dict.fromkeys(point for point, _, _ in records) if point[0] == config]
        yield row(f"{config}: token / step", [f"{batch} × {prompt}" for _, batch, prompt in points])
        yield "|---" * (len(points) + 1) + "|"
        for way, mode in dict.fromkeys((way, mode) for point, way, mode in records if point in points):
            mine = [records.get((point, way, mode), {}) for point in points]
            yield row(f"{NAMES[way]}: {mode}", [cell(record) for record in mine])
        yield ""


def cell(record: dict) -> str:
    return NOT_RUN if "not_run" in record else f"{shown(record.get('token_ms'))} / {shown(record.get('step_ms'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    table: Callable[[Records], Iterator[str]] = whole_table if given.all else short_table
    print("\n".join(table(read(given.results))))


if __name__ == "__main__":
    main()
