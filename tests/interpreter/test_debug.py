"""Debug mode on interpreted ranks: what it poisons, what it finds, and that right steps pass under it."""

import dataclasses
import weakref

import pytest
import torch

import tokenferry as tf
from cases import BULK_ROWS, CASES, Case, StepCase, run_case
from tokenferry.step import StepRequest
from tokenferry.testing import run_ranks
from tokenferry.transports.debug import DebugTransport
from tokenferry.transports.wrapper import TransportWrapper

pytestmark = pytest.mark.interpreter

DEBUG = {"TRITON_INTERPRET": "1", "TOKENFERRY_DEBUG": "1"}
STEPS = (StepCase((3, BULK_ROWS), layers=2), StepCase((1, 2), layers=2, own_buffer=True))
BULK = Case(capacity=1025, transport="p2p", steps=STEPS)


def cases(group: tf.EPGroup) -> int:
    named = [case for size, case in CASES.values() if size == group.size and case.combine_order == "rank"]
    return sum(
        run_case(group, case) for case in (*(dataclasses.replace(c, transport="p2p", counts="uneven") for c in named), BULK)
    )


def test_right_steps_pass_in_slots_and_in_bulk() -> None:
    assert len(set(run_ranks(cases, 2, env=DEBUG))) == 1


class PublishesWrong(TransportWrapper):
    """Behind a step's exchange, one number of what was published becomes another."""

    def __init__(self, debug: DebugTransport, ws: tf.Workspace, place: int, value: int) -> None:
        super().__init__(debug.inner)
        self.packed, self.place, self.value = ws._step_tensors.packed.data, place, value

    def begin_step(self, request: StepRequest, layer: int) -> None:
        super().begin_step(request, layer)
        self.packed[self.place].fill_(self.value)


def found(group: tf.EPGroup) -> dict[str, str]:
    """What the report says of each kind of harm, and whether the workspace goes on after it."""
    from tokenferry import dispatcher

    config = tf.MoEConfig(hidden_size=16, num_experts=8, topk=2)
    rows = torch.ones(3, 16, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    said = {}
    with tf.Workspace(config, group, max_tokens_per_rank=4, transport="p2p") as ws:
        layer, transport = ws.dispatcher(), ws._transport

        rows_before = transport.fixed_rows.hidden_RH
        said["unread"] = "NaN" if bool(rows_before.isnan().all()) else "not poisoned before the first step"

        def round_trip(ids: torch.Tensor = rows[1]) -> torch.Tensor:
            got = layer.dispatch(rows[0], ids, rows[2])
            assert bool(layer.combine_input().isnan().all()), "not yet written by the experts"
            out = layer.combine(got.hidden, got)
            assert bool(got.hidden.isnan().all()), "gone with combine"
            return out

        def harmed(name: str, kind: type[Exception], call) -> None:
            with pytest.raises(kind) as caught:
                call()
            said[name] = str(caught.value)
            ws.begin_step(3)
            assert torch.equal(round_trip(), rows[0])
            ws.check()

        dispatcher.ids_out_of_range = lambda *_: None  # as on CUDA tensors
        wrong_ids = (("negative", -2), ("large", 8), ("huge", 2**40), ("expert 3 if cut", 2**32 + 3), ("deep", -(2**32) + 1))
        for name, wrong in wrong_ids:
            ws.begin_step(3)
            ids = rows[1].clone()
            ids[1, 1] = wrong
            round_trip(ids)
            harmed(name, tf.UsageError, lambda: ws.begin_step(3))
        step = ws.begin_step(3)
        view = step.tokens_per_rank.numpy()  # PyTorch does not count this write
        view += 1
        harmed("counts", tf.StateError, ws.check)
        ws.begin_step(3)
        for name, place, value in (("sum", 0, 2), ("offset", 1, 1), ("most", 2, 4), ("range", 3, 5)):
            DebugTransport(PublishesWrong(transport, ws, place, value), transport._checks).begin_step(StepRequest(9, 3, 3), -1)
            harmed(f"counts {name}", tf.StateError, ws.check)
        ws.begin_step(3)
        layout = transport.memory.layout
        for name, place in (
            ("overrun", layout.hidden.end + 3),
            ("underrun", layout.topk_weights.offset - 1),
            ("first", layout.counts.offset - 1),
            ("last", layout.terms.end),
        ):
            transport.memory.buffer[place] = 0
            harmed(name, tf.StateError, ws.check)
        with ws.solo():
            alone = weakref.ref(ws.active_transport)
        assert alone() is None, "it holds memory, which has to go with it"
    return said


def test_ids_counts_and_canaries_are_found_and_the_workspace_goes_on() -> None:
    said = run_ranks(found, 1, env=DEBUG)[0]
    assert said["unread"] == "NaN"
    assert "topk_idx held -2, but" in said["negative"]
    assert "topk_idx held 8, but" in said["large"]
    assert f"topk_idx held {2**40}, but" in said["huge"]
    assert f"topk_idx held {2**32 + 3}, but" in said["expert 3 if cut"]
    assert f"topk_idx held {-(2**32) + 1}, but" in said["deep"]
    assert "written on the device" in said["counts"]
    for name in ("sum", "offset", "most", "range"):
        assert "published counts that do not fit one another" in said[f"counts {name}"]
    assert "behind 'hidden' and before 'topk_idx', was written" in said["overrun"]
    assert "behind 'topk_idx' and before 'topk_weights', was written" in said["underrun"]
    assert "behind 'control' and before 'counts', was written" in said["first"]
    assert "behind 'terms' and before 'end', was written" in said["last"]


def found_by_each(group: tf.EPGroup) -> list[str]:
    """Two ranks in one workspace. Each kind of harm is done by rank 1 alone, and each rank says what it was told."""
    from tokenferry import dispatcher

    dispatcher.ids_out_of_range = lambda *_: None  # as on CUDA tensors
    config = tf.MoEConfig(hidden_size=16, num_experts=8, topk=2)
    hidden, ids, weights = torch.ones(3, 16, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    said = []
    with tf.Workspace(config, group, max_tokens_per_rank=4, transport="p2p", timeout_s=20) as ws:
        layer = ws.dispatcher()

        def round_trip(ids: torch.Tensor = ids) -> torch.Tensor:
            got = layer.dispatch(hidden, ids, weights)
            return layer.combine(got.hidden, got)

        for harm in ("ids", "counts", "overrun"):
            step = ws.begin_step(3)
            wrong = ids.clone()
            wrong[2, 0] = 8 if harm == "ids" and group.rank == 1 else 0
            round_trip(wrong)
            if harm == "counts" and group.rank == 1:
                view = step.tokens_per_rank.numpy()  # PyTorch does not count this write
                view += 1
            if harm == "overrun" and group.rank == 1:
                ws._transport.memory.buffer[ws._transport.memory.layout.hidden.end] = 0
            try:
                ws.check()
                said.append("nothing")
            except (tf.UsageError, tf.StateError) as error:
                said.append(type(error).__name__)
            ws.begin_step(3)
            assert torch.equal(round_trip(), 2 * hidden), "both ranks go on, and both ranks' experts are the identity"
            ws.check()
    return said


def test_what_is_found_on_one_rank_is_told_there_and_both_ranks_go_on() -> None:
    assert run_ranks(found_by_each, 2, env=DEBUG) == [["nothing"] * 3, ["UsageError", "StateError", "StateError"]]
