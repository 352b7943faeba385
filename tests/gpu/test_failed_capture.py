"""Captures of CUDA graphs that fail: the error that leaves, what the peer hears (nothing), and what works afterwards in the same
process."""

from collections.abc import Callable

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.graph_capture import captured
from tokenferry.graphs import GraphRunner

H, E, K, C = 64, 4, 2, 32


class OurOwnError(RuntimeError):
    """Raised by a forward."""


def raise_our_own(_: torch.Tensor) -> None:
    raise OurOwnError("in the middle of the forward")


def ask_the_device(hidden: torch.Tensor) -> None:
    hidden.sum().item()


def draw_and_ask(hidden: torch.Tensor) -> None:
    torch.rand(4, device=hidden.device, dtype=torch.float32)
    ask_the_device(hidden)


FAILURES = {"our own error": raise_our_own, "an item()": ask_the_device, "an item() after random numbers": draw_and_ask}
Place = str
"""Where in a layer the forward fails: "dispatched" or "combined"."""


class Forward:
    """One layer whose experts are the identity; `failing` is called in it."""

    def __init__(self, ws: tf.Workspace, place: Place) -> None:
        self.ws, self.place = ws, place
        self.dispatcher = ws.dispatcher()
        self.failing: Callable[[torch.Tensor], None] | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        idx = torch.zeros(hidden.shape[0], K, dtype=torch.int32, device=hidden.device)
        weights = torch.ones(hidden.shape[0], K, dtype=torch.float32, device=hidden.device)
        got = self.dispatcher.dispatch(hidden, idx, weights)
        self._fail("dispatched", hidden)
        rows = self.dispatcher.combine_input()
        rows.copy_(got.hidden if self.ws.group.rank == 0 else torch.zeros_like(got.hidden))
        combined = self.dispatcher.combine(rows, got)
        self._fail("combined", hidden)
        return combined

    def _fail(self, place: Place, hidden: torch.Tensor) -> None:
        if self.failing is not None and place == self.place and torch.cuda.is_current_stream_capturing():
            self.failing(hidden)


def open_workspace(group: tf.EPGroup) -> tf.Workspace:
    config = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K, dtype=torch.float32)
    return tf.Workspace(config, group, max_tokens_per_rank=C, transport="p2p", timeout_s=10.0)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "none"


def everything_works(forward: Forward) -> None:
    """Eager steps, a capture and its replays, random numbers and memory, on a rank whose capture has failed and on its peer."""
    ws = forward.ws
    device = ws.device
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    hidden = torch.rand(5, H, device=device, dtype=torch.float32)
    ws.begin_step(5)
    assert torch.equal(forward(hidden), hidden)
    runner = GraphRunner(ws, forward, [8], inputs=[hidden])
    for _ in range(3):
        assert torch.equal(runner(hidden), hidden)
    runner.close()
    ws.check()
    torch.cuda.empty_cache()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        torch.rand(1 << 20, device=device, dtype=torch.float32)
    del pool
    torch.ones(1 << 16, dtype=torch.float32, device="cpu", pin_memory=True).to(device, non_blocking=True)
    torch.cuda.synchronize(device)


def fail_in_a_runner(group: tf.EPGroup, failure: str, place: Place) -> str:
    """On rank 0; rank 1 meanwhile begins the next step, and waits in it."""
    with open_workspace(group) as ws:
        forward = Forward(ws, place)
        said = "none"
        for _ in range(2):
            if group.rank == 0:
                forward.failing = FAILURES[failure]
                said = error_of(lambda: GraphRunner(ws, forward, [8, 4], inputs=[torch.empty(0, H)]))
                forward.failing = None
            everything_works(forward)
        return said


def fail_in_torchs_own(group: tf.EPGroup, failure: str, place: Place) -> str:
    """A capture that the caller makes, with a begin_step in it, and the next one on another pool of memory, as it is advised."""
    with open_workspace(group) as ws:
        forward = Forward(ws, place)
        hidden = torch.rand(5, H, device=ws.device, dtype=torch.float32)
        said = "none"
        if group.rank == 0:
            stream = torch.cuda.Stream()
            forward.failing = FAILURES[failure]

            def capture() -> torch.cuda.CUDAGraph:
                graph = torch.cuda.CUDAGraph()
                with captured(graph, stream=stream, pool=torch.cuda.graph_pool_handle()):
                    ws.begin_step(5)
                    try:
                        forward(hidden)
                    except BaseException as error:
                        ws.tell_peers(error)
                        raise
                return graph

            said = error_of(capture)
            forward.failing = None
            assert error_of(capture) == "none"
        everything_works(forward)
        return said


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("place", ["dispatched", "combined"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("worker", [fail_in_a_runner, fail_in_torchs_own], ids=lambda worker: worker.__name__)
def test_its_own_error_leaves_and_both_ranks_go_on(
    on_ranks: RankPools, worker: Callable[..., str], failure: str, place: Place
) -> None:
    said, other = on_ranks(worker, 2, failure, place, backend="nccl", timeout_s=60)
    if failure == "our own error":
        assert said == "OurOwnError: in the middle of the forward"
    else:
        assert said.startswith("AcceleratorError: CUDA error: operation not permitted when stream is capturing"), said
    assert other == "none"


def fail_explicitly(group: tf.EPGroup) -> tuple[str, str]:
    """`fail` within a capture is the caller's own word: it reaches the peer, and the capture goes on."""
    with open_workspace(group) as ws:
        if group.rank == 1:
            return error_of(lambda: (ws.begin_step(1), ws.check())), "none"
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        number = torch.zeros(1, dtype=torch.int32, device=ws.device)

        def capture() -> None:
            with captured(graph, stream=stream):
                number.add_(1)
                ws.fail("a watchdog")

        said = error_of(capture)
        graph.replay()
        return said, str(number.item())


@pytest.mark.gpu(count=2)
def test_an_explicit_fail_in_a_capture_reaches_the_peer(on_ranks: RankPools) -> None:
    (said, number), (heard, _) = on_ranks(fail_explicitly, 2, backend="nccl", timeout_s=60)
    assert (said, number) == ("none", "1")
    assert heard.startswith("PeerFailedError")
    assert "a watchdog" in heard
