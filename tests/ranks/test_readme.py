"""What the README shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLE, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_shown() -> None:
    assert "make demo" in README and "make test" in README


def test_the_first_program_prints_what_its_comment_says(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(EXAMPLE)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[10.0, 10.0], [20.0, 20.0, 20.0]]"
