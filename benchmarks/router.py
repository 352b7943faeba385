"""The router on one GPU: its kernel beside the chain of PyTorch operators, for the models of `tokenferry bench layer`.

python benchmarks/router.py OUTPUT.jsonl [--commit HASH]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton

from tokenferry import router as library
from tokenferry.cli.bench_presets import PRESETS
from tokenferry.router import Router, RouterConfig

TOKENS = (1, 8, 32, 512, 4096)
CALLS, REPLAYS = 20, 15


def time_us(call: Callable[[torch.Tensor], object], rows: list[torch.Tensor]) -> float:
    """Microseconds of a call: a graph of CALLS with other rows each, of REPLAYS the median."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for hidden in rows:
            call(hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for hidden in rows:
            call(hidden)
    times = []
    for _ in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(rows))
    return statistics.median(times[3:])


def operators(router: Router) -> Callable[[torch.Tensor], object]:
    """As before there was a kernel: a float32 weight where logits are float32, and PyTorch's operators behind them."""
    dtype = torch.float32 if router.config.float32_logits else router.weight.dtype
    twin = Router(router.config, dtype=dtype, device=router.weight.device)
    twin.load_state_dict({name: value.to(twin.state_dict()[name].dtype) for name, value in router.state_dict().items()})

    def call(hidden: torch.Tensor) -> object:
        with mock.patch.object(library, "_has_kernel", return_value=False):
            return twin(hidden)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    common = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    common |= {"commit": options.commit, "date": time.strftime("%Y-%m-%d")}
    for preset in PRESETS:
        torch.manual_seed(1)
        config = RouterConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk, **preset.router)
        router = Router(config, device="cuda")
        for count in TOKENS:
            rows = [torch.randn(count, preset.hidden_size, device="cuda").bfloat16() for _ in range(CALLS)]
            by_operators, by_kernel = operators(router), router
            times = {"operators": [], "kernel": []}
            for _ in range(2):
                times["operators"].append(round(time_us(by_operators, rows), 2))
                times["kernel"].append(round(time_us(by_kernel, rows), 2))
            (weights, idx), (expected_weights, expected_idx) = by_kernel(rows[0]), by_operators(rows[0])
            same = (idx == expected_idx).all(1)
            error = (weights - expected_weights)[same].abs().max().item()
            record = {"preset": preset.name, "tokens": count, "operators_us": times["operators"], "kernel_us": times["kernel"]}
            record |= {"rows_with_the_same_experts": same.float().mean().item(), "largest_difference_of_weights": error}
            with options.output.open("a") as file:
                file.write(json.dumps({"what": "router", **record, **common}) + "\n")
            sys.stdout.write(f"{preset.name:<15}{count:>5}  operators {times['operators']}  kernel {times['kernel']}\n")
            sys.stdout.write(
                f"{'':<22}same experts in {record['rows_with_the_same_experts']:.4f} of rows, weights +-{error:.1e}\n"
            )


if __name__ == "__main__":
    main()
