"""What the README shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLE, UNDER_TORCHRUN, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SUMS = "[10.0, 10.0]", "[20.0, 20.0, 20.0]"


def test_the_two_commands_are_shown() -> None:
    assert "make demo" in README and "make test" in README


def test_the_example_prints_what_its_comment_says(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(EXAMPLE)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == f"[{', '.join(SUMS)}]", done.stderr


def test_the_same_under_torchrun(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(EXAMPLE[: EXAMPLE.index("if __name__")] + UNDER_TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert all(text in done.stdout for text in SUMS), done.stderr
