"""Which goals the records of a run reach: a line for each kind of goal, with what misses it, and the record.

python benchmarks/goals.py RECORD.jsonl [MORE.jsonl ...]

What a file holds is told by how its name ends, as `benchmarks/publish.py` names them.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import layer_table

sys.path.append(str(Path(__file__).parents[1] / "docs" / "generate"))
import round_trips

ROWS, TERMS = "fp8_block128", "fp8_block128"
"""Of a workspace for float8."""
FORMAT_GOALS_US = {
    7168: {32: 7.2, 128: 13.0, 512: 42, 4096: 270},
    2048: {128: 7.6, 512: 14.5, 4096: 90},
}
"""Of a round trip with float8 rows that the dispatch quantizes and bfloat16 terms, by hidden size and tokens per rank."""
TERMS_POINT = (7168, 4096)
TERMS_GOALS_US = {"terms quantized before": 195, "terms quantized by the combine": 215}
FEW, MOST_ABOVE_BFLOAT16_US = 8, 0.3
"""Up to so many tokens float8 rows may take so much longer than bfloat16 ones."""
FEWEST_GAINING = 32
"""From so many tokens on a layer with float8 weights is faster with float8 rows than with those that its experts quantize."""
TELEMETRY_ADDS_US = 0.3
SHOWN = 3
"""Most misses that a line names, the worst first."""


class Goal(NamedTuple):
    """What was found at a point, and the most that it should be."""

    kind: str
    point: str
    found: float
    most: float


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_point(records: Iterable[dict]) -> dict[tuple[int, ...], float]:
    """µs by hidden size and the tokens of all ranks."""
    return {(r["hidden_size"], *r["tokens"]): r["round_trip_us"] for r in records if "round_trip_us" in r}


def named(size: int, *tokens: int) -> str:
    return f"H {size}, T {tokens[0] if len(set(tokens)) == 1 else ' and '.join(map(str, tokens))}"


def of_round_trips(records: list[dict]) -> Iterator[Goal]:
    mine = [r for r in records if r["transport"] == "p2p" and "round_trip_us" in r]
    capacity = max((r["capacity"] for r in mine), default=0)
    as_opened = by_point(r for r in mine if r["capacity"] == capacity)
    exact = by_point(r for r in mine if r["capacity"] == max(r["tokens"]))
    for (size, *tokens), us in as_opened.items():
        point, count = named(size, *tokens), tokens[0]
        if len(set(tokens)) > 1:
            if (even := as_opened.get((size, *[max(tokens)] * len(tokens)))) is not None:
                yield Goal("uneven round trip", point, us, round_trips.UNEVEN_FACTOR * even)
            continue
        if (goal := round_trips.GOALS_US.get(size, {}).get(count)) is not None:
            yield Goal(f"round trip, C = {capacity}", point, us, goal)
        if count <= round_trips.FEW and (size, *tokens) in exact:
            yield Goal("above a workspace of C = T", point, round(us - exact[size, *tokens], 2), round_trips.MOST_ABOVE_EXACT_US)
        if (size, count) == round_trips.MIDDLE_POINT:
            yield Goal(f"round trip, C = {capacity}, as issued", point, us, round_trips.MIDDLE_GOAL_US)


def of_formats(records: list[dict]) -> Iterator[Goal]:
    def ways(rows: str, terms: str, *, terms_before: bool = False) -> dict[tuple[int, ...], float]:
        wanted = (rows, False, terms, terms_before)
        names = ("dispatch_format", "quantized", "combine_format", "quantized_terms")
        return by_point(r for r in records if tuple(map(r.get, names)) == wanted)

    plain, quantized = ways("same", "same"), ways(ROWS, "same")
    for (size, *tokens), us in quantized.items():
        if len(set(tokens)) > 1:
            continue
        point, count = named(size, *tokens), tokens[0]
        if (goal := FORMAT_GOALS_US.get(size, {}).get(count)) is not None:
            yield Goal("round trip, float8 rows", point, us, goal)
        if count <= FEW and (size, *tokens) in plain:
            yield Goal("float8 rows above bfloat16 ones", point, round(us - plain[size, *tokens], 2), MOST_ABOVE_BFLOAT16_US)
    for (kind, goal), before in zip(TERMS_GOALS_US.items(), (True, False), strict=True):
        for (size, *tokens), us in ways(ROWS, TERMS, terms_before=before).items():
            if all((size, count) == TERMS_POINT for count in tokens):
                yield Goal(f"round trip, float8 {kind}", named(size, *tokens), us, goal)


def of_layers(records: list[dict]) -> Iterator[Goal]:
    for record in records:
        point = f"{record['preset']}, T {record.get('tokens')}"
        if "total_us" in record:
            for name, found, most in layer_table.goals(record):
                yield Goal(f"layer: {layer_table.kind_of(name, record)}", point, found, most)
        if "bfloat16_us" not in record:
            continue
        totals = {way: record[way]["total_us"] for way in ("same", "fp8_block128", "fp8_block128_both") if way in record}
        for way, us in totals.items():
            yield Goal("float8 layer: no slower than bfloat16", f"{point}, {way}", us, record["bfloat16_us"])
        if record["tokens"] >= FEWEST_GAINING:
            yield Goal("float8 layer: no slower with float8 rows", point, totals["fp8_block128"], totals["same"])


def of_telemetry(records: list[dict]) -> Iterator[Goal]:
    for record in records:
        if "hidden_size" in record:
            point = named(record["hidden_size"], record["tokens"])
            yield Goal("telemetry adds", point, record["waits_adds_us"], TELEMETRY_ADDS_US)
            yield Goal("telemetry adds, somebody else's experts", point, record["numbers_adds_us"], TELEMETRY_ADDS_US)


GOALS = {"round-trips": of_round_trips, "formats": of_formats, "layer": of_layers, "telemetry": of_telemetry}
"""By how a file's name ends."""


def missed(goals: list[Goal]) -> str:
    """In words, the worst first."""
    short = sorted((goal for goal in goals if goal.found > goal.most), key=lambda goal: goal.most / goal.found)
    told = [f"{goal.point}: {goal.found:.4g}, goal {goal.most:.4g}" for goal in short[:SHOWN]]
    return "; ".join(told + [f"{len(short) - SHOWN} more"] * (len(short) > SHOWN)) or "–"


def table(paths: Iterable[Path]) -> Iterator[str]:
    """The lines of the table."""
    yield "| goal, µs | reached | missed | record |"
    yield "|---|---|---|---|"
    for path in paths:
        kinds = dict[str, list[Goal]]()
        for goal in next((of for end, of in GOALS.items() if path.stem.endswith(end)), lambda records: ())(read(path)):
            kinds.setdefault(goal.kind, []).append(goal)
        for kind, goals in kinds.items():
            held = sum(goal.found <= goal.most for goal in goals)
            yield f"| {kind} | {held} of {len(goals)} | {missed(goals)} | {path.name} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    print(*table(parser.parse_args().records), sep="\n")


if __name__ == "__main__":
    main()
