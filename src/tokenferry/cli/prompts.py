"""The prompts: the demo's own, or those of a file."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Final

from tokenferry.errors import ConfigError

DEFAULT_PROMPTS: Final = (
    "What is the capital of France?",
    "What is photosynthesis?",
    "Give me three tips for sleeping better.",
    "Tell me a short story about a lighthouse keeper and a lost dog who becomes his best friend.",
    "My neighbour wants to grow tomatoes on a small balcony that gets sun only in the morning. Which pots, soil and seeds "
    "should she buy, how often should she water them, and when can she expect the first ripe ones?",
)
"""Questions of different lengths, so that ranks get different numbers of them."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 file.

    In a file named `*.jsonl` each line is an object with one key, `{"prompt": "..."}`. In any other file each line is a prompt.
    Blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, holds no prompt, or has a malformed line (the message gives its number).
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise ConfigError(f"prompts file {path} cannot be read: {error.strerror}") from error
    parse = _parse_json if path.suffix == ".jsonl" else _parse_text
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(parse(line.decode("utf-8").strip()))
        except ValueError as error:
            raise ConfigError(f"prompts file {path}, line {number}: {_reason(error)}") from error
    if not prompts:
        raise ConfigError(f"prompts file {path} holds no prompt; write one on each line")
    return tuple(prompts)


def _parse_text(line: str) -> str:
    if "\0" in line:
        raise ValueError("a NUL byte; this is no text file")
    return line


def _parse_json(line: str) -> str:
    entry = json.loads(line)
    if not isinstance(entry, dict) or set(entry) != {"prompt"} or not isinstance(entry["prompt"], str):
        raise ValueError('each line must be an object like {"prompt": "some text"} with no other key')
    if not entry["prompt"].strip():
        raise ValueError("the prompt is empty")
    return entry["prompt"]


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.object[error.start]:#04x} at column {error.start + 1})"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    return str(error)
