"""The entry point of the command `tokenferry`: outside the package, because importing that already loads torch.

Ctrl-C in those first seconds is a line and exit code 2, as it is later.
"""

import sys


def run() -> None:
    """Loads the command line and runs it."""
    try:
        from tokenferry.cli.main import run as run_command_line
    except KeyboardInterrupt:
        sys.stderr.write("tokenferry: interrupted\n")
        sys.exit(2)
    run_command_line()
