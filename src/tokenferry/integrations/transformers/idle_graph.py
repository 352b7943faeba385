"""The step of a rank without tokens as a CUDA graph: all layers, with no rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import torch

from tokenferry.errors import PeerError
from tokenferry.integrations.transformers.decode_graphs import MakesRecorder
from tokenferry.lifecycle import WrongCallerError
from tokenferry.recording import Recorded, Recorder
from tokenferry.step import FLAG_DONE, Step
from tokenferry.workspace import Workspace

_log = logging.getLogger(__name__)

_FAILED: Final = "steps without tokens run eagerly, since one could not be recorded as a CUDA graph: %s: %s"


class IdleGraph:
    """Steps without tokens, by replays of one graph for ranks that are done and one for those that are not.

    Args:
        run_layers: such a step, eagerly: begins it, saying done or not, and runs all layers.
        forget_step: called where a recording failed, which may have begun a step in vain.
    """

    def __init__(
        self,
        workspace: Workspace,
        run_layers: Callable[[bool], Step],
        forget_step: Callable[[], None],
        make_recorder: MakesRecorder = Recorder,
    ) -> None:
        self._workspace, self._run_layers, self._forget_step = workspace, run_layers, forget_step
        self._make_recorder = make_recorder
        self._recorder: Recorder | None = None
        self._recorded: dict[bool, Recorded] = {}
        self._is_warm = self._has_failed = False

    def step(self, *, done: bool) -> tuple[bool, int]:
        """One step. Waits for the device.

        Returns:
            Whether every rank said done, and V.

        Raises:
            PeerTimeoutError, PeerFailedError: another rank is the cause.
        """
        recorded = self._recorded.get(done)
        if recorded is None and self._is_warm and not self._has_failed:
            recorded = self._record(done)
        if recorded is None:
            summary = _summary(self._run_layers(done))
            self._is_warm = True
        else:
            with self._workspace.replaying(recorded.num_steps):
                recorded.replay()
            summary = recorded.result
        all_done, num_tokens = summary.tolist()
        self._workspace.check(wait=False)
        return bool(all_done), num_tokens

    def drop(self) -> None:
        """Lets go of the graphs; they are recorded anew."""
        self._recorded.clear()
        self._recorder = None

    def _record(self, done: bool) -> Recorded | None:
        if self._recorder is None:
            self._recorder = self._make_recorder(self._workspace)
        try:
            with self._workspace.busy("recording a step without tokens"):
                recorded = self._recorded[done] = self._recorder.record(lambda: _summary(self._run_layers(done)))
            return recorded
        except BaseException as error:
            self._forget_step()
            self.drop()
            if isinstance(error, PeerError | WrongCallerError) or not isinstance(error, Exception):
                raise
            self._has_failed = True  # whatever cannot be recorded can be run
            _log.warning(_FAILED, type(error).__name__, " ".join(str(error).split()))
            return None


def _summary(step: Step) -> torch.Tensor:
    """[2] int32: whether all are done, V. One tensor, since each read of one waits for the device."""
    all_done = (step.flags_per_rank & FLAG_DONE).amin(dim=0, keepdim=True)
    return torch.cat([all_done, step.valid_tokens])
