"""Skips say what is missing; Ctrl-C reaches the processes that tests start; a file's tests share their rank processes.

Under pytest-xdist (`make test`) each file runs on one of two workers: its items share fixtures and rank processes.
"""

import importlib.util
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from rank_pool import RankPools
from sampling import SHARE, Choice, choice_of, kept
from tokenferry import supervisor

FIRST = ("test_verification.py",)
"""Files that take long and would come last, when one of the two workers has nothing left to do."""
FORK_SERVER_IMPORTS = ("torch", "torch._dynamo", "transformers.generation", "transformers.models.auto.modeling_auto")
"""What rank processes of `make test` share. Those that are not installed are left out."""
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", metavar="SEED", help="run a share of the items of each test; SEED says which, see sampling.py")
    if importlib.util.find_spec("pytest_timeout") is None:  # then our settings of it would be unknown, which is an error
        parser.addini("timeout", "of pytest-timeout, which is not installed: nothing limits a test")


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("pytest_timeout") is None:
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not installed")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell ran pytest in the background: children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if IS_WORKER:
        os.setpgrp()  # tests look for what they left behind in their process group, where the other worker's would show
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker has one core, and so has all that it starts
        torch.set_num_threads(1)
        start_fork_server()
    if config.getoption("sample"):
        config.pluginmanager.register(Sampler(config.getoption("sample")), "tokenferry-sampler")


def start_fork_server() -> None:
    """Rank processes are forked from one that has imported what most of them need, which takes each of them seconds otherwise: of
    four files that were measured, all tests together, more than half.

    Triton is among it, which sees as it is imported whether kernels are interpreted. So it is told that they are, and that is
    wrong for ranks that compile kernels: on GPUs. Our own kernels are imported by each rank, and see its own environment.
    """
    if torch.cuda.is_available():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        supervisor.start_fork_server(FORK_SERVER_IMPORTS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)
    found = torch.cuda.device_count()
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is not None:
            needed = marker.kwargs.get("count", 1)
            if found < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {found}"))


class Sampler:
    """Leaves out the items that do not belong to the sample of `seed`, once all other options have chosen theirs."""

    def __init__(self, seed: str) -> None:
        self.seed = seed

    def pytest_report_header(self) -> str:
        return f"sample: about {SHARE} of the items of each test, seed {self.seed}; without --sample all of them run"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        keep = kept([choice(item) for item in items], self.seed)
        config.hook.pytest_deselected(items=[item for item, is_kept in zip(items, keep, strict=True) if not is_kept])
        items[:] = [item for item, is_kept in zip(items, keep, strict=True) if is_kept]


def choice(item: pytest.Item) -> Choice:
    file = item.path.relative_to(item.config.rootpath).as_posix()
    parameters = {name: index for name, index in shared_fixtures(item).items() if index is not None}
    return choice_of(f"{file}::{getattr(item, 'originalname', item.name)}", item.name, file, parameters)


def shared_fixtures(item: pytest.Item) -> dict[str, int | None]:
    """The fixtures that this item shares with others of its file, with the index of its parameter if they have some."""
    known = getattr(item, "_fixtureinfo", None)
    if known is None:
        return {}
    indices = item.callspec.indices if hasattr(item, "callspec") else {}
    shared = [name for name, found in known.name2fixturedefs.items() if found and found[-1].scope == "module"]
    return {name: indices.get(name) for name in sorted(shared)}


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[RankPools]:
    """Like `run_ranks`, in rank processes that the tests of a file share; see rank_pool.py."""
    pools = RankPools()
    yield pools
    pools.close()
