"""Where the records of a measurement go: a file of JSON lines, named before anything is measured."""

from __future__ import annotations

from pathlib import Path

from tokenferry.errors import ConfigError


def check_output(path: Path | None) -> None:
    """Makes the folder of the file for the records.

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
