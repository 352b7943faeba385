"""Which kernels a token's time goes to within `generate()`: ours beside transformers' own expert parallelism, both compiled.

torchrun --nproc-per-node 2 benchmarks/model_profile.py OUTPUT.jsonl [--random-init qwen3-30b-a3b:8] [--batches 1,8,32]
                                                        [--prompt 128]

Rank 0 writes a line for each way and batch, with microseconds a token by kernel, and prints what they add up to by kind. Under
the profiler steps are slower; what counts is how they are divided.
"""

import argparse
import datetime
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import LogitsProcessorList, StaticCache

import tokenferry as tf
from tokenferry.benchmarking import GroupTimer, ModelPoint, ModelRequest, environment
from tokenferry.benchmarking.model_modes import Scene
from tokenferry.benchmarking.model_plan import parts_of
from tokenferry.benchmarking.model_ways import WAYS

FIRST, TOKENS = 4, 16
"""The token behind which the profile begins, and how many are profiled."""
KINDS = {
    "exchange": r"dispatch_kernel|combine_kernel|counts_kernel|nccl|AllReduce",
    "experts": r"expert|grouped|Grouped|GroupProblem|bmm|sort|Sort|histc|radix",
    "attention": r"flash|fmha|attention|sdpa|cudnn",
    "products": r"gemm|gemv|cutlass|nvjet|splitK|cublas|triton_tem",
    "of the compiler": r"^triton_",
}
"""By what stands in a kernel's name, the first that fits."""


class Window:
    """A logits processor that profiles from one token to another, and notes the host's time between them."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities)
        self.passed_s, self._calls = 0.0, 0

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls in (FIRST, FIRST + TOKENS):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if self._calls == FIRST:
                self.profile.start()
                self.passed_s = -time.perf_counter()
            else:
                self.passed_s += time.perf_counter()
                self.profile.stop()
        return scores

    def kernels_us(self) -> dict[str, float]:
        """Microseconds a token of each kernel, those that take longest first."""
        found = {each.key: each.self_device_time_total / TOKENS for each in self.profile.key_averages()}
        return dict(sorted(((name, us) for name, us in found.items() if us), key=lambda pair: -pair[1]))


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def profiled(scene: Scene, point: ModelPoint) -> dict:
    """A record of a point. The calls before make graphs and code."""
    ids = scene.own_prompts(point)
    new_tokens = scene.request.new_tokens
    settings: dict = {}
    if not scene.is_ours:
        settings["past_key_values"] = StaticCache(config=scene.model.config, max_cache_len=point.prompt + new_tokens)
    for _ in range(2):
        scene.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **settings)
        if "past_key_values" in settings:
            settings["past_key_values"].reset()
    window = Window()
    scene.timer.meet()
    processors = LogitsProcessorList([window])
    scene.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, logits_processor=processors, **settings
    )
    kernels = window.kernels_us()
    kinds: dict[str, float] = {}
    for kernel, us in kernels.items():
        kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + us
    return {
        "token_us": round(1e6 * window.passed_s / TOKENS, 1),
        "busy_us": round(sum(kernels.values()), 1),
        "kinds_us": {kind: round(us, 1) for kind, us in sorted(kinds.items(), key=lambda pair: -pair[1])},
        "kernels_us": {kernel[:120]: round(us, 2) for kernel, us in list(kernels.items())[:40]},
    }


def measure(group: tf.EPGroup, request: ModelRequest) -> Iterator[dict]:
    timer = GroupTimer(group)
    for part in parts_of(request, group):
        with WAYS[part.way].open(group, part.values, request) as model:
            scene = Scene(timer, model, part.values, request, WAYS[part.way].replicates)
            for _, point in part.steps:
                torch._dynamo.reset()
                yield {"config": part.config, "way": part.way, "batch": point.batch, "prompt": point.prompt} | profiled(
                    scene, point
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--random-init", default="qwen3-30b-a3b:8")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--ways", nargs="+", default=["p2p", "transformers"])
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    backend = "gloo" if given.rehearse else "nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=120))
    if not given.rehearse:
        torch.cuda.set_device(dist.get_node_local_rank())
    request = ModelRequest(
        points=tuple(ModelPoint(given.random_init, int(batch), given.prompt) for batch in given.batches.split(",")),
        ways=tuple(given.ways),
        modes=("graph-compiled", "compile"),
        new_tokens=FIRST + TOKENS + 4,
        transport="collective" if given.rehearse else "p2p",
        rehearse=given.rehearse,
    )
    group = tf.EPGroup(dist.group.WORLD)
    with given.output.open("w") if group.rank == 0 else open("/dev/null", "w") as file:
        for record in measure(group, request):
            file.write(json.dumps(record | environment(group.device)) + "\n")
            file.flush()
            if group.rank == 0:
                print({name: value for name, value in record.items() if name != "kernels_us"}, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
