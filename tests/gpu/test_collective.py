"""The collective transport over NCCL, one process a GPU: the same cases, graphs with equal counts, and faults."""

import time

import pytest
import torch
from hypothesis import given, settings

import tokenferry as tf
from cases import CASES, Case, StepCase, begin, run_case, run_layer, same
from rank_pool import RankPools
from scenarios import PROPERTY, scenarios
from tokenferry.testing.data import make_inputs
from wide_work import WIDE, gathered

pytestmark = pytest.mark.gpu(count=2)

CONFIG = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
TWO_RANKS = sorted(
    (name for name, (world_size, case) in CASES.items() if world_size <= 2 and case.combine_order == "rank"),
    key=lambda name: -CASES[name][0],  # one rank last: it then runs in the processes of two
)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_bits_as_reference(on_ranks: RankPools, name: str) -> None:
    world_size, case = CASES[name]
    assert on_ranks(run_case, world_size, case, backend="nccl", timeout_s=120) == [sum(s.layers for s in case.steps)] * world_size


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32-out", "int64-out"])
def test_a_number_that_no_int32_holds_arrives_as_none(on_ranks: RankPools, index_dtype: torch.dtype) -> None:
    found = on_ranks(gathered, 2, "collective", index_dtype, backend="nccl", timeout_s=120)
    assert found == [[-1] * len(WIDE) * 2] * 2


def many_scenarios(group: tf.EPGroup, cases: list[Case]) -> int:
    return sum(run_case(group, case) for case in cases)


def test_random_scenarios(on_ranks: RankPools) -> None:
    drawn: list[Case] = []

    @settings(max_examples=60, **PROPERTY)
    @given(scenarios(capacity=40))
    def draw(scenario: tuple[int, Case]) -> None:
        if scenario[0] == 2:
            drawn.append(scenario[1])

    draw()
    assert len(drawn) > 5
    first, second = on_ranks(many_scenarios, 2, drawn, backend="nccl", timeout_s=300)
    assert first == second == sum(step.layers for case in drawn for step in case.steps)


def any_order(group: tf.EPGroup) -> float:
    config = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2, dtype=torch.float32)
    inputs = make_inputs(config, (4, 4), seed=1)
    own = inputs[group.rank]
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="collective", combine_order="any") as ws:
        ws.begin_step(4)
        dispatcher = ws.dispatcher()
        dispatcher.dispatch(*(t.to(ws.device) for t in (own.hidden, own.topk_idx, own.topk_weights)))
        out = dispatcher.combine(own.partial.to(ws.device))
    wanted = tf.reference.combine([i.partial for i in inputs], (4, 4), torch.float32, torch.float32)[group.rank]
    return float((out.cpu() - wanted).abs().max())


def test_any_order_is_right_within_rounding(on_ranks: RankPools) -> None:
    assert max(on_ranks(any_order, 2, backend="nccl", timeout_s=120)) < 1e-6


def graph_with_equal_counts(group: tf.EPGroup) -> None:
    config = CONFIG
    with tf.Workspace(config, group, max_tokens_per_rank=8, transport="collective", counts="equal") as ws:
        dispatcher = ws.dispatcher()
        hidden = torch.zeros(5, 64, dtype=torch.bfloat16, device=ws.device)
        rows = [hidden, torch.zeros(5, 2, dtype=torch.int32, device=ws.device), torch.zeros(5, 2, device=ws.device)]
        partial = torch.zeros(10, 64, dtype=torch.bfloat16, device=ws.device)

        def forward() -> tuple[tf.Dispatched, torch.Tensor]:
            ws.begin_step(5)
            got = dispatcher.dispatch(*rows)
            return got, dispatcher.combine(partial, got)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            got, out = forward()
        for seed in range(6):
            inputs = make_inputs(config, (5, 5), seed=seed, index_dtype=torch.int32)
            own = inputs[group.rank]
            for tensor, value in zip((*rows, partial), (own.hidden, own.topk_idx, own.topk_weights, own.partial), strict=True):
                tensor.copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            ws.check()
            same("hidden", got.hidden, torch.cat([i.hidden for i in inputs]))
            wanted = tf.reference.combine([i.partial for i in inputs], (5, 5), config.dtype, config.dtype)
            same("combined", out, wanted[group.rank])


def test_a_graph_with_equal_counts_replays_with_other_rows(on_ranks: RankPools) -> None:
    on_ranks(graph_with_equal_counts, 2, backend="nccl", timeout_s=120)


def late_in_layer(group: tf.EPGroup) -> str:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="collective", timeout_s=4) as ws:
        dispatcher = ws.dispatcher()
        own = make_inputs(CONFIG, (1, 1), seed=1)[group.rank]
        ws.begin_step(1)
        if group.rank == 1:
            time.sleep(9)
        start = time.monotonic()
        try:
            got = dispatcher.dispatch(*(rows.to(group.device) for rows in (own.hidden, own.topk_idx, own.topk_weights)))
            dispatcher.combine(got.hidden)
            torch.cuda.synchronize()
            ws.check()
        except tf.PeerError as error:
            said = f"{type(error).__name__} {error.rank} in time {time.monotonic() - start < 6}"
        ws.reset(timeout_s=60)
        for seed in range(20):
            step = StepCase((seed % 4, (seed + 1) % 4), seed=seed)
            begin(ws, step)
            run_layer(ws, dispatcher, step, 0)
        return said


def test_a_late_rank_is_named_and_after_a_reset_all_is_right(on_ranks: RankPools) -> None:
    said = on_ranks(late_in_layer, 2, backend="nccl", timeout_s=150)
    assert said == ["PeerTimeoutError 1 in time True", "PeerFailedError 1 in time True"]


def capture_beside_a_watched_call(group: tf.EPGroup) -> int:
    """Rank 1 comes late to the dispatch: rank 0's call is under way, and its watchdog asks for it every 0.2 s, while rank 0
    captures a graph of its own in the mode "global". In that mode no other thread may ask unless it has said so before."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="collective", timeout_s=4) as ws:
        dispatcher = ws.dispatcher()
        inputs = make_inputs(CONFIG, (2, 3), seed=3)
        own = inputs[group.rank]
        arguments = [rows.to(group.device) for rows in (own.hidden, own.topk_idx, own.topk_weights)]
        values, graph, stream = torch.zeros(4, device=group.device), torch.cuda.CUDAGraph(), torch.cuda.Stream(group.device)
        torch.cuda.synchronize()
        ws.begin_step((2, 3)[group.rank])
        if group.rank == 1:
            time.sleep(1.5)
        got = dispatcher.dispatch(*arguments)
        if group.rank == 0:
            with torch.cuda.stream(stream):  # not torch.cuda.graph: that synchronises first, and would wait for rank 1
                graph.capture_begin(capture_error_mode="global")
                for _ in range(10):
                    values += 1
                    time.sleep(0.1)
                graph.capture_end()
        out = dispatcher.combine(own.partial.to(group.device), got)
        torch.cuda.synchronize()
        ws.check()
        gathered = torch.cat([each.hidden for each in inputs])
        same("hidden", got.hidden, gathered)
        wanted = tf.reference.combine([each.partial for each in inputs], (2, 3), CONFIG.dtype, CONFIG.dtype)
        same("combined", out, wanted[group.rank])
        if group.rank == 0:
            graph.replay()
            torch.cuda.synchronize()
        assert ws._transport._communicator._watchdog.is_alive()
        return int(values.sum())


def test_the_watchdog_leaves_a_capture_of_another_thread_alone(on_ranks: RankPools) -> None:
    """Expected: the capture ends well and replays right, the watched dispatch too, and the watchdog is still there. Asked without
    `cuThreadExchangeStreamCaptureMode`, the event would raise in the watchdog or invalidate the capture."""
    assert on_ranks(capture_beside_a_watched_call, 2, backend="nccl", timeout_s=120) == [40, 0]


def watchdog_that_fails(group: tf.EPGroup) -> str:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="collective", timeout_s=4) as ws:
        dispatcher = ws.dispatcher()
        own = make_inputs(CONFIG, (1, 1), seed=1)[group.rank]
        ws.begin_step(1)
        if group.rank == 1:

            def fail() -> None:
                raise ValueError("out of order")

            ws._transport._communicator._watchdog._look = fail
            time.sleep(1)
        start = time.monotonic()
        try:
            got = dispatcher.dispatch(*(rows.to(group.device) for rows in (own.hidden, own.topk_idx, own.topk_weights)))
            dispatcher.combine(got.hidden)
            torch.cuda.synchronize()
            ws.check()
        except tf.PeerError as error:
            return (
                f"{type(error).__name__} {error.rank} {'ValueError: out of order' in str(error)} {time.monotonic() - start < 8}"
            )
        return "nothing"


def test_a_watchdog_that_fails_is_told_to_all_ranks(on_ranks: RankPools) -> None:
    """Expected: rank 1 raises with the watchdog's exception at its next call, and rank 0, from rank 1's record, in time."""
    assert on_ranks(watchdog_that_fails, 2, backend="nccl", timeout_s=120) == ["PeerFailedError 1 True True"] * 2
