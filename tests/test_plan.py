"""`tokenferry doctor --plan`: its bytes are those of a workspace, and its times follow what was measured."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tokenferry as tf
from tokenferry.cli.main import app
from tokenferry.cli.plan import EXCHANGES, experts_floor_us, plan, shape_of, step_times
from tokenferry.errors import ConfigError
from tokenferry.testing.tiny_models import FAMILIES, tiny_config

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def records(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", "--plan", *arguments])


@pytest.mark.parametrize("transport", ["p2p", "nvls", "collective"])
def test_bytes_are_those_of_a_workspace(transport):
    document = plan(shape_of("qwen3-30b-a3b"), 8, 512)
    config = tf.MoEConfig(hidden_size=2048, num_experts=128, topk=8, dtype=torch.bfloat16)
    buffers = dict(document["workspace_bytes"][transport])
    total = buffers.pop("total")
    assert total == tf.Workspace.required_bytes(config, 8, 512, transport=transport)
    assert not buffers or sum(buffers.values()) == total


@pytest.mark.parametrize("transport", list(EXCHANGES))
def test_times_of_an_exchange_are_within_the_tolerance_that_is_told(transport):
    """Of what was measured on 2 x H100; collective by the faster of its two orders of summation."""
    measured = {}
    for record in records("2xH100-2026-11-22.jsonl"):
        tokens = record.get("tokens")
        if record.get("transport") == transport and isinstance(tokens, list) and len(set(tokens)) == 1:
            point = (record["wire_bytes"], record["hidden_size"])
            measured[point] = min(record["round_trip_us"], measured.get(point, float("inf")))
    model = EXCHANGES[transport]
    worst = max(abs(model.time_us(num_bytes) / took_us - 1) for (num_bytes, _), took_us in measured.items())
    assert len(measured) == 12
    assert worst <= model.tolerance


def test_bytes_that_a_rank_sends_are_those_that_the_benchmark_counts():
    record = next(each for each in records("2xH100-2026-11-23.jsonl") if each.get("tokens") == [128, 128])
    shape = shape_of("deepseek-v3")
    assert (record["hidden_size"], record["topk"]) == (shape.hidden_size, shape.topk)
    assert step_times(shape, 2, 128)["bytes_sent_per_layer"] == record["wire_bytes"]


@pytest.mark.parametrize("tokens", [1, 8, 128, 4096])
def test_experts_floor_is_that_of_the_benchmark_within_a_tenth(tokens):
    """There the routing was counted, here it is expected."""
    layers = [record for record in records("2xH100-2026-11-23-layer.jsonl") if record.get("preset") == "qwen3-30b-a3b"]
    counted_us = next(record["experts_floor_us"] for record in layers if record["tokens"] == tokens)
    assert experts_floor_us(shape_of("qwen3-30b-a3b"), 2, tokens) == pytest.approx(counted_us, rel=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_configuration_of_every_family_gives_a_shape(family, tmp_path):
    config = tiny_config(family)
    (tmp_path / "config.json").write_text(config.to_json_string())
    shape = shape_of(str(tmp_path / "config.json"))
    text = config.get_text_config()
    assert (shape.hidden_size, shape.topk >= 1, shape.num_experts >= shape.topk) == (text.hidden_size, True, True)


def test_dense_layers_are_left_out(tmp_path):
    values = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3, "hidden_size": 7168}
    values |= {"n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "intermediate_size": 18432}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shape = shape_of(str(tmp_path))
    assert (shape.num_layers, shape.expert_size) == (58, 2048)


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ({"num_hidden_layers": 4}, 4),
        ({"num_hidden_layers": 4, "mlp_only_layers": [0, 3]}, 2),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe"]}, 2),
        ({"hybrid_override_pattern": "MEM*E"}, 2),
        ({}, None),
    ],
    ids=["all", "some-dense", "named-blocks", "pattern", "unknown"],
)
def test_number_of_layers_with_experts(layers, count, tmp_path):
    sizes = {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", **sizes, **layers}))
    assert shape_of(str(tmp_path)).num_layers == count


def test_one_rank_exchanges_nothing():
    (row,) = plan(shape_of("mixtral-8x7b"), 1, 1)["steps"]
    assert (row["p2p_round_trip_us"], row["bytes_sent_per_layer"]) == (0.0, 0)


def test_plan_says_what_its_times_stand_on():
    outcome = invoke("qwen3-30b-a3b", "--ep", "8", "--max-tokens", "512")
    said = " ".join(outcome.stdout.split())
    assert outcome.exit_code == 0
    assert "a model, not a measurement" in said
    assert "More than 2 GPUs have not been measured" in said
    assert "4.7 µs + bytes sent / 330 GB/s" in said


def test_plan_as_json_is_the_document():
    outcome = invoke("deepseek-v3", "--ep", "4", "--max-tokens", "64", "--json")
    assert json.loads(outcome.stdout)["plan"] == json.loads(json.dumps(plan(shape_of("deepseek-v3"), 4, 64)))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["nothing", "--ep", "2", "--max-tokens", "8"],
            "--plan takes qwen3-30b-a3b, gpt-oss-20b, gpt-oss-20b-mxfp4",
        ),
        (["mixtral-8x7b", "--ep", "2"], "--plan needs --max-tokens too"),
        (["mixtral-8x7b"], "--plan needs --ep and --max-tokens too"),
        (["mixtral-8x7b", "--ep", "9", "--max-tokens", "8"], "has 8 experts, too few for 9 ranks; give --ep 8 at most"),
        (["mixtral-8x7b", "--ep", "0", "--max-tokens", "8"], "Invalid value"),
    ],
    ids=["unknown", "no-max-tokens", "no-numbers", "too-many-ranks", "no-ranks"],
)
def test_wrong_use_is_exit_code_2(arguments, reason):
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert reason in " ".join(outcome.output.split())


def test_numbers_without_a_plan_are_wrong_use():
    outcome = CliRunner().invoke(app, ["doctor", "--ep", "2"])
    assert (outcome.exit_code, outcome.output) == (2, "tokenferry: --ep and --max-tokens belong to --plan, which is not given\n")


def test_a_configuration_without_experts_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64}')
    with pytest.raises(ConfigError, match=r"has none of num_local_experts, num_experts, .* is it one with experts"):
        shape_of(str(tmp_path))


def test_packed_experts_take_4_25_bits_a_weight():
    plain, packed = shape_of("gpt-oss-20b"), shape_of("gpt-oss-20b-mxfp4")
    assert packed.expert_bytes * 16 == plain.expert_bytes * 4.25
    assert experts_floor_us(packed, 2, 8) < 0.3 * experts_floor_us(plain, 2, 8)
