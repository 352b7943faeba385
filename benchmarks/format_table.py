"""The tables of docs/formats.md from records of `benchmarks/roundtrip.py --format ... --combine-format ...`, as Markdown.

python benchmarks/format_table.py RECORD.jsonl
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import goals

PLAIN, SENT, BEFORE = ("same", False), ("fp8_block128", False), ("fp8_block128", True)
"""How rows, or terms, travel: in bfloat16, quantized by the sending kernel, or before. By the names in the records."""
WAYS = {
    "all bfloat16": (PLAIN, PLAIN),
    "rows kernel, bfloat16 terms": (SENT, PLAIN),
    "rows before, bfloat16 terms": (BEFORE, PLAIN),
    "rows kernel, terms before": (SENT, BEFORE),
    "rows before, terms before": (BEFORE, BEFORE),
    "both kernel": (SENT, SENT),
    "bfloat16 rows, terms before": (PLAIN, BEFORE),
    "bfloat16 rows, terms kernel": (PLAIN, SENT),
}


def way_of(record: dict) -> tuple:
    return (record["dispatch_format"], record["quantized"]), (record["combine_format"], record["quantized_terms"])


def figure(us: float | None) -> str:
    return "–" if us is None else f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def table(records: list[dict]) -> Iterator[str]:
    """The lines: one for each hidden size and number of tokens, µs. What was wrong in its results is an error."""
    measured = [record for record in records if "round_trip_us" in record]
    if wrong := [(r["hidden_size"], r["tokens"]) for r in measured if not r["correct"]]:
        raise SystemExit(f"these round trips differed from the reference: {wrong}")
    found = {name: goals.by_point(r for r in measured if way_of(r) == way) for name, way in WAYS.items()}
    shown = {name: by_point for name, by_point in found.items() if by_point}
    yield f"| H | T | {' | '.join(shown)} |"
    yield "|---" * (2 + len(shown)) + "|"
    points = sorted({point for by_point in shown.values() for point in by_point}, key=lambda point: (-point[0], point[1:]))
    for size, *tokens in points:
        if len(set(tokens)) == 1:
            figures = [figure(by_point.get((size, *tokens))) for by_point in shown.values()]
            yield f"| {size} | {tokens[0]} | {' | '.join(figures)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    path = parser.parse_args().record
    print(*table(goals.read(path)), "", *goals.table([path]), sep="\n")


if __name__ == "__main__":
    main()
