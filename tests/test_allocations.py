"""Every tensor that the package makes names its device and its dtype, so that no default of torch's reaches it."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import tokenferry

ROOT = Path(tokenferry.__file__).parent
CONSTRUCTORS = {function.__name__ for function in _device_constructors() if hasattr(torch, function.__name__)}
"""The functions of torch that take the default device. What is made like another tensor (`*_like`, `new_*`) takes that one's."""
WITHOUT_DTYPE = {"as_tensor", "asarray"}
"""These keep the dtype of a tensor or array that they are given."""
EXEMPT: dict[tuple[str, str], str] = {}
"""(file, function): why its constructors may follow the defaults."""


def unnamed(source: str) -> list[str]:
    """The calls of torch's constructors in `source` that leave the device or the dtype to torch."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if ast.unparse(node.func.value) != "torch" or node.func.attr not in CONSTRUCTORS:
            continue
        named = {keyword.arg for keyword in node.keywords}
        wanted = {"device"} if node.func.attr in WITHOUT_DTYPE else {"device", "dtype"}
        if None not in named and not wanted <= named:  # None: **factory, which names them
            found.append(f"line {node.lineno}: {ast.unparse(node)} lacks {' and '.join(sorted(wanted - named))}")
    return found


def test_every_tensor_that_is_made_names_its_device_and_dtype() -> None:
    files = sorted(ROOT.rglob("*.py"))
    found = {str(path.relative_to(ROOT)): unnamed(path.read_text()) for path in files}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("torch.empty(3)", "device and dtype"),
        ("torch.zeros(3, dtype=torch.int64, pin_memory=True)", "device"),
        ("torch.tensor(values, device=device)", "dtype"),
        ("torch.arange(3, device=device)", "dtype"),
        ("torch.as_tensor(rows)", "device"),
    ],
)
def test_a_constructor_that_follows_a_default_is_found(source: str, lacks: str) -> None:
    assert unnamed(source) == [f"line 1: {source} lacks {lacks}"]


@pytest.mark.parametrize("source", ["torch.empty_like(rows)", "rows.new_empty(3)", "torch.ones(3, **factory)", "numpy.zeros(3)"])
def test_what_is_made_like_another_tensor_is_none(source: str) -> None:
    assert unnamed(source) == []
