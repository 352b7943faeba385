"""The entry point of the command `tokenferry`, outside the package: Ctrl-C is a line and exit code 2 from the first moment on."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


def run() -> None:
    """Loads the command line and runs it. Its packages are an extra, which programs that only use the library do without."""
    with loading():
        try:
            from tokenferry.cli.main import run as run_command_line
        except ModuleNotFoundError as error:
            if error.name not in ("typer", "rich"):
                raise
            command = "pip install 'tokenferry[cli]'"
            sys.stderr.write(
                f"tokenferry: the command line needs the package {error.name}, which is not installed; run: {command}\n"
            )
            raise SystemExit(2) from None
    run_command_line()


@contextmanager
def loading() -> Iterator[None]:
    """Around imports that bring torch: Ctrl-C ends the process where it stands; nothing is open yet.

    Not by an exception: one that is raised while torch's C++ code calls Python ends in `std::terminate`, a dump and SIGABRT.
    """
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it is not behind nohup, for one
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"tokenferry: interrupted\n")
    os._exit(2)
