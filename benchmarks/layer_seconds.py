"""Where the seconds of a run of `tokenferry bench layer` went: python benchmarks/layer_seconds.py RUN.jsonl"""

import json
import sys
from collections import Counter
from pathlib import Path


def seconds(path: Path) -> dict[str, Counter[str]]:
    """By preset ("float8" behind it for float8 weights), and then by part."""
    found: dict[str, Counter[str]] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        name = record["preset"] + " float8" * bool(record.get("float8"))
        found.setdefault(name, Counter()).update(record.get("seconds", {}))
    return found


def main() -> None:
    total: Counter[str] = Counter()
    for name, parts in seconds(Path(sys.argv[1])).items():
        total.update(parts)
        print(f"{name}: {parts.total():.1f} s:", ", ".join(f"{part} {spent:.1f}" for part, spent in parts.items()))
    print(f"all: {total.total():.1f} s:", ", ".join(f"{part} {spent:.1f}" for part, spent in total.items()))


if __name__ == "__main__":
    main()
