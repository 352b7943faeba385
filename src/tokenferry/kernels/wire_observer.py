"""For tests: who watches what an interpreted rank puts on the wire."""

from __future__ import annotations

import numpy as np


class Observer:
    """Sees the words that an interpreted rank puts on the wire, and may delay them. Subclass it in tests.

    Kinds of events: count, send, poll, restore, signal. `addresses` are int64, one a packet.
    """

    def pieces(self, kind: str, num_packets: int) -> list[np.ndarray]:
        """The order in which the packets of one block go out, in pieces; it may sleep between two of them."""
        return [np.arange(num_packets)]

    def event(self, kind: str, addresses: np.ndarray) -> None:
        """Called after each piece."""
