"""What the command line shows: verdicts of `verify`, JSON, progress, and what `doctor` and `bench` say, in any encoding."""

import dataclasses
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tokenferry.benchmarking import PRESETS, REHEARSAL
from tokenferry.cli import output
from tokenferry.cli.display import print_comparison, printable
from tokenferry.cli.job import Answer, Job, RankResult
from tokenferry.cli.main import app
from tokenferry.cli.phases import telling_phases
from tokenferry.cli.progress import progress, progress_lines
from tokenferry.cli.reference import compare
from tokenferry.cli.terminal import print_json
from tokenferry.errors import ConfigError
from tokenferry.integrations.vllm import known_versions
from tokenferry.lifecycle import PROGRESS


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


def test_where_rows_travel_quantized_other_tokens_are_counted_and_complete_answers_wanted():
    results = [result(0, [answer(0, (5, 6, 4)), answer(1, (8, 9))])]
    comparison = compare(results, REFERENCE, is_lossy=True)
    assert comparison.passed
    assert (comparison.num_equal, comparison.num_equal_tokens, comparison.num_tokens) == (1, 4, 5)
    ended = [result(0, [REFERENCE[0], answer(1, (8, 9), complete=False)])]
    assert not compare(ended, REFERENCE, is_lossy=True).passed


@pytest.mark.parametrize(
    ("is_lossy", "said"), [(True, ": not equal to one process, as expected of values"), (False, ": NOT equal to one process\n")]
)
def test_the_verdict_says_whether_other_tokens_are_a_failure(is_lossy, said):
    results = [result(0, [answer(0, (5, 6, 4)), answer(1, (8, 9))])]
    console = Console(file=io.StringIO(), width=200)
    print_comparison(console, compare(results, REFERENCE, is_lossy=is_lossy))
    assert said in console.file.getvalue()


def test_logits_count_up_to_the_first_token_that_differs():
    logits = REFERENCE[0].logits.clone()
    logits[1] += 0.5
    logits[2] += 9.0
    got = dataclasses.replace(answer(0, (5, 4, 7)), logits=logits)
    assert compare([result(0, [got])], REFERENCE[:1]).largest_logit_difference == 0.5


def test_json_has_the_documented_keys():
    job = Job(model="demo", prompts=("first", "second"), max_new_tokens=3)
    results = [result(0, [REFERENCE[1]]), result(1, [REFERENCE[0]])]
    document = json.loads(output.as_json("verify", job, results, compare(results, REFERENCE)))
    assert set(document) == {
        "schema",
        "command",
        "model",
        "max_new_tokens",
        "exact",
        "dispatch_format",
        "combine_dtype",
        "ranks",
        "prompts",
        "verify",
    }
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


def test_piped_progress_tells_what_a_rank_is_loading_and_what_it_has_taken():
    """A minute of "loading" told nobody whether it was weights or a compiler."""
    written = io.StringIO()
    with progress_lines(Console(file=written), ["rank 0"], every_s=0.05) as on_message:
        on_message(0, {"phase": "loading the model's weights"})
        on_message(0, {"phase": "opening a workspace"})
        while "rank 0: opening a workspace (0 s), 0 s\n" not in written.getvalue():
            time.sleep(0.01)
        on_message(0, {"total": 20, "prompts": 2})
    [told] = [line for line in written.getvalue().splitlines() if "weights" in line]
    assert re.fullmatch(r"rank 0: loading the model's weights \d\.\d s, opening a workspace \d\.\d s, 0 s", told)


def test_a_bar_names_what_a_rank_is_loading():
    written = io.StringIO()
    with progress(Console(file=written, force_terminal=True, width=120), ["rank 0"]) as on_message:
        on_message(0, {"phase": "opening a workspace"})
    assert "rank 0: opening a workspace" in written.getvalue()


def test_what_the_library_logs_is_a_phase():
    sent, logger = [], logging.getLogger(PROGRESS)
    with telling_phases(sent.append):
        logger.info("opening %s", "p2p")
        logger.debug("a detail")
    logger.info("nobody listens")
    assert sent == [{"phase": "opening p2p"}]
    assert not logger.handlers


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
    command = [sys.executable, "-m", "tokenferry.cli", "doctor", "--no-selftest", *arguments]
    outcome = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    said = outcome.stdout.decode("ascii").replace("\n", "")
    assert ("J\\u00fcrgen" if arguments else "rgen - ...") in said


def test_doctor_names_every_transport_with_its_reason():
    outcome = CliRunner().invoke(app, ["doctor", "--no-selftest", "--json"])
    document = json.loads(outcome.stdout)
    pair = next(trial for trial in document["transports"] if (trial["num_ranks"], trial["device"]) == (2, "cpu"))
    assert {decision["name"] for decision in pair["decisions"]} == {"local", "nvls", "p2p", "collective"}
    assert all(decision["reason"] for decision in pair["decisions"])
    assert document["topology"]["num_cpus"] >= 1
    assert document["topology"]["versions"]["torch"] == torch.__version__
    assert "TOKENFERRY_DEBUG" in document["environment"]
    assert document["vllm"] == known_versions.summary()


def test_doctor_prints_for_people():
    outcome = CliRunner().invoke(app, ["doctor", "--no-selftest"])
    assert outcome.exit_code == 0
    assert "Transports for 2 ranks on cpu" in outcome.stdout
    assert "vLLM" in outcome.stdout


def test_bench_layer_names_its_presets_and_those_of_a_rehearsal():
    said = CliRunner().invoke(app, ["bench", "layer", "--help"]).stdout
    assert [preset.name for preset in (*PRESETS, *REHEARSAL) if preset.name not in said] == []
