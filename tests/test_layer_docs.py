"""What docs/layer.md says of a run is what benchmarks/layer_docs.py makes of its records: nobody has changed a figure by hand."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


@pytest.fixture
def layer_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("layer_docs")


def test_float8_rows_that_gain_nothing_are_named(layer_docs: ModuleType) -> None:
    def layer(tokens: int, bfloat16: float, same: float, quantized: float) -> dict:
        ways = {"same": {"total_us": same}, "fp8_block128": {"total_us": quantized}}
        return {"preset": "some", "tokens": tokens, "bfloat16_us": bfloat16, **ways}

    records = [layer(8, 10.0, 8.0, 9.0), layer(32, 20.0, 21.0, 20.0), layer(4096, 500.0, 400.0, 404.0)]
    assert " ".join(" ".join(layer_docs.float8_goals(records)).split()) == (
        "- Float8 weights are faster than bfloat16 ones in 2 of 3 columns: some at T = 32 takes 5.0% longer. "
        "- From T = 32 on rows that travel in float8 are faster than rows that the experts quantize in 1 of 2 columns: "
        "some at T = 4096 takes 1.0% longer."
    )


def test_a_commit_is_named_as_git_shortens_it(layer_docs: ModuleType) -> None:
    run = {"world_size": 2, "gpu": "G", "torch": "2", "cuda": "13", "triton": "3", "date": "today"}
    assert layer_docs.run_of(run | {"commit": "0123456789" * 4}).endswith(", today, commit 0123456")
    assert layer_docs.run_of(run | {"commit": "of a rehearsal"}).endswith("commit of a rehearsal")


def test_a_page_without_the_marks_is_refused(tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text("no marks")
    done = subprocess.run(
        [sys.executable, SCRIPT, RESULTS / "2xH100-2026-11-26-layer.jsonl", "--docs", page],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "measured: end" in done.stderr
    assert page.read_text() == "no marks"
