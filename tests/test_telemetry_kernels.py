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
from tokenferry.kernels import combine, counts, dispatch, expert_table, fp8_bulk, fp8_terms, wire
from tokenferry.kernels.launch import options, source

pytestmark = pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")


PASSED_ON = re.compile(r",\s+TELEMETRY(: tl\.constexpr)?,\s+board,\s+layer,\s+step\)")
"""What kernels hand on to device functions of float8 terms, where these have arguments of that name. Nothing comes behind it."""

MADE_WAY = (
    ("            if is_in_place != 0:\n                pass\n            elif IS_FP8:", "            if IS_FP8:"),
    ("tl.where(is_in_place != 0, 0, num_flags), programs)", "num_flags, programs)"),
)
"""How the combine makes way for a program that has its flags to set for itself, since it has counted numbers; and as it was."""


def without_telemetry(text: str) -> str:
    """A kernel's module with every `if TELEMETRY:` and its arguments gone, and all other lines as they were before it."""
    text = PASSED_ON.sub(")", text)
    if "def combine_kernel" in text:
        for made_way, before in MADE_WAY:
            assert text.count(made_way) == 1
            text = text.replace(made_way, before)
    lines = text.splitlines()
    tests = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.If) and ast.unparse(node.test).startswith("TELEMETRY")
    ]
    assert tests, "the kernel has no telemetry at all"
    for node in sorted(tests, key=lambda node: -node.lineno):
        kept = node.orelse[0].lineno if node.orelse else node.end_lineno + 1
        for number in range(node.lineno, kept):
            lines[number - 1] = ""
        for number in range(kept, (node.end_lineno if node.orelse else kept - 1) + 1):
            lines[number - 1] = lines[number - 1].removeprefix("    ")
    names = "TELEMETRY|TOPK|IDS|loads|first_load|loads_ptr|ids_offset|num_experts"
    arguments = rf'"({names})": "constexpr",|({names})(: tl\.constexpr)?,'
    gone = re.compile(rf" *({arguments}|(COUNTING_SIGNATURE|NO_LOADS) = .*|board = tl.zeros.*)")
    stripped = "\n".join("" if gone.fullmatch(line) else line for line in lines)
    code = re.sub(r"^ +(TELEMETRY: whether|loads.*: with TELEMETRY).*$", "", stripped, flags=re.MULTILINE)
    assert "TELEMETRY" not in code
    assert "waits." not in code and "round_loads." not in code
    return code


def stripped(module: ModuleType, folder: Path) -> ModuleType:
    """The module as it would be if telemetry did not exist, and float8 terms with it."""
    path = folder / f"{module.__name__.split('.')[-1]}.py"
    bare = module_of(without_telemetry(Path(module.__file__).read_text()), path)
    if module is combine:
        bare.fp8_terms, bare.fp8_bulk = stripped(fp8_terms, folder), stripped(fp8_bulk, folder)
    return bare


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
    return text.split(".section")[0].strip()


MODULES = {"counts": counts, "dispatch": dispatch, "combine": combine, "table": expert_table}
SIMILAR = re.compile(r"telemetry|unrounded|16-warps|fp32-to-bf16|fp32-wire")
"""Names of variants that differ from others in the dtypes of terms alone, which telemetry has nothing to do with."""
OFF = [name for name in VARIANTS if name.split("-")[0] in MODULES and not SIMILAR.search(name)]


@pytest.mark.parametrize("name", OFF)
def test_the_same_ptx_when_off(name: str, tmp_path: Path) -> None:
    kernel, signature, constants, num_warps = VARIANTS[name]
    bare = stripped(MODULES[name.split("-")[0]], tmp_path)
    kinds, values = ({key: given[key] for key in given if key in bare.SIGNATURE} for given in (signature, constants))
    expected = ptx(getattr(bare, kernel.fn.__name__), kinds, values, num_warps)
    assert ptx(kernel, signature, constants, num_warps) == expected
    assert "%clock64" not in expected


def test_every_kernel_that_counts_is_among_these() -> None:
    """A new one must have variants that are compared with it bare, float8 rows and terms among them."""
    folder = Path(wire.__file__).parent
    counting = {path.stem for path in folder.glob("*.py") if "if TELEMETRY:" in path.read_text()}
    assert counting == {"counts", "dispatch", "combine", "fp8_terms", "fp8_bulk", "expert_table"}
    assert {"dispatch-fp8", "dispatch-fp8-quantized", "dispatch-bytes", "combine-fp8", "combine-fp8-quantized-few-tokens"} <= set(
        OFF
    )


@pytest.mark.parametrize(("name", "reads"), [("counts", 3), ("dispatch", 2), ("combine", 2), ("combine-fp8", 2)])
def test_when_on_the_clock_is_read(name: str, reads: int) -> None:
    """So that the test above would notice telemetry that is always there."""
    text = ptx(*VARIANTS[f"{name}-telemetry"])
    assert text.count("%clock64") >= reads


@pytest.mark.parametrize(("name", "more"), [("table", 1), ("combine", 6), ("combine-fp8", 6)])
def test_when_on_rows_are_added_up(name: str, more: int) -> None:
    """By the combine: waits and numbers in slots and in bulk, the numbers in three places."""
    adds = re.compile(r"(atom|red)\.\S*add\.u64")
    without, counting = (len(adds.findall(ptx(*VARIANTS[variant]))) for variant in (name, f"{name}-telemetry"))
    assert (without, counting - without) == (int(name != "table"), more)
