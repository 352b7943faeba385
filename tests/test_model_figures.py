"""README.md's figures of models and engines are those of the records that it names. Others: tests/test_figures.py."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "2xH200-2026-11-26-model.jsonl"
ENGINE_RECORDS = RECORDS.with_name("2xH200-2026-11-26-megatron-engine.jsonl")
VLLM_RECORDS = RECORDS.with_name("2xH200-2026-11-26-vllm-padding.jsonl")
FORMS = (("p2p", "graph-compiled"), ("transformers", "compile"))


@pytest.mark.parametrize(
    ("title", "points"),
    [
        ("`generate()`, Qwen3-30B-A3B", [("qwen3-30b-a3b:8", batch) for batch in (1, 8, 32)]),
        ("the same, gpt-oss-20b, Mixtral-8x7B", [("gpt-oss-20b:8", 8), ("mixtral-8x7b:8", 8)]),
    ],
    ids=["Qwen3", "gpt-oss and Mixtral"],
)
def test_a_row_has_the_measured_milliseconds_of_a_token(title: str, points: list[tuple[str, int]]) -> None:
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    tokens = {
        (record["way"], record["mode"], record["config"], record["batch"]): record["token_ms"]
        for record in records
        if "token_ms" in record and record["prompt"] == 128
    }
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {title}")]
    cells = [", ".join(f"{tokens[(*form, *point)]:.2f}" for point in points) for form in FORMS]
    assert [cell.strip() for cell in row.split("|")][-3:-1] == cells


def test_the_row_of_megatrons_engine_has_the_measured_tokens_per_second() -> None:
    records = [json.loads(line) for line in ENGINE_RECORDS.read_text().splitlines()]
    rates = {(record["variant"], record["load"]): record["tokens_per_s"] for record in records if "tokens_per_s" in record}
    [row] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| Megatron-Core's own engine")]
    cells = [", ".join(f"{rates[variant, f'even{load}']:.0f}" for load in (1, 8, 32)) for variant in ("nvls", "megatron")]
    assert [cell.strip() for cell in row.split("|")][-3:-1] == cells


def test_the_sentence_on_vllm_has_the_measured_ratios() -> None:
    records = [json.loads(line) for line in VLLM_RECORDS.read_text().splitlines()]
    steps = {(record["arm"], record["load"]): record["step_ms"] for record in records if "step_ms" in record}
    loads = ("8/2", "32/32", "1/0")

    def between(values: list[float], form: str) -> str:
        return f"{min(values):{form}} to {max(values):{form}}"

    forwards = {(record["arm"], record["load"]): record for record in records if "forward_ms" in record}
    without = {load: max(forwards["none", load]["forward_ms_of_ranks"]) for load in loads}
    own, ours = ([forwards[arm, load]["forward_ms"] - without[load] for load in loads] for arm in ("stock", "ours"))
    gone = [100 * (1 - our / their) for our, their in zip(ours, own, strict=True)]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{between(gone, '.0f')} % less time" in text
    for arm, said in (("ours", "{} times as many steps"), ("ours, no padding", "{} without padding rows")):
        assert said.format(between([steps["stock", load] / steps[arm, load] for load in loads], ".2f")) in text
