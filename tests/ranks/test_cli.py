"""The command line as users run it: processes, exit codes, Ctrl-C, torchrun."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from patience import PATIENT_S, SLACK_S, once
from tokenferry.demo import model as demo_model
from tokenferry.errors import ConfigError
from tokenferry.testing.tiny_models import tiny_config

pytest.importorskip("transformers", reason="the command line generates with transformers")
pytestmark = pytest.mark.ranks

CLI = [sys.executable, "-m", "tokenferry.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def environment(monkeypatch):
    """One torch thread a process, and no place under a torchrun that the tests may themselves run under."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return dict(os.environ)


def run(command, environment, timeout_s=120):
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def without_progress(stderr):
    """The lines of standard error but for those that tell how far the ranks are."""
    return [line for line in stderr.splitlines() if line.strip() and not line.startswith("rank ")]


def test_generate_answers_uneven_prompts_and_prints_one_json_object(environment, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a much longer prompt than all the others together\nb\ncc\nddd\n")
    arguments = ["--model", "tiny:qwen3_moe", "--ranks", "2", "--prompts", str(prompts), "--max-new-tokens", "5", "--json"]
    outcome = run([*CLI, "generate", *arguments], environment)
    assert outcome.returncode == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert [(rank["num_prompts"], rank["num_new_tokens"]) for rank in document["ranks"]] == [(1, 5), (3, 15)]
    assert [rank["experts"] for rank in document["ranks"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [entry["prompt"] for entry in document["prompts"]] == prompts.read_text().splitlines()
    assert all(rank["num_layers"] == 2 and 0 < rank["communication_share"] <= 1 for rank in document["ranks"])
    assert "rank 0: 1 prompt " in outcome.stderr
    assert "rank 1: 3 prompts" in outcome.stderr


def test_verify_counts_tokens_of_rows_and_terms_that_travel_quantized(environment, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one prompt\nanother\n")
    arguments = ["--model", "tiny:qwen3_moe", "--prompts", str(prompts), "--max-new-tokens", "6"]
    asked = ["--dispatch-format", "fp8_block128", "--combine-dtype", "float8_e4m3fn"]
    outcome = run([*CLI, "verify", *arguments, *asked, "--json"], environment, timeout_s=400)
    assert outcome.returncode == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    found = document["verify"]
    assert (document["dispatch_format"], document["combine_dtype"]) == ("fp8_block128", "float8_e4m3fn")
    assert found["num_tokens"] == 12 and 0 <= found["num_equal_tokens"] <= 12
    assert found["largest_logit_difference"] > 1e-3, "float8 numbers differ from the model's own"


def test_generate_with_random_weights_for_a_configuration(environment, tmp_path):
    (tmp_path / "config.json").write_text(tiny_config("mixtral").to_json_string())
    arguments = ["--random-init", str(tmp_path / "config.json"), "--ranks", "2", "--max-new-tokens", "3", "--json"]
    outcome = run([*CLI, "generate", *arguments], environment)
    assert outcome.returncode == 0, outcome.stderr
    ranks = json.loads(outcome.stdout)["ranks"]
    assert [rank["experts"] for rank in ranks] == [[0, 1], [2, 3]]
    assert sum(rank["num_new_tokens"] for rank in ranks) == 3 * sum(rank["num_prompts"] for rank in ranks) > 0


@pytest.mark.long
def test_a_prompt_beyond_the_context_is_a_line_and_exit_code_2_before_anything_is_loaded(environment, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("short\n" + 400_000 * "a" + "\n")
    outcome = run([*CLI, "verify", "--model", "tiny:mixtral", "--prompts", str(prompts)], environment)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    [line] = without_progress(outcome.stderr)
    assert "prompt 1 has 400000 tokens and --max-new-tokens is 32, but the model's context holds 512 tokens" in line
    assert "shorten the prompt to 480 tokens at most" in line
    assert "to answer" not in outcome.stderr, "no rank has loaded"


def test_answers_come_out_in_ascii_with_plain_lines_of_progress(environment, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Grüße – und …\n")
    arguments = ["--model", "tiny:mixtral", "--prompts", str(prompts), "--max-new-tokens", "4"]
    outcome = run([*CLI, "generate", *arguments], {**environment, "PYTHONIOENCODING": "ascii"})
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.isascii()
    assert "Gr\\xfc\\xdfe - und ..." in outcome.stdout
    assert "rank 1: 1 prompt to answer, at most 4 tokens" in outcome.stderr
    assert "rank 1: done, 4 tokens" in outcome.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--model", "tiny:mixtral", "--ranks", "3"], id="mixtral-EP3-fp32", marks=pytest.mark.long),
        pytest.param(["--model", "tiny:olmoe", "--ranks", "2", "--exact", "--dtype", "bfloat16"], id="olmoe-EP2-bf16-exact"),
    ],
)
def test_verify_finds_equal_tokens(environment, tmp_path, arguments):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\nand the second\n")
    outcome = run([*CLI, "verify", *arguments, "--prompts", str(prompts), "--max-new-tokens", "6"], environment)
    assert outcome.returncode == 0, outcome.stderr + outcome.stdout
    assert "2 of 2 prompts have the unmodified model's tokens" in outcome.stdout


@pytest.mark.long
def test_a_model_without_experts_is_a_line_and_exit_code_2(environment, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenferry.testing.tiny_models import byte_tokenizer

    config = LlamaConfig(vocab_size=384, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    outcome = run([*CLI, "generate", "--model", str(tmp_path)], environment)
    assert outcome.returncode == 2
    [line] = without_progress(outcome.stderr)
    assert "LlamaForCausalLM has no MoE layer" in line
    assert outcome.stdout == ""


def descendants(pid):
    """Every process below `pid`, with its state; none on systems without /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


INTERRUPTED_AT_AN_IMPORT = """
import os, signal, sys, tokenferry_command
module = sys.argv.pop(1)

def interrupt(event, arguments):
    if event == "import" and arguments[0] == module:
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
tokenferry_command.run()
"""


@pytest.mark.parametrize("module", ["typer", "torch", "torch._C", "torch.nn", "torch._ops"])
def test_ctrl_c_while_it_loads_is_a_line_and_exit_code_2(environment, module):
    """At the import of that module: how long loading takes depends on the machine."""
    outcome = run([sys.executable, "-c", INTERRUPTED_AT_AN_IMPORT, module, "doctor"], environment)
    assert (outcome.returncode, outcome.stderr) == (2, "tokenferry: interrupted\n")


def test_ctrl_c_is_a_line_and_exit_code_2_and_leaves_nothing_behind(environment, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo two\n")
    # Not below tmp_path: the fork server listens on a socket there, whose whole path may have 107 characters.
    scratch = Path(tempfile.mkdtemp(prefix="ctrl-c-"))
    command = [*CLI, "generate", "--model", "tiny:mixtral", "--prompts", str(prompts), "--max-new-tokens", "400"]
    process = subprocess.Popen(
        command,
        env={**environment, "TMPDIR": str(scratch)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    once(lambda: len(descendants(process.pid)) >= 4)  # resource tracker, fork server, two ranks
    below = descendants(process.pid)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENT_S)
    assert (process.returncode, stdout) == (2, "")
    assert without_progress(stderr) == ["tokenferry: interrupted"]
    assert stderr.endswith("tokenferry: interrupted\n"), "nothing behind it"
    once(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), SLACK_S)
    left_folders = list(scratch.glob("tokenferry-*"))
    shutil.rmtree(scratch)
    assert not left_folders


@pytest.mark.long
def test_takes_its_place_under_torchrun(environment):
    arguments = ["generate", "--model", "tiny:mixtral", "--max-new-tokens", "4", "--json"]
    outcome = run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "tokenferry.cli", *arguments], environment)
    assert outcome.returncode == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert [rank["num_prompts"] for rank in document["ranks"]] == [1, 4]
    assert "rank 1: 4 prompts" in outcome.stderr


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.long
def test_takes_its_place_under_two_agents(environment):
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    arguments = ["-m", "tokenferry.cli", "verify", "--model", "tiny:mixtral", "--max-new-tokens", "4", "--json"]
    agents = [
        subprocess.Popen(
            [*TORCHRUN, *rendezvous, "--node-rank", str(node), *arguments], env=environment, stdout=subprocess.PIPE, text=True
        )
        for node in range(2)
    ]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    assert outputs[1] == ""
    document = json.loads(outputs[0])
    assert document["verify"]["passed"] is True
    assert len(document["ranks"]) == 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--ranks", "2", "--dtype", "float32"],
        ["--ranks", "3", "--dtype", "float32"],
        ["--ranks", "4", "--dtype", "float32"],
        ["--ranks", "2", "--dtype", "bfloat16", "--exact"],
    ],
    ids=["EP2-fp32", "EP3-fp32", "EP4-fp32", "EP2-bf16-exact"],
)
def test_demo_model_is_equal_to_one_process(environment, arguments):
    try:
        demo_model.source_file()
    except ConfigError as error:
        pytest.skip(str(error))
    outcome = run([*CLI, "verify", "--model", "demo", "--json", *arguments], environment, timeout_s=900)
    assert outcome.returncode == 0, outcome.stderr + outcome.stdout
    document = json.loads(outcome.stdout)
    texts = " ".join(entry["text"] for entry in document["prompts"])
    assert "The capital of France is Paris" in texts
    assert len({rank["num_prompts"] for rank in document["ranks"]}) > 1
