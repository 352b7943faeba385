"""Whether the files of a checkpoint are what their names say, before anything is loaded from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tokenferry.errors import ConfigError

INDEX: Final = "model.safetensors.index.json"
LARGEST_HEADER: Final = 100_000_000
"""safetensors refuses more."""
TEXT_BYTES: Final = 60


def check_files(folder: Path) -> None:
    """Looks at the first bytes and the size of every safetensors file that the checkpoint in `folder` consists of.

    A folder without safetensors, and what is no folder, passes: transformers knows more places to look for files.

    Raises:
        ConfigError: a file is lacking, cut off, or no safetensors file; the message names it and says what it seems to be.
    """
    if not folder.is_dir():
        return
    for path in _files(folder):
        reason = what_is_wrong(path)
        if reason is not None:
            raise ConfigError(_message(path, reason))


def unreadable(path: str | Path, error: Exception) -> ConfigError:
    """What to raise where safetensors could not open `path`: its own texts do not name the file."""
    return ConfigError(_message(Path(path), what_is_wrong(Path(path)) or f"cannot be read: {error}"))


def num_bytes_of_dtypes(folder: Path) -> Counter[str]:
    """How many bytes of each dtype the safetensors files of the checkpoint in `folder` hold, by safetensors' names; none of what
    is no folder. The files are whole: `check_files` has looked at them."""
    sizes = Counter[str]()
    for path in _files(folder) if folder.is_dir() else []:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[entry["dtype"]] += end - begin
    return sizes


def what_is_wrong(path: Path) -> str | None:
    """Why `path` is no whole safetensors file, or None if its sizes fit together.

    Example:
        A file of 900 bytes whose header speaks of tensors up to byte 1200: "is cut off: 900 bytes of 1200".
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(1024)
            if text := _as_text(start):
                return f"is no safetensors file but {text}"
            if num_bytes < 8:
                return f"is cut off: it has {num_bytes} bytes"
            header_bytes = int.from_bytes(start[:8], "little")
            if header_bytes > LARGEST_HEADER:
                return "is no safetensors file: it does not begin with the size of a header"
            if num_bytes < 8 + header_bytes:
                return f"is cut off: {num_bytes} bytes, of which the header alone needs {8 + header_bytes}"
            file.seek(8)
            needed = 8 + header_bytes + _end_of_tensors(file.read(header_bytes))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is no safetensors file: its header is not one"
    return None if num_bytes >= needed else f"is cut off: {num_bytes} bytes of {needed}"


def _files(folder: Path) -> Iterable[Path]:
    index = folder / INDEX
    if not index.exists():
        return [path for path in [folder / "model.safetensors"] if path.exists()]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except OSError as error:
        raise ConfigError(_message(index, f"cannot be read: {error.strerror}")) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(_message(index, "is no table of a checkpoint's files")) from error
    paths = [folder / name for name in names]
    for path in paths:
        if not path.exists():
            raise ConfigError(_message(path, f"is lacking, and {INDEX} lists it"))
    return paths


def _as_text(start: bytes) -> str | None:
    """What a file that begins with text seems to be; the first 8 bytes of a safetensors file are a number with zeros in it."""
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (`git lfs pull` fetches what it points to)"
    if b"\0" in start:
        return None
    try:
        text = start.decode()
    except UnicodeDecodeError:
        return None
    line = text.split("\n", 1)[0][:TEXT_BYTES]
    return f"text that begins {line!r}, as a pointer to a file that was never fetched or a saved error page does"


def _end_of_tensors(header: bytes) -> int:
    tensors = json.loads(header)
    return max((int(entry["data_offsets"][1]) for name, entry in tensors.items() if name != "__metadata__"), default=0)


def _message(path: Path, reason: str) -> str:
    return f"checkpoint file {path} {reason}; fetch it again"
