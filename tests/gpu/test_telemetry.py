"""Telemetry on GPUs: a delayed rank over peer memory and over NCCL, in bulk rounds too, and in replayed graphs."""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import telemetry_work as work
import tokenferry as tf
from faults import CONFIG, one_step
from nvtx_ranges import cupti_path, ranges_of
from rank_pool import RankPools
from telemetry_loads import check_loads_of_random_numbers, loads_of_random_numbers
from tokenferry.graph_capture import captured
from tokenferry.testing.ranks import run_virtual

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)
VIRTUAL = {"CUDA_MODULE_LOADING": "EAGER", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # as in test_symmetric.py


@two_gpus
@pytest.mark.parametrize("within", [False, True], ids=["entering", "within"])
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_a_delayed_rank_is_found_by_its_waits(on_ranks: RankPools, transport: str, within: bool) -> None:
    work.check_delayed(on_ranks(work.delayed, 2, transport, 1, within, backend="nccl", timeout_s=90), 1, within)


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_loads_and_rows_are_those_counted_by_hand(on_ranks: RankPools, transport: str) -> None:
    for told in on_ranks(work.counts_by_hand, 2, transport, backend="nccl", timeout_s=90):
        work.check_counts_by_hand(told)


@two_gpus
@pytest.mark.parametrize("formats", work.BYTES_OF_ROUNDS.values(), ids=work.BYTES_OF_ROUNDS)
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_bytes_of_rows_and_terms(on_ranks: RankPools, transport: str, formats: tuple[dict[str, Any], int, int]) -> None:
    settings, *sizes = formats
    told = on_ranks(work.bytes_of_rounds, 2, transport, work.TOKENS_OF_ROUNDS, settings, backend="nccl", timeout_s=90)
    work.check_bytes_of_rounds(told, work.TOKENS_OF_ROUNDS, *sizes)


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_nothing_is_counted_while_it_is_stopped(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(work.stops_and_starts, 2, transport, backend="nccl", timeout_s=90) == [[1, 1, 2]] * 2


@two_gpus
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_compiled_code_is_counted(on_ranks: RankPools, transport: str) -> None:
    work.check_counts_of_compiled_code(on_ranks(work.counts_of_compiled_code, 2, transport, backend="nccl", timeout_s=90))


@two_gpus
@pytest.mark.parametrize("fails", [False, True], ids=["times-out", "fails"])
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_the_error_of_a_late_rank_says_who_was_late_before(on_ranks: RankPools, transport: str, fails: bool) -> None:
    _, reading, num_steps = on_ranks(work.error_of_a_late_rank, 2, transport, fails, backend="nccl", timeout_s=90)[0]
    assert reading.startswith("rank 1 was last to enter in")
    assert num_steps >= 3


def replays(group: tf.EPGroup, num_tokens: int) -> dict[str, Any]:
    """A captured step of two rounds, replayed five times with rank 1 late by 50 ms; a snapshot is read amid the replays, while
    rank 0's kernel waits."""
    with work.opened(group, "p2p", max_tokens_per_rank=num_tokens, telemetry=True) as ws:
        dispatcher = ws.dispatcher()
        hidden = torch.ones(num_tokens, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
        ids = torch.zeros(num_tokens, CONFIG.topk, dtype=torch.int32, device=ws.device)
        weights = torch.ones(num_tokens, CONFIG.topk, device=ws.device)

        def step() -> None:
            ws.begin_step(num_tokens)
            for _ in range(2):
                got = dispatcher.dispatch(hidden, ids, weights)
                dispatcher.combine(got.hidden)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with captured(graph, stream=stream):
            step()
        read_s = 0.0
        before = ws.telemetry.snapshot()
        for _ in range(5):
            group.channel.barrier(group.unique_name("replay"), 30.0)
            if group.rank == 1:
                time.sleep(work.DELAY_S)
            graph.replay()
            if group.rank == 0:
                start_s = time.perf_counter()
                ws.telemetry.snapshot()
                read_s = max(read_s, time.perf_counter() - start_s)
            torch.cuda.synchronize()
        ws.check()
        after = ws.telemetry.snapshot()
        waited_ns = after.waits.counts_ns[1 - group.rank] - before.waits.counts_ns[1 - group.rank]
        return {"waited_ns": waited_ns, "read_s": read_s, **after.to_dict()}


@two_gpus
@pytest.mark.parametrize("num_tokens", [4, 4096], ids=["slots", "bulk"])
def test_replayed_graphs_are_counted_and_read_without_waiting_for_them(on_ranks: RankPools, num_tokens: int) -> None:
    first, second = on_ranks(replays, 2, num_tokens, backend="nccl", timeout_s=90)
    assert 0.6 * 5 * work.DELAY_S < first["waited_ns"] / 1e9 < 3 * 5 * work.DELAY_S
    assert second["waited_ns"] < first["waited_ns"] / 10
    assert first["num_rounds"] == 12
    assert first["loads"][0][0] == 12 * 2 * num_tokens * CONFIG.topk
    assert first["read_s"] < work.DELAY_S


WIDE = tf.MoEConfig(hidden_size=7168, num_experts=64, topk=3)
"""Of whose rows a launch has more packets than threads from some hundred rows on."""
STEPS = ((512, 512), (3, 1), (32, 32), (1000, 700), (1024, 1), (0, 600), (512, 511))
"""Rounds in slots of few rows and of many, and bulk rounds, also of a rank with few rows."""


@two_gpus
@pytest.mark.parametrize("settings", [{}, {"combine_dtype": torch.float8_e4m3fn}], ids=["same", "float8-terms"])
@pytest.mark.parametrize("transport", ["p2p", "collective"])
def test_numbers_of_somebody_elses_experts_are_counted(on_ranks: RankPools, transport: str, settings: dict[str, Any]) -> None:
    seen = on_ranks(loads_of_random_numbers, 2, transport, STEPS, WIDE, settings, backend="nccl", timeout_s=90)
    check_loads_of_random_numbers(seen)


@two_gpus
def test_numbers_beside_rows_of_bytes_are_counted(on_ranks: RankPools) -> None:
    """Their dispatch is bulk where the combine is in slots, so that a launch of its own counts them."""
    settings = {"dispatch_format": "bytes"}
    seen = on_ranks(loads_of_random_numbers, 2, "p2p", ((3, 1), (8, 8)), CONFIG, settings, backend="nccl", timeout_s=90)
    check_loads_of_random_numbers(seen)


def virtual_loads(group: tf.EPGroup) -> list[tuple[list[int], list[int]]]:
    steps = ((2, 3, 1, 0), (600, 0, 5, 513), (700, 600, 800, 520))
    return run_virtual(loads_of_random_numbers, 4, "p2p", steps, CONFIG, {}, device=group.device)


@one_gpu
def test_numbers_of_four_ranks_are_counted(on_ranks: RankPools) -> None:
    check_loads_of_random_numbers(on_ranks(virtual_loads, 1, backend="nccl", timeout_s=90, env=VIRTUAL)[0])


def virtual(group: tf.EPGroup) -> list[work.Seen]:
    return run_virtual(work.delayed, 4, "p2p", 2, False, device=group.device)


@one_gpu
def test_of_four_ranks_the_late_one_is_found(on_ranks: RankPools) -> None:
    """Each lane of a warp waits for a rank of its own: the early ones must not be charged with the late one's wait."""
    seen = on_ranks(virtual, 1, backend="nccl", timeout_s=90, env=VIRTUAL)[0]
    work.check_delayed(seen, 2, within=False)
    for rank in (0, 1, 3):
        others = [wait for source, wait in enumerate(seen[rank][0]["waited_ns"]) if source not in (rank, 2)]
        assert max(others) < seen[rank][0]["waited_ns"][2] / 3


@two_gpus
def test_float8_terms_are_waited_for_by_source(on_ranks: RankPools) -> None:
    work.check_float8_terms_delayed(on_ranks(work.float8_terms_delayed, 2, 1, backend="nccl", timeout_s=90), 1)


@two_gpus
def test_a_trace_has_the_steps_of_both_ranks_on_one_time_line(on_ranks: RankPools, tmp_path: Path) -> None:
    """By the GPUs' own timers, which tick apart: a step's counts come to both at one moment, to some microseconds."""
    path = tmp_path / "trace.json"
    error_ns = on_ranks(work.traced, 2, "p2p", str(path), backend="nccl", timeout_s=90)[0]
    work.check_traced(json.loads(path.read_text()), error_ns, "p2p")
    assert error_ns < 1e6


@two_gpus
@pytest.mark.parametrize("as_graph", [False, True], ids=["eager", "graph"])
def test_our_own_experts_count_their_rows(on_ranks: RankPools, as_graph: bool) -> None:
    seen = on_ranks(work.loads_of_own_experts, 2, "p2p", as_graph, backend="nccl", timeout_s=90)
    work.check_loads_of_own_experts(seen)


def read_by_another_thread(group: tf.EPGroup) -> int:
    """Steps, then closing and a reset's closing, while a thread reads without a pause. How many snapshots it got."""
    taken, is_over = [0], threading.Event()

    def read(ws: tf.Workspace) -> None:
        while not is_over.is_set():
            with contextlib.suppress(tf.StateError):  # the moment in which it is closed
                ws.telemetry.snapshot()
                taken[0] += 1

    for again in range(4):
        is_over.clear()
        with work.opened(group, "p2p", telemetry=True) as ws:
            thread = threading.Thread(target=read, args=(ws,))
            thread.start()
            dispatchers = [ws.dispatcher()]
            for step in range(20):
                assert one_step(ws, dispatchers, step)
            if again % 2:
                ws.reset()
                assert one_step(ws, dispatchers, 0)
        is_over.set()
        thread.join()
    return taken[0]


@two_gpus
def test_a_thread_may_read_while_the_workspace_closes(on_ranks: RankPools) -> None:
    assert min(on_ranks(read_by_another_thread, 2, backend="nccl", timeout_s=90)) > 20


def virtual_float8(group: tf.EPGroup) -> list[dict[str, Any]]:
    return run_virtual(work.float8_terms_delayed, 4, 2, device=group.device)


@one_gpu
def test_of_four_ranks_float8_terms_are_waited_for_by_source(on_ranks: RankPools) -> None:
    seen = on_ranks(virtual_float8, 1, backend="nccl", timeout_s=90, env=VIRTUAL)[0]
    work.check_float8_terms_delayed(seen, 2)


def ranges_seen(group: tf.EPGroup, path: str) -> list[str]:
    """Of two steps with two layers."""
    with work.opened(group, "local", telemetry=True) as ws:
        dispatchers = [ws.dispatcher(), ws.dispatcher()]
        return ranges_of(path, lambda: [one_step(ws, dispatchers, step) for step in (1, 2)])


@one_gpu
def test_a_profiler_sees_the_ranges(on_ranks: RankPools) -> None:
    path = cupti_path()
    if path is None:
        pytest.skip("needs CUPTI, which this torch has not loaded")
    seen = on_ranks(ranges_seen, 1, path, backend="nccl", timeout_s=90, env={"NVTX_INJECTION64_PATH": path})[0]
    step = ["begin_step", "dispatch[0]", "combine[0]", "dispatch[1]", "combine[1]"]
    assert [name for name in seen if name.startswith("tokenferry.")] == [f"tokenferry.{name}" for name in step * 2]
