"""What the streams of a command can show: any text in any encoding, and progress for those who watch no terminal."""

from __future__ import annotations

import codecs
import io
import json
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

ERRORS: Final = "tokenferry.plain"
PLAIN: Final = {
    "–": "-", "—": "-", "−": "-", "‑": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "×": "x", "±": "+-",
    "≤": "<=", "≥": ">=", "→": "->", "·": "-", "•": "-", "µ": "u", "\N{NO-BREAK SPACE}": " ",
    "\N{REPLACEMENT CHARACTER}": "?",
}  # fmt: skip
"""Signs that our own texts and models' texts are full of, for outputs whose encoding lacks them."""


def accept_any_text() -> None:
    """From here on this process prints what its output's encoding lacks in other signs, or as an escape, instead of dying of it.

    Without this a model's answer, or a folder's name in `doctor`, ended the command after all its work where the output is ASCII
    (`PYTHONIOENCODING=ascii`, many a log collector, LANG=C without Python's UTF-8 mode).
    """
    codecs.register_error(ERRORS, _in_plain_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def _in_plain_signs(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = [PLAIN.get(sign) or _escape(sign) for sign in error.object[error.start : error.end]]
    return "".join(signs), error.end


def _escape(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode("ascii")


def print_json(console: Console, text: str) -> None:
    """Prints JSON text so that it is still JSON, with the same meaning, where the output's encoding lacks some of its signs."""
    try:
        text.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(json.loads(text), indent=1)
    console.print(text, soft_wrap=True, markup=False)
