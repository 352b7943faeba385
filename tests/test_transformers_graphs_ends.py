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
