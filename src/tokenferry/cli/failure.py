"""Errors as a user of the command line wants them: one clear line on stderr, and exit code 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import typer

from tokenferry import env
from tokenferry.errors import ConfigError, RankFailedError, TokenferryError

EXIT_CODE: Final = 2
UNAVAILABLE: Final = re.compile(
    r"transport '(?P<name>\w+)' cannot serve this group:(?:\n  .*)*\n  (?P=name): rejected, (?P<why>.*)(?:\n  .*)*"
)
"""The message of a transport that cannot serve the group. It lists the reasons for all candidates; only one was asked for."""
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
    typer.echo(f"tokenferry: {one_line(message)}", err=True)
    raise typer.Exit(EXIT_CODE)


def one_line(message: str) -> str:
    """`message`, where a transport was asked for by name without the candidates that were not.

    Example:
        "transport 'nvls' cannot serve this group:\\n  p2p: accepted, 2 GPUs\\n  nvls: rejected, no multicast" gives
        "transport 'nvls' cannot serve this group: no multicast (`tokenferry doctor` shows them all)".
    """
    shorter = r"transport '\g<name>' cannot serve this group: \g<why> (`tokenferry doctor` shows them all)"
    return UNAVAILABLE.sub(shorter, message)


def _wants_traceback() -> bool:
    try:
        return env.read(env.DebugSettings).enabled
    except ConfigError:  # the rank has failed with the same, and its line follows
        return False


def summary(traceback: str) -> str:
    """A traceback in one line: the message of an error of ours, the type and message of another, or the text if it is none.

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
