"""One call recorded as a CUDA graph, with the steps of a workspace that it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.graph_capture import captured
from tokenferry.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Recorded:
    """A graph that holds one call.

    Attributes:
        result: what the call returned. Its tensors lie in the graph's memory; each replay writes them anew.
        num_steps: how many steps it begins on the workspace.
    """

    graph: torch.cuda.CUDAGraph
    result: Any
    num_steps: int

    def replay(self) -> None:
        """Launches it once on the current stream, within `Workspace.replaying(num_steps)`."""
        self.graph.replay()


class Recorder:
    """Records calls on one stream. Its graphs share one pool of memory, so that only one of them may run at a time, and what a
    call returned must be read before another one of them is replayed.

    Args:
        workspace: on a CUDA device; the only one that the calls use.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.stream = torch.cuda.Stream(workspace.device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Any]) -> Recorded:
        """Records `call`; nothing of it runs on the device, and the workspace counts none of its steps.

        Raises:
            Whatever `call` raises, such as the driver's error where something in it cannot be recorded. No peer hears of it, and
            the process can go on recording.
        """
        graph, device = torch.cuda.CUDAGraph(), self._workspace.device
        self.stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with self._workspace.capturing() as num_steps, captured(graph, stream=self.stream, pool=self._pool):
                result = call()
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()
            raise
        torch.cuda.current_stream(device).wait_stream(self.stream)
        return Recorded(graph, result, num_steps())
