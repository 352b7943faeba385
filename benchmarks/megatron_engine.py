"""Megatron-Core's engine on its own dispatcher and on ours, in one run: decode forwards, steps, and tokens per second.

    python benchmarks/megatron_engine.py --out engine.jsonl        # 2 GPUs, megatron-core 0.19 and einops; less than 4 minutes
    python benchmarks/megatron_engine.py --rehearse                # CPUs: the same calls and comparisons, no graphs, no times

A random GPT of 16 layers (hidden size 2048, 64 experts of 768, top-8, bfloat16, squared ReLU) is built for each variant from
Megatron's own classes and run by its `DynamicInferenceEngine`, greedy, decode steps in CUDA graphs of all layers. Timed are:

- the captured decode forward by itself, replayed back to back, at 1, 8, 32 and 64 tokens per rank: microseconds a layer, with
  attention over a short cache, router, dispatch, experts and combine;
- whole runs of 1, 8 and 32 requests on each rank: tokens per second of all ranks (median of three), the median decode step, and
  of that the captured forward's time on the GPU. The rest of a step is the host's, and the sampling's.

"of saving" is what the median step saves, as a part of what the captured forward of the same size saves. Attention is the
stand-in of tests/engine_harness where flash-attn is not installed; it costs every variant the same.
"""

import argparse
import cProfile
import datetime
import gc
import importlib.util
import json
import pstats
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]  # rank processes get them too

import tokenferry as tf  # noqa: E402
from engine_harness import ENVIRONMENT, GPU_ENVIRONMENT, Engine, EngineOptions, Outcome, Ranks, even, missing, other_choices  # noqa: E402
from engine_harness.replay import kernels_of_a_layer, microseconds_per_layer  # noqa: E402
from engine_harness.variants import MEGATRON, Variant, installed  # noqa: E402
from tokenferry.errors import RankFailedError  # noqa: E402
from tokenferry.testing import run_ranks  # noqa: E402

VARIANTS = {
    "megatron": MEGATRON,
    "nccl": Variant("nccl"),
    "nccl-any": Variant("nccl", combine_order="any"),
    "nvls": Variant("nvls"),
    "nvls-experts": Variant("nvls", experts=True),
    "nvls-no-hook": Variant("nvls", hook=False),
    "megatron-again": MEGATRON,
}
DEFAULT = [name for name in VARIANTS if name != "nvls-no-hook"]
"""Megatron's own comes again at the end: what differs from the first is the order's, and the machine's."""
ROWS = (1, 8, 32, 64)
LOADS = (1, 8, 32)
RUNS = 3
NEW_TOKENS = 64
LAYERS = 16
MODEL = {
    "num_layers": LAYERS, "hidden_size": 2048, "num_heads": 16, "num_query_groups": 4, "expert_size": 768, "num_experts": 64,
    "topk": 8, "vocab_size": 32000,
}  # fmt: skip
OPTIONS = EngineOptions(
    max_requests=64, max_tokens=2048, page_tokens=64, buffer_gb=2.0, graph_scope="block", num_graphs=8, model=MODEL
)
REHEARSAL = EngineOptions()


class Records:
    """JSON lines, written by rank 0 as they come: a run that is stopped leaves what it measured."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes

    def add(self, **record: Any) -> None:
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def timed_load(engine: Engine, name: str, requests: int, records: Records, wanted: dict[int, Outcome], rehearse: bool) -> None:
    """Some runs of one load. `wanted` gets the first variant's tokens, which the others' are compared with."""
    ranks = engine.ranks
    load = even(requests, 4 if rehearse else NEW_TOKENS, 16 if rehearse else 64, ranks.size)
    engine.run(load, asks_peers=False)  # kernels are loaded, caches are warm
    gc.collect()
    gc.freeze()  # what was built before is not looked through in the middle of a step
    runs = [engine.run(load, asks_peers=False) for _ in range(1 if rehearse else RUNS)]
    gc.unfreeze()
    first = wanted.setdefault(requests, runs[0])
    parted, alike = map(sum, zip(*ranks.gather(other_choices(first.tokens, runs[0].tokens)), strict=True))
    steps = [step for run in runs for step in run.steps if step.kind == "decode" and step.in_graph] or runs[0].steps
    own = (
        statistics.median(step.wall_ms for step in steps),
        statistics.median(step.forward_ms or 0.0 for step in steps),
        statistics.median(run.wall_s for run in runs),
    )
    step_ms, forward_ms, wall_s = (max(column) for column in zip(*ranks.gather(own), strict=True))
    tokens = sum(ranks.gather(runs[0].num_tokens))
    records.add(
        variant=name, load=f"even{requests}", tokens_per_s=tokens / wall_s, step_ms=step_ms, forward_ms=forward_ms,
        walls_s=[run.wall_s for run in runs], decode_steps_in_graphs=sum(step.in_graph for run in runs for step in run.steps),
        requests=2 * requests, parted=parted, other_choices=parted / max(alike, 1),
    )  # fmt: skip


def measure(engine: Engine, name: str, records: Records, wanted: dict[int, Outcome], options: argparse.Namespace) -> None:
    """One variant. A profiler's hooks stay in the process and slow every later launch, so that nothing is timed beside it."""
    if options.profile:
        kernels = [(kernel[:90], us, count) for kernel, us, count in kernels_of_a_layer(engine, options.profile)]
        records.add(variant=name, rows_profiled=options.profile, kernels=kernels[:40])
        return
    for requests in LOADS[:2] if options.rehearse else LOADS:
        timed_load(engine, name, requests, records, wanted, options.rehearse)
    for rows, layer_us in microseconds_per_layer(engine, () if options.rehearse else ROWS).items():
        records.add(variant=name, rows=rows, layer_us=layer_us)
    if options.host:
        records.add(variant=name, host=host_functions(engine))


def host_functions(engine: Engine) -> list[tuple[str, float, float]]:
    """(function, own microseconds a step, calls a step) of a run of even8 on this rank, with what Python's profiler adds."""
    profiler = cProfile.Profile()
    profiler.enable()
    outcome = engine.run(even(8, NEW_TOKENS, 64, engine.ranks.size), asks_peers=False)
    profiler.disable()
    found = []
    for (file, line, function), (_, calls, own_s, *_) in pstats.Stats(profiler).stats.items():
        found.append((f"{Path(file).name}:{line} {function}", 1e6 * own_s / len(outcome.steps), calls / len(outcome.steps)))
    return sorted(found, key=lambda row: -row[1])[:60]


def run(group: tf.EPGroup, options: argparse.Namespace) -> None:
    began_s, records, wanted = time.monotonic(), Records(options.out, group.rank == 0), {}
    with Ranks(group) as ranks:
        for name in options.variants.split(","):
            if ranks.any(time.monotonic() - began_s > options.budget_s):
                records.add(variant=name, left_out=f"{options.budget_s:g} s were over")
                continue
            variant = VARIANTS[name]
            start_s = time.monotonic()
            with (
                installed(variant, timeout_s=20.0, open_timeout_s=60.0),
                ranks.engine(REHEARSAL if options.rehearse else OPTIONS, dispatcher=variant.dispatcher) as engine,
            ):
                records.add(
                    variant=name, dispatcher=type(engine.dispatchers[0]).__module__, capture_s=engine.capture_s,
                    host_messages=engine.has_host_messages, stand_in_attention=ranks.has_stand_in_attention,
                )  # fmt: skip
                measure(engine, name, records, wanted, options)
            records.add(variant=name, seconds=time.monotonic() - start_s)


def head(commit: str, rehearse: bool) -> dict[str, Any]:
    """The first line: what was measured, and with what."""
    if not commit:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": "cpu" if rehearse else torch.cuda.get_device_name(0),
        "ranks": 2,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if rehearse else ".".join(map(str, torch.cuda.nccl.version())),
        "megatron_core": version_of("megatron-core"),
        "zmq": version_of("pyzmq"),
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": {} if rehearse else MODEL,
    }


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def table(records: list[dict]) -> str:
    """A line a variant, with the change against the first of them behind each figure."""
    names = [name for name in VARIANTS if any(record.get("variant") == name for record in records)]
    layers = {(each["variant"], each["rows"]): each["layer_us"] for each in records if "layer_us" in each}
    loads = {(each["variant"], each["load"]): each for each in records if "load" in each}
    lines = ["decode forward, µs a layer", header([str(rows) for rows in ROWS])]
    for name in names:
        cells = [change(layers.get((name, rows)), layers.get((names[0], rows)), ".1f") for rows in ROWS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["tokens/s; decode step, ms = forward + rest; of saving", header([f"even{requests}" for requests in LOADS])]
    for name in names:
        cells = [load_cell(name, names[0], requests, loads, layers) for requests in LOADS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"{each['variant']} was left out: {each['left_out']}" for each in records if "left_out" in each)])


def header(columns: list[str]) -> str:
    return f"| variant | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"


def change(value: float | None, base: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + (f" ({100 * (value / base - 1):+.1f} %)" if base and value != base else "")


def load_cell(name: str, base: str, requests: int, loads: dict[tuple[str, str], dict], layers: dict) -> str:
    """Tokens per second; the step and its shares; how much of the forward's saving the step saves; requests that part."""
    own, other = (loads.get((each, f"even{requests}")) for each in (name, base))
    if own is None or other is None:
        return "-"
    text = change(own["tokens_per_s"], other["tokens_per_s"], ".0f")
    own_us, other_us = (layers.get((each, requests)) for each in (name, base))
    if own_us is None or other_us is None:
        return text
    forward_ms, saved_ms = own_us * LAYERS / 1e3, (other_us - own_us) * LAYERS / 1e3
    text += f"; {own['step_ms']:.2f} = {forward_ms:.2f} + {own['step_ms'] - forward_ms:.2f}"
    text += f"; {(other['step_ms'] - own['step_ms']) / saved_ms:.2f}" if saved_ms else ""
    return text + (f"; other tokens {100 * own['other_choices']:.1f} %" if own["parted"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("megatron_engine.jsonl"), help="JSON lines: versions, then what is measured"
    )
    parser.add_argument("--variants", default=",".join(DEFAULT), help="the first is what the others are compared with")
    parser.add_argument("--commit", default="", help="of the code measured, where there is no repository")
    parser.add_argument("--budget-s", type=float, default=200.0, help="begin no further variant after so many seconds")
    parser.add_argument("--profile", type=int, default=0, help="only the kernels of a decode forward of so many rows, no times")
    parser.add_argument("--host", action="store_true", help="record the host's functions in a step, too")
    parser.add_argument("--rehearse", action="store_true", help="on CPUs: every call and comparison, no times")
    options = parser.parse_args()
    if missing():
        parser.error(missing())
    options.out.write_text(json.dumps(head(options.commit, options.rehearse)) + "\n")
    environment = ENVIRONMENT if options.rehearse else GPU_ENVIRONMENT
    backend = "gloo" if options.rehearse else "nccl"
    options.out = options.out.resolve()
    try:
        run_ranks(run, 2, options, backend=backend, timeout_s=options.budget_s + 60.0, env=dict(environment))
        code = 0
    except RankFailedError as error:
        print(error, file=sys.stderr)
        code = 1
    first, *records = map(json.loads, options.out.read_text().splitlines())
    print(", ".join(f"{name} {value}" for name, value in first.items() if name != "model"))
    if options.rehearse:
        parted = sum(record.get("parted", 0) for record in records)
        print("it failed" if code else f"{parted} requests got other tokens than Megatron's own dispatcher gives")
        return code or int(parted > 0)
    print(table(records))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
