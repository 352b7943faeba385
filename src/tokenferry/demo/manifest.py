"""A checkpoint folder's manifest: size and hash of each file, so that a damaged cache is noticed before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
"""Raised whenever a checkpoint would be made differently; folders of another format are left alone."""
FILE_NAME: Final = "manifest.json"


def write(folder: Path) -> None:
    """Record size and SHA-256 of every file in `folder`."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / FILE_NAME).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def damage(folder: Path) -> str | None:
    """Why the folder cannot be used ("not there yet", "config.json has 12 bytes instead of 700", ...), or None if it can."""
    if not folder.is_dir():
        return "not there yet"
    try:
        expected = json.loads((folder / FILE_NAME).read_text())
        if expected["format"] != FORMAT:
            return f"format {expected['format']} instead of {FORMAT}"
        return next((reason for name, file in expected["files"].items() if (reason := _damage_of(folder / name, file))), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILE_NAME} cannot be read: {error}"


def _damage_of(path: Path, expected: dict[str, Any]) -> str | None:
    num_bytes = path.stat().st_size
    if num_bytes != expected["bytes"]:
        return f"{path.name} has {num_bytes} bytes instead of {expected['bytes']}"
    if _sha256(path) != expected["sha256"]:
        return f"{path.name} has other contents than were written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
