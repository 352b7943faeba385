"""What the ranks wait for, and where tokens go: counted while a workspace runs, read without stalling it."""

from tokenferry.telemetry.lateness import last_to_enter
from tokenferry.telemetry.recorder import Recorder
from tokenferry.telemetry.snapshot import LayerRecord, RoundRecord, Snapshot, StepRecord, Waits, loads_of

__all__ = ["LayerRecord", "Recorder", "RoundRecord", "Snapshot", "StepRecord", "Waits", "last_to_enter", "loads_of"]
