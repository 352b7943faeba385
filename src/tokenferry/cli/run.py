"""`generate` and `verify`: start or join the ranks, show what they answered and, for `verify`, compare it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from rich.console import Console

from tokenferry import env
from tokenferry.cli import display, output
from tokenferry.cli.job import Job, RankResult
from tokenferry.cli.progress import progress
from tokenferry.cli.reference import Comparison, compare, reference_answers
from tokenferry.cli.start import run_launched, run_under_torchrun
from tokenferry.cli.terminal import print_json

EXIT_DIFFERENT: Final = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, checked."""

    command: str
    job: Job
    num_ranks: int
    place: env.TorchrunSettings | None
    as_json: bool


def generate(request: Request) -> int:
    """Answer the prompts and show them. Returns the exit code."""
    results = run_ranks(request)
    if results is not None:
        show(request, results, None)
    return 0


def verify(request: Request) -> int:
    """Answer the prompts, on the ranks and then with the unmodified model, and compare. Returns the exit code."""
    request = replace(request, job=replace(request.job, keep_logits=True))
    results = run_ranks(request)
    if results is None:
        return 0
    with progress(Console(stderr=True), ["unmodified model"]) as on_message:
        reference = reference_answers(request.job, len(results), results[0].num_threads, on_message)
    comparison = compare(results, reference, is_lossy=request.job.is_lossy)
    show(request, results, comparison)
    return 0 if comparison.passed else EXIT_DIFFERENT


def run_ranks(request: Request) -> list[RankResult] | None:
    """Every rank's result; None in a process that torchrun started and that is not rank 0."""
    if request.place is not None and request.place.rank != 0:
        return run_under_torchrun(request.job, request.place, lambda rank, message: None)
    names = [f"rank {rank}" for rank in range(request.num_ranks)]
    with progress(Console(stderr=True), names) as on_message:
        if request.place is not None:
            return run_under_torchrun(request.job, request.place, on_message)
        return run_launched(request.job, request.num_ranks, on_message)


def show(request: Request, results: list[RankResult], comparison: Comparison | None) -> None:
    """Print results for a person, or for a program."""
    console = Console(highlight=False)
    if request.as_json:
        print_json(console, output.as_json(request.command, request.job, results, comparison))
        return
    display.print_answers(console, request.job.prompts, results)
    console.print(display.rank_table(results))
    if comparison is not None:
        display.print_comparison(console, comparison)
