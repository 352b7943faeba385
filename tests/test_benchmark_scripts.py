"""The scripts in benchmarks/ need GPUs to measure, but what they import must be there: nothing else would notice a moved name."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def test_every_script_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    assert {"experts", "layer", "router", "roundtrip"} <= set(names)
    imports = "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", imports], cwd=SCRIPTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_list_of_scripts_names_each_of_them() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", (SCRIPTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in SCRIPTS.glob("*.py"))


def test_precompile_knows_the_kernels_of_every_layer_that_is_measured() -> None:
    """Of presets as they are, and with float8 weights in each way in which rows and terms travel: a kernel that it does not
    know is compiled amid the measurement."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED_FOR], cwd=SCRIPTS, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_precompile_knows_round_trips_with_float8_terms_and_with_telemetry() -> None:
    """The kernels of each, beside those of plain round trips."""
    done = subprocess.run([sys.executable, "-c", MORE], cwd=SCRIPTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "formats combine_kernel dispatch_kernel",
        "telemetry combine_kernel counts_kernel dispatch_kernel expert_table_kernel load_counts_kernel",
    ]


MORE = """
import precompile

plain = set(precompile.round_trip_specs(2048, [precompile.CAPACITY]))
for setting in ("formats", "telemetry"):
    more = set(precompile.round_trip_specs(2048, [precompile.CAPACITY], **{setting: True})) - plain
    print(setting, *sorted({spec.name for spec in more}))
"""


ASKED_FOR = """
from types import SimpleNamespace
import torch
import precompile
from tokenferry.benchmarking.layer_formats import FORMATS
from tokenferry.benchmarking.layer_model import LayerModel
from tokenferry.benchmarking.presets import REHEARSAL
from tokenferry.dispatched import FLOAT8
from tokenferry.experts import variants

def asked_for(model, quantized_rows, out_dtype):
    experts, topk = model.experts, model.preset.topk
    variant = variants.variant_of(
        experts.weights, experts.config.activation, topk, torch.bfloat16, torch.int32, out_dtype,
        max_rows=precompile.CAPACITY * precompile.EP, quantized_rows=quantized_rows,
    )
    return set(variants.specs(variant, torch.device("cpu")).all)

group = SimpleNamespace(device=torch.device("cpu"), rank=0, size=2, expert_range=lambda number: range(number // 2))
for preset in REHEARSAL:
    model = LayerModel(group, preset, 8)
    if missing := asked_for(model, False, torch.bfloat16) - set(precompile.expert_specs(preset)):
        print(preset.name, [spec.name for spec in missing])
    model.quantize()
    for name, formats in FORMATS.items():
        wanted = set()
        for out_dtype in {torch.bfloat16, formats.combine_dtype}:
            wanted |= asked_for(model, formats.dispatch_format != "same", out_dtype)
        if missing := wanted - set(precompile.expert_specs(preset, formats)):
            print(preset.name, name, [spec.name for spec in missing])
"""
