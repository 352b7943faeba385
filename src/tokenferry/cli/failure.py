"""Errors as a person wants them: one clear line on stderr and exit code 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from tokenferry import env
from tokenferry.errors import ConfigError, RankFailedError, TokenferryError

EXIT_CODE: Final = 2
EXCEPTION: Final = re.compile(r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning))\b:? ?", re.MULTILINE)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what a user can cause, and Ctrl-C, into a line on stderr and exit code 2. Our own mistakes keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted")
    except RankFailedError as error:
        if _wants_traceback():
            typer.echo(error.traceback, err=True)
        fail(f"rank {error.rank}: {summary(error.traceback)}")
    except (TokenferryError, OSError) as error:
        fail(str(error))


def fail(message: str) -> None:
    """Print the line and leave."""
    typer.echo(f"tokenferry: {message}", err=True)
    raise typer.Exit(EXIT_CODE)


def _wants_traceback() -> bool:
    try:
        return env.read(env.DebugSettings).enabled
    except ConfigError:  # the rank has failed with the same, and its line follows
        return False


def summary(traceback: str) -> str:
    """What a traceback comes to: the message of an error of ours, the type and message of another, or the text itself.

    Example:
        "Traceback ...\\n  File ...\\ntokenferry.errors.ConfigError: 4 experts are too few\\n" gives "4 experts are too few", and
        "killed by SIGKILL" stays as it is.
    """
    found = list(EXCEPTION.finditer(traceback))
    if not traceback.startswith("Traceback") or not found:
        return traceback.strip()
    kind, message = found[-1]["type"], traceback[found[-1].end() :].strip()
    if kind.startswith("tokenferry."):
        return message
    first_line = message.partition("\n")[0]
    return f"{kind}{': ' if first_line else ''}{first_line} (TOKENFERRY_DEBUG=1 shows where)"
