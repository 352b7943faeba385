"""Where the graphs of a model end, and where a rank that compiles is busy no longer."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from graphed_model import Graphed
from test_transformers_graphs import graphed, paths  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns of its own affairs


def test_a_model_whose_graphs_cannot_be_freed_is_closed_all_the_same(
    graphed: Graphed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("an illegal memory access")

    parallel = graphed.model.expert_parallel
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="illegal memory"):
        patched.setattr(parallel.graphs, "close", fail)
        parallel.close()
    assert not any(layer.kernels for layer in parallel.installed)
    with pytest.raises(Exception, match="closed"):
        parallel.workspace.begin_step(1)


class FailedDevice:
    """A workspace, seen by what waits for its device: that fails."""

    device = torch.device("cuda")


@pytest.fixture
def failing(graphed: Graphed, monkeypatch: pytest.MonkeyPatch) -> Graphed:  # noqa: F811
    """It has graphs of all kinds, and its device has failed. How often that has come to light: `num_failures`."""
    parallel = graphed.model.expert_parallel
    graphed.expect_equal()
    parallel.finish()
    parallel.finish()
    assert graphed.decode.num_graphs and parallel.graphs.idle._recorded

    def synchronize(_device: torch.device) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(graphed.decode, "_workspace", FailedDevice())
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return graphed


@pytest.mark.parametrize("by", ["drop", "reset", "look_over", "close"])
def test_graphs_are_gone_where_the_device_has_failed(failing: Graphed, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`drop` kept the graph of steps without tokens, recorded with experts that are no more; `close` the caches too."""
    parallel, decode = failing.model.expert_parallel, failing.decode
    idle, workspace = parallel.graphs.idle, parallel.workspace
    calls = {
        "drop": parallel.graphs.drop,
        "reset": parallel.reset,
        "look_over": parallel.look_over,
        "close": parallel.close,
    }
    if by == "look_over":
        monkeypatch.setattr(parallel.graphs, "_experts_facts", "others")
    with pytest.raises(RuntimeError, match="illegal memory"):
        calls[by]()
    assert decode.num_graphs == 0
    assert not decode._warm and decode._recorder is None
    assert not idle._recorded and idle._recorder is None
    if by == "close":
        assert decode.stopped and not decode._inputs and decode._compiled is None and not decode.caches._kept
        return
    monkeypatch.setattr(decode, "_workspace", workspace)
    calls[by]()
    before = failing.stand_in.num_recorded
    failing.expect_equal()
    parallel.finish()
    assert failing.stand_in.num_recorded > before, "they are recorded anew"


def test_a_rank_that_compiles_is_busy_until_its_step_begins(graphed: Graphed, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    events: list[str] = []
    workspace = graphed.model.expert_parallel.workspace
    begin = workspace.begin_step

    @contextlib.contextmanager
    def busy(reason: str) -> Iterator[None]:
        events.append(f"busy: {reason}")
        yield
        events.append("free")

    def begin_step(*args: Any, **kwargs: Any) -> Any:
        events.append("step")
        return begin(*args, **kwargs)

    monkeypatch.setattr(workspace, "busy", busy)
    monkeypatch.setattr(workspace, "begin_step", begin_step)
    graphed.expect_equal(new_tokens=3)
    compiling = events.index("busy: compiling a decode step")
    assert events[compiling : compiling + 3] == ["busy: compiling a decode step", "free", "step"]


def test_a_static_cache_by_an_old_name_is_not_said_to_be_in_the_way(graphed: Graphed, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    caplog.set_level(logging.INFO, logger="tokenferry.integrations")
    graphed.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, cache_implementation="hybrid")
    assert not any("cannot be part of a CUDA graph" in message for message in caplog.messages)
