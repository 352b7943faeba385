"""The rehearsal of `tokenferry bench layer` on CPUs: every call and check of the table, without figures."""

import json
from pathlib import Path

import pytest

from tokenferry.benchmarking import PRESETS, layer_table
from tokenferry.cli.bench import layer_command, named_presets, token_counts
from tokenferry.errors import ConfigError, DeviceError

pytestmark = pytest.mark.ranks


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rehearsal_is_right_in_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer.jsonl"
    assert layer_command(2, "tiny-v3", "1", 200.0, path, rehearse=True) == 0
    first, second = records_of(path)
    assert (first["tokens"], second["tokens"]) == (1, 8)
    for record in (first, second):
        assert record["correct"] == dict.fromkeys(("layer", "collective", "grouped_mm", "batched_mm"), True)
        assert all(record[name] > 0 for name in ("total_us", "floor_us", "collective_us", "grouped_mm_us", "touched_mb"))
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert line.split()[2:] == ["-"] * 9 + ["yes"]


WAYS = ("same", "fp8_block128", "fp8_block128_both")
"""How rows and terms of a layer with float8 weights travel."""


def check_float8(record: dict) -> None:
    assert record["float8"] and record["correct"] == dict.fromkeys(WAYS, True)
    assert record["bfloat16_us"] > 0
    assert all(record[name][time] > 0 for name in WAYS for time in ("total_us", "round_trip_us"))
    assert {"expected", *WAYS} <= set(record["seconds"])


def test_float8_weights_are_right_in_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer.jsonl"
    assert layer_command(2, "tiny-v3", "1", 200.0, path, rehearse=True, float8=True) == 0
    for record in records_of(path):
        check_float8(record)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [["tiny-v3", "1", name, *"------", "yes"] for name in WAYS]


def test_one_run_measures_a_preset_as_it_is_and_in_float8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layer of bfloat16 weights is measured once, in the first of the two."""
    path = tmp_path / "layer.jsonl"
    assert layer_command(2, "tiny,tiny-mxfp4", "1", 200.0, path, rehearse=True, float8_too=["tiny"]) == 0
    records = records_of(path)
    assert [(record["preset"], record["float8"]) for record in records] == [
        *[("tiny", False)] * 2, *[("tiny", True)] * 2, *[("tiny-mxfp4", False)] * 2,
    ]  # fmt: skip
    for plain, quantized in zip(records[:2], records[2:4], strict=True):
        check_float8(quantized)
        assert quantized["tokens"] == plain["tokens"]
        assert quantized["bfloat16_us"] == plain["total_us"]
        assert "bfloat16" not in quantized["seconds"]
    assert ["weights" in record["seconds"] for record in records] == [True, False] * 3
    assert capsys.readouterr().out.count("right") == 2


def test_packed_weights_do_not_stand_for_those_in_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "layer.jsonl"
    assert layer_command(2, "tiny-mxfp4", "1", 200.0, path, rehearse=True, float8_too=["tiny-mxfp4"]) == 0
    measured = [record for record in records_of(path) if record["float8"]]
    assert measured
    assert all("bfloat16" in record["seconds"] for record in measured)


def test_presets_for_float8_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got 'huge'"):
        layer_command(2, "tiny", "1", 200.0, tmp_path / "layer.jsonl", rehearse=True, float8_too=["huge"])


def test_what_the_budget_leaves_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer.jsonl"
    assert layer_command(1, "tiny", "1", 1e-3, path, rehearse=True) == 0
    [record] = records_of(path)
    assert record["left_out"] == [1, 8]
    assert "left out: T = [1, 8]" in capsys.readouterr().out


def test_a_wrong_column_is_named() -> None:
    record = {"preset": "x", "tokens": 1, "total_us": 1.0, "correct": {"layer": True, "grouped_mm": False}}
    assert layer_table([record]).splitlines()[1].endswith("no: grouped_mm")


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"with --rehearse a preset must be one of tiny, .* got 'huge'"):
        named_presets("huge", rehearse=True)


@pytest.mark.parametrize("tokens", ["1,x", "0", "", "-1"])
def test_tokens_are_positive_numbers(tokens: str) -> None:
    with pytest.raises(ConfigError, match="tokens must be positive ints"):
        token_counts(tokens)


def test_without_gpus_it_says_so() -> None:
    with pytest.raises(DeviceError, match=r"needs 99 CUDA GPUs.*--rehearse"):
        layer_command(99, "all", "1", 1.0, None)


def test_the_presets_are_those_of_the_page() -> None:
    names = ["qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-20b-mxfp4", "gpt-oss-120b", "deepseek-v3", "mixtral-8x7b"]
    assert [preset.name for preset in PRESETS] == names


def test_a_rehearsed_layer_of_packed_experts_is_right_in_each_way(tmp_path: Path) -> None:
    """transformers' functions get the weights that the packed ones stand for."""
    path = tmp_path / "layer.jsonl"
    assert layer_command(2, "tiny-mxfp4", "1", 200.0, path, rehearse=True) == 0
    for record in records_of(path):
        assert record["correct"] == dict.fromkeys(("layer", "collective", "grouped_mm", "batched_mm"), True)
