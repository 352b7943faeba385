"""What docs/layer.md says of a run is what benchmarks/layer_docs.py makes of its records: nobody has changed a figure by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = ROOT / "benchmarks" / "layer_docs.py"


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "layer.md").read_text()


def test_the_measured_part_is_made_of_the_records_that_it_names(page: str, tmp_path: Path) -> None:
    before, mark, rest = page.partition("<!-- measured: by benchmarks/layer_docs.py -->")
    measured, end, after = rest.partition("<!-- measured: end -->")
    layer, float8 = re.search(r"results/(\S+-layer\.jsonl)", measured), re.findall(r"`(\S+-layer-float8\.jsonl)`", measured)
    assert layer is not None, "the measured part names no records"
    (copy := tmp_path / "layer.md").write_text(before + mark + end + after)
    names = [layer.group(1), *float8]
    subprocess.run([sys.executable, SCRIPT, *(RESULTS / name for name in names), "--docs", copy], check=True, timeout=60)
    assert copy.read_text() == page


def test_a_page_without_the_marks_is_refused(tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text("no marks")
    done = subprocess.run(
        [sys.executable, SCRIPT, RESULTS / "2xH100-2026-11-26-layer.jsonl", "--docs", page],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "measured: end" in done.stderr
    assert page.read_text() == "no marks"
