"""vLLM itself on CPUs, with tokenferry in the place of its exchange. Needs the folder that `make vllm` fills."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenferry.testing import same_bits
from vllm_client import complete_all, wait_until_up
from vllm_engine import PROMPTS
from vllm_runs import MISSING, TESTS, finished, free_port, rank_environment, save_model, started

pytestmark = [
    pytest.mark.long,
    pytest.mark.ranks,
    pytest.mark.timeout(700),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


# --- its classes, without an engine ---------------------------------------------------------------------------------


def run_classes(mode: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks gets from vLLM's own prepare and finalize."""
    finished([str(TESTS / "vllm_unit.py"), mode, str(folder), str(free_port())], folder / f"{mode}.log", TRITON_INTERPRET="1")
    return [torch.load(folder / f"{mode}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_classes("plain", tmp_path_factory.mktemp("classes"))


@pytest.mark.parametrize("transport", ["collective", "p2p"])
def test_its_own_classes_get_the_bits_of_plain_gathers(transport: str, plain: list[dict[str, Any]], tmp_path: Path) -> None:
    for theirs, ours in zip(plain, run_classes(transport, tmp_path), strict=True):
        assert (theirs["manager"], ours["manager"]) == ("AgRsAll2AllManager", "TokenferryAll2AllManager")
        assert ours["transports"] == [transport] * 2, "of 16-bit rows, and of quantized ones"
        for want, got in zip(theirs["results"], ours["results"], strict=True):
            assert all(same_bits(left, right) for left, right in zip(got, want, strict=True))


# --- its engine -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(model: Path) -> dict[str, list[int]]:
    """Of one process, by the number of the prompt."""
    out = model.parent / "one.json"
    finished([str(TESTS / "vllm_engine.py"), str(model), str(out)], model.parent / "one.log")
    return json.loads(out.read_text())


def test_two_ranks_generate_the_tokens_of_one_process(model: Path, tokens: dict[str, list[int]], tmp_path: Path) -> None:
    """In float32; the ranks serve 4 and 2 prompts, so that one is idle at the end."""
    port, outs = free_port(), [tmp_path / f"{rank}.json" for rank in (0, 1)]
    with contextlib.ExitStack() as running:
        programs = [
            running.enter_context(
                started(
                    [str(TESTS / "vllm_engine.py"), str(model), str(outs[rank])],
                    tmp_path / f"{rank}.log",
                    **rank_environment(rank, port),
                )
            )
            for rank in (0, 1)
        ]
        codes = [program.wait(400) for program in programs]
    logs = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert all("transport collective" in log for log in logs), "tokenferry did not carry the rows"
    both = {**json.loads(outs[0].read_text()), **json.loads(outs[1].read_text())}
    assert len(tokens) == len(both) == 6
    for number, got in both.items():
        assert len(got) >= 12, f"prompt {number} has ended early"
        assert got == tokens[number][: len(got)], f"prompt {number}"


# --- its server -----------------------------------------------------------------------------------------------------

TIMEOUT_S = 15
OPTIONS = {
    "dtype": "float32",
    "max-model-len": 256,
    "max-num-seqs": 8,
    "max-num-batched-tokens": 256,
    "kv-cache-memory-bytes": 64 << 20,
    "host": "127.0.0.1",
    "data-parallel-size": 2,
    "worker-cls": "vllm_failing_worker.Worker",
    "additional-config": json.dumps({"tokenferry": {"timeout_s": TIMEOUT_S}}),
}
FLAGS = ("--skip-tokenizer-init", "--enforce-eager", "--no-enable-prefix-caching", "--enable-expert-parallel")


def serve(model: Path, port: int) -> list[str]:
    """The command, for `started`."""
    options = [f"--{name}={value}" for name, value in {**OPTIONS, "port": port}.items()]
    return ["-m", "vllm.entrypoints.cli.main", "serve", str(model), *options, *FLAGS]


@pytest.mark.parametrize(
    ("failure", "said", "limit_s"),
    [("die", "PeerFailedError: rank 1 failed", 30), ("sleep", "PeerTimeoutError: rank 1", TIMEOUT_S + 30)],
    ids=["rank-1-dies", "rank-1-is-late"],
)
def test_a_server_answers_and_ends_with_the_rank_that_fails(
    failure: str, said: str, limit_s: float, model: Path, tokens: dict[str, list[int]], tmp_path: Path
) -> None:
    """Six requests at once get the tokens of one process. Then rank 1 fails in the middle of a forward."""
    port, log, order = free_port(), tmp_path / "server.log", tmp_path / "order"
    with started(serve(model, port), log, FAIL_FILE=str(order)) as server:
        wait_until_up(server, port, 300)
        answers = complete_all(port, str(model), PROMPTS, 12)
        assert answers == [tokens[str(i)][:12] for i in range(len(PROMPTS))], log.read_text()[-3000:]
        order.write_text(failure)
        start = time.monotonic()
        errors = complete_all(port, str(model), PROMPTS, 100)
        for error in errors:
            assert isinstance(error, str), "no request may end well"
            assert error.startswith("HTTP 500") and said in error, error
        server.wait(limit_s - (time.monotonic() - start))
    assert said in log.read_text(), log.read_text()[-6000:]
