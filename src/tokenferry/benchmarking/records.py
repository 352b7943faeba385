"""Where the records of a measurement go: a file of JSON lines, named before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenferry.errors import ConfigError

Record = dict[str, Any]
"""One line of a file of results: what was measured, the figures, the environment."""


def check_output(path: Path | None) -> None:
    """Makes the folder of the file for the records. The file itself, if there is one, keeps what it holds.

    Raises:
        ConfigError: it cannot be written, which is better known before the measurements than after them.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}; name a file in a folder of yours") from error


def write_records(records: Sequence[Mapping[str, Any]], path: Path, *, commit: str = "unknown") -> None:
    """Replaces the file by one JSON object a line, each with the commit of the code that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(as_line({**record, "commit": commit}) for record in records))


def append_record(record: Mapping[str, Any], path: Path) -> None:
    """Adds a line at once, so that a run that is stopped leaves what it measured."""
    with path.open("a") as file:
        file.write(as_line(record))


def as_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(record) + "\n"
