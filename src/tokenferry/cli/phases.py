"""What a rank is doing while it loads, told as messages, as the library's logger of its progress says it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tokenferry.lifecycle import PROGRESS


class _Teller(logging.Handler):
    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send({"phase": record.getMessage()})


@contextmanager
def telling_phases(send: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within it, what the library begins to do is sent as `{"phase": ...}`: above all that it loads kernels, which may take a
    minute where no cache has them."""
    logger, teller = logging.getLogger(PROGRESS), _Teller(send)
    level = logger.level
    logger.addHandler(teller)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(teller)


__all__ = ["telling_phases"]
