"""`tokenferry doctor`: what this machine is, the decision for every transport, a self-test, and a verdict."""

from __future__ import annotations

import dataclasses
import datetime
import json
from typing import Any, Final

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from tokenferry import env
from tokenferry.cli import doctor_tables, health, selftest
from tokenferry.cli.terminal import print_json
from tokenferry.errors import ConfigError
from tokenferry.groups import EPGroup
from tokenferry.integrations.vllm import known_versions
from tokenferry.topology import Topology, topology
from tokenferry.transports.selection import Accepted, Decision, decide

SCHEMA: Final = 2
"""Raised when a key changes its meaning or goes."""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that was seen. `trials` is None where no self-test was asked for."""

    facts: Topology
    vllm: str
    groups: tuple[health.GroupDecisions, ...]
    trials: tuple[selftest.Trial, ...] | None
    findings: tuple[health.Finding, ...]

    @property
    def health(self) -> health.Health:
        """The verdict."""
        return health.health_of(self.findings)

    @property
    def exit_code(self) -> int:
        """0: healthy, 1: degraded, 3: broken."""
        return health.EXIT_CODES[self.health]


def print_report(*, as_json: bool, with_selftest: bool = True, with_nvls: bool = False) -> int:
    """Look at this machine, print what is there and what runs on it, and return the exit code."""
    report = examine(with_selftest=with_selftest, with_nvls=with_nvls)
    console = Console(highlight=False)
    if as_json:
        print_json(console, report_json(report))
    else:
        doctor_tables.print_machine(console, report.facts, report.vllm)
        doctor_tables.print_groups(console, report.groups)
        doctor_tables.print_trials(console, report.trials)
        doctor_tables.print_verdict(console, report.health, report.findings)
    return report.exit_code


def examine(*, with_selftest: bool, with_nvls: bool) -> Report:
    """Look at this machine; nothing is changed on it."""
    facts = topology()
    try:
        groups = decide_groups(len(facts.gpus))
    except ConfigError:  # an environment variable that holds what it cannot: a finding
        groups, with_selftest = (), False
    trials = None
    if with_selftest:
        runs = selftest.runs_for(len(facts.gpus), dict(facts.versions), with_nvls=with_nvls)
        trials = tuple(selftest.try_all(runs, facts.num_cpus, say))
    findings = tuple(health.findings_of(facts, groups, trials or ()))
    return Report(facts, known_versions.summary(), groups, trials, findings)


def say(text: str) -> None:
    """A line of progress, apart from the report on stdout."""
    typer.echo(text, err=True)


def decide_groups(num_gpus: int) -> tuple[health.GroupDecisions, ...]:
    """Decisions for one rank and for several, on the CPU and, if there are GPUs, on them. Nothing is opened."""
    sizes = [(1, "cpu"), (2, "cpu")]
    if num_gpus:
        sizes += [(1, "cuda"), (max(2, num_gpus), "cuda")]
    return tuple(
        health.GroupDecisions(num_ranks, device, decide(EPGroup.from_store(dist.HashStore(), 0, num_ranks, device)))
        for num_ranks, device in sizes
    )


def print_plan(spec: str, ep_size: int | None, max_tokens: int | None, *, as_json: bool) -> int:
    """Print what a workspace for a model would take.

    Raises:
        ConfigError: there is no such model, or a number is missing or does not go with it.
    """
    if ep_size is None or max_tokens is None:
        missing = " and ".join(name for name, value in (("--ep", ep_size), ("--max-tokens", max_tokens)) if value is None)
        raise ConfigError(f"--plan needs {missing} too: the number of ranks, and the most tokens that one brings to a step")
    from tokenferry.cli.plan import plan, shape_of  # here: benchmarks come with it

    document = plan(shape_of(spec), ep_size, max_tokens)
    console = Console(highlight=False)
    if as_json:
        print_json(console, json.dumps({"schema": SCHEMA, "plan": document}, indent=1))
    else:
        doctor_tables.print_plan(console, document)
    return 0


def report_json(report: Report) -> str:
    """All that `print_report` shows, as JSON text: what an issue form asks for."""
    facts = dataclasses.asdict(report.facts)
    document = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "health": report.health,
        "exit_code": report.exit_code,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "topology": {**facts, "versions": dict(report.facts.versions)},
        "torch_build": torch.__config__.show().splitlines(),
        "vllm": report.vllm,
        "environment": {variable.name: variable.value for variable in env.table()},
        "transports": [
            {"num_ranks": group.num_ranks, "device": group.device, "decisions": [_decision(each) for each in group.decisions]}
            for group in report.groups
        ],
        "selftest": None if report.trials is None else [dataclasses.asdict(trial) for trial in report.trials],
    }
    return json.dumps(document, indent=1)


def _decision(decision: Decision) -> dict[str, Any]:
    remedy = "" if isinstance(decision, Accepted) else decision.remedy
    return {
        "name": decision.name,
        "accepted": isinstance(decision, Accepted),
        "status": doctor_tables.status_of(decision),
        "reason": decision.reason,
        "remedy": remedy,
    }
