"""Where ranks come from: processes that we start, or the place that torchrun gave to this one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import typer

from tokenferry import env
from tokenferry.channel import RendezvousStore, host_of
from tokenferry.cli.job import Answer, Job, RankResult
from tokenferry.cli.work import Send, answer_as_rank
from tokenferry.errors import ConfigError
from tokenferry.groups import EPGroup
from tokenferry.supervisor import run_processes
from tokenferry.topology import num_cpus

OnMessage = Callable[[int, dict[str, Any]], None]
PRELOAD: Final = ("torch", "tokenferry.integrations.transformers")
"""Imported once by the fork server instead of once by each rank."""
POLL_S: Final = 0.2
STORE_TIMEOUT_S: Final = 600.0
LEFTOVER_TIMEOUT_S: Final = 45.0
"""How long the other processes may take where nothing but RANK and WORLD_SIZE speaks of them: these may be left over."""
NOTICE_S: Final = 3.0
"""After which a process says what it waits for."""


def rank_environment(num_threads: int) -> dict[str, str]:
    """What processes of the command line get on top of their environment: their share of the CPUs, and no downloads."""
    return {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_launched(job: Job, num_ranks: int, on_message: OnMessage) -> list[RankResult]:
    """Start `num_ranks` processes on this machine and return their results in rank order."""
    environment = rank_environment(max(1, num_cpus() // num_ranks))
    return run_processes(
        _launched_rank, num_ranks, (job,), timeout_s=None, env=environment, preload=PRELOAD, on_message=on_message
    )


def _launched_rank(rank: int, world_size: int, store_path: str, job: Job, send: Send) -> RankResult:
    device = torch.device(job.device, rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(store_path, world_size)
    return answer_as_rank(job, EPGroup.from_store(store, rank, world_size, device), send, Path(store_path).parent)


def run_under_torchrun(job: Job, place: env.TorchrunSettings, on_message: OnMessage) -> list[RankResult] | None:
    """Take this process's place among torchrun's. Rank 0 gets every rank's messages and results, the others None."""
    device = torch.device("cuda", place.local_rank or 0) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world_size = _meet(place)
    # No default process group while the model is made and loaded: transformers' saving and loading change their ways with it.
    group = EPGroup.from_store(dist.PrefixStore("cli/group", store), rank, world_size, device)
    with _messages_through_store(group, on_message) as send:
        result = answer_as_rank(job, group, send)
    results = RendezvousStore(store, host_of(store)).under("cli/results")
    _tell(results, result)
    group.channel.barrier("cli/results", STORE_TIMEOUT_S)  # names a rank that has died
    return [_received(results, each) for each in range(world_size)] if rank == 0 else None


def _meet(place: env.TorchrunSettings) -> tuple[dist.Store, int, int]:
    """The store of all processes, once they have come.

    Raises:
        ConfigError: they do not. Variables left over from another run made a single process wait for ten minutes, in silence.
    """
    timeout_s = place.meet_timeout_s or (STORE_TIMEOUT_S if place.run_id is not None else LEFTOVER_TIMEOUT_S)
    among = f"RANK={place.rank} and WORLD_SIZE={place.world_size} say that torchrun started {place.world_size} processes"
    where = f"{place.master_addr}:{place.master_port}"
    notice = threading.Timer(NOTICE_S, typer.echo, [f"tokenferry: waiting for the others at {where}; {among}"], {"err": True})
    notice.daemon = True
    notice.start()
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{among}, but they did not meet at {where} within {timeout_s:.0f} s ({reason}); unset RANK and WORLD_SIZE to have "
            "the ranks started here, or start all of them with torchrun (TOKENFERRY_MEET_TIMEOUT_S gives them longer)"
        ) from error
    finally:
        notice.cancel()
    return store, rank, world_size


def _tell(store: RendezvousStore, result: RankResult) -> None:
    """Lays a rank's result into the store. JSON and bare float32 words: what comes over a network is never unpickled."""
    told = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "answers"}
    told["answers"] = []
    for number, answer in enumerate(result.answers):
        told["answers"].append({field.name: getattr(answer, field.name) for field in fields(answer) if field.name != "logits"})
        told["answers"][-1]["logits_shape"] = None if answer.logits is None else list(answer.logits.shape)
        for token, row in enumerate(() if answer.logits is None else answer.logits):  # each by itself: TCPStore refuses 8 MiB
            words: Any = row.contiguous().numpy().tobytes()  # its annotation says str, any bytes will do
            store.set(f"{result.rank}/logits/{number}/{token}", words)
    store.set(f"{result.rank}/result", json.dumps(told))


def _received(store: RendezvousStore, rank: int) -> RankResult:
    told = json.loads(store.get(f"{rank}/result"))
    answers = []
    for number, answer in enumerate(told.pop("answers")):
        shape, logits = answer.pop("logits_shape"), None
        if shape is not None:
            logits = torch.empty(shape, dtype=torch.float32, device="cpu")
            for token, row in enumerate(logits):
                row.copy_(torch.frombuffer(bytearray(store.get(f"{rank}/logits/{number}/{token}")), dtype=torch.float32))
        answers.append(Answer(**{**answer, "token_ids": tuple(answer["token_ids"])}, logits=logits))
    return RankResult(**{**told, "experts": tuple(told["experts"])}, answers=tuple(answers))


@contextmanager
def _messages_through_store(group: EPGroup, on_message: OnMessage) -> Iterator[Send]:
    """Each rank numbers its messages in the store that all ranks share; a thread of rank 0 reads them."""
    store = group.rendezvous.under("cli/messages")
    sent = iter(range(10**9))
    ended = threading.Event()

    def send(message: dict[str, Any]) -> None:
        store.set(f"{group.rank}/{next(sent)}", json.dumps(message))

    def read_all(next_numbers: list[int]) -> None:
        for rank in range(group.size):
            while store.has(key := f"{rank}/{next_numbers[rank]}"):
                on_message(rank, json.loads(store.get(key)))
                store.delete(key)
                next_numbers[rank] += 1

    def read_until_ended() -> None:
        next_numbers = [0] * group.size
        while not ended.wait(POLL_S):
            read_all(next_numbers)
        read_all(next_numbers)

    reader = threading.Thread(target=read_until_ended, daemon=True)
    if group.rank == 0:
        reader.start()
    try:
        yield send
    finally:
        ended.set()
        if group.rank == 0:
            reader.join()


def torchrun_place(num_ranks: int | None) -> env.TorchrunSettings | None:
    """This process's place under torchrun, or None if it was started without.

    Raises:
        ConfigError: `num_ranks` was asked for and torchrun started another number.
    """
    place = env.read(env.TorchrunSettings)
    if not place.active:
        return None
    if num_ranks is not None and num_ranks != place.world_size:
        raise ConfigError(f"--ranks is {num_ranks} but torchrun started {place.world_size} processes; leave --ranks out")
    return place
