"""What is put into transformers' continuous batching, alone: waiting that takes part, padding, warm-ups without peers, replays.

There is no CUDA here, and no model: stand-ins note what they are asked to do.
"""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from tokenferry.errors import PeerFailedError
from tokenferry.integrations.transformers import continuous_batching
from tokenferry.integrations.transformers.continuous_batching import StepGraph, Steps, WaitingInSteps, adopt, limit
from tokenferry.integrations.transformers.one_thread import OneThread

WHAT_FAILED = PeerFailedError(1, "out of luck", 0)


class Parallel:
    """Stands in for `ExpertParallel`. `num_tokens`: of the other ranks, step by step; an exception is raised."""

    def __init__(self, *num_tokens: Any) -> None:
        self.num_tokens = list(num_tokens)
        self.thread = OneThread(waits=False)
        self.took_part = self.num_looks = 0
        self.swallowed: list[BaseException | None] = []
        self.num_real_tokens: torch.Tensor | None = None
        self.group = tf.EPGroup(device="cpu")
        self.workspace = tf.Workspace(
            tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32), self.group, max_tokens_per_rank=8
        )

    def look_over(self) -> None:
        self.num_looks += 1

    def take_part(self, *, done: bool) -> tuple[bool, int]:
        assert not done
        self.took_part += 1
        now = self.num_tokens.pop(0) if self.num_tokens else 0
        if isinstance(now, Exception):
            raise now
        return False, now

    def note_swallowed(self, error: BaseException | None) -> None:
        self.swallowed.append(error)

    def raise_swallowed(self) -> None:
        if self.swallowed and self.swallowed[-1] is not None:
            raise self.swallowed[-1]


# --- waiting ------------------------------------------------------------------------------------------------------------


def waiting(parallel: Parallel) -> WaitingInSteps:
    return WaitingInSteps(parallel, lambda: None)  # type: ignore[arg-type]


def pauses_in(*num_tokens: int) -> list[float]:
    """Between steps in which the ranks have so many tokens, in seconds. After them a peer fails."""
    pauses: list[float] = []
    with pytest.MonkeyPatch.context() as patched, pytest.raises(PeerFailedError):
        patched.setattr(threading.Event, "wait", lambda event, timeout: pauses.append(timeout))
        waiting(Parallel(*num_tokens, WHAT_FAILED)).wait(60)
    return pauses


def test_while_others_have_tokens_a_step_follows_the_other_without_a_pause() -> None:
    assert pauses_in(*[5] * 100) == []


def test_while_nobody_has_tokens_the_pauses_grow_to_ten_milliseconds() -> None:
    assert pauses_in(*[0] * 6) == [0.001, 0.002, 0.004, 0.008, 0.01, 0.01]


def test_tokens_in_between_make_the_next_pause_short_again() -> None:
    assert pauses_in(0, 0, 0, 5, 0) == [0.001, 0.002, 0.004, 0.001]


def test_each_wait_looks_once_whether_the_experts_are_what_they_were() -> None:
    parallel = Parallel(1, 1, 1)
    event = waiting(parallel)
    for num_waits in (1, 2):
        event.wait(0.05)
        assert parallel.num_looks == num_waits
    assert parallel.took_part > 4


def test_it_ends_in_time() -> None:
    assert not waiting(Parallel()).wait(0.05)


def test_a_request_ends_it_after_the_step_under_way() -> None:
    parallel = Parallel(*[5] * 10**6)
    event = waiting(parallel)
    threading.Timer(0.05, event.set).start()
    begun_s = time.monotonic()
    assert event.wait(PATIENT_S)
    assert time.monotonic() - begun_s < SLACK_S


def test_a_request_that_is_there_already_needs_no_step() -> None:
    parallel = Parallel(5)
    event = waiting(parallel)
    event.set()
    assert event.wait(1)
    assert parallel.took_part == 0


@pytest.mark.parametrize("hosting", [False, True], ids=["in a call", "hosting"])
def test_while_another_thread_uses_the_model_it_only_waits(hosting: bool) -> None:
    parallel = Parallel(*[5] * 1000)
    inside = parallel.thread.hosting("generate_batch") if hosting else parallel.thread.inside("generate")
    ends: list[bool] = []
    with inside:
        thread = threading.Thread(target=lambda: ends.append(waiting(parallel).wait(0.05)))
        thread.start()
        thread.join()
    assert ends == [False]
    assert parallel.took_part == 0


def test_a_guest_that_has_run_the_model_still_only_waits_for_its_host() -> None:
    parallel = Parallel(5)

    def guest() -> None:
        parallel.thread.enter("forward", as_guest=True)
        parallel.thread.leave()
        waiting(parallel).wait(0.05)

    with parallel.thread.hosting("generate_batch"):
        thread = threading.Thread(target=guest)
        thread.start()
        thread.join()
    assert parallel.took_part == 0


def test_a_peers_failure_leaves_it_and_is_noted() -> None:
    parallel = Parallel(5, WHAT_FAILED)
    with pytest.raises(PeerFailedError):
        waiting(parallel).wait(1)
    assert parallel.swallowed == [WHAT_FAILED]
    assert parallel.thread.try_enter()


# --- forwards -------------------------------------------------------------------------------------------------------------


class Runner:
    """Stands in for the model runner of transformers, and for its inputs and outputs. It has graphs if `graphs`."""

    def __init__(self, forward: Any, *, pad_inputs: bool = True) -> None:
        self.forward, self.pad_inputs = forward, pad_inputs
        self.inputs_and_outputs = SimpleNamespace(compute_stream=None, total_seqlen_q=3)

    def compute_batch(self, model: Any, batch_data: Any) -> None:
        self.forward()

    def warmup(self, model: Any) -> None:
        self.compute_batch(model, {})


class Processor:
    def __init__(self, runner: Runner) -> None:
        self.model_runner = runner

    def _generation_step(self, model: Any) -> None:
        self.model_runner.compute_batch(model, {})


def made(parallel: Parallel, forward: Any, **kwargs: Any) -> tuple[Processor, Steps]:
    processor = Processor(Runner(forward, **kwargs))
    return processor, Steps(processor, parallel)  # type: ignore[arg-type]


@pytest.mark.parametrize("pad_inputs", [True, False])
def test_a_padded_forward_knows_its_real_rows(pad_inputs: bool) -> None:
    parallel, seen = Parallel(), []
    processor, _ = made(parallel, lambda: seen.append(parallel.num_real_tokens), pad_inputs=pad_inputs)
    processor._generation_step(None)
    assert [None if each is None else each.tolist() for each in seen] == [[3] if pad_inputs else None]
    assert parallel.num_real_tokens is None


def test_warming_up_is_this_ranks_alone_and_counts_no_step() -> None:
    parallel, alone = Parallel(), []

    def forward() -> None:
        parallel.workspace.begin_step(2)
        alone.append(parallel.workspace._stand_in is not None)

    processor, _ = made(parallel, forward)
    processor.model_runner.warmup(None)
    assert alone == [True]
    assert parallel.workspace.last_step == 0
    processor._generation_step(None)
    assert alone == [True, False]
    assert parallel.workspace.last_step == 1


def test_what_a_forward_raises_is_noted_and_leaves() -> None:
    parallel = Parallel()

    def forward() -> None:
        raise ValueError("no")

    processor, _ = made(parallel, forward)
    with pytest.raises(ValueError, match="no"):
        processor._generation_step(None)
    assert isinstance(parallel.swallowed[-1], ValueError)
    assert parallel.num_real_tokens is None


def test_a_peers_failure_is_raised_in_the_place_of_the_steps_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = Parallel()

    def check(*, wait: bool) -> None:
        assert not wait
        raise WHAT_FAILED

    monkeypatch.setattr(parallel.workspace, "check", check)
    processor, _ = made(parallel, lambda: None)
    with pytest.raises(PeerFailedError):
        processor._generation_step(None)
    assert parallel.swallowed == [WHAT_FAILED]


class Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


def test_a_replay_is_told_to_the_workspace() -> None:
    parallel, graph = Parallel(), Graph()
    _, steps = made(parallel, lambda: None)
    again: list[int] = []
    StepGraph(steps, graph, 2, parallel.workspace.generation, lambda: again.append(1)).replay()  # type: ignore[arg-type]
    assert (graph.replays, parallel.workspace.last_step, again) == (1, 2, [])


def test_after_a_reset_the_forward_is_captured_anew() -> None:
    parallel, graph = Parallel(), Graph()
    _, steps = made(parallel, lambda: None)
    again: list[int] = []
    replay = StepGraph(steps, graph, 1, parallel.workspace.generation, lambda: again.append(1)).replay  # type: ignore[arg-type]
    parallel.workspace.reset()
    replay()
    assert (graph.replays, parallel.workspace.last_step, again) == (0, 0, [1])


def test_a_second_warm_up_replays_nothing() -> None:
    parallel, graph = Parallel(), Graph()
    processor, steps = made(parallel, lambda: replay())
    replay = StepGraph(steps, graph, 1, 0, lambda: None).replay  # type: ignore[arg-type]
    processor.model_runner.warmup(None)
    assert (graph.replays, parallel.workspace.last_step) == (0, 0)


def test_another_thread_in_the_middle_of_a_call_is_refused_a_replay() -> None:
    parallel, graph = Parallel(), Graph()
    _, steps = made(parallel, lambda: None)
    replay = StepGraph(steps, graph, 1, 0, lambda: None).replay  # type: ignore[arg-type]
    said: list[BaseException] = []

    def other() -> None:
        try:
            replay()
        except tf.StateError as error:
            said.append(error)

    with parallel.thread.inside("generate"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1
    assert graph.replays == 0


# --- managers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_wake_up_loop", "_has_new_requests"])
def test_a_manager_of_either_release_is_adopted_once(name: str) -> None:
    processor = Processor(Runner(lambda: None))
    manager = SimpleNamespace(
        _create_batch_processor=lambda: processor, warmup=lambda: None, batch_processor=None, **{name: threading.Event()}
    )
    parallel: Any = Parallel()
    assert adopt(manager, parallel) is manager
    before = dict(vars(manager))
    adopt(manager, parallel)
    assert dict(vars(manager)) == before
    assert isinstance(getattr(manager, name), WaitingInSteps)
    compute = manager._create_batch_processor().model_runner.compute_batch
    assert manager._create_batch_processor().model_runner.compute_batch == compute


def test_what_a_warm_up_swallows_is_raised_and_the_model_has_its_attention_back() -> None:
    parallel: Any = Parallel()
    attention: list[str] = []
    manager = SimpleNamespace(
        _create_batch_processor=lambda: None,
        warmup=lambda: parallel.note_swallowed(WHAT_FAILED),
        _wake_up_loop=threading.Event(),
        _original_attn_impl="sdpa",
        model=SimpleNamespace(set_attn_implementation=attention.append),
    )
    adopt(manager, parallel)
    with pytest.raises(PeerFailedError):
        manager.warmup()
    assert attention == ["sdpa"]
    assert manager._original_attn_impl is None


# --- configurations ------------------------------------------------------------------------------------------------------


def asked(device: str, use_cuda_graph: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(continuous_batching, "why_not_captured", lambda parallel: reason)
    config = SimpleNamespace(max_batch_tokens=None, use_cuda_graph=use_cuda_graph)
    parallel: Any = SimpleNamespace(
        options=SimpleNamespace(max_tokens_per_rank=8), group=SimpleNamespace(device=torch.device(device))
    )
    limit(config, parallel)
    return config.use_cuda_graph


@pytest.mark.parametrize("use_cuda_graph", [None, False, (False, False)], ids=str)
def test_graphs_that_nobody_asked_for_are_left_out(use_cuda_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("cuda", use_cuda_graph, "it waits", monkeypatch) in (False, (False, False))


@pytest.mark.parametrize("use_cuda_graph", [True, (True, False), (False, True)], ids=str)
def test_graphs_that_were_asked_for_are_refused(use_cuda_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tf.ConfigError, match=r"use_cuda_graph is .*, but it waits, or leave use_cuda_graph out"):
        asked("cuda", use_cuda_graph, "it waits", monkeypatch)


@pytest.mark.parametrize("use_cuda_graph", [None, True, False], ids=str)
def test_what_can_be_captured_stays_as_it_was_asked_for(use_cuda_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("cuda", use_cuda_graph, None, monkeypatch) is use_cuda_graph


def test_on_a_cpu_nothing_is_captured_and_nothing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("cpu", True, "it waits", monkeypatch) is True
