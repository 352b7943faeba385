"""The entry point of the command `tokenferry`: outside the package, because importing that already loads torch.

Ctrl-C in those first seconds is a line and exit code 2, as it is later.
"""

import os
import signal
from types import FrameType
from typing import NoReturn


def run() -> None:
    """Loads the command line and runs it."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it is not behind nohup, for one
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    from tokenferry.cli.main import run as run_command_line

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command_line()


def _leave(signal_number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process where it stands; nothing is open yet.

    Not by an exception: one that is raised while torch's C++ code calls Python ends in `std::terminate`, a dump and SIGABRT.
    """
    os.write(2, b"tokenferry: interrupted\n")
    os._exit(2)
