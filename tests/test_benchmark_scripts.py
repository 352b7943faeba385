"""The scripts in benchmarks/ need GPUs to measure, but what they import must be there: nothing else would notice a moved name."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
DRAWS = "plot"  # imports matplotlib as it begins, which tests do not need


def test_every_script_finds_what_it_imports() -> None:
    names = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != DRAWS)
    assert {"experts", "layer", "router", "roundtrip"} <= set(names)
    imports = "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", imports], cwd=SCRIPTS, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
