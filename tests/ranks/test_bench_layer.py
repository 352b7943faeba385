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
    assert "tiny-v3" in capsys.readouterr().out


def test_float8_weights_are_right_with_rows_of_either_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer.jsonl"
    assert layer_command(2, "tiny-v3", "1", 200.0, path, rehearse=True, float8=True) == 0
    for record in records_of(path):
        assert record["float8"] and record["correct"] == {"same": True, "fp8_block128": True}
        assert record["bfloat16_us"] > 0
        assert all(record[name][time] > 0 for name in record["correct"] for time in ("total_us", "round_trip_us"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["tiny-v3", "1", "same"], ["tiny-v3", "1", "fp8_block128"]]


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
