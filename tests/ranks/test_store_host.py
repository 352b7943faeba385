"""The process that hosts the ranks' rendezvous store is killed: its peers raise our error with its rank, and in time.

The store is a TCP store, as `init_process_group` makes one. Nobody supervises these processes: `run_ranks` would end the others.
"""

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from tokenferry.transports.opening import telling_the_others

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

HOST, SIZE = 0, 3
TIMEOUT_S = 2.0
CONFIG = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32)
ROWS = (torch.ones(2, 8), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))


@dataclass(frozen=True)
class Seen:
    """What a call came to on one rank."""

    error: str
    rank: int
    phase: str
    step: int
    text: str
    seconds: float


def seen(call: Callable[[], object]) -> Seen:
    start = time.monotonic()
    error: Exception | None = None
    try:
        call()
    except Exception as problem:
        error = problem
    kind, seconds = "nothing" if error is None else type(error).__name__, time.monotonic() - start
    return Seen(kind, getattr(error, "rank", -9), getattr(error, "phase", ""), getattr(error, "step", -9), str(error), seconds)


def die_if_host(group: tf.EPGroup) -> None:
    """The others are where they wait by then."""
    if group.rank == HOST:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)


def check_for_a_while(ws: tf.Workspace) -> None:
    give_up_s = time.monotonic() + PATIENT_S
    while time.monotonic() < give_up_s:
        ws.check()
        time.sleep(0.01)


def one_step(ws: tf.Workspace, dispatcher: tf.Dispatcher) -> torch.Tensor:
    ws.begin_step(2)
    got = dispatcher.dispatch(*ROWS)
    return dispatcher.combine(torch.ones_like(got.hidden), got)


def amid(situation: str, ws: tf.Workspace, dispatcher: tf.Dispatcher) -> Seen:
    """The host dies, and this rank sees what comes of the call that it makes."""
    if situation in ("dispatch", "combine"):
        ws.begin_step(2)
    got = dispatcher.dispatch(*ROWS) if situation == "combine" else None
    die_if_host(ws.group)
    calls: dict[str, Callable[[], object]] = {
        "begin_step": lambda: ws.begin_step(2),
        "dispatch": lambda: dispatcher.dispatch(*ROWS),
        "combine": lambda: dispatcher.combine(torch.ones_like(got.hidden), got),
        "check": lambda: check_for_a_while(ws),
        "reset": ws.reset,
    }
    return seen(calls[situation])


def opened(group: tf.EPGroup, transport: str) -> tf.Workspace:
    return tf.Workspace(CONFIG, group, max_tokens_per_rank=4, transport=transport, timeout_s=PATIENT_S, open_timeout_s=PATIENT_S)


def tell_of_a_mistake(group: tf.EPGroup) -> None:
    with telling_the_others(group):
        raise ValueError("a mistake")


def reset_elsewhere(ws: tf.Workspace, dispatcher: tf.Dispatcher, folder: Path) -> None:
    survivors = tf.EPGroup.from_store(dist.FileStore(str(folder / "other-store"), SIZE - 1), ws.group.rank - 1, SIZE - 1)
    ws.reset(group=survivors)
    assert torch.equal(one_step(ws, dispatcher), torch.full((2, 8), float(SIZE - 1)))
    ws.check()


def live(rank: int, folder: Path, transport: str, situation: str) -> dict[str, Seen]:
    """A rank's life; the host's ends amid it."""
    store = store_of(rank, folder)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    group = tf.EPGroup(dist.group.WORLD)
    if situation == "open":
        die_if_host(group)
        return {"open": seen(lambda: opened(group, transport))}
    ws = opened(group, transport)
    dispatcher = ws.dispatcher()
    one_step(ws, dispatcher)  # with the patience of opening: ranks come to it as their processes start
    ws.set_timeout(TIMEOUT_S)
    found = {situation: amid(situation, ws, dispatcher)}
    afterwards: dict[str, Callable[[], object]] = {
        "check again": ws.check,
        "fail": lambda: ws.fail("no use"),
        "subset": lambda: group.subset([1, 2]),
        "reset afterwards": ws.reset,
        "tell": lambda: tell_of_a_mistake(group),
        "reset elsewhere": lambda: reset_elsewhere(ws, dispatcher, folder),
        "close": ws.close,
    }
    return {**found, **{name: seen(call) for name, call in afterwards.items()}}


def store_of(rank: int, folder: Path) -> dist.TCPStore:
    """The host takes any free port and says which one."""
    told = folder / "port"
    if rank == HOST:
        store = dist.TCPStore("127.0.0.1", 0, SIZE, is_master=True, wait_for_workers=False)
        (folder / "port-being-written").write_text(str(store.port))
        (folder / "port-being-written").rename(told)
        return store
    while not told.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", int(told.read_text()), SIZE, is_master=False)


def process_of_a_rank(rank: int, folder: str, transport: str, situation: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", TRITON_INTERPRET=str(int(transport == "p2p")))
    torch.set_num_threads(1)
    try:
        told = json.dumps({name: asdict(each) for name, each in live(rank, Path(folder), transport, situation).items()})
    except BaseException:
        told = json.dumps(traceback.format_exc())
    Path(folder, f"told-{rank}").write_text(told)
    os._exit(0)


Told = dict[int, dict[str, Seen]]


def run(transport: str, situation: str, folder: Path) -> Told:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenferry"])  # imported once, and not by each process
    ranks = [context.Process(target=process_of_a_rank, args=(r, str(folder), transport, situation)) for r in range(SIZE)]
    for process in ranks:
        process.start()
    give_up_s = time.monotonic() + 1.5 * PATIENT_S
    for process in ranks:
        process.join(max(0.0, give_up_s - time.monotonic()))
        with suppress(ProcessLookupError):
            process.kill()
        process.join()
    assert [process.exitcode for process in ranks] == [-signal.SIGKILL, 0, 0]
    told = {rank: json.loads((folder / f"told-{rank}").read_text()) for rank in range(SIZE) if rank != HOST}
    assert all(isinstance(each, dict) for each in told.values()), told
    return {rank: {name: Seen(**each) for name, each in said.items()} for rank, said in told.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Told]]:
    done: dict[tuple[str, str], Told] = {}

    def run_once(transport: str, situation: str) -> Told:
        if (transport, situation) not in done:
            done[transport, situation] = run(transport, situation, tmp_path_factory.mktemp("store"))
        return done[transport, situation]

    return run_once


PHASES = {
    "open": "open", "begin_step": "not-entered", "dispatch": "data-missing", "combine": "data-missing", "check": "data-missing",
    "reset": "reset",
}  # fmt: skip
CASES = [
    *(("collective", situation) for situation in PHASES if situation != "combine"),
    *(("p2p", situation) for situation in ("open", "begin_step", "reset")),
    *(
        pytest.param(transport, situation, marks=pytest.mark.long)
        for transport, situation in (("collective", "combine"), ("p2p", "dispatch"))
    ),
]
"""A check on p2p looks into this rank's own memory, where nothing stands before a rank has waited in vain."""


@pytest.mark.parametrize(("transport", "situation"), CASES, ids=lambda word: word)
def test_every_peer_names_the_host_of_the_store_in_time(runs: Callable[[str, str], Told], transport: str, situation: str) -> None:
    step = {"open": 0, "reset": 0, "begin_step": 2}.get(situation, 2 if situation in ("dispatch", "combine") else 1)
    for said in runs(transport, situation).values():
        found = said[situation]
        assert (found.error, found.rank, found.phase, found.step) == ("PeerFailedError", HOST, PHASES[situation], step), found
        assert "the rendezvous store, which rank 0 hosts, cannot be reached any more" in found.text
        assert found.seconds < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("transport", ["collective", "p2p"])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("check again", "PeerFailedError"),
        ("fail", "nothing"),
        ("subset", "PeerFailedError"),
        ("reset afterwards", "PeerFailedError"),
        ("tell", "ValueError"),
        ("reset elsewhere", "nothing"),
        ("close", "nothing"),
    ],
)
def test_what_comes_after_it(runs: Callable[[str, str], Told], transport: str, call: str, error: str) -> None:
    """No call hangs or raises another library's error, and the ranks go on with a group on another store."""
    for said in runs(transport, "begin_step").values():
        found = said[call]
        assert found.error == error, found
        assert found.rank == (HOST if error == "PeerFailedError" else -9)
        assert found.seconds < TIMEOUT_S + SLACK_S
