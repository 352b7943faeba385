"""Debug mode on a GPU: what it finds in eager calls and in replays, that it waits for nothing, and that nothing of it stays."""

import gc
import warnings

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.step import StepRequest
from tokenferry.transports.debug import DebugTransport
from tokenferry.transports.wrapper import TransportWrapper

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
        layout, buffer = ws._transport.memory.layout, ws._transport.memory.buffer
        for run in (steps, graph.replay):
            for harm, repair in (
                (lambda: steps.ids[3, 1].fill_(8), lambda: steps.ids.zero_()),
                (lambda: steps.ids[3, 1].fill_(-2), lambda: steps.ids.zero_()),
                (lambda: ws.step.tokens_per_rank.data.add_(1), lambda: None),  # .data: PyTorch does not count this write
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


def test_harm_is_found_in_eager_steps_and_in_replays(on_ranks: RankPools) -> None:
    said = on_ranks(found, 1, backend="nccl", timeout_s=100, env=DEBUG)[0]
    print("\n" + "\n".join(said))
    wanted = (
        "topk_idx held 8",
        "topk_idx held -2",
        "tensors of a step were written",
        f"topk_idx held {2**32 + 3}",
        "before 'counts', was written",
        "behind 'terms'",
    )
    for text, part in zip(said, wanted * 2, strict=True):
        assert part in text


class PublishesWrong(TransportWrapper):
    """Behind a step's exchange, one number of what was published becomes another."""

    def __init__(self, debug: DebugTransport, ws: tf.Workspace, place: int, value: int) -> None:
        super().__init__(debug.inner)
        self.packed, self.place, self.value = ws._step_tensors.packed.data, place, value

    def begin_step(self, request: StepRequest, layer: int) -> None:
        super().begin_step(request, layer)
        self.packed[self.place].fill_(self.value)


def wrong_counts(group: tf.EPGroup) -> list[str]:
    """What is said of a step that publishes what cannot be, first eager, then in a replay; and that right steps go on."""
    said = []
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p") as ws:
        steps, transport = Steps(ws), ws._transport
        steps()
        for place, value in ((0, ROWS - 1), (1, 1), (2, ROWS - 1), (3, 9)):  # sum, offset, largest; more rows than there may be
            wrong = DebugTransport(PublishesWrong(transport, ws, place, value), transport._checks)

            def begin(wrong: DebugTransport = wrong) -> None:
                wrong.begin_step(StepRequest(9, ROWS, ROWS), -1)

            begin()  # before the capture: what it launches has to be loaded
            said.append(told(ws))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                begin()
            graph.replay()
            said.append(told(ws))
            assert torch.equal(steps(), steps.hidden)
            ws.check()
    return said


def told(ws: tf.Workspace) -> str:
    torch.cuda.synchronize()
    with pytest.raises(tf.StateError) as caught:
        ws.check()
    return str(caught.value)


def test_counts_that_cannot_be_are_found_in_eager_steps_and_in_replays(on_ranks: RankPools) -> None:
    [said] = on_ranks(wrong_counts, 1, backend="nccl", timeout_s=100, env=DEBUG)
    assert len(said) == 8
    assert {text.split(",")[0] for text in said} == {"a step published counts that do not fit one another"}


def poisoned(group: tf.EPGroup) -> dict[str, bool]:
    """Whether NaN stands where nothing valid does: before the first step, then in an eager step, then in a replay."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p") as ws:
        steps, gathered = Steps(ws), ws._transport.fixed_rows
        rows, weights = gathered.hidden_RH, gathered.topk_weights_RK
        seen = {"rows before the first step": bool(rows.isnan().all()), "weights too": bool(weights.isnan().all())}

        def step() -> torch.Tensor:
            ws.begin_step(ROWS)
            got = steps.layer.dispatch(steps.hidden, steps.ids, steps.weights)
            unwritten = steps.layer.combine_input().isnan().all()
            steps.layer.combine(got.hidden, got)
            return torch.stack([unwritten, rows.isnan().all(), weights.isnan().all()])

        names = ("combine_input after dispatch", "rows after combine", "weights after combine")
        seen |= {f"eager: {name}": flag for name, flag in zip(names, step().tolist(), strict=True)}
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            flags = step()
        flags.zero_()
        ws._transport.combine_input().zero_()
        rows.zero_()
        weights.zero_()
        graph.replay()
        torch.cuda.synchronize()
        ws.check()
        return seen | {f"replay: {name}": flag for name, flag in zip(names, flags.tolist(), strict=True)}


def test_rows_and_sums_that_nobody_may_read_are_poisoned(on_ranks: RankPools) -> None:
    [seen] = on_ranks(poisoned, 1, backend="nccl", timeout_s=100, env=DEBUG)
    assert len(seen) == 8
    assert [name for name, is_nan in seen.items() if not is_nan] == []


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


def test_nothing_waits_for_the_device_and_nothing_grows(on_ranks: RankPools) -> None:
    assert on_ranks(without_waiting, 1, backend="nccl", timeout_s=100, env=DEBUG) == [0]
