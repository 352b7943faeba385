"""The hook in Megatron's engine, on stand-ins of its classes: where it asks, what it lets through, and that undoing undoes it."""

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tokenferry.errors import PeerTimeoutError
from tokenferry.integrations import megatron
from tokenferry.integrations.megatron import engine_hook
from tokenferry.integrations.megatron.engine_hook import WRAPS, place_engine_hook

LATE = PeerTimeoutError(1, "data-missing", 7, 0, 2.0)


class TextGenerationController:
    """Notes what it does; `sync` stands for the copy that brings the tokens to the host."""

    def __init__(self) -> None:
        self.done: list[str] = []

    async def async_generate_output_tokens_dynamic_batch(self, skip_bookkeeping: bool = False) -> str:
        """Documented."""
        self.done.append("forward")
        await asyncio.sleep(0)
        self._transfer_samples_to_cpu(1)
        self._synchronize_async_sched_event(None)
        self.done.append("bookkeeping")
        return "tokens"

    def dummy_forward(self) -> None:
        self.done.append("dummy")

    def _transfer_samples_to_cpu(self, count: int) -> int:
        return count

    @staticmethod
    def _synchronize_async_sched_event(event: Any) -> None:
        return


class InferenceBatchDimensions:
    @staticmethod
    def adjust_batch_dims_for_expert_parallelism(
        local_batch_dims: Any, ep_group: Any = None, ep_zmq_communicator: Any = None
    ) -> Any:
        return ep_zmq_communicator


class DynamicInferenceEngine:
    """Runs its steps as Megatron's does, on a thread where a loop runs already."""

    def __init__(self) -> None:
        self.controller = TextGenerationController()

    def step_modern(self) -> Any:
        coroutine = self.controller.async_generate_output_tokens_dynamic_batch()
        try:
            asyncio.get_running_loop()
            with ThreadPoolExecutor(1) as executor:
                return executor.submit(asyncio.run, coroutine).result()
        except RuntimeError:
            return asyncio.run(coroutine)


class Workspace:
    """Knows `failure` once the forward has run, as its host's word."""

    def __init__(self, timeout_s: float = 2.0) -> None:
        self.failure: Exception | None = None
        self.timeout_s = timeout_s
        self.looks: list[bool] = []
        self.num_steps = 0

    def check(self, *, wait: bool = True) -> None:
        self.looks.append(wait)
        if self.failure is not None:
            raise self.failure

    @contextlib.contextmanager
    def engine_step(self) -> Iterator[None]:
        self.num_steps += 1
        yield
        self.check(wait=False)


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> list[Workspace]:
    """Two that are open."""
    opened = [Workspace(), Workspace()]
    registry = SimpleNamespace(workspaces=lambda: opened)
    monkeypatch.setattr(engine_hook, "InferenceAllGatherDispatcherBase", SimpleNamespace(_registry=registry))
    return opened


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[engine_hook.EngineHook]:
    classes = {cls.__name__: cls for cls in (TextGenerationController, InferenceBatchDimensions, DynamicInferenceEngine)}
    for path, _ in WRAPS:
        module, _, name = path.rpartition(".")
        made = ModuleType(module)
        setattr(made, name, classes[name])
        for parent in [module.rsplit(".", depth)[0] for depth in range(1, module.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, made)
    before = {cls: dict(vars(cls)) for cls in classes.values()}
    hook = place_engine_hook()
    yield hook
    hook()
    hook()
    assert {cls: dict(vars(cls)) for cls in classes.values()} == before


def test_every_method_is_wrapped_and_keeps_its_name_and_documentation(hooked: engine_hook.EngineHook) -> None:
    assert len(hooked.replaced) == len(WRAPS)
    assert TextGenerationController.async_generate_output_tokens_dynamic_batch.__doc__ == "Documented."
    assert isinstance(vars(TextGenerationController)["_synchronize_async_sched_event"], staticmethod)


def test_a_step_asks_all_workspaces_without_waiting(hooked: engine_hook.EngineHook, workspaces: list[Workspace]) -> None:
    assert DynamicInferenceEngine().step_modern() == "tokens"
    assert [workspace.num_steps for workspace in workspaces] == [1, 1]
    assert all(workspace.looks and not any(workspace.looks) for workspace in workspaces)


@pytest.mark.parametrize("which", [0, 1])
def test_a_failure_ends_the_step_before_its_tokens_are_booked(
    hooked: engine_hook.EngineHook, workspaces: list[Workspace], which: int
) -> None:
    workspaces[which].failure = LATE
    engine = DynamicInferenceEngine()
    with pytest.raises(PeerTimeoutError):
        engine.step_modern()
    assert engine.controller.done == ["forward"]


def test_within_an_event_loop_too_where_the_engine_takes_it_for_a_missing_loop(
    hooked: engine_hook.EngineHook, workspaces: list[Workspace]
) -> None:
    workspaces[0].failure = LATE

    async def serve() -> None:
        with pytest.raises(PeerTimeoutError, match="rank 1 is late"):
            DynamicInferenceEngine().step_modern()

    asyncio.run(serve())


def test_a_runtime_error_of_the_engines_own_stays(hooked: engine_hook.EngineHook, workspaces: list[Workspace]) -> None:
    engine = DynamicInferenceEngine()
    engine.controller._transfer_samples_to_cpu = lambda count: (_ for _ in ()).throw(RuntimeError("of its own"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="of its own"):
        engine.step_modern()


def test_a_dummy_step_asks_too(hooked: engine_hook.EngineHook, workspaces: list[Workspace]) -> None:
    controller = TextGenerationController()
    controller.dummy_forward()
    workspaces[1].failure = LATE
    with pytest.raises(PeerTimeoutError):
        controller.dummy_forward()


def test_with_nothing_open_the_engine_is_as_it_was(hooked: engine_hook.EngineHook, workspaces: list[Workspace]) -> None:
    workspaces.clear()
    assert DynamicInferenceEngine().step_modern() == "tokens"
    zmq = object()
    assert InferenceBatchDimensions.adjust_batch_dims_for_expert_parallelism(None, None, zmq) is zmq


def test_a_megatron_without_an_engine_is_served_without_the_hook(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    assert place_engine_hook().replaced == ()
    assert "a peer's failure is not looked for" in caplog.text


def test_an_agreement_with_other_parameters_is_left_alone(
    hooked: engine_hook.EngineHook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in releases before 0.19. Wrapped, each step of a graph raised TypeError."""
    hooked()
    before = staticmethod(lambda local_batch_dims, ep_group=None: "agreed")
    monkeypatch.setattr(InferenceBatchDimensions, "adjust_batch_dims_for_expert_parallelism", before)
    hook = place_engine_hook()
    assert len(hook.replaced) == len(WRAPS) - 1
    assert InferenceBatchDimensions.adjust_batch_dims_for_expert_parallelism(None, ep_group=None) == "agreed"
    assert "it takes (local_batch_dims, ep_group), not (local_batch_dims, ep_group, ep_zmq_communicator)" in caplog.text
    hook()
    monkeypatch.undo()


def test_the_names_that_the_errors_tell_users_to_call_exist() -> None:
    for name in ("check", "reset", "restart_engine", "close"):
        assert callable(getattr(megatron, name))
