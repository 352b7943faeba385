"""A few shapes as SVG text, enough for the site's pictures."""

from collections.abc import Iterable

COLOURS = ("#3367d6", "#e37400", "#188038", "#a142f4")
"""One for each rank, or each curve."""


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-family="sans-serif" font-size="{size}"{weight}>{escaped}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "#ffffff", opacity: float = 1.0) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}" fill-opacity="{opacity}"/>'


def line(points: Iterable[tuple[float, float]], colour: str, *, dashed: bool = False, arrow: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = (' stroke-dasharray="5 4"' if dashed else "") + (' marker-end="url(#tip)"' if arrow else "")
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{style}/>'


def picture(width: int, height: int, parts: Iterable[str]) -> str:
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#555555"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return head + tip + box(0, 0, width, height, "#ffffff") + "".join(parts) + "</svg>\n"
