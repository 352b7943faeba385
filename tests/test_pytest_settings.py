"""The settings of pytest: other people's pytest plugins do not end a run, and a warning in a test of ours does."""

import os
import subprocess
import sys
from pathlib import Path

SETTINGS = Path(__file__).parent.parent / "pyproject.toml"
NOISY = """
import warnings
def pytest_configure(config):
    warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.")
"""


def pytest_on(test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a test file under this project's settings, with what lies in `folder` installed."""
    (folder / "test_one.py").write_text(test)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        SETTINGS,
        "--rootdir",
        folder,
        "-p",
        "no:cacheprovider",
        folder / "test_one.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_benchmark_plugin_that_warns_while_it_is_set_up_does_not_end_the_run(tmp_path: Path) -> None:
    """As pytest-benchmark 5.1 does beside pytest-xdist: an INTERNALERROR before the first test."""
    (tmp_path / "noisy.py").write_text(NOISY)
    metadata = tmp_path / "pytest_benchmark-5.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pytest-benchmark\nVersion: 5.1.0\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\nbenchmark = noisy\n")
    done = pytest_on("def test_one(): pass", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_warning_in_a_test_is_an_error(tmp_path: Path) -> None:
    done = pytest_on("import warnings\ndef test_one(): warnings.warn('take care')", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "UserWarning: take care" in done.stdout
