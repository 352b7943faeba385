"""The parts of the command line that need no rank: prompts, spreading, verdicts, errors, JSON."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tokenferry.benchmarking import PRESETS, REHEARSAL
from tokenferry.cli import output
from tokenferry.cli.context import check_prompts, context_length
from tokenferry.cli.display import printable
from tokenferry.cli.failure import one_line, summary
from tokenferry.cli.job import Answer, Job, RankResult
from tokenferry.cli.main import app
from tokenferry.cli.progress import progress, progress_lines
from tokenferry.cli.prompts import DEFAULT_PROMPTS, read_prompts
from tokenferry.cli.reference import compare
from tokenferry.cli.spread import TOKENS_PER_BATCH, batches, capacity, spread
from tokenferry.cli.terminal import print_json
from tokenferry.cli.work import load_tokenizer
from tokenferry.errors import ConfigError

# Prompts


def test_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("Wer da?\r\n\n  ¿Qué?  \n{not json}\n".encode())
    assert read_prompts(path) == ("Wer da?", "¿Qué?", "{not json}")


def test_jsonl_file_has_an_object_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "three"}')
    assert read_prompts(path) == ("one\ntwo", "three")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "line 2: each line must be an object"),
        ("a.jsonl", b'{"prompt": "a", "seed": 1}', "line 1: each line must be an object"),
        ("a.jsonl", b'\n\n{"prompt": "a}', r"line 3: not JSON \(.* at column 12\)"),
        ("a.jsonl", b'{"prompt": " "}', "line 1: the prompt is empty"),
        ("a.txt", b"fine\nbad \xff", r"line 2: not UTF-8 \(byte 0xff at column 5\)"),
        ("a.txt", b"\0\0", "line 1: a NUL byte"),
        ("a.txt", b" \n\n", "holds no prompt"),
    ],
)
def test_malformed_prompts_file_is_named_with_its_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_prompts(path)


def test_prompts_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")


# Spreading


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "expected"),
    [
        ((10, 4, 3, 2, 1), 2, [[0], [1, 2, 3, 4]]),
        ((1, 2, 3, 4, 10), 2, [[4], [3, 2, 1, 0]]),
        ((5, 5, 5, 5), 2, [[0, 1], [2, 3]]),
        ((7,), 3, [[], [0], []]),
        ((9, 1), 1, [[0, 1]]),
    ],
    ids=["longest-first", "any-order", "equal", "fewer-prompts-than-ranks", "one-rank"],
)
def test_spread(lengths, num_ranks, expected):
    assert spread(lengths, num_ranks) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_prompt_is_spread_once(num_ranks):
    lengths = [(37 * i) % 101 + 1 for i in range(23)]
    assert sorted(prompt for own in spread(lengths, num_ranks) for prompt in own) == list(range(23))


def test_batches_stay_within_the_limit_and_capacity_covers_them():
    lengths = [TOKENS_PER_BATCH + 500, 900, 800, 700, 10]
    assert batches([0, 1, 2, 3, 4], lengths) == [[0], [1, 2], [3, 4]]
    assert capacity(lengths, 1) == TOKENS_PER_BATCH + 500
    assert capacity([3, 5], 1) == 10


# Verdicts


def answer(prompt, ids, shift=0.0, complete=True):
    logits = torch.arange(len(ids) * 4, dtype=torch.float32).view(len(ids), 4) + shift
    return Answer(prompt=prompt, num_prompt_tokens=3, token_ids=ids, text="text", complete=complete, logits=logits)


def result(rank, answers, num_layers=2):
    return RankResult(
        rank=rank, device="cpu", transport="collective", dtype="float32", answers=tuple(answers), generate_s=2.0, total_s=4.0,
        communication_s=1.0, num_layers=num_layers, experts=(2 * rank, 2 * rank + 2), num_experts=4, num_threads=1,
        peak_memory_bytes=2**20,
    )  # fmt: skip


REFERENCE = [answer(0, (5, 6, 7)), answer(1, (8, 9))]


def test_equal_tokens_pass_and_the_largest_logit_difference_is_known():
    comparison = compare([result(0, [answer(1, (8, 9), shift=0.25)]), result(1, [answer(0, (5, 6, 7))])], REFERENCE)
    assert comparison.passed
    assert (comparison.num_equal, comparison.num_prompts, comparison.largest_logit_difference) == (2, 2, 0.25)


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([result(0, REFERENCE, num_layers=0)], "rank 0: no MoE layer is under expert parallelism"),
        ([result(0, [answer(0, (5, 6, 4)), REFERENCE[1]])], r"rank 0, prompt 0: token 2 is \[4\], alone it is \[7\]"),
        ([result(0, [answer(0, (5, 6)), REFERENCE[1]])], r"rank 0, prompt 0: token 2 is the end, alone it is \[7\]"),
        ([result(0, [REFERENCE[0], answer(1, (8, 9), complete=False)])], "rank 0, prompt 1: ended after 2 tokens"),
        ([result(0, REFERENCE[:1])], "prompt 1: no rank answered it"),
    ],
    ids=["no-layers", "other-token", "too-short", "incomplete", "unanswered"],
)
def test_what_makes_verify_fail(results, reason):
    comparison = compare(results, REFERENCE)
    assert not comparison.passed
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("\n".join(comparison.reasons))


def test_logits_count_up_to_the_first_token_that_differs():
    logits = REFERENCE[0].logits.clone()
    logits[1] += 0.5
    logits[2] += 9.0
    got = dataclasses.replace(answer(0, (5, 4, 7)), logits=logits)
    assert compare([result(0, [got])], REFERENCE[:1]).largest_logit_difference == 0.5


# Output


def test_json_has_the_documented_keys():
    job = Job(model="demo", prompts=("first", "second"), max_new_tokens=3)
    results = [result(0, [REFERENCE[1]]), result(1, [REFERENCE[0]])]
    document = json.loads(output.as_json("verify", job, results, compare(results, REFERENCE)))
    assert set(document) == {"schema", "command", "model", "max_new_tokens", "exact", "ranks", "prompts", "verify"}
    assert document["ranks"][1] | {"peak_memory_bytes": 0} == {
        "rank": 1, "device": "cpu", "transport": "collective", "dtype": "float32", "num_prompts": 1, "num_prompt_tokens": 3,
        "num_new_tokens": 3, "generate_s": 2.0, "total_s": 4.0, "tokens_per_s": 1.5, "communication_share": 0.25,
        "num_layers": 2, "experts": [2, 3], "num_experts": 4, "peak_memory_bytes": 0,
    }  # fmt: skip
    assert document["prompts"][1] == {
        "prompt_id": 1, "rank": 0, "prompt": "second", "text": "text", "token_ids": [8, 9], "num_prompt_tokens": 3,
        "complete": True,
    }  # fmt: skip
    assert document["verify"]["passed"] is True


def test_unknown_logit_difference_is_null_in_json():
    results = [result(0, [dataclasses.replace(entry, logits=None) for entry in REFERENCE])]
    comparison = compare(results, REFERENCE)
    assert math.isnan(comparison.largest_logit_difference)
    text = output.as_json("verify", Job(model="demo", prompts=("a", "b"), max_new_tokens=3), results, comparison)
    assert json.loads(text)["verify"]["largest_logit_difference"] is None


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\tc\nd\r").plain == "a\N{REPLACEMENT CHARACTER}[31mb\tc\nd\N{REPLACEMENT CHARACTER}"


def test_a_model_without_a_tokenizer_is_named_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds no tokenizer; fetch its files"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"the tokenizer in {tmp_path} cannot be loaded: .*; fetch its files"):
        load_tokenizer(tmp_path)


def test_default_prompts_differ_in_length():
    assert len({len(prompt) for prompt in DEFAULT_PROMPTS}) == 5


# The model's context


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"model_type": "mamba"}, None),
        ({"text_config": {"max_position_embeddings": 256, "rope_scaling": None}}, 256),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        (
            {"max_position_embeddings": 131072, "rope_parameters": {"factor": 32.0, "original_max_position_embeddings": 4096}},
            131072,
        ),
        ({"max_position_embeddings": 100, "rope_parameters": {"full_attention": {"factor": 8.0}, "other": {}}}, 800),
    ],
    ids=["plain", "gpt2", "none", "nested", "stretched", "stretched-already", "by-layer-type"],
)
def test_context_length_as_the_configuration_tells(config, length):
    assert context_length(config) == length


def test_a_prompt_that_fills_the_context_to_the_last_token_passes(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 100}')
    check_prompts(tmp_path, [3, 90], 10)
    check_prompts(tmp_path, [], 10)


@pytest.mark.parametrize(
    ("lengths", "new", "remedy"),
    [
        (
            (3, 91),
            10,
            "prompt 1 has 91 tokens .* holds 100 tokens; .* to 90 tokens, or give --max-new-tokens 9 at most",
        ),
        ((400, 5), 10, "prompt 0 has 400 tokens .* shorten the prompt to 90 tokens at most"),
    ],
    ids=["together", "alone"],
)
def test_a_prompt_beyond_the_context_is_named_with_the_remedy(tmp_path, lengths, new, remedy):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 100}')
    with pytest.raises(ConfigError, match=remedy):
        check_prompts(tmp_path, lengths, new)


# Outputs that are no terminal, and those that are ASCII


def test_piped_progress_is_lines():
    written = io.StringIO()
    with progress(Console(file=written), ["rank 0", "rank 1"]) as on_message:
        on_message(1, {"total": 20, "prompts": 2})
        on_message(1, {"new": 2})
        on_message(1, {"done": True})
    assert [line.rpartition(",")[0] for line in written.getvalue().splitlines()] == [
        "rank 1: 2 prompts to answer, at most 20 tokens",
        "rank 1: done, 2 tokens",
    ]


def test_piped_progress_comes_again_and_again_and_ends_with_an_error():
    written = io.StringIO()
    with pytest.raises(ConfigError), progress_lines(Console(file=written), ["rank 0", "rank 1"], every_s=0.05) as on_message:
        on_message(1, {"total": 20, "prompts": 1})
        on_message(1, {"new": 3})
        while written.getvalue().count("rank 0: loading; rank 1: 3 of at most 20 tokens") < 2:
            time.sleep(0.01)
        raise ConfigError("it fails")
    before = written.getvalue()
    time.sleep(0.15)
    assert written.getvalue() == before


def ascii_console():
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=200)


def test_json_stays_json_in_ascii():
    console = ascii_console()
    print_json(console, json.dumps({"text": "Grüße … 🙂"}, ensure_ascii=False))
    console.file.flush()
    assert json.loads(console.file.buffer.getvalue()) == {"text": "Grüße … 🙂"}


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=["table", "json"])
def test_doctor_prints_what_ascii_lacks_in_other_signs(arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "300", "TOKENFERRY_CACHE_DIR": "/Jürgen – …"}
    command = [sys.executable, "-m", "tokenferry.cli", "doctor", *arguments]
    outcome = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    said = outcome.stdout.decode("ascii").replace("\n", "")
    assert ("J\\u00fcrgen" if arguments else "rgen - ...") in said


# Errors


@pytest.mark.parametrize(
    ("traceback", "expected"),
    [
        ("killed by SIGKILL", "killed by SIGKILL"),
        (
            'Traceback (most recent call last):\n  File "a.py", line 1\ntokenferry.errors.ConfigError: 4 experts are too few\n',
            "4 experts are too few",
        ),
        (
            "Traceback (most recent call last):\n  File\ntokenferry.errors.TransportUnavailableError: none:\n  local: rejected\n",
            "none:\n  local: rejected",
        ),
        (
            "Traceback (most recent call last):\n  File\nKeyError: 'a'\n\nDuring handling\n\nTraceback (most recent call last):\n"
            "  File\nRuntimeError: out of luck\nand more\n",
            "RuntimeError: out of luck (TOKENFERRY_DEBUG=1 shows where)",
        ),
        ("Traceback (most recent call last):\n  File\nAssertionError\n", "AssertionError (TOKENFERRY_DEBUG=1 shows where)"),
    ],
    ids=["signal", "ours", "ours-of-many-lines", "chained", "no-message"],
)
def test_summary_of_a_rank_traceback(traceback, expected):
    assert summary(traceback) == expected


def test_transport_that_cannot_be_had_gives_the_reason_for_that_one():
    message = "rank 1: transport 'nvls' cannot serve this group:\n  p2p: accepted\n  nvls: rejected, no multicast\n  local: x"
    expected = "rank 1: transport 'nvls' cannot serve this group: no multicast (`tokenferry doctor` shows them all)"
    assert one_line(message) == expected
    assert one_line("no other\n  message: changes") == "no other\n  message: changes"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "--model", "/nowhere"], "no model at /nowhere"),
        (["generate", "--model", "tiny:nothing"], "no tiny model of family 'nothing'"),
        (["verify", "--model", "tiny:mixtral", "--ranks", "5"], "has 4 experts, too few for 5 ranks"),
        (["generate", "--prompts", "/nowhere.txt"], "prompts file /nowhere.txt cannot be read"),
        (["generate", "--transport", "pigeon"], "--transport must be auto or one of"),
        (["generate", "--ranks", "0"], "Invalid value"),
        (["verify", "--dtype", "int8"], "Invalid value"),
        (["generate", "--model", ""], "--model is empty: give demo, tiny:FAMILY or a checkpoint's folder"),
        (
            ["verify", "--model", "tiny:mixtral", "--max-new-tokens", "512"],
            "the prompt's included; give at most 511",
        ),
        (["bench", "roundtrip", "--ranks", "0"], "Invalid value"),
        (["bench", "roundtrip", "--ranks", "999"], "bench roundtrip needs 999 CUDA GPUs, found"),
        (["bench", "layer", "--ranks", "0", "--rehearse"], "Invalid value"),
        (["bench", "layer", "--rehearse", "--output", "/"], "--output / cannot be written: Is a directory"),
    ],
    ids=[
        "model",
        "family",
        "experts",
        "prompts",
        "transport",
        "ranks",
        "dtype",
        "empty-model",
        "new-tokens",
        "bench-ranks",
        "bench-GPUs",
        "bench-layer-ranks",
        "bench-output",
    ],
)
def test_what_a_user_can_cause_is_a_line_and_exit_code_2(arguments, reason):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert reason in outcome.stderr
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert "--ranks 0" not in outcome.stderr


def test_fewer_processes_under_torchrun_than_asked_for(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(app, ["generate", "--ranks", "3", "--model", "tiny:mixtral"])
    assert (outcome.exit_code, "--ranks is 3 but torchrun started 2" in outcome.stderr) == (2, True)


def test_unwritable_cache_is_a_line_and_exit_code_2(monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="the demo's packages are not installed")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENFERRY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tokenferry.demo.model.source_file", lambda: tmp_path / "weights.gguf")
    outcome = CliRunner().invoke(app, ["generate"])
    assert outcome.exit_code == 2
    assert "cannot be written to the cache folder" in outcome.stderr
    assert "set TOKENFERRY_CACHE_DIR" in outcome.stderr


def test_bench_layer_names_its_presets_and_those_of_a_rehearsal():
    said = CliRunner().invoke(app, ["bench", "layer", "--help"]).stdout
    assert [preset.name for preset in (*PRESETS, *REHEARSAL) if preset.name not in said] == []


def test_doctor_names_every_transport_with_its_reason():
    outcome = CliRunner().invoke(app, ["doctor", "--json"])
    document = json.loads(outcome.stdout)
    pair = next(trial for trial in document["transports"] if (trial["num_ranks"], trial["device"]) == (2, "cpu"))
    assert {decision["name"] for decision in pair["decisions"]} == {"local", "nvls", "p2p", "collective"}
    assert all(decision["reason"] for decision in pair["decisions"])
    assert document["topology"]["num_cpus"] >= 1
    assert document["topology"]["versions"]["torch"] == torch.__version__
    assert "TOKENFERRY_DEBUG" in document["environment"]


def test_doctor_prints_for_people():
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == 0
    assert "Transports for 2 ranks on cpu" in outcome.stdout
