"""Binding a launch: names are resolved, and wrong ones refused, before anything is launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from tokenferry.errors import UsageError
from tokenferry.kernels import combine, counts, dispatch
from tokenferry.kernels.launch import KernelSpec, Launch, specify

SIGNATURE = {"rows": "*bf16", "num_rows": "i32", "layer": "i32", "BLOCK": "constexpr"}


class WrittenDown(Launch):
    """Writes down what it would launch."""

    def __init__(self, spec: KernelSpec) -> None:
        super().__init__(spec)
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, grid: int, *args: Any) -> None:
        self.seen.append((grid, *args))


def launch_of(signature: Mapping[str, str] = SIGNATURE) -> WrittenDown:
    def example_kernel() -> None: ...

    return WrittenDown(specify(SimpleNamespace(fn=example_kernel), signature, {"BLOCK": 4}, num_warps=1))


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (lambda launch: launch.bind({}, ("rows", "num_rows", "layer"), grid=2), (16, 3, 1)),
        (lambda launch: launch.bind({}, ("layer", "rows", "num_rows"), grid=2), (1, 16, 3)),
        (lambda launch: launch.bind({"layer": 1, "rows": 16}, ("num_rows",), grid=2), (3,)),
        (lambda launch: launch.bind({"layer": 1, "rows": 16, "num_rows": 3}, grid=2), ()),
        (lambda launch: launch.bind({"num_rows": 3}, ("layer", "rows")), (2, 1, 16)),
    ],
    ids=["all-vary", "in-another-order", "one-varies", "none-varies", "grid-at-the-call"],
)
def test_every_argument_comes_to_its_place(call: Callable[[Launch], Callable[..., None]], args: tuple[int, ...]) -> None:
    launch = launch_of()
    call(launch)(*args)
    assert launch.seen == [(2, 16, 3, 1)]


@pytest.mark.parametrize(
    ("fixed", "varying", "said"),
    [
        ({"rows": 16}, ("num_rows", "layers"), "unknown: layers; missing: layer"),
        ({"rows": 16, "num_row": 3}, ("layer",), "unknown: num_row; missing: num_rows"),
        ({"rows": 16}, ("layer",), "missing: num_rows"),
        ({"rows": 16, "layer": 1}, ("layer", "num_rows"), "named twice: layer"),
        ({"rows": 16, "layer": 1, "BLOCK": 4}, ("num_rows",), "unknown: BLOCK"),
    ],
    ids=["unknown-varying", "unknown-fixed", "missing", "twice", "constant"],
)
def test_a_wrong_name_is_refused_by_name_before_any_launch(fixed: Mapping[str, int], varying: tuple[str, ...], said: str) -> None:
    launch = launch_of()
    with pytest.raises(UsageError, match=f"^example_kernel has 3 arguments .*{said}"):
        launch.bind(fixed, varying, grid=1)
    assert launch.seen == []


@pytest.mark.parametrize("module", [counts, dispatch, combine], ids=lambda module: module.__name__.rsplit(".", 1)[1])
def test_signatures_name_the_arguments_of_their_kernels(module: Any) -> None:
    kernel = next(value for name, value in vars(module).items() if name.endswith("_kernel"))
    assert list(module.SIGNATURE) == list(kernel.arg_names)
