"""`tokenferry inspect`: runs prompts with telemetry, and reports where tokens went and what the ranks waited for."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from tokenferry.cli.job import RankResult
from tokenferry.cli.plan import EXCHANGES, GEMM_TFLOPS, READ_GB_PER_S
from tokenferry.cli.run import Request, run_ranks
from tokenferry.cli.terminal import print_json
from tokenferry.demo.model import FOLDER_NAME
from tokenferry.errors import ConfigError
from tokenferry.inspection.findings import Findings, findings_of
from tokenferry.inspection.page import make_folder, summary, write_report
from tokenferry.placement import StepModel
from tokenferry.telemetry import Snapshot

SCHEMA: Final = 1
NEEDED: Final = ("jinja2", "matplotlib")
ROW_ITEMSIZE: Final = 2
"""Bytes of a number of a row on its way, where models are served in 16 bits."""


def inspect(request: Request, folder: Path) -> int:
    """Answers the prompts, writes the report into `folder`, and prints the summary. Returns the exit code.

    Raises:
        ConfigError: a package is missing, or the folder cannot be written, which rank 0 finds out before anything runs.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"the report needs {' and '.join(missing)}; pip install 'tokenferry[inspect]'")
    request = replace(request, job=replace(request.job, telemetry=True))
    if request.place is None or request.place.rank == 0:  # who writes
        make_folder(folder)
    results = run_ranks(request)
    if results is None:
        return 0
    progress, start_s = Console(stderr=True), time.monotonic()
    findings = findings_of([_snapshot(result) for result in results], step_model(results[0], len(results)))
    judged_s = time.monotonic()
    paths = write_report(findings, folder, _about(request, results))
    took = f"report: the verdict {judged_s - start_s:.1f} s, the pictures {time.monotonic() - judged_s:.1f} s"
    progress.print(Text(took), soft_wrap=True)
    console = Console(highlight=False)
    if request.as_json:
        print_json(console, json.dumps(_document(request, findings, paths), indent=1))
        return 0
    for line in summary(findings):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"report: {paths[0]}"), soft_wrap=True)
    return 0


def step_model(result: RankResult, num_ranks: int) -> StepModel:
    """Of the model that the ranks ran, on an H100 whatever they ran on: a CPU's times would say nothing of where it is served."""
    assert result.telemetry is not None, "the job asked for it"
    expert, exchange = result.telemetry["expert"], EXCHANGES["p2p"]
    bytes_per_token = 2 * ROW_ITEMSIZE * expert["hidden_size"] + 8 * expert["topk"]  # there and back, and its routing
    sent_per_row = (num_ranks - 1) / num_ranks * bytes_per_token / expert["topk"]
    return StepModel(
        weight_bytes=expert["num_bytes"],
        flops_per_row=2 * expert["num_weights"],
        memory_bytes_per_s=READ_GB_PER_S * 1e9,
        flops_per_s=GEMM_TFLOPS * 1e12,
        exchange_s=exchange.latency_us / 1e6,
        exchange_s_per_row=sent_per_row / exchange.gb_per_s / 1e9,
    )


def _snapshot(result: RankResult) -> Snapshot:
    assert result.telemetry is not None, "the job asked for it"
    return Snapshot.from_dict(result.telemetry["snapshot"])


def _about(request: Request, results: list[RankResult]) -> dict[str, str]:
    first = results[0]
    return {
        "model": "demo" if Path(request.job.model).name == FOLDER_NAME else request.job.model,
        "ranks": f"{len(results)}, on {first.device}, transport {first.transport}",
        "prompts": str(len(request.job.prompts)),
        "new tokens": str(sum(result.num_new_tokens for result in results)),
        "experts": f"{first.num_experts} in each of {first.num_layers} layers",
        "times predicted for": "H100, whatever this ran on",
    }


def _document(request: Request, findings: Findings, paths: list[Path]) -> dict[str, Any]:
    files = [str(path) for path in paths]
    return {"schema": SCHEMA, "command": "inspect", "model": request.job.model, "files": files, **findings.to_dict()}
