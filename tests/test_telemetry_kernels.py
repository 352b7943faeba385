"""Kernels without telemetry are those that would be there if it did not exist: the same PTX."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget

from test_compile_kernels import VARIANTS
from tokenferry.kernels import combine, counts, dispatch, wire
from tokenferry.kernels.launch import options, source

pytestmark = pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")


def without_telemetry(text: str) -> str:
    """A kernel's module with every `if TELEMETRY:` and its argument gone, and all other lines where they were."""
    lines = text.splitlines()
    tests = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.If) and ast.unparse(node.test) == "TELEMETRY"]
    assert tests, "the kernel has no telemetry at all"
    for node in sorted(tests, key=lambda node: -node.lineno):
        kept = node.orelse[0].lineno if node.orelse else node.end_lineno + 1
        for number in range(node.lineno, kept):
            lines[number - 1] = ""
        for number in range(kept, (node.end_lineno if node.orelse else kept - 1) + 1):
            lines[number - 1] = lines[number - 1].removeprefix("    ")
    gone = ('    "TELEMETRY": "constexpr",', "    TELEMETRY: tl.constexpr,")
    stripped = "\n".join("" if line in gone else line for line in lines)
    code = re.sub(r"^ +TELEMETRY: whether.*$", "", stripped, flags=re.MULTILINE)
    assert "TELEMETRY" not in code
    assert "waits." not in code
    return code


def module_of(code: str, path: Path) -> ModuleType:
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ptx(kernel, signature: dict, constants: dict, num_warps: int) -> str:
    compiled = triton.compile(
        source(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options(num_warps, True)
    )
    # The path of the source, where it is named, and the column, which an `else` that is gone has moved.
    text = re.sub(r"^\s*\.file.*$", "", compiled.asm["ptx"], flags=re.MULTILINE)
    text = re.sub(r"^\s*\.loc.*$", "", text, flags=re.MULTILINE)
    return text.split(".section")[0]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("counts-EP2", counts),
        ("dispatch", dispatch),
        ("dispatch-fp8", dispatch),
        ("dispatch-multicast", dispatch),
        ("dispatch-few-tokens", dispatch),
        ("combine", combine),
        ("combine-few-tokens", combine),
    ],
)
def test_the_same_ptx_when_off(name: str, module: ModuleType, tmp_path: Path) -> None:
    kernel, signature, constants, num_warps = VARIANTS[name]
    stripped = module_of(without_telemetry(Path(module.__file__).read_text()), tmp_path / f"{module.__name__.split('.')[-1]}.py")
    bare = {key: value for key, value in constants.items() if key != "TELEMETRY"}
    expected = ptx(getattr(stripped, kernel.fn.__name__), stripped.SIGNATURE, bare, num_warps)
    assert ptx(kernel, signature, constants, num_warps) == expected
    assert "%clock64" not in expected


@pytest.mark.parametrize(("name", "reads"), [("counts", 3), ("dispatch", 2), ("combine", 2)])
def test_when_on_the_clock_is_read(name: str, reads: int) -> None:
    """So that the test above would notice telemetry that is always there."""
    text = ptx(*VARIANTS[f"{name}-telemetry"])
    assert text.count("%clock64") >= reads
