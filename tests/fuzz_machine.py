"""Calls in any order, right and wrong, against a model of the state machine that is small enough to be read.

Shapes: T rows announced by the step, R rows of a gathered tensor (T, or on p2p as many as there may be).
"""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import tokenferry as tf
from bad_calls import CONFIG, STAGES, C, Scene, T, Wrong, open_workspace, same
from bad_calls import TABLE as WRONG_CALLS
from tokenferry.testing.data import RankInputs, make_inputs

WRONG_OF_STAGE = {
    stage: [w for w in WRONG_CALLS if w.stage == stage and w.name not in ("an-earlier-handle", "own-handle-in-another-workspace")]
    for stage in STAGES
}
LAYERS = 2
HOW = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "stateful_step_count": 40}


class Calls(RuleBasedStateMachine):
    """The model: a stage, the layer in flight, how many rows were announced and brought, and what is due back."""

    transport: str
    not_here: frozenset[str]
    """Wrong calls of the table that are not made on this transport."""
    tally: Counter[str]

    @initialize()
    def open(self) -> None:
        self.ws = open_workspace(self.transport)
        self.capacity = self.ws.max_tokens_per_rank
        self.tally["sequences"] += 1
        self.dispatchers = [self.ws.dispatcher() for _ in range(LAYERS)]
        self.stage, self.layer, self.announced, self.steps, self.resets = "opened", 0, 0, 0, 0
        self.inputs: RankInputs | None = None
        self.got: tf.Dispatched | None = None
        self.used: list[tf.Dispatched] = []
        self.summed: torch.Tensor | None = None
        """What the last combine was given."""

    # --- right or wrong, as the model says --------------------------------------------------------------------------

    def expect(self, allowed: bool, call: Any) -> bool:
        """Makes the call: it goes through if it is `allowed`, and is a StateError if not."""
        if allowed:
            self.result = call()
            self.tally["right"] += 1
            return True
        with pytest.raises(tf.StateError):
            call()
        self.tally["wrong"] += 1
        return False

    def partial_RH(self, inputs: RankInputs) -> torch.Tensor:
        """Of R rows. Nobody may read those behind the valid ones."""
        if self.transport != "p2p":
            return inputs.partial
        rows_RH = torch.full((self.capacity, CONFIG.hidden_size), torch.nan)
        rows_RH[: inputs.partial.shape[0]] = inputs.partial
        return rows_RH

    @rule(num_tokens=st.integers(0, C), data=st.data())
    def begin_step(self, num_tokens: int, data: st.DataObject) -> None:
        num_tokens = min(num_tokens, self.capacity)
        real = data.draw(st.none() | st.integers(0, num_tokens))
        promised = data.draw(st.none() | st.integers(num_tokens, self.capacity))
        may_begin = self.stage in ("opened", "ready")
        if self.expect(may_begin, lambda: self.ws.begin_step(num_tokens, real, max_tokens=promised)):
            self.steps += 1
            assert self.result.index == self.steps
            assert self.result.tokens_per_rank.tolist() == [num_tokens]
            self.stage, self.announced, self.real = "ready", num_tokens, num_tokens if real is None else real

    @rule(layer=st.integers(0, LAYERS - 1), seed=st.integers(0, 99), fewer=st.integers(0, C))
    def dispatch_begin(self, layer: int, seed: int, fewer: int) -> None:
        supplied = max(0, self.announced - fewer)
        inputs = make_inputs(CONFIG, [self.announced], seed=seed, payload="hostile", supplied=[supplied])[0]
        call = lambda: self.dispatchers[layer].dispatch_begin(inputs.hidden, inputs.topk_idx, inputs.topk_weights)  # noqa: E731
        if self.expect(self.stage == "ready", call):
            self.stage, self.layer, self.inputs = "dispatching", layer, inputs

    @rule(layer=st.integers(0, LAYERS - 1))
    def dispatch_end(self, layer: int) -> None:
        if self.expect(self.stage == "dispatching" and layer == self.layer, self.dispatchers[layer].dispatch_end):
            self.stage, self.got = "dispatched", self.result
            padded = tf.reference.pad_rows(self.inputs.hidden, self.inputs.topk_idx, self.inputs.topk_weights, self.announced)
            wanted = tf.reference.dispatch(*([rows] for rows in padded), num_real_tokens=[self.real])
            same("hidden", self.got.hidden[: self.announced], wanted.hidden)
            same("topk_idx", self.got.topk_idx[: self.announced], wanted.topk_idx)
            same("topk_weights", self.got.topk_weights[: self.announced], wanted.topk_weights)
            assert self.got.valid_tokens.tolist() == [self.announced]
            assert (self.got.topk_idx[self.announced :] == -1).all()

    @rule(layer=st.integers(0, LAYERS - 1), handle=st.sampled_from(["none", "right", "used"]), own_buffer=st.booleans())
    def combine_begin(self, layer: int, handle: str, own_buffer: bool) -> None:
        given = {"none": None, "right": self.got, "used": self.used[-1] if self.used else None}[handle]
        is_right = self.stage == "dispatched" and layer == self.layer and (given is None or given is self.got)
        partial = torch.zeros(0, CONFIG.hidden_size) if self.inputs is None else self.partial_RH(self.inputs)
        if is_right and own_buffer:
            partial = self.dispatchers[layer].combine_input().copy_(partial)
        if self.expect(is_right, lambda: self.dispatchers[layer].combine_begin(partial, given)):
            self.stage, self.summed = "combining", partial
            self.used.append(self.got)
            self.got = None

    @rule(layer=st.integers(0, LAYERS - 1))
    def combine_end(self, layer: int) -> None:
        if self.expect(self.stage == "combining" and layer == self.layer, self.dispatchers[layer].combine_end):
            self.stage = "ready"
            (wanted,) = tf.reference.combine([self.inputs.partial], [self.announced], CONFIG.dtype, CONFIG.dtype)
            same("combined", self.result, wanted[: self.inputs.hidden.shape[0]])

    @rule(data=st.data(), seed=st.integers(0, 99), count=st.integers(1, 9))
    def the_right_next_calls(self, data: st.DataObject, seed: int, count: int) -> None:
        """So that sequences get somewhere: of the calls above most are wrong at most times."""
        for _ in range(count):
            self.go_on(data, seed)

    def go_on(self, data: st.DataObject, seed: int) -> None:
        if self.stage == "opened":
            self.begin_step(T, data)
        elif self.stage == "ready":
            self.dispatch_begin(seed % LAYERS, seed, 0)
        elif self.stage == "dispatching":
            self.dispatch_end(self.layer)
        elif self.stage == "dispatched":
            self.combine_begin(self.layer, data.draw(st.sampled_from(["none", "right", "used"])), False)
        elif self.stage == "combining":
            self.combine_end(self.layer)

    @rule(layer=st.integers(0, LAYERS - 1))
    def combine_input(self, layer: int) -> None:
        self.expect(self.stage == "dispatched" and layer == self.layer, self.dispatchers[layer].combine_input)

    @rule(num_tokens=st.integers(0, C))
    def solo(self, num_tokens: int) -> None:
        num_tokens = min(num_tokens, self.capacity)

        def warm_up() -> None:
            with self.ws.solo():
                self.ws.begin_step(num_tokens)
                rows = make_inputs(CONFIG, [num_tokens], seed=1)[0]
                got = self.dispatchers[0].dispatch(rows.hidden, rows.topk_idx, rows.topk_weights)
                same("solo", self.dispatchers[0].combine(got.hidden, got), rows.hidden)

        if self.expect(self.stage in ("opened", "ready"), warm_up):
            self.stage = "opened"

    @rule()
    def check(self) -> None:
        self.expect(self.stage != "closed", self.ws.check)

    @rule()
    def reset(self) -> None:
        if self.resets < 2 and self.expect(self.stage != "closed", self.ws.reset):
            self.resets += 1
            self.stage, self.steps, self.got = "opened", 0, None

    @rule(sure=st.integers(0, 9))
    def close(self, sure: int) -> None:
        if sure == 0:
            self.ws.close()
            self.stage = "closed"

    # --- wrong whatever the stage, with the message of the table -----------------------------------------------------

    @rule(data=st.data())
    def a_call_of_the_table(self, data: st.DataObject) -> None:
        stage = {"ready": "stepped"}.get(self.stage, self.stage)
        if stage not in ("opened", "closed") and (self.announced, self.layer) != (T, 0):
            return  # the table speaks of three rows, and of layer 0
        rows = self.inputs
        brought_fewer = rows is not None and rows.hidden.shape[0] != T
        if rows is None or rows.hidden.shape[0] != T or rows.partial.shape[0] != T:
            rows = make_inputs(CONFIG, [T], seed=3)[0]
        used = self.used[-1] if self.used else None
        calls = self.of_the_table(stage, used)
        if brought_fewer:  # what it says of `out` speaks of three rows brought
            calls = [wrong for wrong in calls if not wrong.name.startswith("out-")]
        if self.summed is not rows.partial:  # then nobody reads these while sums are written to them
            calls = [wrong for wrong in calls if wrong.name != "out-the-partial-rows-in-the-end"]
        wrong = data.draw(st.sampled_from(calls))
        scene = Scene(self.ws, self.dispatchers[0], self.dispatchers[1], rows, got=self.got, used=used)
        with pytest.raises(wrong.error, match=wrong.said):
            wrong.call(scene)
        self.tally["wrong"] += 1

    def of_the_table(self, stage: str, used: tf.Dispatched | None) -> list[Wrong]:
        names = [] if used else ["the-same-handle-twice", "the-same-handle-while-combining"]
        return [wrong for wrong in WRONG_OF_STAGE[stage] if wrong.name not in self.not_here.union(names)]

    @invariant()
    def the_workspace_knows_its_step(self) -> None:
        if self.stage not in ("opened", "closed"):
            assert self.ws.step.num_tokens == self.announced

    def teardown(self) -> None:
        if hasattr(self, "ws"):
            self.ws.close()


def run(transport: str, max_examples: int, not_here: frozenset[str] = frozenset(), shrinks: bool = True) -> Counter[str]:
    """Tries `max_examples` sequences of calls; how many there were, and how many right and wrong calls in them.

    `shrinks`: a sequence that fails is shown as short as can be found, which takes minutes where launches are slow."""
    tally: Counter[str] = Counter()
    machine = type(f"{transport.capitalize()}Calls", (Calls,), {"transport": transport, "not_here": not_here, "tally": tally})
    phases = [phase for phase in Phase if shrinks or phase not in (Phase.shrink, Phase.explain)]
    run_state_machine_as_test(machine, settings=settings(max_examples=max_examples, phases=phases, **HOW))
    return tally
