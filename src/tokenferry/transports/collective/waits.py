"""What a rank waits for on the collective transport, as its host sees it: for telemetry.

gloo's messages are waited for one by one, so that every wait has a peer. NCCL serves all peers in one call. There the packets of
a step's counts say when each rank came; of a dispatch or combine, events on the stream say how long the call took, transfer
included, which is the peer's where there is one, and nobody's in particular where there are more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from tokenferry.graph_capture import is_capturing
from tokenferry.kernels.wait_board import COMBINE, DISPATCH
from tokenferry.telemetry.recorder import COUNTS, Recorder
from tokenferry.transports.collective.messages import Header

PHASES = (COUNTS, DISPATCH, COMBINE, COUNTS)
"""By operation: a step, a dispatch, a combine, an announcement."""


class CollectiveWaits:
    """Notes the waits of one transport in the workspace's recorder; without one, nothing."""

    def __init__(self, recorder: Recorder | None, device: torch.device) -> None:
        self._recorder, self._device = recorder, device
        self._has_events = recorder is not None and device.type == "cuda"
        self._begin: torch.cuda.Event | None = None
        self._phase, self._layer = COUNTS, -1

    @property
    def by_message(self) -> Callable[[int, int], None] | None:
        """What to call with a peer and the nanoseconds that the host has waited for a message of its; None if nothing."""
        return None if self._recorder is None or self._has_events else self._host_waited

    def now_ns(self) -> int:
        """For the header of an operation: by this host's clock; 0 if nobody asks."""
        return 0 if self._recorder is None else time.time_ns()

    def step_begins(self, step: int) -> None:
        """Before the counts of `step` are exchanged."""
        if self._recorder is not None:
            self._phase, self._layer = COUNTS, -1
            self._recorder.step_began(step)

    def headers_came(self, headers: Sequence[Header]) -> None:
        """From all ranks, with when each of them came. Messages of gloo's have been waited for one by one."""
        if self._recorder is None or not self._has_events:
            return
        own = headers[self._recorder.rank].entered_ns
        for source, header in enumerate(headers):
            if source != self._recorder.rank and header.entered_ns:
                self._recorder.waited(COUNTS, -1, source, max(0, header.entered_ns - own))

    def span_begins(self, operation: int, layer: int) -> None:
        """A dispatch or combine is launched on the current stream from here on. Graphs hold no events of ours."""
        if self._recorder is None:
            return
        self._begin, self._phase, self._layer = None, PHASES[operation], layer
        if self._has_events and self._recorder.is_on and not is_capturing(self._device):
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def span_ends(self) -> None:
        """The current stream waits for it from here on."""
        begin, self._begin = self._begin, None
        if begin is not None and self._recorder is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._recorder.span_on_stream(self._phase, self._layer, begin, end)

    def _host_waited(self, peer: int, span_ns: int) -> None:
        assert self._recorder is not None, "the caller was given nothing to call"
        self._recorder.waited(self._phase, self._layer, peer, span_ns)
