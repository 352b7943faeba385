"""Which transport: a decision, with its reason, for every candidate."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tokenferry import env, topology
from tokenferry.config import MoEConfig
from tokenferry.dispatched import SAME, RowFormat
from tokenferry.errors import ConfigError, TransportUnavailableError
from tokenferry.groups import EPGroup
from tokenferry.transports.symmetric import layout as symmetric_layout

TRANSPORTS = ("local", "p2p", "nvls", "collective")
"""All transports, in the order in which `auto` prefers them. `nvls` stands behind `p2p` for as long as no GPU with multicast has
run it: whoever wants it asks for it by name."""

SYMMETRIC = ("p2p", "nvls")
"""Those that stand on symmetric memory."""

MAP_REMEDY = (
    "look at `nvidia-smi topo -p2p r`: GPUs map each other over NVLink, or over PCIe where no IOMMU or access control service "
    "stands between; a virtual machine or container must be given both; until then `auto` takes collective"
)


@dataclass(frozen=True)
class Accepted:
    """The transport would serve this group here."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: accepted, {self.reason}"


@dataclass(frozen=True)
class Rejected:
    """The transport cannot serve this group here.

    Attributes:
        remedy: what to do about it. Empty where there is nothing to mend: `local` is not made for two ranks.
    """

    name: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.name}: rejected, {self.reason}"


Decision = Accepted | Rejected


def decide(
    group: EPGroup,
    requested: str = "auto",
    config: MoEConfig | None = None,
    max_tokens_per_rank: int = 1,
    combine_dtype: torch.dtype | None = None,
    dispatch_format: RowFormat = SAME,
) -> tuple[Decision, ...]:
    """A decision for every transport, in order of preference, as this rank alone sees it.

    `requested` matters for CPU tensors, where the symmetric transports run in Triton's interpreter and only if asked for. Without
    a `config` nothing is said about the shapes that a transport can carry.
    """
    symmetric = _symmetric(group, requested)
    if config is not None:
        refusal = _shape_refusal(config, group.size, max_tokens_per_rank, combine_dtype or config.dtype, dispatch_format)
        symmetric = tuple(Rejected(d.name, refusal) if refusal and isinstance(d, Accepted) else d for d in symmetric)
    return (_local(group), *symmetric, _collective(group))


def _local(group: EPGroup) -> Decision:
    if group.size == 1:
        return Accepted("local", "a group of one needs no communication")
    return Rejected("local", f"the group has {group.size} ranks; local serves one")


def _symmetric(group: EPGroup, requested: str) -> tuple[Decision, ...]:
    if importlib.util.find_spec("triton") is None:
        remedy = "pip install triton" if group.device.type == "cuda" else ""
        return tuple(Rejected(name, "Triton is not installed", remedy) for name in SYMMETRIC)
    if group.device.type == "cpu":
        return tuple(_interpreted(name, requested) for name in SYMMETRIC)
    if group.device.type != "cuda":
        return tuple(Rejected(name, f"no symmetric memory on {group.device.type} devices") for name in SYMMETRIC)
    if env.read(env.TritonSettings).interpret:
        reason = "TRITON_INTERPRET=1 leaves no kernels for GPUs; unset it"
        return tuple(Rejected(name, reason, "unset TRITON_INTERPRET") for name in SYMMETRIC)
    unreachable = [
        device
        for device in range(torch.cuda.device_count())
        if device != group.device.index and not torch.cuda.can_device_access_peer(group.device.index, device)
    ]
    if unreachable and group.size > 1:
        reason = f"GPU {group.device.index} cannot map the memory of GPU {unreachable[0]}"
        return tuple(Rejected(name, reason, MAP_REMEDY) for name in SYMMETRIC)
    return Accepted("p2p", "peer stores and loads over symmetric memory"), _nvls(group)


def _interpreted(name: str, requested: str) -> Decision:
    if requested != name:
        return Rejected(name, f"on CPU tensors it runs in Triton's interpreter, for tests: ask for transport={name!r}")
    if not env.read(env.TritonSettings).interpret:
        return Rejected(name, "on CPU tensors it needs TRITON_INTERPRET=1, set before tokenferry is imported")
    return Accepted(name, "Triton's interpreter over shared memory, as asked for")


def _nvls(group: EPGroup) -> Decision:
    gpu = topology.gpu(group.device.index)
    if gpu.capability[0] < 9:
        return Rejected("nvls", f"{gpu.name} has no multicast; it came with Hopper")
    if not gpu.multicast:
        return Rejected("nvls", "PyTorch's symmetric memory has no multicast here (no NVSwitch, or it is turned off)")
    return Accepted("nvls", "the driver and PyTorch offer multicast; opening looks for the address")


def _shape_refusal(
    config: MoEConfig, ep_size: int, max_tokens_per_rank: int, combine_dtype: torch.dtype, dispatch_format: RowFormat
) -> str:
    try:
        symmetric_layout.plan(config, ep_size, max_tokens_per_rank, combine_dtype, dispatch_format=dispatch_format)
    except ConfigError as error:
        return str(error)
    return ""


def _collective(group: EPGroup) -> Decision:
    if not dist.is_available():
        return Rejected("collective", "this build of torch has no torch.distributed", "install a build of torch that has it")
    backend = "NCCL" if group.device.type == "cuda" else "gloo"
    present = dist.is_nccl_available() if backend == "NCCL" else dist.is_gloo_available()
    if not present:
        return Rejected("collective", f"this build of torch has no {backend}", f"install a build of torch with {backend}")
    return Accepted("collective", f"{backend} on {group.device.type.upper()} tensors")


def agree(per_rank: Sequence[Sequence[Decision]], machines: Sequence[str] = ()) -> tuple[Decision, ...]:
    """One decision a transport for the whole group: rejected if a rank rejects it, with that rank's reason, and the symmetric
    ones also if the ranks live on several of the `machines`."""
    agreed: list[Decision] = []
    if len(set(machines)) > 1:
        apart = (
            f"the ranks live on {len(set(machines))} machines, or in containers that do not see one another's processes and "
            "temporary files; symmetric memory reaches one"
        )
        per_rank = [[Rejected(d.name, apart) if d.name in SYMMETRIC else d for d in decisions] for decisions in per_rank]
    for decisions in zip(*per_rank, strict=True):
        refusals = [(rank, d) for rank, d in enumerate(decisions) if isinstance(d, Rejected)]
        if not refusals:
            agreed.append(decisions[0])
        else:
            rank, refusal = refusals[0]
            where = "" if len(refusals) == len(decisions) else f" (on rank {rank})"
            agreed.append(Rejected(refusal.name, refusal.reason + where, refusal.remedy))
    return tuple(agreed)


def choose(requested: str, decisions: Sequence[Decision]) -> str:
    """The transport to open: the first that is accepted, or the one asked for.

    Raises:
        ConfigError: no transport of that name.
        TransportUnavailableError: the one asked for was rejected, or all were.
    """
    if requested != "auto":
        by_name = {decision.name: decision for decision in decisions}
        if requested not in by_name:
            raise ConfigError(f"transport must be 'auto' or one of {', '.join(TRANSPORTS)}, got {requested!r}")
        if isinstance(by_name[requested], Rejected):
            raise TransportUnavailableError(f"transport {requested!r} cannot serve this group:", decisions)
        return requested
    for decision in decisions:
        if isinstance(decision, Accepted):
            return decision.name
    raise TransportUnavailableError("no transport can serve this group:", decisions)


def default_device() -> torch.device:
    """Where a group of this machine would live: the current GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
