"""What a rank waits for on the collective transport, as its host sees it: for telemetry.

gloo's messages are waited for one by one, so that every wait has a peer. NCCL serves all peers in one call. There the packets of
a step's counts say when each rank came; of a dispatch or combine, events on the stream say how long the call took, transfer
included, which is the peer's where there is one, and nobody's in particular where there are more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenferry.graph_capture import is_capturing
from tokenferry.kernels.wait_board import COMBINE, DISPATCH
from tokenferry.telemetry.recorder import COUNTS, Recorder
from tokenferry.transports.base import TransportSettings
from tokenferry.transports.collective.messages import Header

PHASES = (COUNTS, DISPATCH, COMBINE, COUNTS)
"""By operation: a step, a dispatch, a combine, an announcement."""


class CollectiveWaits:
    """Notes the waits of one transport in the workspace's recorder."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder, self._device = recorder, device
        self._is_cuda = device.type == "cuda"
        self._begin: torch.cuda.Event | None = None

    @classmethod
    def of(cls, settings: TransportSettings) -> CollectiveWaits | None:
        """None without telemetry."""
        return None if settings.recorder is None else cls(settings.recorder, settings.group.device)

    def step_begins(self, step: int) -> None:
        """Before the counts of `step` are exchanged."""
        self._recorder.step_began(step)

    def headers_came(self, headers: Sequence[Header]) -> None:
        """From all ranks, with when each of them came. Messages of gloo's have been waited for one by one."""
        own = headers[self._recorder.rank].entered_ns
        if not self._is_cuda or not own:
            return
        for source, header in enumerate(headers):
            if source != self._recorder.rank and header.entered_ns:
                self._recorder.waited(COUNTS, -1, source, max(0, header.entered_ns - own))

    def host_waited(self, operation: int, layer: int, peer: int, span_ns: int) -> None:
        """For one message."""
        self._recorder.waited(PHASES[operation], layer, peer, span_ns)

    def span_begins(self) -> None:
        """A dispatch or combine is launched on the current stream from here on. Graphs hold no events of ours."""
        self._begin = None
        if self._is_cuda and self._recorder.is_on and not is_capturing(self._device):
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def span_ends(self, operation: int, layer: int) -> None:
        """The current stream waits for it from here on."""
        begin, self._begin = self._begin, None
        if begin is not None:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._recorder.span_on_stream(PHASES[operation], layer, begin, end)
