"""Calls in any order, right and wrong, against a model of the state machine that is small enough to be read."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import tokenferry as tf
from bad_calls import CONFIG, STAGES, C, Scene, T, open_workspace, same
from bad_calls import TABLE as WRONG_CALLS
from tokenferry.testing.data import RankInputs, make_inputs

WRONG_OF_STAGE = {
    stage: [w for w in WRONG_CALLS if w.stage == stage and w.name not in ("an-earlier-handle", "own-handle-in-another-workspace")]
    for stage in STAGES
}
LAYERS = 2


class Calls(RuleBasedStateMachine):
    """The model: a stage, the layer in flight, how many rows were announced and brought, and what is due back."""

    transport = "local"

    @initialize()
    def open(self) -> None:
        self.ws = open_workspace(self.transport)
        self.dispatchers = [self.ws.dispatcher() for _ in range(LAYERS)]
        self.stage, self.layer, self.announced, self.steps, self.resets = "opened", 0, 0, 0, 0
        self.inputs: RankInputs | None = None
        self.got: tf.Dispatched | None = None
        self.used: list[tf.Dispatched] = []

    # --- right or wrong, as the model says --------------------------------------------------------------------------

    def expect(self, allowed: bool, call: Any) -> bool:
        """Makes the call: it goes through if it is `allowed`, and is a StateError if not."""
        if allowed:
            self.result = call()
            return True
        with pytest.raises(tf.StateError):
            call()
        return False

    @rule(num_tokens=st.integers(0, C), data=st.data())
    def begin_step(self, num_tokens: int, data: st.DataObject) -> None:
        real = data.draw(st.none() | st.integers(0, num_tokens))
        if self.expect(self.stage in ("opened", "ready"), lambda: self.ws.begin_step(num_tokens, real)):
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
            same("hidden", self.got.hidden, wanted.hidden)
            same("topk_idx", self.got.topk_idx, wanted.topk_idx)
            same("topk_weights", self.got.topk_weights, wanted.topk_weights)

    @rule(layer=st.integers(0, LAYERS - 1), handle=st.sampled_from(["none", "right", "used"]), own_buffer=st.booleans())
    def combine_begin(self, layer: int, handle: str, own_buffer: bool) -> None:
        given = {"none": None, "right": self.got, "used": self.used[-1] if self.used else None}[handle]
        is_right = self.stage == "dispatched" and layer == self.layer and (given is None or given is self.got)
        partial = torch.zeros(0, CONFIG.hidden_size) if self.inputs is None else self.inputs.partial
        if is_right and own_buffer:
            partial = self.dispatchers[layer].combine_input().copy_(partial)
        if self.expect(is_right, lambda: self.dispatchers[layer].combine_begin(partial, given)):
            self.stage = "combining"
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
        if rows is None or rows.hidden.shape[0] != T or rows.partial.shape[0] != T:
            rows = make_inputs(CONFIG, [T], seed=3)[0]
        used = self.used[-1] if self.used else None
        wrong = data.draw(st.sampled_from([w for w in WRONG_OF_STAGE[stage] if used or not w.name.startswith("the-same-handle")]))
        scene = Scene(self.ws, self.dispatchers[0], self.dispatchers[1], rows, got=self.got, used=used)
        with pytest.raises(wrong.error, match=wrong.said):
            wrong.call(scene)

    @invariant()
    def the_workspace_knows_its_step(self) -> None:
        if self.stage not in ("opened", "closed"):
            assert self.ws.step.num_tokens == self.announced

    def teardown(self) -> None:
        if hasattr(self, "ws"):
            self.ws.close()


class LocalCalls(Calls):
    transport = "local"


class CollectiveCalls(Calls):
    transport = "collective"


HOW = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "stateful_step_count": 40}


@pytest.mark.parametrize("machine", [LocalCalls, CollectiveCalls], ids=["local", "collective"])
def test_any_sequence_of_calls_does_what_the_model_says(machine: type[Calls]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=60, **HOW))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("machine", [LocalCalls, CollectiveCalls], ids=["local", "collective"])
def test_thousands_of_sequences_do_what_the_model_says(machine: type[Calls]) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=3000, **HOW))
