"""The package imports in one direction, reads the environment in one place, and keeps no mutable state on modules or classes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tokenferry

ROOT = Path(tokenferry.__file__).parent
ORDER = (
    "errors", "env", "config", "waiting", "groups", "topology", "dispatched", "precision", "reference", "kernels", "step",
    "lifecycle", "transports", "operators", "dispatcher", "workspace", "activations", "experts", "router",
    "shared_experts", "layer", "graphs", "supervisor", "integrations", "testing", "benchmarking", "demo", "cli",
)  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
SEED_API = ROOT / "integrations" / "megatron"  # the seed's API has class attributes


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_up(path: Path) -> None:
    own = part(path)
    allowed = set(ORDER[: ORDER.index(own) + 1])
    assert imported(ast.parse(path.read_text())) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_wire_from_one_another(path: Path) -> None:
    froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    siblings = {node.module.split(".")[2] for node in froms if node.module.startswith("tokenferry.kernels.")}
    siblings |= {alias.name for node in froms if node.module == "tokenferry.kernels" for alias in node.names}
    assert siblings <= {"wire", "control_block", "launch", "driver_launch", "expert_math"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_in_env_only(path: Path) -> None:
    text = path.read_text()
    assert path.name == "env.py" or not any(word in text for word in ("os.environ", "os.getenv", "getenv("))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_mutable_state_on_modules_and_classes(path: Path) -> None:
    if path.is_relative_to(SEED_API) or path == SEED_API.with_suffix(".py"):
        pytest.skip("the seed's API has class attributes; only this integration may")
    tree = ast.parse(path.read_text())
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for body in bodies:
        for node in body:
            value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AnnAssign) else None
            names = ast.unparse(node).split("=")[0].strip() if value is not None else ""
            frozen_by_custom = names.split(":")[0].strip() == "__all__" or ("_" + names.strip("_") == names and names.isupper())
            assert not isinstance(value, MUTABLE) or frozen_by_custom or names.split(":")[0].strip("_ ").isupper(), names


def test_public_names_are_sorted_and_there() -> None:
    assert list(tokenferry.__all__) == sorted(tokenferry.__all__)
    assert all(hasattr(tokenferry, name) for name in tokenferry.__all__)


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
