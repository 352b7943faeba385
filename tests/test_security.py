"""Memory and meeting places are this user's alone; what peers send is data, never code; caches are checked before use."""

import ast
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry
import tokenferry as tf
from faults import CAPACITY, CONFIG, one_step
from patience import PATIENT_S, SLACK_S
from sockets import Socket, of_own_process
from tokenferry.cli import start
from tokenferry.cli.job import Answer, RankResult
from tokenferry.demo import manifest
from tokenferry.groups import EPGroup
from tokenferry.supervisor import run_processes
from tokenferry.testing import run_ranks
from tokenferry.transports.symmetric import buffer as memory

ROOT = Path(tokenferry.__file__).parent
OBJECTS = {
    "all_gather_object",
    "broadcast_object_list",
    "send_object_list",
    "allow_pickle",
    "gather_object",
    "scatter_object_list",
    "recv_object_list",
}
UNPICKLES = {"pickle", "torch.load", *OBJECTS, "cloudpickle", "marshal"}


# --- shared memory ------------------------------------------------------------------------------------------------------


NUM_BYTES = 4096


@pytest.fixture
def opened() -> Iterator[list[int]]:
    """Descriptors, closed when the test ends."""
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def identity(path: str) -> list[int]:
    return memory._identity(os.stat(path))


def offered(opened: list[int], mode: int = 0o600, num_bytes: int = NUM_BYTES) -> tuple[str, list[int]]:
    """Memory as a peer offers it."""
    opened.append(os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600))
    os.fchmod(opened[-1], mode)
    os.truncate(opened[-1], num_bytes)
    path = f"/proc/{os.getpid()}/fd/{opened[-1]}"
    return path, identity(path)


def test_a_peers_memory_of_this_user_alone_is_mapped(opened: list[int]) -> None:
    memory._map_of_peer(*offered(opened), NUM_BYTES).close()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666], ids=oct)
def test_memory_that_others_may_read_or_write_is_refused(opened: list[int], mode: int) -> None:
    with pytest.raises(ValueError, match="is not this user's alone"):
        memory._map_of_peer(*offered(opened, mode), NUM_BYTES)


def test_memory_of_another_size_is_refused(opened: list[int]) -> None:
    with pytest.raises(ValueError, match="has 64 bytes, not 4096"):
        memory._map_of_peer(*offered(opened, num_bytes=64), NUM_BYTES)


def test_a_path_elsewhere_is_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "file"), "/proc/self/mem", f"/proc/{os.getpid()}/fd/../../1/mem", "/dev/shm/x"):
        with pytest.raises(ValueError, match="shared memory must be a descriptor of its owner"):
            memory._map_of_peer(path, [0, 0], NUM_BYTES)


def test_a_file_with_a_name_and_what_is_no_file_are_refused(opened: list[int], tmp_path: Path) -> None:
    named = os.open(tmp_path / "named", os.O_CREAT | os.O_RDWR, 0o600)
    os.truncate(named, NUM_BYTES)
    opened += [named, *os.pipe()]
    for descriptor in opened[:2]:
        with pytest.raises(ValueError, match="is not memory without a name"):
            memory._map_of_peer(path := f"/proc/{os.getpid()}/fd/{descriptor}", identity(path), NUM_BYTES)


def test_the_same_path_to_other_memory_is_refused(opened: list[int]) -> None:
    """As between ranks that see different processes under one number."""
    (_, one), (path, _) = offered(opened), offered(opened)
    with pytest.raises(ValueError, match="is other memory here than where the peer runs"):
        memory._map_of_peer(path, one, NUM_BYTES)


def shared_memory(rank: int, world_size: int, store_path: str) -> list[tuple[int, int, list[str]]]:
    """Modes, numbers of names, and what is in /dev/shm, as they are when a rank maps its peers' memory."""
    seen, map_of_peer = [], memory._map_of_peer

    def look(path: str, identity: list[int], num_bytes: int) -> Any:
        status = os.stat(path)
        seen.append((stat.S_IMODE(status.st_mode), status.st_nlink, [name for name in os.listdir("/dev/shm") if "ferry" in name]))
        return map_of_peer(path, identity, num_bytes)

    memory._map_of_peer = look
    group = EPGroup.from_store(dist.FileStore(store_path, world_size), rank, world_size, "cpu")
    for number in range(2):
        memory.SymmetricBuffer(group, NUM_BYTES, f"buffer{number}", 20).close()
    return seen


@pytest.mark.ranks
def test_shared_memory_has_mode_0600_and_never_a_name() -> None:
    seen = [each for rank in run_processes(shared_memory, 2, timeout_s=60) for each in rank]
    assert seen == [(0o600, 0, [])] * 4


def full(rank: int, world_size: int, store_path: str) -> tuple[str, float]:
    """Rank 1's share of the memory is not to be had."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    group = EPGroup.from_store(dist.FileStore(store_path, world_size), rank, world_size, "cpu")
    if rank == 1:
        os.posix_fallocate = refuse
    start = time.monotonic()
    with pytest.raises(tf.TransportUnavailableError) as caught:
        memory.SymmetricBuffer(group, NUM_BYTES, "buffer", PATIENT_S / 2)
    return str(caught.value), time.monotonic() - start


@pytest.mark.ranks
def test_a_full_dev_shm_is_told_by_all_ranks_at_once() -> None:
    for said, waited_s in run_processes(full, 2, timeout_s=60):
        assert "rank 1 failed to allocate shared memory: OSError: [Errno 28] no space left" in said
        assert waited_s < SLACK_S


def test_threads_that_open_at_once_leave_the_mask_as_it_was() -> None:
    before = os.umask(0o027)
    try:
        with memory.PRIVATE_FILES:
            thread = threading.Thread(target=memory.PRIVATE_FILES.__enter__)
            thread.start()
            thread.join()
        assert os.umask(0o077) == 0o077, "one is inside still"
        memory.PRIVATE_FILES.__exit__()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


# --- meeting places -----------------------------------------------------------------------------------------------------


def meeting_place(rank: int, world_size: int, store_path: str) -> list[int]:
    return [
        stat.S_IMODE(os.stat(store_path).st_mode) if os.path.exists(store_path) else 0,
        os.stat(Path(store_path).parent).st_mode,
    ]


@pytest.mark.ranks
def test_rank_processes_meet_in_a_folder_with_mode_0700_and_without_a_port() -> None:
    for _, mode in run_processes(meeting_place, 1, timeout_s=60):
        assert stat.S_IMODE(mode) == 0o700


def sockets_at_work(group: EPGroup, transport: str) -> list[Socket]:
    """What this rank has open between two steps."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=CAPACITY, transport=transport) as ws:
        dispatchers = [ws.dispatcher()]
        assert one_step(ws, dispatchers, 0)
        found = of_own_process()
        group.channel.barrier("looked", 20)
        return found


def test_every_socket_that_is_open_is_found() -> None:
    before = of_own_process()
    families = [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_ALG]
    kinds = []
    for family in families:
        try:
            with socket.socket(family, socket.SOCK_SEQPACKET if family == socket.AF_ALG else socket.SOCK_DGRAM) as one:
                if family in families[:2]:
                    one.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
                elif family == socket.AF_NETLINK:
                    one.bind((0, 0))  # the kernel lists it from then on
                found = of_own_process()
        except OSError:
            continue  # this kernel has no such family
        for each in before:
            found.remove(each)
        kinds += [each.kind for each in found]
        assert len(found) == 1, f"{family.name} was not seen"
    assert {"udp", "unix"} <= set(kinds)
    print("kinds seen:", *kinds)


@pytest.mark.interpreter
def test_symmetric_memory_needs_no_socket_at_all() -> None:
    for found in run_ranks(sockets_at_work, 2, "p2p", env={"TRITON_INTERPRET": "1"}):
        assert [each.kind for each in found] == ["unix"], "the pipe to the supervisor, and nothing else"
        assert found[0].where == "", "a pair without a name, which nobody can connect to"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_launched_ranks_speak_gloo_over_the_loopback_alone(world_size: int) -> None:
    for found in run_ranks(sockets_at_work, world_size, "collective"):
        over_network = [each for each in found if each.kind != "unix"]
        assert any(each.listens for each in over_network), "gloo listens somewhere, or this test looks at nothing"
        assert {each.kind for each in over_network} <= {"tcp", "tcp6"}
        assert [each for each in over_network if not each.on_loopback] == []
        assert {each.where for each in found if each.kind == "unix"} == {""}


@pytest.mark.ranks
def test_the_fork_servers_socket_file_has_mode_0600_in_a_folder_with_mode_0700() -> None:
    run_processes(meeting_place, 1, timeout_s=60)
    address = Path(forkserver._forkserver._forkserver_address)
    assert stat.S_ISSOCK(address.stat().st_mode)
    assert stat.S_IMODE(address.stat().st_mode) == 0o600
    assert stat.S_IMODE(address.parent.stat().st_mode) == 0o700


def test_the_socket_file_of_a_rendezvous_is_the_users_alone_whatever_the_mask(tmp_path: Path) -> None:
    """PyTorch makes it as `bind` does: with what the mask of the process allows."""
    path = tmp_path / "socket"

    def rendezvous(tensor: object, name: object) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
            made.bind(str(path))
        return stat.S_IMODE(path.stat().st_mode)

    buffer = memory.SymmetricBuffer(EPGroup.from_store(dist.HashStore(), 0, 1, "cpu"), 64, "name", 1.0)
    before = os.umask(0)
    try:
        assert buffer._rendezvous(rendezvous) & 0o077 == 0
        assert os.umask(0) == 0, "the mask is as it was"
    finally:
        os.umask(before)


# --- data, not code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "supervisor.py"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_is_unpickled(path: Path) -> None:
    """Only `launch` pickles, between a supervisor and the processes that it started, over pipes of their own."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            used |= {node.attr, ast.unparse(node)}
        elif isinstance(node, ast.keyword):
            used.add(node.arg or "")
    assert not used & UNPICKLES


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_a_pickle_from_a_peer_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    store = dist.HashStore()
    group = EPGroup.from_store(store, 0, 2, "cpu")
    store.set("what/1", pickle.dumps(Evil()))
    with pytest.raises(Exception):  # noqa: B017 - whatever it is, nothing has run
        group.channel.exchange("what", 1, 1.0)
    assert not (tmp_path / "executed").exists()


def test_results_come_through_the_store_as_they_were_sent() -> None:
    def answer(prompt: int, logits: torch.Tensor | None) -> Answer:
        return Answer(prompt=prompt, num_prompt_tokens=3, token_ids=(5, 7), text="ä", complete=True, logits=logits)

    def result(rank: int, answers: tuple[Answer, ...]) -> RankResult:
        numbers = {
            "generate_s": 0.1,
            "total_s": 1 / 3,
            "communication_s": 0.0,
            "num_layers": 2,
            "num_experts": 8,
            "num_threads": 1,
        }
        names = {"device": "cpu", "transport": "collective", "dtype": "float32"}
        return RankResult(rank=rank, answers=answers, experts=(0, 4), peak_memory_bytes=2**40, **names, **numbers)

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    logits = torch.randn(30, 100_000)  # 12 MB: more than one value of that store may have
    sent = [result(0, (answer(0, None),)), result(1, (answer(1, logits), answer(2, torch.empty(0, 100_000))))]
    for each in sent:
        start._tell(store, each)
    got = [start._received(store, rank) for rank in range(2)]
    assert repr(got) == repr(sent)
    assert torch.equal(got[1].answers[0].logits, logits)


# --- caches -------------------------------------------------------------------------------------------------------------


def test_a_changed_cache_file_is_noticed_before_use(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(100))
    manifest.write(tmp_path)
    assert manifest.damage(tmp_path) is None
    (tmp_path / "weights").write_bytes(bytes(99) + b"x")
    assert manifest.damage(tmp_path) == "weights has other contents than were written"
    (tmp_path / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT, "files": {"weights": 3}}))
    assert "cannot be read" in str(manifest.damage(tmp_path))
