"""From what `tokenferry doctor` saw to a verdict: what is wrong, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from tokenferry import env
from tokenferry.cli.selftest import Trial
from tokenferry.errors import ConfigError
from tokenferry.topology import Topology
from tokenferry.transports.selection import SYMMETRIC, Decision, Rejected

Level = Literal["note", "degraded", "broken"]
Health = Literal["healthy", "degraded", "broken"]

EXIT_CODES: Final = {"healthy": 0, "degraded": 1, "broken": 3}
"""2 is wrong usage, as in all commands."""
DRIVER: Final = Path("/proc/driver/nvidia/version")
"""There where Linux has loaded NVIDIA's driver."""


@dataclass(frozen=True)
class Finding:
    """Something that the user should know.

    Attributes:
        level: "note": all is well. "degraded": it works, but slower than this machine could, or in part. "broken": it does not
            work, or gives wrong results.
        remedy: what to do about it; empty where there is nothing to do.
    """

    level: Level
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class GroupDecisions:
    """The decisions for a group of `num_ranks` ranks on this machine."""

    num_ranks: int
    device: str
    decisions: tuple[Decision, ...]


def health_of(findings: Sequence[Finding]) -> Health:
    """The worst of them."""
    levels = {finding.level for finding in findings}
    return "broken" if "broken" in levels else "degraded" if "degraded" in levels else "healthy"


def findings_of(facts: Topology, groups: Sequence[GroupDecisions], trials: Sequence[Trial]) -> list[Finding]:
    """All that is worth telling, the worst first."""
    found = [*of_environment(), *of_machine(facts), *of_decisions(groups), *of_trials(trials)]
    order = ("broken", "degraded", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def of_environment() -> Iterator[Finding]:
    """Variables that hold what they cannot, or that slow everything down."""
    for concern in env.CONCERNS:
        try:
            env.read(concern)  # type: ignore[type-var]  # each is one of the types that `read` takes
        except ConfigError as error:
            yield Finding("broken", str(error), "correct or unset it")
    with_debug = next(variable.value for variable in env.table() if variable.name == "TOKENFERRY_DEBUG")
    if with_debug in ("1", "true", "yes", "on"):
        yield Finding("note", "TOKENFERRY_DEBUG is on: calls check and poison their buffers", "unset it before you measure times")


def of_machine(facts: Topology, driver: Path = DRIVER) -> Iterator[Finding]:
    """GPUs that torch cannot use."""
    if facts.gpus or not driver.exists():
        return
    if torch.version.cuda is None:
        remedy = "install a build of torch for CUDA, if GPUs are to be used"
    else:
        remedy = f"see that the driver serves CUDA {torch.version.cuda}, and that CUDA_VISIBLE_DEVICES does not hide the GPUs"
    yield Finding("degraded", "NVIDIA's driver is loaded here, but this torch sees no GPU", remedy)


def of_decisions(groups: Sequence[GroupDecisions]) -> Iterator[Finding]:
    """Rejections that something can be done about. A group that no transport serves is broken."""
    for group in groups:
        where = f"{group.num_ranks} rank{'s'[: group.num_ranks > 1]} on {group.device}"
        faults = [each for each in group.decisions if isinstance(each, Rejected) and each.remedy]
        serves_none = all(isinstance(each, Rejected) for each in group.decisions)
        for reason in dict.fromkeys(fault.reason for fault in faults):
            alike = [fault for fault in faults if fault.reason == reason]
            names = ", ".join(fault.name for fault in alike)
            yield Finding("broken" if serves_none else "degraded", f"{names} cannot serve {where}: {reason}", alike[0].remedy)
        if serves_none and not faults:
            yield Finding("broken", f"no transport serves {where}", "see the reasons above")


def of_trials(trials: Sequence[Trial]) -> Iterator[Finding]:
    """Transports that gave wrong bits, or could not be used although they were to."""
    for trial in trials:
        of = f"{trial.transport} on {trial.num_ranks} {trial.device} rank{'s'[: trial.num_ranks > 1]}"
        if trial.outcome == "wrong bits":
            remedy = "do not use it here, and report it with `tokenferry doctor --json`"
            yield Finding("broken", f"{of} gave wrong bits: {trial.detail}", remedy)
        elif trial.outcome == "failed":
            yield Finding(
                "degraded" if can_be_spared(trial, trials) else "broken",
                f"{of} failed its self-test: {trial.detail}",
                remedy_for(trial),
            )


def can_be_spared(trial: Trial, trials: Sequence[Trial]) -> bool:
    """Whether another transport has passed that serves the same ranks. Interpreted kernels are for tests: they serve nobody."""
    if trial.interpreted:
        return True
    alike = [each for each in trials if (each.device, each.num_ranks, each.interpreted) == (trial.device, trial.num_ranks, False)]
    return any(each.outcome == "passed" for each in alike)


def remedy_for(trial: Trial) -> str:
    """What usually helps where a self-test fails."""
    if trial.interpreted:
        return "only tests use interpreted kernels; `make test` shows more, in a clone"
    if trial.device == "cpu":
        return "gloo listens on the interface that GLOO_SOCKET_IFNAME names (the loopback here); see that nothing forbids it"
    if trial.transport in SYMMETRIC:
        return "until it is solved, ask for transport='collective'; `nvidia-smi topo -p2p r` shows which GPUs map each other"
    return "run again with NCCL_DEBUG=INFO; see that /dev/shm has room and that no other program holds the GPUs"
