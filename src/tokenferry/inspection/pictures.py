"""The report's pictures, drawn by matplotlib: SVG text for the page, and PNG files. No state of pyplot's is touched."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from tokenferry.errors import ConfigError
from tokenferry.inspection.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI: Final = 120
_COLOURS: Final = "viridis"
UNITS: Final = (("s", 1e9), ("ms", 1e6), ("µs", 1e3), ("ns", 1.0))
"""Of time, and how many nanoseconds each is."""


def draw_all(findings: Findings) -> Mapping[str, Figure]:
    """A figure for each picture, by the name that its file has.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the report needs matplotlib; pip install 'tokenferry[inspect]'") from error

    drawn: dict[str, Figure] = {}
    painters: dict[str, tuple[tuple[float, float], Callable[[Any, Findings], None]]] = {
        "loads": ((9.0, 3.6), _paint_loads),
        "tokens": ((9.0, 2.8), _paint_tokens),
        "waits": ((4.8, 4.0), _paint_waits),
        "imbalance": ((9.0, 2.8), _paint_imbalance),
    }
    for name, (size, paint) in painters.items():
        figure = Figure(figsize=size, layout="constrained")
        paint(figure, findings)
        _count_in_whole_numbers(figure)
        drawn[name] = figure
    return drawn


def svg_of(figure: Figure, name: str) -> str:
    """As an element to stand in a page. `name` sets its ids apart from those of the page's other pictures."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    element = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    element = element[element.index("<svg") :]
    element = re.sub(r'\bid="', f'id="{name}-', element)
    return re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", element)


def _count_in_whole_numbers(figure: Figure) -> None:
    """Layers, experts, ranks and steps have no halves."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.axes[0]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.get_ylabel() in ("layer", "rank"):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _paint_loads(figure: Figure, findings: Findings) -> None:
    axes = figure.subplots()
    image = axes.imshow(findings.loads, aspect="auto", interpolation="nearest", cmap=_COLOURS, vmin=0)
    axes.set(title="Rows that came for each expert", xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="rows")
    num_experts, num_ranks = len(findings.loads[0]), len(findings.snapshots)
    begin = 0
    for rank in range(num_ranks - 1):
        begin += num_experts // num_ranks + (rank < num_experts % num_ranks)
        axes.axvline(begin - 0.5, color="white", linewidth=0.8)


def _paint_tokens(figure: Figure, findings: Findings) -> None:
    axes = figure.subplots()
    for snapshot in findings.snapshots:
        axes.step(
            [step for step, _ in snapshot.tokens],
            [number for _, number in snapshot.tokens],
            where="post",
            label=f"rank {snapshot.rank}",
            linewidth=1.0,
        )
    axes.set(title="Rows that each rank brought", xlabel="step", ylabel="rows", yscale="symlog")
    axes.yaxis.set_major_formatter("{x:g}")  # not as powers of ten
    axes.legend(loc="upper right", fontsize="small")


def _paint_waits(figure: Figure, findings: Findings) -> None:
    axes = figure.subplots()
    longest = max(max(row) for row in findings.waits_ns)
    unit, length = next(each for each in UNITS if longest >= each[1] or each is UNITS[-1])
    waits = [[wait / length for wait in row] for row in findings.waits_ns]
    image = axes.imshow(waits, cmap=_COLOURS, vmin=0)
    axes.set(title="Time waited", xlabel="for rank", ylabel="rank")
    figure.colorbar(image, ax=axes, label=unit)
    if len(waits) <= 8:
        for rank, row in enumerate(waits):
            for source, wait in enumerate(row):
                colour = "black" if 2 * wait > longest / length else "white"
                axes.text(source, rank, f"{wait:.3g}", ha="center", va="center", color=colour, fontsize="small")


def _paint_imbalance(figure: Figure, findings: Findings) -> None:
    axes = figure.subplots()
    layers = range(len(findings.rank_imbalance))
    axes.bar([layer - 0.2 for layer in layers], findings.rank_imbalance, width=0.4, label="ranks")
    axes.bar([layer + 0.2 for layer in layers], findings.expert_imbalance, width=0.4, label="experts")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(title="Rows of the fullest over the mean", xlabel="layer", ylabel="max / mean")
    axes.legend(fontsize="small")
