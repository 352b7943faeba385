"""Puts the figures of published records into the pages that are committed, and draws their pictures: `make figures`.

python docs/generate/figures.py [--round-trips FILE.jsonl] [--layers FILE.jsonl] [--models FILE.jsonl]

An option publishes another file of benchmarks/results from now on. README.md, docs/which-transport.md, docs/symmetric.md,
docs/layer.md and docs/pictures are made anew; docs/performance.md is filled when the site is built. Tests compare.
"""

import argparse
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import draw
import published
import round_trips as trips
from result_files import RESULTS, first_of, machine, records, rounded, short, source, table

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- measured: round trips, by docs/generate/figures.py -->", "<!-- measured: end -->"
QWEN = "qwen3-30b-a3b"


def wrapped(words: str, width: int = 120) -> str:
    return textwrap.fill(words, width=width, break_on_hyphens=False, break_long_words=False)


def verdict(us: float, goal_us: float) -> str:
    excess = us / goal_us - 1
    if excess <= 0:
        return "reached"
    return "missed by less than 1 %" if excess < 0.005 else f"missed by {excess * 100:.0f} %"


def round_trip_rows() -> list[list[str]]:
    """The rows of docs/symmetric.md's table."""
    rows = []
    for hidden_size in trips.hidden_sizes():
        curves, nccl = trips.curves(hidden_size), trips.faster_of_nccl(hidden_size)
        exact, goals = curves.get(trips.EXACT, {}), trips.GOALS_US.get(hidden_size, {})
        for count, us in sorted(curves[trips.P2P].items()):
            goal = goals.get(count)
            judged = ["–", "–"] if goal is None else [f"{goal:g}", verdict(us, goal)]
            rows.append([hidden_size, count, us, exact.get(count), nccl.get(count), *judged])
        if (found := trips.uneven(hidden_size)) is not None:
            (few, many), us = found
            even, factor = curves[trips.P2P][many], trips.UNEVEN_FACTOR
            judged = [f"{factor} × {even:.1f}", verdict(us, factor * even)]
            rows.append([hidden_size, f"{few} and {many}", us, None, None, *judged])
    return [
        [str(size), str(tokens), cell(us, 2), *([cell(exact_us, 2)] if trips.capacity() else []), cell(nccl_us, 1), *judged]
        for size, tokens, us, exact_us, nccl_us, *judged in rows
    ]


def cell(us: float | None, digits: int) -> str:
    return "–" if us is None else f"{us:.{digits}f}"


def above_exact() -> str:
    """What a workspace as engines open it costs, beside one of C = T."""
    above = [
        round(us - curves[trips.EXACT][count], 2)
        for curves in map(trips.curves, trips.hidden_sizes())
        for count, us in curves[trips.P2P].items()
        if count <= trips.FEW and count in curves.get(trips.EXACT, {})
    ]
    held = sum(each <= trips.MOST_ABOVE_EXACT_US for each in above)
    return (
        f"Up to T = {trips.FEW} a workspace of C = {trips.capacity()} takes {min(above):.2f} to {max(above):.2f} µs more than "
        f"one of C = T. The goal is {trips.MOST_ABOVE_EXACT_US} at most, which {held} of {len(above)} points reach. "
        + middle_goal()
    )


def middle_goal() -> str:
    """The goal that is of workspaces as engines open them alone."""
    (hidden_size, count), goal = trips.MIDDLE_POINT, trips.MIDDLE_GOAL_US
    us = trips.curves(hidden_size)[trips.P2P][count]
    return f"At H {hidden_size} and T = {count}, where the goal for them is {goal} µs, it takes {us:.1f}: {verdict(us, goal)}."


def symmetric_page(page: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"docs/symmetric.md must have a line {BEGIN!r}, and after it a line {END!r}")
    copied = sorted({f"{record['copy_gb_per_s']:.0f}" for record in trips.all_points()}, key=int)
    rate = copied[0] if len(copied) == 1 else f"{copied[0]} to {copied[-1]}"
    exact = ["p2p, C = T, µs"] if trips.capacity() else []
    head = ["H", "T", f"p2p, {trips.in_workspaces()}, µs", *exact, "NCCL, µs", "goal", "result"]
    parts = [
        wrapped(f"{source(published.ROUND_TRIPS)} A plain copy to the peer ran at {rate} GB/s."),
        table(head, round_trip_rows()),
        *([wrapped(above_exact())] if trips.capacity() else []),
        "![round trips](pictures/round-trips.svg)",
    ]
    return f"{before}{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}{after}"


def layer_figures(key: str) -> dict[int, float]:
    """µs of qwen3-30b-a3b's layer, by tokens per rank."""
    mine = [record for record in records(published.LAYERS) if record.get("preset") == QWEN and record.get(key)]
    return {record["tokens"]: record[key] for record in mine}


def readme_lines() -> dict[str, str]:
    """Lines of README.md by how they begin."""

    def listed(curve: dict[int, float]) -> str:
        return ", ".join(rounded(us) for _, us in sorted(curve.items()))

    ours, nccl = trips.curves(trips.MAIN_SIZE)[trips.P2P], trips.faster_of_nccl(trips.MAIN_SIZE)
    layer = layer_figures("total_us")
    trip, whole = f"round trip (dispatch + combine), hidden size {trips.MAIN_SIZE}", f"layer of {QWEN}"
    at = f"{', '.join(map(str, sorted(ours)))} tokens per rank"
    at_layer = f"{', '.join(map(str, sorted(layer)))} tokens per rank"
    other = "the same, with transformers' `grouped_mm` experts in the place of ours ²"
    return {
        "| round trip": f"| {trip}, {trips.in_workspaces()}, µs; NCCL, the faster of its two orders of summation ¹ | {at} | "
        f"{listed(ours)} | {listed(nccl)} |",
        "| layer of": f"| {whole}, µs; the same layer over NCCL ² | {at_layer} | {listed(layer)} | "
        f"{listed(layer_figures('collective_us'))} |",
        "| the same, with": f"| {other} | the same | the same | {listed(layer_figures('grouped_mm_us'))} |",
        "¹ ": footnote("¹", published.ROUND_TRIPS, "top-8, bfloat16"),
        "² ": footnote("²", published.LAYERS, f"bfloat16, C = {first_of(published.LAYERS)['capacity']}"),
    }


def footnote(mark: str, name: str, how: str) -> str:
    first = first_of(name)
    commit = short(first["commit"])
    return f"{mark} {machine(name)}, {how}, slower rank, {first['date']}, commit {commit}: `benchmarks/results/{name}`."


def readme(page: str) -> str:
    lines = page.split("\n")
    for start, line in readme_lines().items():
        places = [place for place, old in enumerate(lines) if old.startswith(start)]
        if len(places) != 1:
            raise SystemExit(f"README.md has {len(places)} lines that begin with {start!r}; it must have one")
        lines[places[0]] = line
    return "\n".join(lines)


def transports_page(page: str) -> str:
    curves = {"`p2p`": trips.curves(trips.MAIN_SIZE)[trips.P2P], "`collective` on GPUs": trips.faster_of_nccl(trips.MAIN_SIZE)}
    for name, curve in curves.items():
        cell = f"{rounded(curve[8])} and {rounded(curve[4096])} µs"
        page, num = re.subn(rf"^(\| {re.escape(name)} \|.*\| )[^|]*( \|)$", rf"\g<1>{cell}\g<2>", page, flags=re.MULTILINE)
        if num != 1:
            raise SystemExit(f"docs/which-transport.md has {num} rows of {name}; it must have one")
    where = f"on {machine(published.ROUND_TRIPS)}, {trips.in_workspaces()}, hidden size"
    return re.sub(r"on \d × H\d+, (C = \w+, )?hidden size", where, page)


PAGES: dict[str, Callable[[str], str]] = {
    "README.md": readme,
    "docs/symmetric.md": symmetric_page,
    "docs/which-transport.md": transports_page,
}


def publish(**names: str | None) -> None:
    """Other files from now on."""
    path = Path(published.__file__)
    text = path.read_text()
    for constant, name in names.items():
        if name is not None:
            text = re.sub(rf'^{constant} = ".*"$', f'{constant} = "{Path(name).name}"', text, flags=re.MULTILINE)
            setattr(published, constant, Path(name).name)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--round-trips", "--layers", "--models"):
        parser.add_argument(option)
    given = parser.parse_args()
    publish(ROUND_TRIPS=given.round_trips, LAYERS=given.layers, MODELS=given.models)
    for name, made in PAGES.items():
        (ROOT / name).write_text(made((ROOT / name).read_text()))
    draw.main()
    if given.layers is not None:
        script = ROOT / "benchmarks" / "layer_docs.py"
        subprocess.run([sys.executable, script, RESULTS / published.LAYERS], check=True, timeout=60)


if __name__ == "__main__":
    main()
