"""The drawings of the site: what moves in a layer, a step's time line, and what lies in a symmetric buffer.

All show the worked example of docs/concepts.md: two ranks with 3 and 2 tokens, four experts, two of them on each rank, top-2.
"""

from drawing import COLOURS, box, line, picture, text

TOKENS = (3, 2)
CHOICES = (((0, 2), (1, 3), (0, 1)), ((2, 3), (1, 2)))
"""The two experts of each token of each rank."""
EXPERTS = ((0, 1), (2, 3))
GREY = "#555555"
NAMES = tuple((rank, f"{'ab'[rank]}{number}") for rank, count in enumerate(TOKENS) for number in range(count))


def data_flow() -> str:
    """Own rows, all rows on every rank, the experts' partial rows, and the sums at the owners."""
    parts = [text(x, 22, title, bold=True) for x, title in ((20, "own tokens"), (185, "after dispatch"), (400, "partial rows"))]
    parts += [text(600, 22, "after combine", bold=True)]
    for rank in range(2):
        top = 40 + 180 * rank
        parts += [text(20, top + 12, f"rank {rank}"), text(185, top + 12, f"rank {rank}: experts {EXPERTS[rank]}")]
        for row, name in enumerate(name for owner, name in NAMES if owner == rank):
            parts += _row(20, top + 20 + 24 * row, rank, name) + _row(600, top + 20 + 24 * row, rank, f"Σ {name}")
        chosen = [choice for choices in CHOICES for choice in choices]
        for row, ((owner, name), choice) in enumerate(zip(NAMES, chosen, strict=True)):
            is_used = any(expert in EXPERTS[rank] for expert in choice)
            mine = [str(expert) for expert in choice if expert in EXPERTS[rank]]
            label = f"{' + '.join(f'e{expert}' for expert in mine)} of {name}" if is_used else "0"
            parts += _row(185, top + 20 + 24 * row, owner, f"{name} → {choice[0]}, {choice[1]}", faint=not is_used, width=130)
            parts += _row(400, top + 20 + 24 * row, owner, label, faint=not is_used, width=130)
        for other in range(2):
            there = 40 + 180 * other + 70
            parts += [
                line([(122, top + 60), (180, there)], GREY, arrow=True),
                line([(535, there), (595, top + 60)], GREY, arrow=True),
            ]
        parts += [line([(320, top + 70), (395, top + 70)], GREY, arrow=True), text(357, top + 62, "experts", anchor="middle")]
    return picture(720, 390, parts)


def _row(x: int, y: int, owner: int, label: str, *, faint: bool = False, width: int = 96) -> list[str]:
    return [box(x, y, width, 22, COLOURS[owner], opacity=0.1 if faint else 0.35), text(x + 6, y + 15, label, size=12)]


def time_line() -> str:
    """What a rank calls in a forward of two layers, and where it meets the others."""
    widths = (("begin_step", 80, 0), ("dispatch", 80, 1), ("experts", 110, 2), ("combine", 80, 1), ("attention", 90, 2))
    parts = []
    for rank in range(2):
        x, y = 70, 34 + 60 * rank
        parts.append(text(8, y + 20, f"rank {rank}"))
        for name, width, colour in (*widths, *widths[1:4]):
            parts += [
                box(x, y, width, 30, COLOURS[colour], opacity=0.3),
                text(x + width / 2, y + 20, name, anchor="middle", size=12),
            ]
            x += width
    parts += [text(150, 22, "first MoE layer"), text(510, 22, "second MoE layer")]
    parts += [text(70, 170, "The ranks meet in begin_step, dispatch and combine. What lies between needs no other rank.")]
    return picture(800, 186, parts)


def buffer_layout() -> str:
    """The regions of a rank's symmetric buffer, in the order of use; sizes are not to scale."""
    regions = (
        ("control block", "counters, time-outs, abort record", 0),
        ("counts", "a packet of 16 bytes from each peer, for two steps", 0),
        ("flags", "one a program and peer: large steps", 0),
        ("dispatch slots", "packets of small steps from each peer", 1),
        ("gathered rows", "hidden [R, H], expert numbers and weights [R, K]; R = C · EP", 1),
        ("combine slots", "terms of small steps from each peer", 2),
        ("combine input", "[R, H] partial rows, which the experts write", 2),
    )
    parts = []
    for row, (name, what, colour) in enumerate(regions):
        y = 10 + 34 * row
        parts += [box(10, y, 150, 30, COLOURS[colour], opacity=0.3), text(20, y + 20, name), text(175, y + 20, what)]
    return picture(680, 20 + 34 * len(regions), parts)


ALL = {"data-flow.svg": data_flow, "time-line.svg": time_line, "buffer-layout.svg": buffer_layout}
