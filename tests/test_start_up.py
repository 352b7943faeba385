"""What each way into the package imports: seconds differ with the machine's load, lists of modules do not."""

import json
import subprocess
import sys

import pytest

import tokenferry
from tokenferry.benchmarking import ALL_WAYS, PRESETS, REHEARSAL
from tokenferry.cli import names
from tokenferry.testing.model_configs import MODEL_CONFIGS
from tokenferry.transports.selection import TRANSPORTS

HEAVY = ("torch", "triton", "numpy", "transformers")
EXTRAS = ("numpy", "rich", "typer", "transformers")
WITHOUT = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {EXTRAS} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Makes the packages of all extras look as if they were not installed."""


def modules_of(code: str, *arguments: str) -> set[str]:
    """What is in `sys.modules` of a process that has run the code, or has left in it."""
    listing = "import atexit, json, sys\natexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
    command = [sys.executable, "-c", listing + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def imported_by(code: str, *arguments: str) -> set[str]:
    """The packages of these."""
    return {name.partition(".")[0] for name in modules_of(code, *arguments)}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["generate", "--help"], ["doctor", "--help"], ["bench", "layer", "--help"]],
    ids=" ".join,
)
def test_help_and_version_do_not_wait_for_torch(arguments):
    assert imported_by("import tokenferry_command; tokenferry_command.run()", *arguments).isdisjoint(HEAVY)


def test_version_does_not_wait_for_rich():
    assert "rich" not in imported_by("import tokenferry_command; tokenferry_command.run()", "--version")


def test_doctor_without_a_self_test_loads_no_kernels_and_no_benchmarks():
    code = "import tokenferry_command, sys\nsys.argv[1:] = ['doctor', '--no-selftest', '--json']\ntokenferry_command.run()"
    assert "triton" not in imported_by(code)


def test_importing_the_package_imports_nothing_else():
    before = imported_by("import importlib.util, typing")
    assert imported_by("import tokenferry") - before == {"tokenferry"}


def test_the_library_adds_only_triton_to_what_torch_imports():
    torch_itself = imported_by("import torch, torch.distributed")
    ours = imported_by("import tokenferry\nfor name in tokenferry.__all__: getattr(tokenferry, name)")
    standard = set(sys.stdlib_module_names)
    assert ours - torch_itself - standard <= {"tokenferry", "triton"}


COMPILER = "torch._dynamo"


def test_layers_do_not_wait_for_the_compiler():
    """A decorator of torch's imported it, which took longer than all else together."""
    if COMPILER in modules_of("import torch, torch.distributed"):
        pytest.skip(f"torch itself imports {COMPILER} here")
    names = ("dispatcher", "experts", "fixed_linear", "graphs", "layer", "router", "shared_experts", "workspace")
    assert COMPILER not in modules_of("import " + ", ".join(f"tokenferry.{name}" for name in names))


def test_the_library_works_without_the_packages_of_the_extras():
    code = f"""{WITHOUT}
import warnings
warnings.simplefilter("ignore")  # torch's own, that there is no numpy
import torch, tokenferry as tf
config = tf.MoEConfig(hidden_size=4, num_experts=1, topk=1, dtype=torch.float32)
with tf.Workspace(config, tf.EPGroup(), max_tokens_per_rank=2) as ws:
    ws.begin_step(2)
    layer = ws.dispatcher()
    got = layer.dispatch(torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert layer.combine(3 * got.hidden, got).tolist() == [[3.0] * 4] * 2
import tokenferry.kernels.dispatch, tokenferry.layer, tokenferry.testing
"""
    assert imported_by(code).isdisjoint(EXTRAS)


def test_without_its_extra_the_command_line_says_how_to_get_it():
    code = f"{WITHOUT}\nimport tokenferry_command; tokenferry_command.run()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False, timeout=60)
    expected = (
        "tokenferry: the command line needs the package typer, which is not installed; run: pip install 'tokenferry[cli]'\n"
    )
    assert (done.returncode, done.stderr) == (2, expected)


def test_names_in_help_texts_are_those_that_there_are():
    shown = (names.TRANSPORTS, names.PRESETS, names.REHEARSAL_PRESETS, names.MODEL_CONFIGS, names.WAYS)
    there = (TRANSPORTS, [preset.name for preset in PRESETS], [preset.name for preset in REHEARSAL], MODEL_CONFIGS, ALL_WAYS)
    assert [tuple(each) for each in shown] == [tuple(each) for each in there]


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tokenferry' has no attribute 'nothing'"):
        _ = tokenferry.nothing


@pytest.mark.parametrize("module", ["tokenferry", "tokenferry.cli"])
def test_version_is_printed(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"tokenferry {tokenferry.__version__}\n")
