"""A report of what telemetry has seen: figures, pictures, and whether balancing would pay. `tokenferry inspect` writes it."""

from tokenferry.inspection.findings import Findings, findings_of
from tokenferry.inspection.page import write_report

__all__ = ["Findings", "findings_of", "write_report"]
