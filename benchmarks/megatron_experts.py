"""Megatron-Core's fused experts (backend vllm) against ours, on one GPU as a rank of EP 2, in CUDA graphs and in buffers of the
engine's default size.

    python benchmarks/megatron_experts.py --out experts.jsonl            # megatron-core on the path, one GPU; a minute
    python benchmarks/megatron_experts.py --cuts --out experts.jsonl     # each product alone, over cuts for few rows
    TRITON_INTERPRET=1 python benchmarks/megatron_experts.py --rehearse  # the same calls on a CPU, tiny; no times

The shape is that of the engine's trial: H 2048, 64 experts of which 32 are here, top-8, I 768, squared ReLU. `V` is the number of
valid rows of all ranks, as the device knows it. A chain goes over several layers, so that weights are cold. megatron-core 0.19
has no SwiGLU: there ours is timed alone.
"""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from expert_plans import precompile
from tokenferry import EPGroup
from tokenferry.activations import Activation
from tokenferry.benchmarking import GroupTimer, device_rates
from tokenferry.experts import ExpertScratch, ExpertWeights, triton_path, variants
from tokenferry.experts.plan import Tiles, plan
from tokenferry.integrations import megatron

REHEARSES = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSES else "cuda"
H, I, E, L, K, EP = (64, 48, 8, 4, 2, 2) if REHEARSES else (2048, 768, 64, 32, 8, 2)
ROWS = EP * (32 if REHEARSES else 16384)
"""G: each rank may bring as many as the engine's default, `max_tokens` 16384."""
LAYERS = 3
TOKENS = (2, 16) if REHEARSES else (2, 16, 64, 128, 256, 1024)

CUTS = (
    (32, 16, 128, 128, 4, 3),
    (32, 16, 128, 128, 4, 4),
    (32, 16, 64, 128, 4, 4),
    (32, 16, 64, 128, 4, 5),
    (32, 16, 64, 128, 4, 6),
    (32, 16, 64, 128, 2, 4),
    (32, 16, 64, 256, 4, 2),
    (32, 16, 64, 256, 4, 3),
    (32, 16, 64, 256, 8, 4),
    (32, 16, 32, 128, 4, 4),
    (32, 16, 32, 128, 4, 6),
    (32, 16, 32, 128, 2, 6),
    (32, 16, 32, 256, 4, 3),
    (32, 16, 32, 256, 4, 4),
    (16, 16, 64, 128, 4, 4),
    (16, 16, 64, 128, 4, 6),
    (16, 16, 64, 256, 4, 3),
    (16, 16, 32, 128, 4, 6),
    (16, 16, 32, 256, 4, 4),
    (16, 16, 128, 128, 4, 4),
    (64, 16, 64, 128, 4, 3),
)
"""Rows, rows of short tiles, columns read, depth, warps, stages: of tiles that serve experts with at most 64 rows. The first is
the default, the last the former one."""


class Bench:
    """Weights of a few layers, and rows."""

    def __init__(self, activation):
        self.activation = Activation(activation)
        N = self.activation.num_columns(I)
        self.layers = [ExpertWeights(up_proj=_normal(L, N, H), down_proj=_normal(L, H, I)) for _ in range(LAYERS)]
        self.scratch = ExpertScratch(DEVICE)
        self.timer = GroupTimer(EPGroup(device=DEVICE), repeats=9)
        generator = torch.Generator(DEVICE).manual_seed(1)
        self.hidden = torch.randn(ROWS, H, device=DEVICE, generator=generator).bfloat16()
        self.routing = torch.rand(ROWS, E, device=DEVICE, generator=generator).topk(K, 1).indices
        self.probs = torch.rand(ROWS, K, device=DEVICE, generator=generator) / K
        self.valid = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.out = torch.zeros(ROWS, H, device=DEVICE)

    def call(self, function, weights, num_valid, kind, **extra):
        return function(
            self.hidden, self.probs, weights.up_proj, weights.down_proj, kind, L, 0, self.valid, self.routing, out=self.out,
            num_tokens_hint=num_valid, **extra,
        )  # fmt: skip

    def time_us(self, work, calls):
        return self.timer.time_graph(work, calls)[0]

    def whole_us(self, function, num_valid, kind, **extra):
        self.valid.fill_(num_valid)
        return self.time_us(lambda: [self.call(function, w, num_valid, kind, **extra) for w in self.layers * 2], 2 * LAYERS)

    def ours_us(self, num_valid):
        return self.whole_us(megatron.fused_moe, num_valid, self.activation, scratch=self.scratch)

    def skew(self, num_valid):
        """From here on half of the valid rows choose the experts of one row, as in a replay that is padded by one token."""
        self.routing[num_valid // 2 : num_valid] = self.routing[0]

    def touched(self, num_valid):
        counts = torch.bincount(self.routing[:num_valid].flatten(), minlength=E)[:L]
        return int((counts > 0).sum()), int(counts.max())

    def products_us(self, num_valid, trial):
        """The first and the second product, each chained alone, all launches of the plan."""
        self.valid.fill_(num_valid)
        self.call(megatron.fused_moe, self.layers[0], num_valid, self.activation, scratch=self.scratch)  # fills the table
        variant = variant_of(self.activation, trial)
        loaded = triton_path.load(variant, self.scratch)
        buffers = self.scratch.reserve(variants.row_shape(variant), ROWS, L, torch.bfloat16)
        table = (buffers.counts_L, buffers.offsets_L, buffers.pairs_P)
        unread, settings = self.valid, (*table, 0, self.activation.alpha, self.activation.limit)

        def chain(which):
            source, target = (self.hidden, buffers.activated_PI) if which == "up" else (buffers.activated_PI, buffers.outputs_PH)
            for weights in self.layers * 2:
                for product in getattr(loaded, which):
                    given = triton_path.weights_argument(
                        getattr(weights, f"{which}_proj"), self.activation if which == "up" else None, product
                    )
                    product.launch(source, unread, 0, given, unread, unread, target, unread, *settings)

        return {which: self.time_us(lambda which=which: chain(which), 2 * LAYERS) for which in ("up", "down")}


def variant_of(activation, trial=None):
    """Without memory, so that processes without a GPU can compile it."""
    N = activation.num_columns(I)
    weights = ExpertWeights(up_proj=torch.empty(L, N, H, device="meta"), down_proj=torch.empty(L, H, I, device="meta"))
    weights = dataclasses.replace(weights, up_proj=weights.up_proj.bfloat16(), down_proj=weights.down_proj.bfloat16())
    return variants.variant_of(weights, activation, K, torch.bfloat16, torch.int64, torch.float32, plan=trial)


def _normal(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(std=shape[-1] ** -0.5)


def cut_plan(cut, activation):
    """The default, with another cut for experts with few rows."""
    rows, rows_few, read, depth, warps, stages = cut
    default = plan(torch.bfloat16, H, I, gated=activation.gated)

    def replaced(launches, halves):
        few = Tiles(
            rows=rows, rows_few=rows_few, columns=read // halves, depth=depth, num_warps=warps, num_stages=stages,
            programs_per_sm=16, max_rows=64,
        )  # fmt: skip
        return tuple(few if tiles.max_rows else tiles for tiles in launches)

    return dataclasses.replace(default, up=replaced(default.up, 2 if activation.gated else 1), down=replaced(default.down, 1))


def theirs_or_none():
    if REHEARSES or importlib.util.find_spec("megatron") is None:
        return None, None
    from megatron.core.inference.moe import ActivationType, vllm_fused_moe

    return vllm_fused_moe, ActivationType.SQUARED_RELU


def compare(bench, facts, record):
    theirs, kind = theirs_or_none()
    has = theirs is not None and bench.activation.name == "squared_relu"
    print(f"{bench.activation.name}: V | experts touched, most rows | floor | Megatron | ours | share", flush=True)
    for num_valid in TOKENS:
        touched, most = bench.touched(num_valid)
        floor = touched * (bench.activation.num_columns(I) + I) * H * 2 / facts["read_gb_per_s"] / 1e3
        megatron_us = bench.whole_us(theirs, num_valid, kind) if has else float("nan")
        ours_us = bench.ours_us(num_valid)
        record({"what": "whole", "activation": bench.activation.name, "V": num_valid, "touched": touched, "most_rows": most,
                "floor_us": floor, "megatron_us": megatron_us, "ours_us": ours_us})  # fmt: skip
        print(
            f"  {num_valid:5} | {touched} {most} | {floor:6.1f} | {megatron_us:7.1f} | {ours_us:7.1f} | "
            f"{ours_us / megatron_us:.3f}",
            flush=True,
        )


def compare_skewed(bench, record):
    theirs, kind = theirs_or_none()
    has = theirs is not None and bench.activation.name == "squared_relu"
    kept = bench.routing.clone()
    for num_valid in TOKENS[2:]:
        bench.skew(num_valid)
        touched, most = bench.touched(num_valid)
        megatron_us = bench.whole_us(theirs, num_valid, kind) if has else float("nan")
        ours_us = bench.ours_us(num_valid)
        record({"what": "skewed", "activation": bench.activation.name, "V": num_valid, "touched": touched, "most_rows": most,
                "megatron_us": megatron_us, "ours_us": ours_us})  # fmt: skip
        print(f"  {num_valid:5} skewed | {touched} {most} | {megatron_us:7.1f} | {ours_us:7.1f}", flush=True)
        bench.routing.copy_(kept)


def kernels(bench, num_valid):
    """Microseconds of each kernel of a call, theirs and ours."""
    theirs, kind = theirs_or_none()
    entries = [("ours", megatron.fused_moe, bench.activation, {"scratch": bench.scratch})]
    if theirs is not None and bench.activation.name == "squared_relu":
        entries.append(("Megatron", theirs, kind, {}))
    bench.valid.fill_(num_valid)
    for label, function, which, extra in entries:
        with profile(activities=[ProfilerActivity.CPU if REHEARSES else ProfilerActivity.CUDA]) as found:
            for weights in bench.layers * 2:
                bench.call(function, weights, num_valid, which, **extra)
            if not REHEARSES:
                torch.cuda.synchronize()
        cells = [
            f"{e.key[:24]} {e.self_device_time_total / e.count:.1f} x{e.count / 2 / LAYERS:.0f}" for e in found.key_averages()
        ]
        print(f"  V {num_valid} {label}: " + ", ".join(cells), flush=True)


def cuts(bench, record):
    print(f"{bench.activation.name}: us of up / down by cut (rows, short, read, depth, warps, stages) and V {TOKENS}", flush=True)
    for cut in CUTS:
        cells = []
        for num_valid in TOKENS:
            try:
                found = bench.products_us(num_valid, cut_plan(cut, bench.activation))
            except Exception as error:  # noqa: BLE001 - a cut that needs too much shared memory is reported and left out
                cells.append(type(error).__name__)
                break
            record({"what": "cut", "activation": bench.activation.name, "V": num_valid, "cut": cut, **found})
            cells.append(f"{found['up']:.1f}/{found['down']:.1f}")
        print(f"  {'/'.join(map(str, cut)):22}: " + "  ".join(cells), flush=True)


def trials(args, activation):
    """Plans to compile; None is the default."""
    return [None, *(cut_plan(cut, activation) for cut in CUTS if args.cuts)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--activations", nargs="+", default=["squared_relu", "swiglu"])
    parser.add_argument("--cuts", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not REHEARSES:
        precompile([variant_of(Activation(name), trial) for name in args.activations for trial in trials(args, Activation(name))])
    facts = {"read_gb_per_s": 1.0} if REHEARSES else device_rates(torch.device(DEVICE))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = {
        "device": "cpu" if REHEARSES else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }
    print(head, facts, flush=True)
    lines = [head | facts]
    for activation in args.activations:
        bench = Bench(activation)
        compare(bench, facts, lines.append)
        compare_skewed(bench, lines.append)
        for num_valid in TOKENS[1:4:2]:
            kernels(bench, num_valid)
        if args.cuts:
            cuts(bench, lines.append)
        del bench
        torch.cuda.empty_cache()
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
