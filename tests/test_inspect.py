"""`tokenferry inspect`: its report on figures that are known, looked at in a real browser, and a run of the command."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenferry.errors import ConfigError
from tokenferry.inspection import findings_of
from tokenferry.kernels.wait_board import DISPATCH
from tokenferry.placement import StepModel
from tokenferry.telemetry import Snapshot
from tokenferry.telemetry.recorder import COUNTS, Recorder

MODEL = StepModel(weight_bytes=1.0, flops_per_row=1e6, memory_bytes_per_s=1e12, flops_per_s=1e12)
MS = 1_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing) or 'nothing'}, not installed")


drawn = needs("jinja2", "matplotlib")


def snapshots() -> list[Snapshot]:
    """Two ranks that ran ten steps of two layers with four experts; rank 1 was 4 ms late to each."""
    taken = []
    for rank in range(2):
        recorder = Recorder(rank, 2, 4, 32, torch.device("cpu"))
        for step in range(1, 11):
            recorder.step_began(step)
            recorder.is_in_step(step, 5)
            recorder.waited(COUNTS, -1, 1 - rank, 4 * MS if rank == 0 else MS // 100)
            for layer in range(2):
                recorder.waited(DISPATCH, layer, 1 - rank, MS // 10)
                recorder.came(layer, (5, 5))
                recorder.loads[layer] += torch.tensor([70, 10, 10, 10])
        taken.append(recorder.snapshot())
    return taken


def test_the_figures_are_those_of_the_snapshots() -> None:
    findings = findings_of(snapshots(), MODEL)
    assert findings.loads == ((700, 100, 100, 100),) * 2
    assert findings.waits_ns == ((0, 42 * MS), (21 * MS // 10, 0))
    assert findings.rank_imbalance == pytest.approx((1.6, 1.6))
    assert findings.expert_imbalance == pytest.approx((2.8, 2.8))
    assert findings.readings[0] == "rank 1 was last to enter in 10 of the last 10 steps, by 4.0 ms"
    assert findings.verdict.pays


def test_a_snapshot_survives_json() -> None:
    for snapshot in snapshots():
        assert Snapshot.from_dict(json.loads(json.dumps(snapshot.to_dict()))) == snapshot


def test_nothing_counted_is_said() -> None:
    with pytest.raises(ConfigError, match="nothing was counted"):
        findings_of([Recorder(0, 1, 4, 32, torch.device("cpu")).snapshot()], MODEL)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenferry.inspection.page import write_report

    return write_report(findings_of(snapshots(), MODEL), tmp_path_factory.mktemp("report"), {"model": "<none> & two"})[0]


@drawn
def test_the_page_stands_alone(report: Path) -> None:
    text = report.read_text()
    assert "<script" not in text
    assert "&lt;none&gt; &amp; two" in text
    without_namespaces = text.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("http://www.w3.org/2000/svg", "")
    assert "http" not in without_namespaces
    assert {path.name for path in report.parent.glob("*.png")} == {"loads.png", "tokens.png", "waits.png", "imbalance.png"}


@drawn
@needs("playwright")
@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium in PATH, found none")
def test_the_page_in_a_browser(report: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        sentence = page.locator("#verdict").inner_text()
        boxes = [page.locator(f"#figure-{name} svg").bounding_box() for name in ("loads", "tokens", "waits", "imbalance")]
        rows = page.locator("#ranks tr").count()
        widest = page.evaluate("document.documentElement.scrollWidth")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert sentence.startswith("Balancing would pay")
    assert all(box["width"] > 300 and box["height"] > 150 for box in boxes)
    assert rows == 3
    assert widest <= 1100
    colours = colours_of(tmp_path / "page.png")
    assert colours > 100, f"a page with {colours} colours shows no heat map"


def colours_of(path: Path) -> int:
    from PIL import Image

    with Image.open(path) as image:
        return len(image.convert("RGB").resize((400, 800)).getcolors(400 * 800))


@drawn
@needs("transformers")
@pytest.mark.ranks
def test_the_command(tmp_path: Path) -> None:
    """In a process of its own: the command's fork server has transformers, and with it Triton, whose interpreter other tests of
    this process want to be turned on before."""
    options = ["--ranks", "2", "--model", "tiny:mixtral", "--max-new-tokens", "4", "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "tokenferry.cli", "inspect", *options, "--output", str(tmp_path / "made" / "report")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["files"][0]).read_text().startswith("<!DOCTYPE html>")
    assert told["num_ranks"] == 2
    rows = sum(told["snapshots"][0]["rows"])
    topk, num_layers = 2, len(told["loads"])
    assert 0 < sum(map(sum, told["loads"])) <= rows * topk
    assert num_layers == 2
    assert "pay" in told["verdict"]["sentence"]
