"""Skips say what is missing; Ctrl-C reaches the processes that tests start; a file's tests share their rank processes."""

import importlib.util
import signal
from collections.abc import Iterator

import pytest
import torch

from rank_pool import RankPools


def pytest_addoption(parser: pytest.Parser) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:  # then our settings of it would be unknown, which is an error
        parser.addini("timeout", "of pytest-timeout, which is not installed: nothing limits a test")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell ran pytest in the background: children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None:
            needed = marker.kwargs.get("count", 1)
            if found < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {found}"))


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[RankPools]:
    """Like `run_ranks`, in rank processes that the tests of a file share; see rank_pool.py."""
    pools = RankPools()
    yield pools
    pools.close()
