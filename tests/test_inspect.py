"""`tokenferry inspect`: its report on figures that are known, looked at in a real browser, and a run of the command."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenferry.cli.expert_facts import expert_facts
from tokenferry.cli.inspect import step_model
from tokenferry.cli.job import Job
from tokenferry.cli.plan import Shape, step_times
from tokenferry.errors import ConfigError
from tokenferry.inspection import findings_of
from tokenferry.inspection.step_kinds import kinds_of
from tokenferry.kernels.wait_board import DISPATCH
from tokenferry.placement import Placement, StepModel
from tokenferry.telemetry import Snapshot, loads_of
from tokenferry.telemetry.recorder import COUNTS, Recorder

MODEL = StepModel(weight_bytes=1.0, flops_per_row=1e6, memory_bytes_per_s=1e12, flops_per_s=1e12)
MS = 1_000_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STARTS_RANKS = ["-m", "tokenferry.cli", "inspect", "--ranks", "2"]
UNDER_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tokenferry.cli", "inspect"]


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing) or 'nothing'}, not installed")


drawn = needs("jinja2", "matplotlib")


def snapshots() -> list[Snapshot]:
    """Two ranks that ran ten steps of two layers with four experts, two each; rank 1 was 4 ms late to each. Both have counted the
    gathered numbers, of which each tells its own experts'."""
    taken = []
    for rank in range(2):
        recorder = Recorder(rank, 2, 4, 32, 32, torch.device("cpu"), experts=range(2 * rank, 2 * rank + 2))
        for step in range(1, 11):
            recorder.step_began(step)
            recorder.is_in_step(step, 5 if step > 2 else 500)
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


@pytest.mark.parametrize(
    ("layers_of_ranks", "loads"),
    [
        pytest.param((2, 1), ((1, 1, 2, 2), (1, 1, 0, 0)), id="rank-1-earlier"),
        pytest.param((0, 1), ((0, 0, 2, 2),), id="rank-0-before-its-first-round"),
    ],
)
def test_a_rank_that_was_read_earlier_has_fewer_layers(layers_of_ranks: tuple[int, int], loads: tuple) -> None:
    taken = []
    for rank, num_layers in enumerate(layers_of_ranks):
        recorder = Recorder(rank, 2, 4, 32, 32, torch.device("cpu"))
        recorder.step_began(1)
        recorder.is_in_step(1, 5)
        for layer in range(num_layers):
            recorder.came(layer, (5, 5))
            recorder.loads[layer, 2 * rank : 2 * rank + 2] += 1 + rank
        taken.append(recorder.snapshot())
    assert loads_of(taken) == loads
    assert findings_of(taken, MODEL).loads == loads


def test_layers_that_share_a_place_are_one_layer_that_runs_often() -> None:
    recorder = Recorder(0, 1, 4, 32, 32, torch.device("cpu"))
    for step in range(1, 4):
        recorder.step_began(step)
        recorder.is_in_step(step, 10)
        for layer in range(130):
            recorder.came(layer, (10,))
            recorder.loads[min(layer, 127)] += torch.tensor([10, 0, 0, 0])
    findings = findings_of([recorder.snapshot()], MODEL)
    assert findings.verdict.options[0].step_s == pytest.approx(130 * 10 * 1e6 / 1e12)
    assert "Layers from number 127 on, about 3 of them, share the last place" in findings.notes[0]


def test_kinds_of_steps_by_hand() -> None:
    tokens = [{1: 100, 2: 1, 3: 0, 4: 1}, {1: 50, 2: 2, 3: 0, 4: 4}]
    taken = [with_tokens(rank, of_rank) for rank, of_rank in enumerate(tokens)]
    assert [(kind.name, kind.num_steps, kind.rows) for kind in kinds_of(taken)] == [
        ("0 rows", 1, 0.0),
        ("1 to 3 rows", 1, 3.0),
        ("4 to 15 rows", 1, 5.0),
        ("64 to 255 rows", 1, 150.0),
    ]


def test_replayed_steps_are_a_kind_with_the_rows_that_are_left() -> None:
    taken = []
    for rank in range(2):
        recorder = Recorder(rank, 2, 4, 32, 32, torch.device("cpu"))
        for step in range(1, 12):
            recorder.step_began(step)
            if step == 1:
                recorder.is_in_step(step, 100)
            for layer in range(3):
                recorder.came(layer, (100, 100) if step == 1 else (4, 3))
        taken.append(recorder.snapshot())
    assert [(kind.name, kind.num_steps, kind.rows) for kind in kinds_of(taken)] == [
        ("replayed graphs, 7 rows in the mean", 10, pytest.approx(7.0)),
        ("64 to 255 rows", 1, 200.0),
    ]


def test_where_nothing_is_known_of_the_rows_there_are_no_kinds() -> None:
    taken = [with_tokens(rank, {1: 5}, num_steps=20) for rank in range(2)]  # no round
    assert kinds_of(taken) == ()


def with_tokens(rank: int, tokens: dict[int, int], num_steps: int | None = None) -> Snapshot:
    recorder = Recorder(rank, 2, 4, 32, 32, torch.device("cpu"))
    for step in range(1, (num_steps or len(tokens)) + 1):
        recorder.step_began(step)
        if step in tokens:
            recorder.is_in_step(step, tokens[step])
    return recorder.snapshot()


@pytest.mark.parametrize(
    ("tensors", "job", "stored", "num_bytes"),
    [
        pytest.param({"up": (torch.bfloat16, (2, 8, 4))}, {}, "bfloat16", 64, id="bfloat16"),
        pytest.param({"up": (torch.float32, (2, 8, 4))}, {}, "bfloat16", 64, id="float32-for-bfloat16-on-a-cpu"),
        pytest.param({"up": (torch.float32, (2, 8, 4))}, {}, "float32", 128, id="float32"),
        pytest.param({"up": (torch.float32, (2, 8, 4))}, {"dtype": "float32"}, "bfloat16", 128, id="float32-asked-for"),
        pytest.param(
            {"up": (torch.float8_e4m3fn, (2, 8, 4)), "up_scale": (torch.float32, (2, 1, 1))},
            {"device": "cuda"},
            "bfloat16",
            32 + 4,
            id="float8-with-scales",
        ),
        pytest.param(
            {"blocks": (torch.int32, (2, 8, 2)), "gate": (torch.float32, (5,))}, {"device": "cuda"}, "bfloat16", 64, id="packed"
        ),
    ],
)
def test_the_bytes_of_an_expert_are_those_of_its_tensors(
    tensors: dict, job: dict, stored: str, num_bytes: float, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "dtype": stored, **sizes}))
    module = torch.nn.Module()
    for name, (dtype, shape) in tensors.items():
        module.register_buffer(name, torch.zeros(shape, dtype=torch.uint8).to(dtype))
    layer = SimpleNamespace(module=module, num_experts=4)
    parallel = SimpleNamespace(layers=[layer], group=SimpleNamespace(expert_range=lambda number: range(2)))
    facts = expert_facts(parallel, tmp_path / "config.json", Job(model="m", prompts=(), max_new_tokens=1, **job))
    assert facts == {"num_bytes": num_bytes, "num_weights": 3 * 4 * 8, "hidden_size": 4, "topk": 2}


def test_the_exchange_of_a_step_is_that_of_the_plan() -> None:
    expert = {"num_bytes": 0.0, "num_weights": 0, "hidden_size": 2048, "topk": 8}
    model = step_model(SimpleNamespace(telemetry={"expert": expert}), 4)
    shape = Shape(name="m", hidden_size=2048, num_experts=8, topk=8, expert_size=1, num_layers=1)
    planned_s = step_times(shape, 4, 512)["p2p_round_trip_us"] / 1e6
    rows = torch.full((1, 8), 4.0 * 512)
    assert model.step_s(Placement.as_is(1, 8, 4), rows) == pytest.approx(planned_s, rel=1e-2)


def test_a_snapshot_survives_json() -> None:
    for snapshot in snapshots():
        assert Snapshot.from_dict(json.loads(json.dumps(snapshot.to_dict()))) == snapshot


@pytest.mark.parametrize("num_ranks", [0, 1, 2])
def test_nothing_counted_is_said(num_ranks: int) -> None:
    taken = [Recorder(rank, num_ranks, 4, 32, 32, torch.device("cpu")).snapshot() for rank in range(num_ranks)]
    with pytest.raises(ConfigError, match="nothing was counted"):
        findings_of(taken, MODEL)


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
@pytest.mark.parametrize(("longest_ns", "unit", "text"), [(13_500_000_000, "s", "13.5"), (42 * MS, "ms", "42"), (0, "ns", "0")])
def test_waits_are_drawn_in_a_unit_that_fits(longest_ns: int, unit: str, text: str) -> None:
    from tokenferry.inspection.pictures import draw_all

    findings = replace(findings_of(snapshots(), MODEL), waits_ns=((0, longest_ns), (0, 0)))
    axes, colours = draw_all(findings)["waits"].axes
    assert colours.get_ylabel() == unit
    assert axes.texts[1].get_text() == text


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
        kinds = [page.locator("#kinds tr").nth(row).inner_text().split("\t")[:2] for row in (1, 2)]
        widest = page.evaluate("document.documentElement.scrollWidth")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert sentence.startswith("Balancing would pay")
    assert all(box["width"] > 300 and box["height"] > 150 for box in boxes)
    assert rows == 3
    assert kinds == [["4 to 15 rows", "8"], ["256 to 1023 rows", "2"]]
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
@pytest.mark.parametrize("launcher", [STARTS_RANKS, UNDER_TORCHRUN], ids=["ranks", "torchrun"])
def test_the_command(launcher: list[str], tmp_path: Path) -> None:
    """In a process of its own: the command's fork server has transformers, and with it Triton, whose interpreter other tests of
    this process want to be turned on before."""
    options = ["--model", "tiny:mixtral", "--max-new-tokens", "4", "--device", "cpu", "--json"]
    command = [sys.executable, *launcher, *options, "--output", str(tmp_path / "made" / "report")]
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
