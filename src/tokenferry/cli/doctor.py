"""`tokenferry doctor`: what this machine is, and the decision for every transport."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenferry import env
from tokenferry.cli.terminal import print_json
from tokenferry.groups import EPGroup
from tokenferry.integrations.vllm import known_versions
from tokenferry.topology import Topology, topology
from tokenferry.transports.selection import Accepted, Decision, decide


@dataclass(frozen=True)
class Trial:
    """The decisions for a group of `num_ranks` ranks on this machine."""

    num_ranks: int
    device: str
    decisions: tuple[Decision, ...]


def print_report(*, as_json: bool) -> None:
    """Look at this machine and print what is there and what runs on it."""
    facts, trials = topology(), trial_groups()
    console = Console(highlight=False)
    if as_json:
        print_json(console, report_json(facts, trials))
        return
    for table in (machine_table(facts), gpu_table(facts), environment_table()):
        if table.row_count:
            console.print(table)
    for trial in trials:
        plural = "" if trial.num_ranks == 1 else "s"
        console.print(Text(f"\nTransports for {trial.num_ranks} rank{plural} on {trial.device}", style="bold"))
        for decision in trial.decisions:
            console.print(Text(f"  {decision}", style="green" if isinstance(decision, Accepted) else "dim"))


def trial_groups() -> list[Trial]:
    """Decisions for one rank and for several, on the CPU and, if there are GPUs, on them. Nothing is opened."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    groups = [(1, "cpu"), (2, "cpu")]
    if num_gpus:
        groups += [(1, "cuda"), (max(2, num_gpus), "cuda")]
    return [
        Trial(num_ranks, device, decide(EPGroup.from_store(dist.HashStore(), 0, num_ranks, device)))
        for num_ranks, device in groups
    ]


def machine_table(facts: Topology) -> Table:
    """What the machine has, and the versions of the packages."""
    table = Table(title="Machine", show_header=False, title_justify="left")
    table.add_row("platform", facts.platform)
    table.add_row("CPUs", str(facts.num_cpus))
    table.add_row("memory", f"{facts.memory_bytes / 2**30:.0f} GiB" if facts.memory_bytes else "unknown")
    table.add_row("GPUs", str(len(facts.gpus)))
    for name, version in facts.versions:
        table.add_row(name, version)
    table.add_row("vLLM", known_versions.summary())
    return table


def gpu_table(facts: Topology) -> Table:
    """One row for each GPU."""
    table = Table(title="GPUs", title_justify="left")
    for name in ("GPU", "name", "SM", "SMs", "memory", "maps peers", "multicast reported"):
        table.add_column(name)
    for gpu in facts.gpus:
        table.add_row(
            str(gpu.index),
            gpu.name,
            f"{gpu.capability[0]}.{gpu.capability[1]}",
            str(gpu.num_sms),
            f"{gpu.memory_bytes / 2**30:.0f} GiB",
            ", ".join(map(str, gpu.peers)) or "none",
            "yes" if gpu.multicast else "no",
        )
    return table


def environment_table() -> Table:
    """Every variable that tokenferry reads."""
    table = Table(title="Environment", title_justify="left")
    for name in ("variable", "value", "what it does"):
        table.add_column(name)
    for variable in env.table():
        table.add_row(variable.name, Text("not set", style="dim") if variable.value is None else variable.value, variable.doc)
    return table


def report_json(facts: Topology, trials: list[Trial]) -> str:
    """All that `print_report` shows, as JSON text."""
    document = {
        "schema": 1,
        "topology": {**dataclasses.asdict(facts), "versions": dict(facts.versions)},
        "vllm": known_versions.summary(),
        "environment": {variable.name: variable.value for variable in env.table()},
        "transports": [
            {
                "num_ranks": trial.num_ranks,
                "device": trial.device,
                "decisions": [
                    {"name": decision.name, "accepted": isinstance(decision, Accepted), "reason": decision.reason}
                    for decision in trial.decisions
                ],
            }
            for trial in trials
        ],
    }
    return json.dumps(document, indent=1)
