"""Writes the report: one page that needs no network and no script, and its pictures as files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenferry.errors import ConfigError
from tokenferry.inspection.findings import Findings
from tokenferry.inspection.pictures import DPI, draw_all, svg_of
from tokenferry.telemetry.snapshot import in_words

TITLES = {
    "loads": "Layers and experts: how many rows came for each expert; white lines lie between ranks",
    "tokens": "Rows that each rank brought to its last steps",
    "waits": "How long each rank waited for each other",
    "imbalance": "Rows of the fullest rank and of the fullest expert over the mean, by layer",
}


def write_report(findings: Findings, folder: Path, about: dict[str, str]) -> list[Path]:
    """Writes `report.html` and the PNGs into `folder`, which is made if need be. Returns the paths, the page first.

    Args:
        about: lines on the run, by name.

    Raises:
        ConfigError: matplotlib or jinja2 is not installed, or the folder cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError("the report needs jinja2; pip install 'tokenferry[inspect]'") from error
    make_folder(folder)
    figures = draw_all(findings)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["in_words"] = in_words
    pictures = [{"name": name, "title": TITLES[name], "svg": svg_of(figure, name)} for name, figure in figures.items()]
    page = environment.get_template("report.html.jinja").render(findings=findings, about=about, pictures=pictures)
    try:
        paths = [folder / "report.html"]
        paths[0].write_text(page, encoding="utf-8")
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI)
    except OSError as error:
        raise ConfigError(_unwritable(folder, error)) from error
    return paths


def make_folder(folder: Path) -> None:
    """Makes the folder for the report if need be, which is better tried before a run than after it.

    Raises:
        ConfigError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(_unwritable(folder, error)) from error


def _unwritable(folder: Path, error: OSError) -> str:
    return f"the report cannot be written to {folder}: {error.strerror or error}; give --output a folder of yours"


def summary(findings: Findings) -> list[str]:
    """What the terminal shows, in lines."""
    snapshots = findings.snapshots
    worst = max(range(len(findings.rank_imbalance)), key=lambda layer: findings.rank_imbalance[layer])
    lines = [
        f"{len(snapshots)} ranks, {snapshots[0].num_steps} steps, {snapshots[0].num_rounds} rounds in "
        f"{len(findings.loads)} layers, {sum(snapshots[0].rows)} rows",
        f"fullest rank: {findings.rank_imbalance[worst]:.2f} times the mean, in layer {worst}; fullest expert: "
        f"{max(findings.expert_imbalance):.2f} times the mean",
    ]
    for rank, (row, reading) in enumerate(zip(findings.waits_ns, findings.readings, strict=True)):
        if len(row) > 1:
            lines.append(f"rank {rank} waited {in_words(sum(row))}; as it saw it, {reading or 'no step was counted'}")
    return [*lines, findings.verdict.sentence, *findings.notes]


__all__: list[Any] = ["make_folder", "summary", "write_report"]
