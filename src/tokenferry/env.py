"""The one table of environment variables: every variable that tokenferry reads, and the only file that reads them.

Each concern is a frozen dataclass; each of its fields names its variable and says in a line what it does. The functions
read the environment when they are called, never at import, so a test or a program may set a variable at any time.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from tokenferry.errors import ConfigError

ENTER_ENVIRONMENT: Final = "import os; os.environ.clear(); os.environ.update(environment)"
"""What a fresh rank process runs before its first import: a fork server still has the environment of its own start."""


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("write 1 or 0")


def _variable(name: str, doc: str, parse: Callable[[str], Any], default: Any = None) -> Any:
    return field(default=default, metadata={"name": name, "doc": doc, "parse": parse})


@dataclass(frozen=True, kw_only=True)
class DebugSettings:
    """How much tokenferry checks itself."""

    enabled: bool = _variable(
        "TOKENFERRY_DEBUG",
        "1: poison buffers; check ids, counts and canaries on the device",
        _flag,
        False,
    )


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Where files that outlive a process are kept."""

    folder: str = _variable(
        "TOKENFERRY_CACHE_DIR", "folder of the demo checkpoint; ~/.cache/tokenferry if unset", str, "~/.cache/tokenferry"
    )


@dataclass(frozen=True, kw_only=True)
class TorchrunSettings:
    """This process's place among those that torchrun started; elsewhere every number and text is None."""

    rank: int | None = _variable("RANK", "torchrun: number of this process among all", int)
    world_size: int | None = _variable("WORLD_SIZE", "torchrun: number of processes", int)
    local_rank: int | None = _variable("LOCAL_RANK", "torchrun: number of this process on its machine, hence its GPU", int)
    local_world_size: int | None = _variable("LOCAL_WORLD_SIZE", "torchrun: number of processes on this machine", int)
    master_addr: str | None = _variable("MASTER_ADDR", "torchrun: host of the rendezvous store", str)
    master_port: int | None = _variable("MASTER_PORT", "torchrun: port of the rendezvous store", int)
    meet_timeout_s: float | None = _variable(
        "TOKENFERRY_MEET_TIMEOUT_S",
        "seconds that the command line waits for other processes; 600 under torchrun, else 45",
        float,
    )
    agent_hosts_store: bool = _variable(
        "TORCHELASTIC_USE_AGENT_STORE", "torchrun: whether its agent hosts the rendezvous store, and not rank 0", _flag, False
    )
    run_id: str | None = _variable("TORCHELASTIC_RUN_ID", "torchrun: its run; the other variables alone may be left over", str)

    @property
    def active(self) -> bool:
        """Whether torchrun (or anything that sets the same variables) started this process."""
        return None not in (self.rank, self.world_size, self.master_addr, self.master_port)


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """How Triton runs kernels."""

    interpret: bool = _variable("TRITON_INTERPRET", "1: run kernels in Triton's interpreter, without a GPU", _flag, False)


@dataclass(frozen=True, kw_only=True)
class RankProcessSettings:
    """What `launch` gives to the rank processes that it starts; other values in the environment are overridden."""

    num_threads: int = _variable("OMP_NUM_THREADS", "torch threads of a rank process; launch sets 1", int, 1)
    gloo_interface: str | None = _variable("GLOO_SOCKET_IFNAME", "network interface of gloo; launch sets the loopback", str)
    nccl_interface: str | None = _variable("NCCL_SOCKET_IFNAME", "network interface of NCCL; launch sets the loopback", str)


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """Whether tokenferry serves the vLLM that runs in this process."""

    enabled: bool | None = _variable(
        "TOKENFERRY_VLLM", "1: on in vLLM where its additional_config does not say; 0: off whatever that says", _flag
    )
    reason_file: str | None = _variable(
        "TOKENFERRY_VLLM_REASON_FILE", "set by the plug-in: where a server's ranks leave why its engine died", str
    )


@dataclass(frozen=True, kw_only=True)
class TelemetrySettings:
    """Whether workspaces count what they wait for where their caller does not say."""

    enabled: bool = _variable(
        "TOKENFERRY_TELEMETRY", "1: open workspaces with telemetry, also those that an integration opens", _flag, False
    )


Settings = TypeVar(
    "Settings",
    DebugSettings,
    CacheSettings,
    TorchrunSettings,
    TritonSettings,
    RankProcessSettings,
    VllmSettings,
    TelemetrySettings,
)
CONCERNS: Final = (
    DebugSettings,
    CacheSettings,
    TorchrunSettings,
    TritonSettings,
    RankProcessSettings,
    VllmSettings,
    TelemetrySettings,
)


@dataclass(frozen=True)
class Variable:
    """One row of the table: its name, what it does, and the text that it has now (None: not set)."""

    name: str
    doc: str
    value: str | None


def read(concern: type[Settings]) -> Settings:
    """The settings of one concern as the environment has them now; a variable that is not set keeps its default.

    Raises:
        ConfigError: a variable holds a text that it does not take.
    """
    values: dict[str, Any] = {}
    for entry in fields(concern):
        text = os.environ.get(entry.metadata["name"])
        if text is None:
            continue
        try:
            values[entry.name] = entry.metadata["parse"](text)
        except ValueError as error:
            raise ConfigError(f"environment variable {entry.metadata['name']} is {text!r}: {error}") from error
    return concern(**values)


def table() -> tuple[Variable, ...]:
    """Every variable that tokenferry reads, for `tokenferry doctor`."""
    rows = [entry.metadata for concern in CONCERNS for entry in fields(concern)]
    return tuple(Variable(row["name"], row["doc"], os.environ.get(row["name"])) for row in rows)


def cache_folder() -> Path:
    """The cache folder, `~` expanded. It need not exist."""
    return Path(read(CacheSettings).folder).expanduser()


def for_rank_process(overrides: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment for a rank process on this machine: this process's, without a place under torchrun (left over, if it
    has one), one thread, loopback only, then `overrides`."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    interfaces = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": f"={loopback}"}
    places = {entry.metadata["name"] for entry in fields(TorchrunSettings)}
    inherited = {name: text for name, text in os.environ.items() if name not in places}
    return {**inherited, "OMP_NUM_THREADS": "1", **interfaces, **(overrides or {})}


@contextlib.contextmanager
def torchrun_place(rank: int, world_size: int) -> Iterator[None]:
    """Within it the environment says what torchrun would say to a process on one machine, for libraries that look there."""
    said = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    before = {name: os.environ.get(name) for name in said}
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        yield
    finally:
        _put_back(before)


@contextlib.contextmanager
def nccl_errors_stay_ours() -> Iterator[None]:
    """While a NCCL communicator of our own is made: torch's watchdog shall not end the process when a peer is late or dies.

    torch reads both variables in the constructor, so they are put back at once and other communicators are not touched.
    """
    ours = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        _put_back(before)


def turn_telemetry_on() -> None:
    """For what this process opens from here on, also within an integration: see `TelemetrySettings`."""
    os.environ["TOKENFERRY_TELEMETRY"] = "1"


def hand_down_vllm_reason_file(name: str) -> None:
    """Processes that this one starts have `VllmSettings.reason_file` from now on, and so has it."""
    os.environ["TOKENFERRY_VLLM_REASON_FILE"] = name


def _put_back(before: Mapping[str, str | None]) -> None:
    """The variables as they were; those that are None are removed."""
    for name, text in before.items():
        if text is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = text
