"""Writes what docs/layer.md says of a run: its tables, the goals, and what misses them. So figures and records cannot differ.

Layers with float8 weights are of the same file, and of others where runs of their own measured them.

python benchmarks/layer_docs.py benchmarks/results/RUN-layer.jsonl [RUN-layer-float8.jsonl ...] [--docs docs/layer.md]
"""

import argparse
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from layer_table import FEW, FLOORS_WHEN_SET, MANY, RIVALS, TOTALS, few_limit, goals, moved_total, read, summary, table

BEGIN, END = "<!-- measured: by benchmarks/layer_docs.py -->", "<!-- measured: end -->"
DOCS = Path(__file__).parents[1] / "docs" / "layer.md"


def run_of(record: dict) -> str:
    """What was measured on what, in words; a commit as git shortens it."""
    commit = record["commit"]
    if re.fullmatch("[0-9a-f]{40}", commit):
        commit = commit[:7]
    return (
        f"{record['world_size']} × {record['gpu']}, torch {record['torch']} (CUDA {record['cuda']}), Triton {record['triton']}, "
        f"{record['date']}, commit {commit}"
    )


def names(presets: list[str]) -> str:
    """A list in words."""
    return presets[0] if len(presets) == 1 else f"{', '.join(presets[:-1])} and {presets[-1]}" if presets else "none"


def misses(records: list[dict], kind: str, tokens: range) -> Iterator[tuple[dict, float, float]]:
    """The records that miss goals of a kind, with what was found and the most that it should be."""
    for record in records:
        yield from (
            (record, found, most)
            for name, found, most in goals(record)
            if name == kind and record["tokens"] in tokens and found > most
        )


def over(excess: float, least: float, form: str, unit: str = "") -> str:
    """By how much a goal is missed; what the form would round to nothing is said to be less than `least`."""
    return f"{excess:{form}}{unit}" if excess >= least else f"less than {least:{form}}{unit}"


def reached(records: list[dict], kind: str, tokens: range) -> str:
    """How many of the rows reach their goal of a kind."""
    held = [found <= most for r in records if r["tokens"] in tokens for name, found, most in goals(r) if name == kind]
    return f"{sum(held)} of {len(held)} rows"


def wrapped(words: str) -> str:
    """A paragraph, or a point of a list, in lines."""
    return textwrap.fill(words, width=130, subsequent_indent="  " if words.startswith("- ") else "", break_on_hyphens=False)


def few_rows(records: list[dict]) -> str:
    """On the goals of few tokens."""
    few = range(FEW + 1)
    by = [
        f"{r['preset']} at T = {r['tokens']} by {over(found - most, 1, '.0f', ' µs')}"
        for r, found, most in misses(records, "floor", few)
    ]
    below = sum(record["total_us"] < record["floor_us"] for record in records)
    return wrapped(
        f"- **T ≤ 32**: {reached(records, 'floor', few)} are within 1.02 × floor + 12 µs (mixtral-8x7b at T = 32: 1.10)"
        f"{'; short of it are ' + names(by) if by else ''}. {below} rows of the table lie below their floor: their experts read "
        "faster than the sum by which the reading rate is measured."
    )


def goals_beside_floors(records: list[dict]) -> Iterator[str]:
    """The goals in microseconds, each beside its forms that go with the floor of the run."""
    mine = [record for record in records if (record["preset"], record["tokens"]) in TOTALS]
    yield wrapped(
        "Goals in microseconds were set by the floors of one run on H100s. Beside each stand two forms that go with the floor of "
        "this run: the same goal moved by what the floor is above or below that one, and 1.02 × floor + 12 µs. What is "
        "missed says by how much."
    )
    yield ""
    yield "| preset | T | total | goal | floor here | floor then | goal, moved with the floor | 1.02 × floor + 12 |"
    yield "|---" * 8 + "|"
    for record in mine:
        at = record["preset"], record["tokens"]
        then = FLOORS_WHEN_SET.get(at)
        floors = f"{record['floor_us']:.1f} | {'–' if then is None else then}"
        limits = (TOTALS[at], moved_total(record), few_limit(record))
        goal, moved, relative = (judged(record["total_us"], limit) for limit in limits)
        yield f"| {at[0]} | {at[1]} | {record['total_us']:.1f} | {goal} | {floors} | {moved} | {relative} |"


def judged(found: float, most: float | None) -> str:
    """A goal in microseconds, and whether it is reached."""
    if most is None:
        return "–"
    return f"{most:.1f}: {'reached' if found <= most else over(found - most, 0.1, '+.1f')}"


def many_rows(records: list[dict]) -> Iterator[str]:
    """On the goals of 512 tokens and of the most."""
    for tokens, kind, whose in ((512, "floor", "the layer"), (MANY, "experts", "the experts")):
        at = range(tokens, tokens + 1)
        by = [f"{r['preset']} by {over(found / most - 1, 0.01, '.0%')}" for r, found, most in misses(records, kind, at)]
        told = f"; short of it are {names(by)}" if by else ""
        yield wrapped(f"- **T = {tokens}**: {reached(records, kind, at)} reach their goal for {whose}{told}.")


def against_rivals(records: list[dict]) -> str:
    """On the goal that no rival of the run is faster."""
    pairs = [(r, name, r["total_us"] / r[f"{name}_us"]) for r in records for name in RIVALS if r.get(f"{name}_us")]
    by = [f"{r['preset']} at T = {r['tokens']} takes {ratio - 1:.1%} longer than {name}" for r, name, ratio in pairs if ratio > 1]
    if not by:
        return wrapped(f"- **The layer is never slower** than a rival of the same run, in {len(pairs)} comparisons.")
    return wrapped(
        f"- The layer is no slower than its rivals in {len(pairs) - len(by)} of {len(pairs)} comparisons: {names(by)}."
    )


FLOAT8_COLUMNS = {
    "same": "float8 weights, bfloat16 rows",
    "fp8_block128": "float8 weights, `fp8_block128` rows",
    "fp8_block128_both": "float8 weights, `fp8_block128` rows and float8 terms",
}
"""By how rows and terms travel. Runs of 2026-11-26 had no float8 terms."""


FLOAT8_HEAD = wrapped(
    "The layer with float8 weights: rows in bfloat16, which the experts quantize, beside rows that their sender quantizes "
    "([formats.md](formats.md)), as `tokenferry bench layer --float8` measures it; every output compared with float32 products "
    "of what weights and rows stand for."
)


def float8_tables(records: list[dict], name: str) -> Iterator[str]:
    """Of one file: where it was measured, and a table for each preset."""
    yield ""
    yield wrapped(f"{run_of(records[0])}, p2p, C = {records[0]['capacity']}, `{name}`, µs:")
    for preset in dict.fromkeys(record["preset"] for record in records):
        mine = [record for record in records if record["preset"] == preset]
        yield from ("", f"| {preset} | {' | '.join('T = ' + str(r['tokens']) for r in mine)} |", "|---" * (len(mine) + 1) + "|")
        columns = {"bfloat16 weights": [r["bfloat16_us"] for r in mine]}
        columns |= {title: [r[way]["total_us"] for r in mine] for way, title in FLOAT8_COLUMNS.items() if way in mine[0]}
        for title, values in columns.items():
            yield f"| {title} | {' | '.join(f'{value:.1f}' for value in values)} |"


def float8_goals(records: list[dict]) -> Iterator[str]:
    """On the goals that float8 weights are faster than bfloat16 ones, and from FEW tokens on float8 rows than bfloat16 ones."""
    weights = {f"{r['preset']} at T = {r['tokens']}": r["same"]["total_us"] / r["bfloat16_us"] for r in records}
    rows = {
        f"{r['preset']} at T = {r['tokens']}": r["fp8_block128"]["total_us"] / r["same"]["total_us"]
        for r in records
        if r["tokens"] >= FEW
    }
    for which, ratios in (
        ("Float8 weights are faster than bfloat16 ones", weights),
        (f"From T = {FEW} on rows that travel in float8 are faster than rows that the experts quantize", rows),
    ):
        slower = [f"{point} takes {ratio - 1:.1%} longer" for point, ratio in ratios.items() if ratio > 1]
        told = f": {names(slower)}" if slower else ""
        yield wrapped(f"- {which} in {len(ratios) - len(slower)} of {len(ratios)} columns{told}.")


def left_out(records: list[dict]) -> Iterator[str]:
    """What was to be measured in the run and was not."""
    told = [
        f"{r['preset']}{' in float8' if r.get('float8') else ''} at T = {', '.join(map(str, r['left_out']))}"
        for r in records
        if "left_out" in r
    ]
    if told:
        yield wrapped(f"- **Left out**, since the time on the GPUs ended: {names(told)}.")


def text(layer_path: Path, float8_paths: list[Path]) -> str:
    """What stands between the marks."""
    records = read([layer_path])
    first, picture = records[0], layer_path.with_suffix(".png").name
    head = wrapped(
        f"{run_of(first)}, one run, `benchmarks/results/{layer_path.name}`; workspaces opened for {first['capacity']} rows, "
        f"microseconds. Reading goes at {first['read_gb_per_s']:.0f} GB/s here, and dense products at {first['gemm_tflops']:.0f} "
        f"TFLOP/s. The factor of the experts is that over their own floor, at T = {MANY} with one write and one read of each "
        "pair's activated and output row on top. The last column has the goals that a row misses, and by how much "
        "(`benchmarks/layer_table.py` has all goals)."
    )
    lines = [head, "", *table(records), "", f"![stages](../benchmarks/results/{picture})", "", "Goals that were reached:", ""]
    lines += [*summary(records), "", against_rivals(records), few_rows(records), *many_rows(records)]
    lines += [*left_out(lines_of(layer_path)), "", *goals_beside_floors(records)]
    found = {path: [r for r in lines_of(path) if "bfloat16_us" in r] for path in (layer_path, *float8_paths)}
    if any(found.values()):
        lines += ["", "### Float8 weights", "", FLOAT8_HEAD]
        lines += [line for path, quantized in found.items() if quantized for line in float8_tables(quantized, path.name)]
        lines += ["", *float8_goals([r for quantized in found.values() for r in quantized])]
    return "\n".join(lines)


def lines_of(path: Path) -> list[dict]:
    """All records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layer", type=Path)
    parser.add_argument("float8", type=Path, nargs="*")
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    before, _, rest = given.docs.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{given.docs} must have a line {BEGIN!r}, and after it a line {END!r}")
    given.docs.write_text(f"{before}{BEGIN}\n\n{text(given.layer, given.float8)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
