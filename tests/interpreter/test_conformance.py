"""What ranks put on the wire obeys the rules of the protocol models: recorded in real runs, replayed by verification/rules.py."""

import ctypes
import random
import time

import pytest
import torch
from verification.rules import Event, Replay, Violation

import tokenferry as tf
from cases import BULK_ROWS, StepCase, begin, run_layer
from exchangeable import Opens, exchangeable
from rank_pool import RankPools
from tokenferry.testing.data import make_inputs

from .test_symmetric import CAPACITY, INTERPRETER, random_steps

pytestmark = pytest.mark.interpreter


def record(
    group: tf.EPGroup, steps: list[StepCase], dispatch_format: str = "same", combine_dtype: torch.dtype | None = None
) -> tuple[int, int, list[Event]]:
    """Runs the steps with random delays; returns the slots' rows of combines and dispatches, and what this rank did, with places
    for addresses."""
    from tokenferry.kernels.wire_interpreter import Observer

    config = tf.MoEConfig(hidden_size=16, num_experts=8, topk=2)
    with tf.Workspace(
        config,
        group,
        max_tokens_per_rank=CAPACITY,
        transport=Opens("p2p"),
        dispatch_format=dispatch_format,
        combine_dtype=combine_dtype,
        timeout_s=20,
    ) as ws:
        transport = exchangeable(ws).inner
        layout, bases = transport.memory.layout, transport._buffer.addresses
        slots = {"dispatch_slots": layout.dispatch_slot_bytes, "combine_slots": layout.combine_slot_bytes}

        def place(address: int) -> tuple:
            holder = max((base, rank) for rank, base in enumerate(bases) if base <= address)[1]
            offset = address - bases[holder]
            for region in ("counts", "arrived", "ready", "dispatch_slots", "combine_slots", "hidden", "scales"):
                start = getattr(layout, region).offset
                if start <= offset < getattr(layout, region).end:
                    unit = slots.get(region, 0)
                    return (region, holder, *divmod(offset - start, unit)) if unit else (region, holder, offset - start)
            raise AssertionError(f"address {address:#x} is in no region that packets go to")

        def value(kind: str, address: int) -> tuple[int, ...]:
            if kind == "count":
                num_tokens, _, step, _ = (ctypes.c_int32 * 4).from_address(address)
                return step, num_tokens
            units, epoch = (ctypes.c_int32 * 2).from_address(address)
            return (epoch, units) if kind == "signal" else ()

        events: list[Event] = []
        delays = random.Random(group.rank)

        class Recorder(Observer):
            def event(self, kind: str, addresses) -> None:
                events.extend(Event(kind, place(int(a)), value(kind, int(a))) for a in addresses)
                time.sleep(delays.choice((0, 0, 0, 0.001)))

        class Announced:
            """Tells the recording which launch the events after it belong to."""

            def __getattr__(self, name: str):
                launch = {"begin_step": "counts", "dispatch": "dispatch", "combine": "combine"}.get(name.removesuffix("_begin"))
                if launch == "combine":
                    events.append(Event("launch", "experts"))
                if launch:
                    events.append(Event("launch", launch))
                return getattr(transport, name)

        recorder = Recorder()
        transport.observe(recorder)
        exchangeable(ws).inner = Announced()
        dispatchers = [ws.dispatcher(), ws.dispatcher()]
        for step in steps:
            begin(ws, step)
            for number, dispatcher in enumerate(dispatchers[: step.layers]):
                run_layer(ws, dispatcher, step, number)
                time.sleep(delays.choice((0, 0, 0.004)))
        exchangeable(ws).inner = transport
    return layout.slot_rows, layout.dispatch_slot_rows, events


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_recorded_events_obey_the_rules_of_the_models(on_ranks: RankPools, world_size: int) -> None:
    empty = (0,) * (world_size - 1)
    steps = [
        *random_steps(world_size, 25, world_size, 4),
        StepCase((4, *empty), layers=2),
        StepCase((BULK_ROWS, *empty), layers=2),
        StepCase((*empty, BULK_ROWS), layers=2),
        StepCase((0, *empty), layers=2),
        StepCase((2, *empty), layers=2),
    ]
    recordings = on_ranks(record, world_size, steps, env=INTERPRETER, timeout_s=120)
    replayed = Replay([events for _, _, events in recordings], *recordings[0][:2]).run()
    assert all(replayed[kind] > 0 for kind in ("count", "send", "poll", "restore", "signal", "launch"))
    assert replayed["poll"] == replayed["restore"]


@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_recorded_events_of_other_formats_obey_the_rules(on_ranks: RankPools, dispatch_format: str) -> None:
    """Dispatches of bytes are bulk beside combines in slots."""
    steps = [
        *random_steps(2, 15, 2, 4),
        StepCase((4, 0), layers=2),
        StepCase((0, 3), layers=2),
        StepCase((0, 0)),
        StepCase((2, 5)),
    ]
    recordings = on_ranks(record, 2, steps, dispatch_format, env=INTERPRETER, timeout_s=120)
    replayed = Replay([events for _, _, events in recordings], *recordings[0][:2]).run()
    assert replayed["send"] > 0 and replayed["poll"] == replayed["restore"] > 0
    assert ("signal" in replayed) == (dispatch_format == "bytes"), "bytes alone are bulk in small steps"


def test_recorded_events_of_float8_terms_obey_the_rules(on_ranks: RankPools) -> None:
    """A scale is sent and polled as a word of its own."""
    steps = [*random_steps(2, 10, 2, 4), StepCase((4, 0), layers=2), StepCase((BULK_ROWS, 0)), StepCase((2, 5), layers=2)]
    recordings = on_ranks(record, 2, steps, "same", torch.float8_e4m3fn, env=INTERPRETER, timeout_s=120)
    replayed = Replay([events for _, _, events in recordings], *recordings[0][:2]).run()
    assert replayed["send"] > 0 and replayed["poll"] == replayed["restore"] > 0 and replayed["signal"] > 0


# --- the rules find what they are for ---------------------------------------------------------------------------------


def launch(kind: str) -> Event:
    return Event("launch", kind)


def count(step: int, num_tokens: int, holder: int, source: int) -> list[Event]:
    return [launch("counts"), Event("count", ("counts", holder, step & 1, source), (step, num_tokens))]


def slot(kind: str, holder: int) -> tuple:
    return (f"{kind}_slots", holder, 0, 0)


def polled(kind: str, holder: int) -> list[Event]:
    return [Event("poll", slot(kind, holder)), Event("restore", slot(kind, holder))]


def sender(rounds: int, *, combines: bool = True) -> list[Event]:
    """Rank 0 with one row, of two ranks."""
    events = count(1, 1, 1, 0)
    for _ in range(rounds):
        events += [launch("dispatch"), Event("send", slot("dispatch", 1))]
        if combines:
            events += [launch("experts"), launch("combine"), *polled("combine", 0)]
        else:
            events += [launch("experts"), launch("combine")]
    return events


def receiver(rounds: int, *, combines: bool = True) -> list[Event]:
    """Rank 1 without rows."""
    events = count(1, 0, 0, 1)
    for _ in range(rounds):
        events += [launch("dispatch"), *polled("dispatch", 1), launch("experts"), launch("combine")]
        if combines:
            events += [Event("send", slot("combine", 0))]
    return events


def test_rounds_as_they_should_be() -> None:
    assert Replay([sender(5), receiver(5)], 192).run()["poll"] == 10


def test_combines_that_skip_rows_let_a_sender_overwrite() -> None:
    with pytest.raises(Violation, match=r"overwrote_unread_slot: rank 0 in dispatch .*round 1"):
        Replay([sender(5, combines=False), receiver(5, combines=False)], 192).run()


def test_a_row_of_another_round_is_stale() -> None:
    late = receiver(2)
    late[3:3] = [launch("experts"), launch("combine"), launch("dispatch")]
    with pytest.raises(Violation, match="read_stale_row: rank 1 in dispatch of round 1"):
        Replay([sender(1), late], 192).run()


def test_one_parity_of_counts_overwrites() -> None:
    both = [[*count(1, 0, 1 - rank, rank), *count(2, 0, 1 - rank, rank), *count(3, 0, 1 - rank, rank)] for rank in range(2)]
    assert Replay(both, 192).run()["count"] == 6
    one = [
        [Event("count", ("counts", e.place[1], 0, e.place[3]), e.value) if e.kind == "count" else e for e in events]
        for events in both
    ]
    with pytest.raises(Violation, match="overwrote_unread_count"):
        Replay(one, 192).run()


def test_a_packet_that_nobody_sent_cannot_be_taken() -> None:
    with pytest.raises(Violation, match="polled_what_nobody_sent"):
        Replay([sender(1), receiver(2)], 192).run()


# --- found by the model "bug-terms-written-after-the-step": solo has terms of its own --------------------------------------


def solo_while_a_peer_fetches(group: tf.EPGroup, rows: int) -> int:
    """Rank 0, without rows, warms up alone as soon as its combine is over; rank 1 is late to fetch. Returns rows that differ."""
    counts, config = (0, rows), tf.MoEConfig(hidden_size=8, num_experts=6, topk=2, dtype=torch.float32)
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p", timeout_s=20) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(counts[group.rank])
        inputs = make_inputs(config, counts, seed=1)
        own = inputs[group.rank]
        got = dispatcher.dispatch(own.hidden, own.topk_idx, own.topk_weights)
        dispatcher.combine_input()[:rows].copy_(own.partial)
        if group.rank == 1:
            time.sleep(0.5)
        out = dispatcher.combine(dispatcher.combine_input(), got)
        if group.rank == 0:
            with ws.solo():
                ws.begin_step(4)
                alone = make_inputs(config, [4], seed=2)[0]
                got = dispatcher.dispatch(alone.hidden, alone.topk_idx, alone.topk_weights)
                dispatcher.combine(dispatcher.combine_input().fill_(7.0), got)
        group.channel.barrier("both are done", 20)
        wanted = tf.reference.combine([each.partial for each in inputs], counts, config.dtype, config.dtype)[group.rank]
    return int((out != wanted).any(1).sum())


@pytest.mark.parametrize("rows", [8, BULK_ROWS], ids=["slots", "bulk"])
def test_solo_right_after_a_step_leaves_the_peers_results_alone(on_ranks: RankPools, rows: int) -> None:
    assert on_ranks(solo_while_a_peer_fetches, 2, rows, env=INTERPRETER) == [0, 0]
