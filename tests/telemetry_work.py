"""What rank processes do for the tests of telemetry, over every transport."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import switch
import tokenferry as tf
from faults import CAPACITY, CONFIG, one_step
from patience import PATIENT_S
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.graph_capture import captured
from tokenferry.telemetry import Snapshot, loads_of

DELAY_S = 0.05
NUM_STEPS = 6
TOKENS, NUM_REAL = 3, 2
IDS = [[0, 1], [2, -1], [5, 6]]
"""Of each rank; the last row is padding, and -1 is no expert."""
Seen = tuple[dict[str, Any], str]


def opened(group: tf.EPGroup, transport: str, **settings: Any) -> tf.Workspace:
    return tf.Workspace(CONFIG, group, transport=switch.transport(transport), **{"max_tokens_per_rank": CAPACITY, **settings})


def delayed(group: tf.EPGroup, transport: str, late: int, within: bool, delay_s: float = DELAY_S) -> Seen:
    """Rank `late` is late in every step: to enter it or, `within`, to combine."""
    with opened(group, transport, telemetry=True) as ws:
        dispatchers = [ws.dispatcher()]

        def pause() -> None:
            if group.rank == late:
                time.sleep(delay_s)

        assert one_step(ws, dispatchers, 0)  # whatever the first step waits for is not the delay
        before = ws.telemetry.snapshot()
        for step in range(1, NUM_STEPS):
            group.channel.barrier(group.unique_name("together"), 60.0)  # nobody is late but the one that is meant to be
            if not within:
                pause()
            assert one_step(ws, dispatchers, step, pause if within else None)
        after = ws.telemetry.snapshot()
        phase = "combine_ns" if within else "counts_ns"
        told = [getattr(taken.waits, phase) for taken in (before, after)]
        waited = [late_ns - early_ns for early_ns, late_ns in zip(*told, strict=True)]
        return {"waited_ns": waited, **after.to_dict()}, ws.telemetry.reading()


def check_delayed(seen: list[Seen], late: int, within: bool, delay_s: float = DELAY_S) -> None:
    """Whoever is not late has waited for the late rank, and for nobody else as long."""
    delays_ns = delay_s * 1e9 * (NUM_STEPS - 1)
    for rank, (told, reading) in enumerate(seen):
        if rank == late:
            assert told["waited_ns"][rank] == 0
            continue
        assert told["waited_ns"][late] > 0.4 * delays_ns  # what another one was late too is charged to whom is looked for first
        assert told["waited_ns"][late] == max(told["waited_ns"])
        if not within:
            assert f"rank {late} was last to enter in" in reading


def counts_by_hand(group: tf.EPGroup, transport: str) -> dict[str, Any]:
    """Two layers, of which the second is called every other step."""
    with opened(group, transport, telemetry=True) as ws:
        dispatchers = [ws.dispatcher() for _ in range(2)]
        hidden = torch.ones(TOKENS, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
        ids = torch.tensor(IDS, dtype=torch.int32, device=ws.device)
        weights = torch.ones(TOKENS, CONFIG.topk, device=ws.device)
        for step in range(4):
            ws.begin_step(TOKENS, NUM_REAL)
            for dispatcher in dispatchers[: 1 + step % 2]:
                got = dispatcher.dispatch(hidden, ids, weights)
                dispatcher.combine(got.hidden.clone())
        ws.check()
        settle(ws)
        return ws.telemetry.snapshot().to_dict()


def bytes_of_rounds(group: tf.EPGroup, transport: str, tokens: list[list[int]], formats: dict[str, Any]) -> dict[str, Any]:
    """A round for each rank's rows."""
    with opened(group, transport, telemetry=True, **formats) as ws:
        dispatcher = ws.dispatcher()
        for of_ranks in tokens:
            num_tokens = of_ranks[group.rank]
            hidden = torch.ones(num_tokens, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
            ids = torch.zeros(num_tokens, CONFIG.topk, dtype=torch.int32, device=ws.device)
            ws.begin_step(num_tokens)
            got = dispatcher.dispatch(hidden, ids, torch.ones(num_tokens, CONFIG.topk, device=ws.device))
            rows = got.topk_idx.shape[0], CONFIG.hidden_size
            dispatcher.combine(torch.ones(rows, dtype=CONFIG.dtype, device=ws.device), got)
        ws.check()
        settle(ws)
        return ws.telemetry.snapshot().to_dict()


def check_bytes_of_rounds(told: list[dict[str, Any]], tokens: list[list[int]], row_bytes: int, term_bytes: int) -> None:
    """Each rank gets everybody's rows, and from each rank the terms of its own."""
    by_rank = [sum(each) for each in zip(*tokens, strict=True)]
    for rank, each in enumerate(told):
        assert list(each["rows"]) == by_rank
        assert list(each["num_bytes"]) == [number * row_bytes for number in by_rank]
        assert list(each["num_term_bytes"]) == [by_rank[rank] * term_bytes] * len(told)


TOKENS_OF_ROUNDS = [[3, 1], [0, 2], [5, 4]]
BYTES_OF_ROUNDS = {
    "same": ({}, 2 * CONFIG.hidden_size, 2 * CONFIG.hidden_size),
    "fp8-rows": ({"dispatch_format": "fp8_block128"}, CONFIG.hidden_size + 16, 2 * CONFIG.hidden_size),
    "fp8-terms": ({"combine_dtype": torch.float8_e4m3fn}, 2 * CONFIG.hidden_size, CONFIG.hidden_size + 16),
    "fp32-terms": ({"combine_dtype": torch.float32}, 2 * CONFIG.hidden_size, 4 * CONFIG.hidden_size),
}
"""Settings, and the bytes of a row and of a term; a row of float8 has one scale here, rounded up to 16 bytes."""


def check_counts_by_hand(told: dict[str, Any]) -> None:
    rank, size, rounds = told["rank"], told["size"], (4, 2)
    own = range(rank * CONFIG.num_experts // size, (rank + 1) * CONFIG.num_experts // size)
    one = [int(expert in own and expert < 3) for expert in range(CONFIG.num_experts)]  # the row of 5 and 6 is padding
    assert [list(row) for row in told["loads"]] == [[count * size * number for count in one] for number in rounds]
    assert [layer["num_rounds"] for layer in told["layers"]] == list(rounds)
    assert told["num_steps"] == 4
    assert told["num_rounds"] == 6
    assert list(told["rows"]) == [TOKENS * 6] * size
    assert list(told["num_bytes"]) == [TOKENS * 6 * CONFIG.hidden_size * CONFIG.dtype.itemsize] * size
    assert list(told["num_term_bytes"]) == list(told["num_bytes"])  # of terms in the same format, from each rank


def counts_of_compiled_code(group: tf.EPGroup, transport: str) -> tuple[int, int, list[int]]:
    """Three compiled steps of one round. Steps, rounds, and the first layer's loads. The backend is one that symmetric transports
    take, whose buffers others copy, and that needs no C++ compiler."""
    with opened(group, transport, telemetry=True) as ws:
        dispatcher = ws.dispatcher()

        def step(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            ws.begin_step(TOKENS)
            got = dispatcher.dispatch(hidden, ids, weights)
            return dispatcher.combine(got.hidden * 1, got)

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        hidden = torch.ones(TOKENS, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
        ids = torch.tensor(IDS, dtype=torch.int32, device=ws.device)
        for _ in range(3):
            compiled(hidden, ids, torch.ones(TOKENS, CONFIG.topk, device=ws.device))
        ws.check()
        settle(ws)
        seen = ws.telemetry.snapshot()
        return seen.num_steps, seen.num_rounds, list(seen.loads[0])


def check_counts_of_compiled_code(told: list[tuple[int, int, list[int]]]) -> None:
    assert [each[:2] for each in told] == [(3, 3)] * len(told)
    together = [sum(of_ranks) for of_ranks in zip(*(loads for _, _, loads in told), strict=True)]
    named = [number for row in IDS for number in row]
    assert together == [3 * len(told) * named.count(expert) for expert in range(CONFIG.num_experts)]


def stops_and_starts(group: tf.EPGroup, transport: str) -> list[int]:
    """Rounds that were counted after each of three steps: on, off, on again."""
    with opened(group, transport, telemetry=True) as ws:
        dispatchers, counted = [ws.dispatcher()], []
        for step, turn in enumerate((ws.telemetry.start, ws.telemetry.stop, ws.telemetry.start)):
            turn()
            assert one_step(ws, dispatchers, step)
            counted.append(ws.telemetry.snapshot().num_rounds)
        return counted


def is_refused_without(group: tf.EPGroup, transport: str) -> bool:
    with opened(group, transport, telemetry=False) as ws:
        assert not ws.telemetry.is_available
        for name in ("start", "stop", "snapshot", "reading", "gather"):
            with pytest.raises(tf.StateError, match=f"telemetry.{name}: this workspace was opened without telemetry"):
                getattr(ws.telemetry, name)()
        return one_step(ws, [ws.dispatcher()], 0)


def differing(group: tf.EPGroup, transport: str) -> str:
    """Only the last rank asks for telemetry."""
    with pytest.raises(tf.ConfigError) as caught:
        opened(group, transport, telemetry=group.rank == group.size - 1)
    return str(caught.value)


def check_differing(said: list[str]) -> None:
    """Every rank is told, and what each of the two has."""
    name, last = "telemetry (or TOKENFERRY_TELEMETRY) differs between ranks", len(said) - 1
    advice = "open the workspace with equal settings"
    for rank, text in enumerate(said):
        own, other = (f"rank {rank} has {rank == last}", f"rank {last if rank < last else 0} has {rank != last}")
        assert text == f"{name}: {own}, {other}; {advice}"


def float8_terms_delayed(group: tf.EPGroup, late: int, transport: str = "p2p", delay_s: float = DELAY_S) -> dict[str, Any]:
    """Rank `late` is late to combine in every step; terms are float8."""
    with opened(group, transport, telemetry=True, combine_dtype=torch.float8_e4m3fn) as ws:
        dispatcher = ws.dispatcher()
        hidden = torch.ones(TOKENS, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
        ids = torch.tensor(IDS, dtype=torch.int32, device=ws.device)
        for step in range(NUM_STEPS):
            group.channel.barrier(group.unique_name("together"), 60.0)
            ws.begin_step(TOKENS)
            got = dispatcher.dispatch(hidden, ids, torch.ones(TOKENS, CONFIG.topk, device=ws.device))
            settle(ws)
            if step and group.rank == late:
                time.sleep(delay_s)
            dispatcher.combine(got.hidden.clone())
        ws.check()
        return ws.telemetry.snapshot().to_dict()


def check_float8_terms_delayed(seen: list[dict[str, Any]], late: int, delay_s: float = DELAY_S) -> None:
    """Each source has its own waits, and nothing is nobody's."""
    for rank, told in enumerate(seen):
        waits = told["waits"]
        assert waits["shared_ns"] == 0
        assert all(each["shared_ns"] is None for step in told["steps"] for each in step["rounds"])
        if rank != late:
            assert waits["combine_ns"][late] > 0.4 * delay_s * 1e9 * (NUM_STEPS - 1)
            assert waits["combine_ns"][late] == max(waits["combine_ns"])


def loads_of_own_experts(group: tf.EPGroup, transport: str, as_graph: bool = False) -> dict[str, Any]:
    """Three rounds with experts of our own, of which one is a graph's if there shall be one, and one while telemetry is stopped.
    What was counted, and whether the numbers were instead of the experts' tables."""
    with opened(group, transport, telemetry=True) as ws:
        sizes = ExpertsConfig(hidden_size=CONFIG.hidden_size, intermediate_size=16, num_experts=CONFIG.num_experts)
        experts = Experts(sizes, group.expert_range(CONFIG.num_experts), dtype=CONFIG.dtype, device=ws.device)
        experts.prepare(ws)
        dispatcher, counted_ids = ws.dispatcher(), []
        hidden = torch.ones(TOKENS, CONFIG.hidden_size, dtype=CONFIG.dtype, device=ws.device)
        ids = torch.tensor(IDS, dtype=torch.int32, device=ws.device)
        weights = torch.ones(TOKENS, CONFIG.topk, device=ws.device)
        real = torch.tensor([NUM_REAL], dtype=torch.int32, device=ws.device)

        def step() -> None:
            ws.begin_step(TOKENS, real)
            got = dispatcher.dispatch(hidden, ids, weights)
            partial = experts(got, out=dispatcher.combine_input())
            experts(got)  # once more: a dispatch's rows are counted once
            assert got.loads is not None
            counted_ids.append(not got.loads.taken)
            dispatcher.combine(partial, got)

        step()
        again = _captured(step) if as_graph else step
        for _ in range(1 if as_graph else 2):
            again()
        settle(ws)
        ws.telemetry.stop()
        again()
        settle(ws)
        ws.check()
        return {"ids": any(counted_ids), **ws.telemetry.snapshot().to_dict()}


def check_loads_of_own_experts(seen: list[dict[str, Any]], num_experts: int = CONFIG.num_experts) -> None:
    size = len(seen)
    for rank, told in enumerate(seen):
        assert not told["ids"], "experts of our own leave nothing to be counted"
        share = num_experts // size
        mine = range(rank * share, (rank + 1) * share)
        assert list(told["loads"][0]) == [3 * size * (expert in mine and expert < 3) for expert in range(num_experts)]
    together = loads_of([Snapshot.from_dict({key: value for key, value in told.items() if key != "ids"}) for told in seen])
    assert together == ((*[3 * size] * 3, *[0] * (num_experts - 3)),)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with captured(graph, stream=stream):
        step()
    return graph.replay


def error_of_a_late_rank(group: tf.EPGroup, transport: str, fails: bool = False) -> tuple[str, str, int] | None:
    """Rank 1 is late, and then does not come at all or, with `fails`, leaves by an error. What rank 0's error says, its reading,
    and the steps it carries."""
    error = tf.PeerFailedError if fails else tf.PeerTimeoutError
    with contextlib.suppress(ZeroDivisionError), opened(group, transport, telemetry=True, timeout_s=PATIENT_S) as ws:
        dispatchers = [ws.dispatcher()]
        for step in range(4):
            group.channel.barrier(group.unique_name("together"), 60.0)
            if group.rank == 1:
                time.sleep(4 * DELAY_S)
            assert one_step(ws, dispatchers, step)
        group.channel.barrier(group.unique_name("together"), 60.0)  # rank 0 has checked the last step
        if group.rank == 1:
            if fails:
                raise ZeroDivisionError
            group.channel.barrier(group.unique_name("given up"), PATIENT_S)
            return None
        ws.set_timeout(PATIENT_S if fails else 2.0)
        with pytest.raises(error) as caught:
            one_step(ws, dispatchers, 4)
        with pytest.raises(tf.PeerError) as again:
            ws.check()
        assert str(again.value) == str(caught.value)
        if not fails:
            group.channel.barrier(group.unique_name("given up"), PATIENT_S)
        return str(caught.value), caught.value.reading, len(caught.value.waits)
    return None


def traced(group: tf.EPGroup, transport: str, path: str) -> float | None:
    """A few steps, and their trace. The clocks' error, in nanoseconds."""
    with opened(group, transport, telemetry=True) as ws:
        dispatchers = [ws.dispatcher(), ws.dispatcher()]
        for step in range(4):
            assert one_step(ws, dispatchers, step)
        return ws.telemetry.trace(path)


def check_traced(trace: dict[str, Any], error_ns: float | None, transport: str) -> None:
    """The steps of both ranks, their rounds and waits, on one time line whose error is said."""
    assert trace["otherData"]["clock_error_us"] == pytest.approx(error_ns / 1e3)
    assert trace["otherData"]["steps_in_common"] == 4
    events = trace["traceEvents"]
    steps = [event for event in events if event["name"].startswith("step ")]
    assert {event["pid"] for event in steps} == {0, 1}
    assert len(steps) == 8
    assert {"dispatch[0]", "combine[1]"} <= {event["name"] for event in events}
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {f"rank 1 ({transport})", "steps and layers", "waits for rank 1"} <= tracks
    assert all(event["ts"] >= -1e-3 and event["dur"] >= 0 for event in events if event["ph"] == "X")


def settle(ws: tf.Workspace) -> None:
    if ws.device.type == "cuda":
        torch.cuda.synchronize(ws.device)
