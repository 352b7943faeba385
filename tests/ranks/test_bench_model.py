"""The rehearsal of `tokenferry bench model` on CPUs: every way and mode, their tokens compared, without figures."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.benchmarking import MODEL_POINTS, GroupTimer, ModelPoint, ModelRequest, is_right, model_table, run_model
from tokenferry.benchmarking.model import Run
from tokenferry.benchmarking.model_checks import common_prefix
from tokenferry.benchmarking.model_modes import MODES
from tokenferry.benchmarking.model_plan import parts_of
from tokenferry.benchmarking.model_request import ALL_MODES, ALL_WAYS, REFERENCE
from tokenferry.benchmarking.model_times import Decoder, NotCaptured, Replays
from tokenferry.benchmarking.model_ways import WAYS, graphs_wanted
from tokenferry.cli.bench_model import model_command, points
from tokenferry.errors import ConfigError, DeviceError
from tokenferry.testing.tiny_models import tiny_config

pytest.importorskip("transformers", reason="bench model measures models of transformers")
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model.py"


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of a configuration in a file, at the batch that continuous batching is measured at, in all ways."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "config.json").write_text(tiny_config("qwen3_moe").to_json_string())
    output = folder / "model.jsonl"
    config = str(folder / "config.json")
    assert model_command(2, [config], "8", "9", "all", 200.0, output, families="mixtral", rehearse=True) == 0
    return records_of(output)


@pytest.mark.parametrize("way", WAYS)
def test_every_mode_of_a_way_has_its_times_and_the_tokens_of_the_plain_model(way: str, records: list[dict]) -> None:
    mine = {record["mode"]: record for record in records if record.get("way") == way and "mode" in record}
    every = [*WAYS[way].modes, *WAYS[way].slow_modes]
    assert list(mine) == (every if graphs_wanted() else [mode for mode in every if mode != "graph-compiled"])
    for mode, record in mine.items():
        times = [record.get(name) for name in ("step_ms", "token_ms")]
        assert any(times) and all(time is None or time > 0 for time in times), mode
        if (way, mode) != REFERENCE:
            assert (record["agreement"], record["compared"]) == (1.0, 2 * 8 * 8), mode


def test_tiny_models_in_float32_come_first(records: list[dict]) -> None:
    assert (records[0]["what"], records[0]["family"], records[0]["equal_tokens"]) == ("model tokens", "mixtral", True)


def test_a_line_for_each_record_and_the_share_of_equal_tokens_at_its_end(records: list[dict]) -> None:
    lines = model_table(records).splitlines()
    assert len(lines) == 1 + len([record for record in records if "loaded_s" not in record])
    assert any("p2p" in line and "eager" in line and line.endswith(" 1.0") for line in lines)
    assert lines[-1] == "tiny mixtral in float32: tokens equal"


def test_the_table_of_a_rehearsal_has_no_figures(records: list[dict]) -> None:
    for line in model_table([record for record in records if "mode" in record]).splitlines()[1:]:
        assert line.split()[5:14] == ["-"] * 9


def test_what_the_budget_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.jsonl"
    assert model_command(1, ["mixtral-8x7b:1"], "2", "9", "plain", 1e-3, path, families="", rehearse=True) == 0
    [record] = records_of(path)
    assert record["left_out"] == [["graph", 2, 9], ["eager", 2, 9]]
    assert "left out graph at 2 x 9, eager at 2 x 9: the budget of 0 s was spent" in capsys.readouterr().out


def test_a_configuration_of_ones_own_is_measured_by_its_path(tmp_path: Path) -> None:
    path, config = tmp_path / "model.jsonl", tmp_path / "config.json"
    config.write_text(tiny_config("mixtral").to_json_string())
    assert model_command(1, [str(config)], "1", "5", "plain", 60.0, path, modes="eager", families="", rehearse=True) == 0
    assert [record["config"] for record in records_of(path) if record.get("mode") == "eager"] == [str(config)]


def test_a_way_that_fails_says_why_and_the_next_one_is_measured() -> None:
    """Peer memory on CPUs is for the interpreter alone."""
    point = ModelPoint("mixtral-8x7b:1", 1, 5)
    request = ModelRequest(
        points=(point,),
        ways=("p2p", "collective"),
        modes=("graph", "eager"),
        families=("mixtral",),
        new_tokens=3,
        rehearse=True,
    )
    records = run_model(request, 2, device="cpu")
    errors = [record["error"] for record in records if "error" in record]
    assert len(errors) == 2 and all(error.startswith("TransportUnavailableError") for error in errors)
    assert [record["left_out"] for record in records if "left_out" in record] == [[["graph", 1, 5], ["eager", 1, 5]]]
    assert [record["way"] for record in records if "mode" in record] == ["collective"]
    assert not all(is_right(record) for record in records)


@pytest.mark.long
def test_under_torchrun_rank_0_writes_and_prints(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    asked = ["--rehearse", "--ways", "plain,collective", "--families", "qwen3_moe"]
    done = subprocess.run([*torchrun, str(path), *asked], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("configuration") == 1
    assert {record["world_size"] for record in records_of(path)} == {2}


# --- without ranks ----------------------------------------------------------------------------------------------------------


def test_the_published_points_have_three_models_of_eight_layers() -> None:
    assert {point.config for point in MODEL_POINTS} == {"qwen3-30b-a3b:8", "gpt-oss-20b:8", "mixtral-8x7b:8"}
    assert points([], "1", "1", rehearse=False) == MODEL_POINTS


def test_every_mode_of_a_way_has_a_name_and_a_measurement() -> None:
    used = {mode for way in WAYS.values() for mode in (*way.modes, *way.slow_modes)}
    assert set(ALL_MODES) == set(MODES) == used
    assert set(ALL_WAYS) == set(WAYS)


def test_the_tokens_of_the_plain_model_are_made_whatever_modes_are_asked_for() -> None:
    request = ModelRequest(modes=("compile",))
    asked = [("plain", "eager"), ("plain", "graph"), ("p2p", "eager"), ("transformers", "compile")]
    assert [request.wants(*each) for each in asked] == [False, True, False, True]


def test_configurations_are_measured_with_every_batch_and_prompt() -> None:
    found = points(["a", "b"], "8,1", "128", rehearse=False)
    assert [(point.config, point.batch, point.prompt) for point in found] == [
        ("a", 1, 128), ("a", 8, 128), ("b", 1, 128), ("b", 8, 128),
    ]  # fmt: skip


def test_what_is_quick_comes_first_and_what_compiles_by_points() -> None:
    request = ModelRequest(points=MODEL_POINTS, modes=("eager", "compile"))
    parts = parts_of(request, tf.EPGroup.alone("cpu"))
    assert [(part.config[0], part.way) for part in parts[:4]] == [("q", way) for way in ALL_WAYS]
    assert [len(part.steps) for part in parts[:4]] == [6 + 6, 6, 6, 6]  # the plain model's tokens are made as well
    assert [part.steps for part in parts if part.steps[0][0] == "compile"] == [(("compile", point),) for point in MODEL_POINTS]
    assert parts[-len(MODEL_POINTS)].steps[0][0] == "compile"


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([4], [5], 0), ([1, 2], [1, 2, 3], 2)],
    ids=["equal", "one differs", "none", "one is shorter"],
)
def test_tokens_count_up_to_the_first_difference(left: list[int], right: list[int], expected: int) -> None:
    assert common_prefix(left, right) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ways": ("fast",)}, "ways must be of plain, p2p, transformers, collective; got fast"),
        ({"modes": ("slow",)}, "modes must be of eager, graph, .*; got slow"),
        ({"families": ("bert",)}, "no tiny model of family 'bert'"),
        ({"points": (ModelPoint("gpt-5", 1, 1),)}, "no configuration gpt-5"),
        ({"capacity": 4}, "a batch of 8 is more than the capacity, 4"),
    ],
    ids=["way", "mode", "family", "configuration", "capacity"],
)
def test_a_request_that_cannot_be_met_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelRequest(**changed)


def test_without_gpus_it_says_so() -> None:
    with pytest.raises(DeviceError, match=r"bench model needs 99 CUDA GPUs.*--rehearse"):
        model_command(99, [], "1", "1", "all", 1.0, None)


def test_a_workspace_whose_replays_were_timed_is_as_before() -> None:
    group = tf.EPGroup.alone("cpu")
    config = tf.MoEConfig(hidden_size=8, num_experts=2, topk=1)
    with tf.Workspace(config, group, max_tokens_per_rank=2) as ws:
        own = ws.replaying
        with Replays(GroupTimer(group), ws) as replays:
            assert ws.replaying != own
        assert ws.replaying == own
        assert replays.figures() == {}


def test_a_forward_that_cannot_be_captured_is_not_run_and_the_next_mode_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Decoder) -> None:
        raise NotCaptured("it asks the host")

    monkeypatch.setattr(Decoder, "capture", refuse)
    request = ModelRequest(
        points=(ModelPoint("mixtral-8x7b:1", 1, 5),), ways=("plain",), families=(), new_tokens=3, rehearse=True
    )
    records = Run(tf.EPGroup.alone("cpu"), request, time.time(), None, None).measure()
    assert [record["not_run"] for record in records if "not_run" in record] == [[["graph", 1, 5]]]
    assert [record["mode"] for record in records if "mode" in record] == ["eager"]
    assert all(is_right(record) for record in records)
    assert "not run graph at 1 x 5: NotCaptured: it asks the host" in model_table(records)


class Span:
    """In the place of a CUDA event."""

    def elapsed_time(self, end: object) -> float:
        return 2.5


def figures_of_replays(group: tf.EPGroup, ranks_that_replayed: list[int]) -> dict[str, float]:
    replays = Replays(GroupTimer(group), workspace=None)
    replays._spans = [(Span(), Span())] if group.rank in ranks_that_replayed else []
    return replays.figures()


@pytest.mark.parametrize(
    ("ranks_that_replayed", "figures"),
    [([], {}), ([1], {"step_ms": 2.5}), ([0, 1], {"step_ms": 2.5})],
    ids=["none", "one", "both"],
)
def test_a_rank_without_replays_keeps_no_other_waiting(
    on_ranks: RankPools, ranks_that_replayed: list[int], figures: dict[str, float]
) -> None:
    assert on_ranks(figures_of_replays, 2, ranks_that_replayed, timeout_s=30) == [figures] * 2
