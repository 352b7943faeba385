"""The package imports in one direction, reads the environment in one place, and keeps no mutable state on modules or classes."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import tokenferry
from tokenferry import benchmarking

ROOT = Path(tokenferry.__file__).parent
ORDER = (
    "errors", "env", "ambient", "graph_capture", "config", "channel", "waiting", "groups", "gpu_links", "topology",
    "dispatched", "precision", "reference", "kernels", "step", "lifecycle", "telemetry", "transports", "operators",
    "layer_operator", "tensor_checks", "dispatcher", "peers", "capture", "workspace", "activations", "fixed_linear",
    "experts", "router", "shared_experts", "layer", "recording", "graphs", "placement", "inspection", "supervisor",
    "integrations", "testing", "benchmarking", "demo", "cli",
)  # fmt: skip
MEGATRON_API = ROOT / "integrations" / "megatron"
"""Megatron-Core's interface has class attributes; this integration alone may have them too."""
ALLOWED_BETWEEN_KERNELS = {
    "control_block",
    "wire",
    "wire_ptx",
    "wire_interpreter",
    "wire_clock",
    "wire_observer",
    "wire_clock_interpreter",
    "wait_board",
    "round_loads",
    "waits",
    "launch",
    "driver_launch",
    "expert_math",
    "expert_tiles",
    "expert_scaled",
    "expert_mxfp4_products",
    "expert_mxfp4_tiles",
    "wire_float8",
    "wire_float8_interpreter",
    "wire_mxfp4",
    "wire_warp",
    "fp8_rows",
    "fp8_bulk",
    "fp8_sum",
    "fp8_terms",
    "term_rows",
    "routing_packets",
    "shares",
}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
Offences = Iterator[tuple[Path, str]]


@dataclass(frozen=True)
class Module:
    path: Path
    text: str
    tree: ast.Module

    @property
    def part(self) -> str:
        return self.path.relative_to(ROOT).with_suffix("").parts[0]

    @property
    def name(self) -> str:
        parts = self.path.relative_to(ROOT.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    paths = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
    return [Module(path, text := path.read_text(), ast.parse(text)) for path in paths]


def check(offences: Offences) -> None:
    """All offences are shown, not the first file's alone."""
    lines = [f"{path.relative_to(ROOT)}: {offence}" for path, offence in offences]
    assert not lines, "\n" + "\n".join(lines)


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tokenferry":
            tail = node.module.split(".")[1:]
            names |= {tail[0]} if tail else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.add("." * node.level)  # which part it is cannot be seen here: refused
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("tokenferry.")}
    return names


def test_imports_point_up(modules: list[Module]) -> None:
    def offences() -> Offences:
        for module in modules:
            allowed = ORDER[: ORDER.index(module.part) + 1] if module.part in ORDER else ()
            yield from ((module.path, f"imports {name}") for name in sorted(imported(module.tree) - set(allowed)))

    check(offences())


def test_kernels_import_only_wire_from_one_another(modules: list[Module]) -> None:
    def offences() -> Offences:
        for module in modules:
            if module.part == "kernels":
                froms = [node for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom) and node.module]
                siblings = {node.module.split(".")[2] for node in froms if node.module.startswith("tokenferry.kernels.")}
                siblings |= {alias.name for node in froms if node.module == "tokenferry.kernels" for alias in node.names}
                yield from ((module.path, f"imports {name}") for name in sorted(siblings - ALLOWED_BETWEEN_KERNELS))

    check(offences())


def test_the_environment_is_read_in_env_only(modules: list[Module]) -> None:
    words = ("os.environ", "getenv(", "os.getenv")
    others = [module for module in modules if module.path.name != "env.py"]
    check((module.path, f"has {word}") for module in others for word in words if word in module.text)


def test_no_mutable_state_on_modules_and_classes(modules: list[Module]) -> None:
    def offences() -> Offences:
        for module in modules:
            if not (module.path.is_relative_to(MEGATRON_API) or module.path == MEGATRON_API.with_suffix(".py")):
                yield from ((module.path, f"{name} is mutable") for name in mutable_names(module.tree))

    check(offences())


def mutable_names(tree: ast.Module) -> Iterator[str]:
    """Lists, dicts and sets that a module or class holds under a name that does not say it is a constant."""
    for body in (tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))):
        for node in body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, MUTABLE):
                name = ast.unparse(node).split("=")[0].split(":")[0].strip()
                if name != "__all__" and not name.strip("_").isupper():
                    yield name


def test_no_circle_of_imports(modules: list[Module]) -> None:
    """Of whole modules, those that a function imports when it runs included."""
    graph = {module.name: imported_modules(module, {each.name for each in modules}) for module in modules}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"these import one another: {', '.join(error.args[1])}")


def imported_modules(module: Module, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known - {module.name}


def test_no_file_is_longer_than_400_lines() -> None:
    """Of the package, the tests, the benchmarks and the models: a longer one holds two subjects."""
    top = Path(__file__).parent.parent
    files = [path for folder in ("src", "tests", "benchmarks", "verification") for path in sorted((top / folder).rglob("*.py"))]
    lengths = {path.relative_to(top).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_public_names_are_sorted_and_there() -> None:
    assert list(tokenferry.__all__) == sorted(tokenferry.__all__)
    assert all(hasattr(tokenferry, name) for name in tokenferry.__all__)


@pytest.mark.parametrize(
    ("package", "modules"), [(tokenferry, {"reference"}), (benchmarking, set())], ids=["tokenferry", "benchmarking"]
)
def test_a_module_and_what_it_holds_have_other_names(package: ModuleType, modules: set[str]) -> None:
    """An imported module becomes an attribute of its package, even where a function of that name was to come."""
    assert set(package.__all__) & {path.stem for path in Path(str(package.__file__)).parent.glob("*.py")} == modules


def test_importing_pulls_in_neither_transformers_nor_a_command_line() -> None:
    code = "import sys, tokenferry; sys.exit(any(name in sys.modules for name in ('transformers', 'typer', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_transformers_its_integration_names_the_extra() -> None:
    code = (
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'transformers' else find(name, *rest)\n"
        "import tokenferry.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ModuleNotFoundError: ") and 'pip install ".[transformers]"' in last_line
