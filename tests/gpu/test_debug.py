"""Debug mode on a GPU: what it finds in eager calls and in replays, that it waits for nothing, and that nothing of it stays."""

import gc
import warnings

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.gpu(count=1)

DEBUG = {"TOKENFERRY_DEBUG": "1"}
CONFIG = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
ROWS = 5


class Steps:
    """One rank's round trips on p2p, eager or as a graph. The experts are the identity."""

    def __init__(self, ws: tf.Workspace) -> None:
        self.ws, self.layer = ws, ws.dispatcher()
        self.hidden = torch.randn(ROWS, 64, device=ws.device).bfloat16()
        self.ids = torch.zeros(ROWS, 2, dtype=torch.int64, device=ws.device)
        self.weights = torch.ones(ROWS, 2, device=ws.device)

    def __call__(self) -> torch.Tensor:
        self.ws.begin_step(ROWS)
        got = self.layer.dispatch(self.hidden, self.ids, self.weights)
        return self.layer.combine(got.hidden, got)

    def capture(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = self()
        return graph, out


def found(group: tf.EPGroup) -> list[str]:
    """What is said of each kind of harm, first in an eager step, then in a replay."""
    said = []
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p") as ws:
        steps = Steps(ws)
        graph, out = steps.capture()
        layout, buffer = ws._transport._layout, ws._transport._buffer.tensor
        for run in (steps, graph.replay):
            for harm, repair in (
                (lambda: steps.ids[3, 1].fill_(8), lambda: steps.ids.zero_()),
                (lambda: steps.ids[3, 1].fill_(-2), lambda: steps.ids.zero_()),
                (lambda: steps.ids[3, 1].fill_(2**32 + 3), lambda: steps.ids.zero_()),
                (lambda: buffer[layout.counts.offset - 1 : layout.counts.offset].zero_(), lambda: None),
                (lambda: buffer[layout.terms.end : layout.terms.end + 1].zero_(), lambda: None),
            ):
                harm()
                run()
                torch.cuda.synchronize()
                with pytest.raises((tf.UsageError, tf.StateError)) as caught:
                    ws.check()
                said.append(str(caught.value))
                repair()
                run()
                torch.cuda.synchronize()
                ws.check()  # said once
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, steps.hidden)
    return said


def test_harm_is_found_in_eager_steps_and_in_replays() -> None:
    said = run_ranks(found, 1, backend="nccl", timeout_s=100, env=DEBUG)[0]
    print("\n" + "\n".join(said))
    assert len(said) == 10
    wanted = (
        "topk_idx held 8",
        "topk_idx held -2",
        f"topk_idx held {2**32 + 3}",
        "before 'counts', was written",
        "behind 'terms'",
    )
    for text, part in zip(said, wanted * 2, strict=True):
        assert part in text


def without_waiting(group: tf.EPGroup) -> int:
    """Bytes that eager steps, with the peers and alone, leave behind."""
    gc.disable()  # what stays alive by a cycle counts
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p") as ws:
        steps = Steps(ws)
        for _ in range(2):
            with ws.solo():
                steps()
            steps()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode says that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                with ws.solo():
                    steps()
                steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        ws.check()
        return torch.cuda.memory_stats()["allocated_bytes.all.current"] - before


def test_nothing_waits_for_the_device_and_nothing_grows() -> None:
    assert run_ranks(without_waiting, 1, backend="nccl", timeout_s=100, env=DEBUG) == [0]
