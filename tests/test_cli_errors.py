"""What a user can cause is a line on stderr and exit code 2."""

import pytest
from typer.testing import CliRunner

from tokenferry.cli.failure import one_line, summary
from tokenferry.cli.main import app


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
        (
            ["generate", "--random-init", "nothing"],
            "no configuration nothing: give qwen3-30b-a3b, gpt-oss-20b, gpt-oss",
        ),
        (["generate", "--random-init", "mixtral-8x7b:0"], "the layers of mixtral-8x7b must be a positive int, got '0'"),
        (["generate", "--random-init", "mixtral-8x7b", "--ranks", "9"], "has 8 experts, too few for 9 ranks"),
        (["generate", "--random-init", "mixtral-8x7b", "--model", "tiny:mixtral"], "leave one of them out"),
        (["generate", "--model", "tiny:nothing"], "no tiny model of family 'nothing'"),
        (["verify", "--model", "tiny:mixtral", "--ranks", "5"], "has 4 experts, too few for 5 ranks"),
        (["generate", "--prompts", "/nowhere.txt"], "prompts file /nowhere.txt cannot be read"),
        (["generate", "--transport", "pigeon"], "--transport must be auto or one of"),
        (["generate", "--ranks", "0"], "Invalid value"),
        (["verify", "--dtype", "int8"], "Invalid value"),
        (["verify", "--dispatch-format", "bytes"], "--dispatch-format must be one of same, fp8_block128, got 'bytes'"),
        (["verify", "--combine-dtype", "fp8"], "must be one of float32, bfloat16, float16, float8_e4m3fn, got 'fp8'"),
        (["verify", "--combine-dtype", "bfloat16", "--exact"], "--exact and --combine-dtype bfloat16 exclude one another"),
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
        "random-name",
        "random-layers",
        "random-experts",
        "random-and-model",
        "family",
        "experts",
        "prompts",
        "transport",
        "ranks",
        "dtype",
        "dispatch-format",
        "combine-dtype",
        "exact-combine-dtype",
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
