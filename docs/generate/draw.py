"""Writes the site's pictures to docs/pictures; `make figures` does it too. A test compares them with what is committed."""

from pathlib import Path

import performance
import pictures

FOLDER = Path(__file__).parents[1] / "pictures"
DRAWINGS = {**pictures.ALL, "round-trips.svg": performance.round_trip_picture}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw())


if __name__ == "__main__":
    main()
