"""What a person sees of `tokenferry doctor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenferry import env
from tokenferry.cli.health import Finding, GroupDecisions
from tokenferry.cli.selftest import Trial
from tokenferry.topology import Topology
from tokenferry.transports.selection import Accepted, Decision

STYLES = {"ready": "green", "not used": "dim", "rejected": "red", "passed": "green", "wrong bits": "bold red", "failed": "red",
          "healthy": "bold green", "note": "dim", "degraded": "yellow", "broken": "bold red"}  # fmt: skip


def print_machine(console: Console, facts: Topology, vllm: str) -> None:
    """The machine, its GPUs, and the environment."""
    for table in (machine_table(facts, vllm), gpu_table(facts), environment_table()):
        if table.row_count:
            console.print(table)
    unset = [variable.name for variable in env.table() if variable.value is None]
    if unset:
        console.print(Text(f"Not set in the environment: {', '.join(unset)}", style="dim"))


def machine_table(facts: Topology, vllm: str) -> Table:
    """What the machine has, and the versions of the packages."""
    table = Table(title="Machine", show_header=False, title_justify="left")
    table.add_row("platform", facts.platform)
    table.add_row("CPUs", str(facts.num_cpus))
    table.add_row("memory", f"{facts.memory_bytes / 2**30:.0f} GiB" if facts.memory_bytes else "unknown")
    table.add_row("GPUs", str(len(facts.gpus)))
    for name, version in facts.versions:
        table.add_row(name, version)
    table.add_row("vLLM", vllm)
    return table


def gpu_table(facts: Topology) -> Table:
    """One row for each GPU."""
    table = Table(title="GPUs", title_justify="left")
    for name in ("GPU", "name", "compute", "SMs", "memory", "links", "maps GPUs", "multicast"):
        table.add_column(name)
    for gpu in facts.gpus:
        table.add_row(
            str(gpu.index),
            gpu.name,
            f"{gpu.capability[0]}.{gpu.capability[1]}",
            str(gpu.num_sms),
            f"{gpu.memory_bytes / 2**30:.0f} GiB",
            "unknown" if gpu.links is None else str(gpu.links),
            ", ".join(map(str, gpu.peers)) or "none",
            "yes" if gpu.multicast else "no",
        )
    return table


def environment_table() -> Table:
    """The variables that tokenferry reads and that are set. What the others mean is on the page of environment variables."""
    table = Table(title="Environment", title_justify="left")
    for name in ("variable", "value", "what it does"):
        table.add_column(name)
    for variable in env.table():
        if variable.value is not None:
            table.add_row(variable.name, Text(variable.value), variable.doc)
    return table


def print_indented(console: Console, label: str, text: str, style: str = "") -> None:
    """A label, and beside it text whose further lines begin below its first."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_row(label, Text(text), style=style)
    console.print(grid)


def status_of(decision: Decision) -> str:
    """In a word. A rejection that nothing can be done about is no fault: the transport is made for something else."""
    if isinstance(decision, Accepted):
        return "ready"
    return "rejected" if decision.remedy else "not used"


def print_groups(console: Console, groups: Sequence[GroupDecisions]) -> None:
    """The decision for every transport, with what to do about those that are a fault."""
    for group in groups:
        plural = "" if group.num_ranks == 1 else "s"
        console.print(Text(f"\nTransports for {group.num_ranks} rank{plural} on {group.device}", style="bold"))
        for decision in group.decisions:
            status = status_of(decision)
            print_indented(console, f"  {decision.name:10s}", f"{status}: {decision.reason}", STYLES[status])
            if not isinstance(decision, Accepted) and decision.remedy:
                print_indented(console, " " * 12, f"what to do: {decision.remedy}")


def print_trials(console: Console, trials: Sequence[Trial] | None) -> None:
    """A line for each transport that was tried."""
    if trials is None:
        return
    console.print(Text("\nSelf-test", style="bold"))
    for trial in trials:
        place = f"{trial.num_ranks} {trial.device} rank{'s'[: trial.num_ranks > 1]}"
        kernels = ", interpreted kernels" if trial.interpreted else ""
        what = trial.detail if trial.round_trip_us is None else latency(trial)
        print_indented(console, f"  {trial.transport:10s}", f"{place}{kernels}: {trial.outcome}, {what}", STYLES[trial.outcome])


def latency(trial: Trial) -> str:
    """The line of a transport that passed."""
    assert trial.round_trip_us is not None, "only those that passed have one"
    us = trial.round_trip_us
    time = f"{us:.1f} µs" if us < 1000 else f"{us / 1000:.1f} ms"
    how = "in a CUDA graph" if trial.device == "cuda" else "eager"
    return f"right bits; a round trip of a few rows of {trial.hidden_size} takes {time} ({how})"


def print_verdict(console: Console, health: str, findings: Sequence[Finding]) -> None:
    """The verdict, and what it stands on."""
    console.print()
    for finding in findings:
        console.print(Text(f"{finding.level}: {finding.what}", style=STYLES[finding.level]))
        if finding.remedy:
            print_indented(console, " ", f"what to do: {finding.remedy}")
    console.print(Text(f"This machine is {health} for tokenferry.", style=STYLES[health]))


def print_plan(console: Console, document: Mapping[str, Any]) -> None:
    """The plan as tables, and what its times stand on."""
    of_model = "one MoE layer" if document["num_moe_layers"] is None else f"{document['num_moe_layers']} MoE layers"
    console.print(
        Text(
            f"{document['model']}: {of_model}, hidden size {document['hidden_size']}, {document['num_experts']} experts, "
            f"top-{document['topk']}, {document['dtype']}; {document['ep_size']} ranks, up to {document['max_tokens_per_rank']} "
            "tokens each",
            style="bold",
        )
    )
    table = Table(title="\nBytes of a rank's workspace (one serves all layers)", title_justify="left")
    for name in ("transport", "buffer", "bytes", "MiB"):
        table.add_column(name, justify="right" if name in ("bytes", "MiB") else "left")
    for transport, buffers in document["workspace_bytes"].items():
        for buffer, num_bytes in buffers.items():
            last = buffer == "total"
            figures = (f"{num_bytes:,}", f"{num_bytes / 2**20:,.1f}")
            table.add_row(transport, buffer, *figures, style="bold" if last else "", end_section=last)
    console.print(table)
    console.print(
        f"collective allocates the rows of each call: up to {document['rows_of_a_call_bytes'] / 2**20:,.1f} MiB.\n"
        f"Weights of a rank's experts: {document['expert_weight_bytes_per_layer'] / 2**20:,.1f} MiB a layer."
    )
    table = Table(title="\nExpected times (a model, not a measurement)", title_justify="left")
    step = "layer" if document["num_moe_layers"] is None else "step"
    columns = (f"{step} on p2p ms", f"{step} on collective ms")
    for name in ("tokens a rank", "experts' floor µs", "p2p µs", "collective µs", *columns):
        table.add_column(name, justify="right")
    for row in document["steps"]:
        us = (f"{row[key]:.1f}" for key in ("experts_floor_us", "p2p_round_trip_us", "collective_round_trip_us"))
        ms = (f"{row[key]:.2f}" for key in ("p2p_step_ms", "collective_step_ms"))
        table.add_row(str(row["tokens_per_rank"]), *us, *ms)
    console.print(table)
    for sentence in document["assumptions"]:
        print_indented(console, "-", sentence)
