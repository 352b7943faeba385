"""`Workspace.telemetry`: turns counting on and off, reads it, and writes it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from tokenferry.errors import StateError
from tokenferry.groups import EPGroup
from tokenferry.telemetry.lateness import last_to_enter
from tokenferry.telemetry.recorder import Recorder
from tokenferry.telemetry.snapshot import Snapshot
from tokenferry.telemetry.trace import write_trace

GATHER_TIMEOUT_S = 60.0


class Telemetry:
    """What one rank's workspace counts. Its calls come from any thread, and none of them holds up a step. But `gather` and
    `trace` are collective: one thread of each rank calls them, in the same order on all ranks. It knows nothing of the workspace,
    which would otherwise live until Python looks for cycles."""

    def __init__(self) -> None:
        self._followed: tuple[Recorder | None, EPGroup] | None = None

    def follow(self, recorder: Recorder | None, group: EPGroup) -> None:
        """From here on these are the workspace's: it has opened, or was reset. None without telemetry."""
        self._followed = recorder, group

    def _current(self) -> Recorder | None:
        return None if self._followed is None else self._followed[0]

    def _group(self) -> EPGroup:
        assert self._followed is not None, "it has been followed since it opened"
        return self._followed[1]

    @property
    def is_available(self) -> bool:
        """Whether the workspace was opened with telemetry."""
        return self._current() is not None

    @property
    def is_on(self) -> bool:
        """Whether it counts now."""
        current = self._current()
        return current is not None and current.is_on

    def _recorder(self, operation: str) -> Recorder:
        current = self._current()
        if current is None:
            raise StateError(
                f"telemetry.{operation}: this workspace was opened without telemetry, and its kernels have none compiled in; "
                "open it with Workspace(..., telemetry=True), or set TOKENFERRY_TELEMETRY=1"
            )
        return current

    def start(self) -> None:
        """Counts from here on, in graphs that were captured before too. A workspace that is opened with telemetry counts already.

        Raises:
            StateError: it was opened without.
        """
        self._recorder("start").turn(True)

    def stop(self) -> None:
        """Counts no longer; what has been counted stays.

        Raises:
            StateError: the workspace was opened without telemetry.
        """
        self._recorder("stop").turn(False)

    def snapshot(self) -> Snapshot:
        """What this rank has counted since it was opened or last reset. The copy takes its own way beside the steps.

        Raises:
            StateError: the workspace was opened without telemetry.
        """
        return self._recorder("snapshot").snapshot()

    def reading(self) -> str:
        """One line on who keeps this rank waiting; empty before the first step, and on a rank that has no peers.

        Raises:
            StateError: the workspace was opened without telemetry.
        """
        return last_to_enter(self._recorder("reading").snapshot().steps, self._group().rank)

    def gather(self, timeout_s: float = GATHER_TIMEOUT_S) -> list[Snapshot]:
        """Every rank's snapshot, in rank order. Collective: every rank calls it.

        Raises:
            StateError: the workspace was opened without telemetry.
            PeerTimeoutError, PeerFailedError: another rank did not come.
        """
        group, own = self._group(), self._recorder("gather").snapshot().to_dict()
        told = group.channel.exchange(group.unique_name("telemetry"), own, timeout_s)
        return [Snapshot.from_dict(each) for each in told]

    def trace(self, path: str | Path, timeout_s: float = GATHER_TIMEOUT_S) -> float | None:
        """Writes the last steps of all ranks as a trace for Chrome or Perfetto. Collective; rank 0 writes.

        Returns:
            By how many nanoseconds the ranks' clocks may be off against one another in it, the way of one packet not counted;
            infinite if the ranks have kept fewer than two steps in common. None on the other ranks.

        Raises:
            StateError: the workspace was opened without telemetry.
            PeerTimeoutError, PeerFailedError: another rank did not come.
        """
        snapshots = self.gather(timeout_s)
        return write_trace(path, snapshots) if self._group().rank == 0 else None

    def write_json_line(self, file: TextIO) -> None:
        """Appends this rank's snapshot to an open file, as one line of JSON.

        Raises:
            StateError: the workspace was opened without telemetry.
        """
        file.write(json.dumps(self.snapshot().to_dict()) + "\n")

    def prometheus(self, registry: Any = None) -> Any:
        """Registers this rank's counters with `prometheus_client`, which reads them at each scrape; `generate_latest(registry)`
        gives the text.

        Args:
            registry: a `CollectorRegistry`. Default: a new one.

        Returns:
            The registry.

        Raises:
            StateError: the workspace was opened without telemetry.
            ConfigError: `prometheus_client` is not installed.
        """
        from tokenferry.telemetry.prometheus import register

        self._recorder("prometheus")
        return register(self.snapshot, registry)
