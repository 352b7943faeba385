"""What telemetry's host side makes of known figures: alignment of clocks, Prometheus, one line of JSON, kept steps."""

import contextlib
import importlib.util
import io
import json
import math
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tokenferry as tf
from tokenferry.kernels.wait_board import COMBINE, DISPATCH
from tokenferry.telemetry import Recorder, Snapshot
from tokenferry.telemetry.recorder import COUNTS, NUM_TOKEN_STEPS
from tokenferry.telemetry.trace import align, trace_events, write_trace
from tokenferry.transports import counting
from tokenferry.transports.symmetric import side_stream

has_prometheus = importlib.util.find_spec("prometheus_client") is not None


def counted(rank: int = 0) -> Snapshot:
    recorder = Recorder(rank, 2, 3, 8, 4, torch.device("cpu"))
    recorder.step_began(1)
    recorder.waited(COUNTS, -1, 1 - rank, 1_500_000_000)
    recorder.waited(DISPATCH, 4, 1 - rank, 200)
    recorder.waited(DISPATCH, 4, 1 - rank, 100)
    recorder.waited(COMBINE, 4, rank, 70)
    recorder.came(4, (2, 3))
    recorder.loads[4] += torch.tensor([1, 0, 4])
    return recorder.snapshot()


def begun(taken: Snapshot, moments: list[int]) -> Snapshot:
    steps = [
        {"step": number, "begin_ns": moment, "waits_ns": [None, None], "rounds": []}
        for number, moment in enumerate(moments, start=1)
    ]
    return Snapshot.from_dict({**taken.to_dict(), "steps": steps})


def test_what_is_noted_is_what_is_read() -> None:
    taken = counted()
    assert taken.waits.counts_ns == (0, 1_500_000_000)
    assert taken.waits.dispatch_ns == (0, 300)
    assert taken.waits.shared_ns == 70
    assert taken.rows == (2, 3)
    assert taken.num_bytes == (16, 24)
    assert taken.num_term_bytes == (8, 8)  # a term of 4 bytes from each rank for each of this one's two rows
    assert taken.loads == ((0, 0, 0),) * 4 + ((1, 0, 4),)
    [layer] = taken.layers
    assert (layer.layer, layer.num_rounds, layer.dispatch_ns) == (4, 1, (0, 300))
    [step] = taken.steps
    assert step.waits_ns == (None, 1_500_000_000)
    assert [(each.layer, each.phase, each.waits_ns, each.shared_ns) for each in step.rounds] == [
        (4, "dispatch", (None, 300), None),
        (4, "combine", (None, None), 70),
    ]


def test_a_round_begins_with_its_first_wait() -> None:
    """Whichever source that was for: the next one is waited for once that has come."""
    recorder = Recorder(0, 3, 3, 8, 4, torch.device("cpu"))
    recorder.step_began(1)
    before_ns = time.time_ns()
    recorder.waited(DISPATCH, 0, 2, 0)
    time.sleep(0.02)
    recorder.waited(DISPATCH, 0, 1, 0)
    (step,) = recorder.snapshot().steps
    (found,) = step.rounds
    assert 0 <= found.begin_ns - before_ns < 20_000_000


def test_only_the_last_steps_are_kept() -> None:
    recorder = Recorder(0, 2, 3, 8, 4, torch.device("cpu"))
    for step in range(1, 301):
        recorder.step_began(step)
        recorder.waited(COUNTS, -1, 1, step)
        recorder.waited(DISPATCH, 0, 1, step)
        recorder.came(0, (1, 1))
    steps = recorder.snapshot().steps
    assert [step.step for step in steps] == list(range(173, 301))
    assert all(step.waits_ns == (None, step.step) for step in steps)
    assert [step.step for step in steps if step.rounds] == list(range(285, 301))


def steps_meanwhile(recorder: Recorder) -> int:
    """Two threads read without a pause, while this one begins steps with as many rows as their numbers say. How many steps."""
    is_over = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not is_over.is_set():
                tokens = recorder.snapshot().tokens
                first = tokens[0][0] if tokens else 1
                assert tokens == tuple((step, step) for step in range(first, first + len(tokens)))
        except BaseException as error:  # whatever it is, this thread would not hear of it
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    step, end_s = 0, time.monotonic() + 0.5
    while time.monotonic() < end_s and not failures:
        step += 1
        recorder.is_in_step(step, step)
        if step % 100 == 0:
            time.sleep(0)  # with a global lock nobody else would come
        if step % (NUM_TOKEN_STEPS // 4) == 0:
            recorder.snapshot()  # readers that the machine keeps waiting for longer than all kept steps would miss some
    is_over.set()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return step


@pytest.mark.parametrize("has_board", [True, False], ids=["kernels-count", "the-host-counts"])
def test_other_threads_read_amid_steps(has_board: bool) -> None:
    """Without Python's global lock (3.13t and later) a deque raised, as it grew under a reader's copy."""
    recorder = Recorder(0, 1, 3, 8, 4, torch.device("cpu"))
    if has_board:
        recorder.make_board(torch.device("cpu"))
    num_steps = steps_meanwhile(recorder)
    kept = [step for step, _ in recorder.snapshot().tokens]
    assert kept == list(range(max(1, num_steps - NUM_TOKEN_STEPS + 1), num_steps + 1))


def test_a_full_queue_drops_its_oldest_call_while_another_thread_looks_at_it() -> None:
    """The one that was looked at is the one that is noted: the next had not passed, and asking it for its time raised."""
    recorder = Recorder(0, 2, 3, 8, 4, torch.device("cpu"))
    recorder.step_began(1)
    recorder.came(0, (1, 1))
    waiting = FakeEvent(9.0, is_over=False)

    class Filling(FakeEvent):
        def query(self) -> bool:  # meanwhile the stepping thread launches as many calls as are kept
            for _ in range(4096):
                recorder.span_on_stream(COMBINE, 0, FakeEvent(0.0), waiting)
            return True

    recorder.span_on_stream(COMBINE, 0, FakeEvent(5.0), Filling(7.0))
    assert recorder.snapshot().waits.combine_ns == (0, 2_000_000)


def test_layers_beyond_the_last_share_its_place() -> None:
    recorder = Recorder(0, 2, 3, 8, 4, torch.device("cpu"))
    recorder.step_began(1)
    for layer in (127, 128, 500):
        recorder.waited(DISPATCH, layer, 1, 10)
        recorder.came(layer, (1, 1))
    [layer] = recorder.snapshot().layers
    assert (layer.layer, layer.num_rounds, layer.dispatch_ns) == (127, 3, (0, 30))


def test_clocks_are_aligned_by_the_moments_that_all_ranks_share() -> None:
    first, second = counted(0), counted(1)
    alignment = align([begun(first, [1000, 2000]), begun(second, [1005, 2007])])
    assert alignment.offsets_ns == (0, 6)
    assert alignment.error_ns == 1


@pytest.mark.parametrize(("first", "second"), [([], []), ([1000], [1005])], ids=["none", "one"])
def test_with_too_few_steps_in_common_the_error_is_unknown(first: list[int], second: list[int], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    snapshots = [begun(counted(0), first), begun(counted(1), second)]
    assert write_trace(path, snapshots) == math.inf
    note = json.loads(path.read_text())["otherData"]
    assert (note["clock_error_us"], note["steps_in_common"]) == ("unknown", len(first))


def test_one_clock_needs_no_alignment() -> None:
    assert align([begun(counted(0), [])]).error_ns == 0


@dataclass
class FakeEvent:
    """A CUDA event that has passed at this moment, or has not yet."""

    at_ms: float
    is_over: bool = True

    def query(self) -> bool:
        return self.is_over

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at_ms - self.at_ms


@pytest.mark.parametrize(
    ("size", "found"), [(2, ((2_000_000, None), None)), (3, ((None, None, None), 2_000_000))], ids=["EP2", "EP3"]
)
def test_a_library_call_is_the_peers_or_nobodys_in_the_step_that_launched_it(size: int, found: tuple) -> None:
    recorder = Recorder(1, size, 3, 8, 4, torch.device("cpu"))
    end = FakeEvent(7.0, is_over=False)
    recorder.step_began(1)
    recorder.span_on_stream(COMBINE, 0, FakeEvent(5.0), end)
    recorder.step_began(2)
    assert recorder.snapshot().waits.shared_ns == sum(recorder.snapshot().waits.combine_ns) == 0
    end.is_over = True
    recorder.step_began(3)
    seen = recorder.snapshot()
    assert [len(step.rounds) for step in seen.steps] == [1, 0, 0]
    [round_] = seen.steps[0].rounds
    assert (round_.waits_ns, round_.shared_ns) == found
    assert seen.waits.shared_ns + sum(seen.waits.combine_ns) == (2_000_000 if size == 3 else 0)


def test_shared_waits_have_a_track_in_the_trace() -> None:
    recorder = Recorder(0, 3, 3, 8, 4, torch.device("cpu"))
    recorder.step_began(1)
    recorder.waited(DISPATCH, 0, 0, 500)
    events = trace_events([recorder.snapshot()])["traceEvents"]
    [track] = [
        event["tid"] for event in events if event["ph"] == "M" and event["args"]["name"] == "waits for nobody in particular"
    ]
    assert [event["dur"] for event in events if event["ph"] == "X" and event["tid"] == track] == [0.5]


def test_ranges_have_stable_names_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a profiler sees them on GPUs."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1, dtype=torch.float32)
    with tf.Workspace(config, tf.EPGroup.alone("cpu"), max_tokens_per_rank=2, transport="local", telemetry=True) as ws:
        ws.active_transport.names_ranges = True
        dispatchers = [ws.dispatcher(), ws.dispatcher()]
        rows = torch.ones(1, 8), torch.ones(1, 1, dtype=torch.int32), torch.ones(1, 1)
        ws.begin_step(1)
        dispatchers[0].combine(dispatchers[0].dispatch(*rows).hidden)
        dispatchers[1].dispatch_begin(*rows)
        dispatchers[1].combine_begin(dispatchers[1].dispatch_end().hidden)
        dispatchers[1].combine_end()
        monkeypatch.setattr(ws.active_transport.inner, "begin_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ws.begin_step(1)
    names = ["begin_step", "dispatch[0]", "combine[0]", *["dispatch[1]"] * 2, *["combine[1]"] * 2, "begin_step"]
    assert seen[::2] == [f"tokenferry.{name}" for name in names]
    assert seen[1::2] == ["end"] * len(names)


class FakeStream:
    """Of a reader."""

    def __init__(self, device: torch.device) -> None:
        self.is_closed = False

    current = relaxed = contextlib.nullcontext

    def close(self) -> None:
        self.is_closed = True


def test_a_stream_outlives_the_copy_that_another_thread_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was gone under a scrape's copy: such a process ends by SIGSEGV."""
    monkeypatch.setattr(side_stream, "SideStream", FakeStream)
    reader, begun, go_on = counting._Reader(torch.device("cpu")), threading.Event(), threading.Event()
    stream = reader._side

    class Slow:
        def cpu(self) -> torch.Tensor:
            begun.set()
            assert go_on.wait(10)
            assert not stream.is_closed
            return torch.ones(1)

    got: list[list[float]] = []
    thread = threading.Thread(target=lambda: got.append(reader.read(Slow())))
    thread.start()
    assert begun.wait(10)
    reader.close()
    assert not stream.is_closed
    go_on.set()
    thread.join()
    assert stream.is_closed and got == [[1.0]]
    with pytest.raises(tf.StateError):
        reader.read(torch.ones(1))


def test_a_line_of_json() -> None:
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1)
    with tf.Workspace(config, tf.EPGroup.alone("cpu"), max_tokens_per_rank=2, transport="local", telemetry=True) as ws:
        ws.begin_step(1)
        file = io.StringIO()
        ws.telemetry.write_json_line(file)
        ws.telemetry.write_json_line(file)
        lines = [json.loads(line) for line in file.getvalue().splitlines()]
        assert [Snapshot.from_dict(line) for line in lines] == [ws.telemetry.snapshot()] * 2
        assert lines[0]["transport"] == "local"


def test_what_was_written_before_bytes_of_terms_were_known_is_read() -> None:
    told = counted().to_dict()
    del told["num_term_bytes"]
    assert Snapshot.from_dict(told).num_term_bytes is None
    assert Snapshot.from_dict(json.loads(json.dumps(Snapshot.from_dict(told).to_dict()))) == Snapshot.from_dict(told)


def test_a_reset_counts_anew() -> None:
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1)
    with tf.Workspace(config, tf.EPGroup.alone("cpu"), max_tokens_per_rank=2, transport="local", telemetry=True) as ws:
        ws.begin_step(1)
        assert ws.telemetry.snapshot().num_steps == 1
        ws.reset()
        assert ws.telemetry.snapshot().num_steps == 0


@pytest.mark.skipif(not has_prometheus, reason="needs prometheus_client, not installed")
def test_prometheus_reads_the_figures_of_the_moment() -> None:
    from prometheus_client import generate_latest

    from tokenferry.telemetry.prometheus import register

    text = generate_latest(register(counted)).decode()
    assert 'tokenferry_wait_seconds_total{phase="counts",rank="0",source="1"} 1.5' in text
    assert 'tokenferry_rows_total{rank="0",source="1"} 3.0' in text
    assert 'tokenferry_row_bytes_total{rank="0",source="1"} 24.0' in text
    assert 'tokenferry_term_bytes_total{rank="0",source="1"} 8.0' in text
    assert 'tokenferry_expert_rows_total{expert="2",layer="4",rank="0"} 4.0' in text
    assert 'tokenferry_rounds_total{layer="4",rank="0"} 1.0' in text


@pytest.mark.skipif(not has_prometheus, reason="needs prometheus_client, not installed")
def test_a_closed_workspace_does_not_break_the_registry_of_others() -> None:
    from prometheus_client import CollectorRegistry, Counter, generate_latest

    registry = CollectorRegistry()
    Counter("others", "Of somebody else.", registry=registry)
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1)
    with tf.Workspace(config, tf.EPGroup.alone("cpu"), max_tokens_per_rank=2, transport="local", telemetry=True) as ws:
        ws.telemetry.prometheus(registry)
        assert "tokenferry_steps_total" in generate_latest(registry).decode()
    text = generate_latest(registry).decode()
    assert "others_total" in text and "tokenferry" not in text


def test_without_prometheus_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # it cannot be imported then, installed or not
    from tokenferry.telemetry.prometheus import register

    with pytest.raises(tf.ConfigError, match=r"tokenferry\[metrics\]"):
        register(counted)


def test_a_dropped_workspace_goes_at_once_and_its_telemetry_says_so() -> None:
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1)
    ws = tf.Workspace(config, tf.EPGroup.alone("cpu"), max_tokens_per_rank=2, transport="local", telemetry=True)
    telemetry, seen = ws.telemetry, weakref.ref(ws)
    ws.close()
    with pytest.raises(tf.StateError, match="the workspace is closed"):
        telemetry.snapshot()
    del ws
    assert seen() is None


def test_compiled_code_is_counted() -> None:
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1, dtype=torch.float32)
    with tf.Workspace(config, tf.EPGroup.alone("cpu"), max_tokens_per_rank=2, transport="local", telemetry=True) as ws:
        dispatcher = ws.dispatcher()

        def step(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            ws.begin_step(2)
            got = dispatcher.dispatch(hidden, ids, weights)
            return dispatcher.combine(got.hidden * 2, got)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        ids = torch.tensor([[1], [-1]], dtype=torch.int32)
        for _ in range(3):
            compiled(torch.ones(2, 8), ids, torch.ones(2, 1))
        seen = ws.telemetry.snapshot()
        assert (seen.num_steps, seen.num_rounds, seen.loads) == (3, 3, ((0, 3),))
