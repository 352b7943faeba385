"""Times the experts of one rank (of EP 2) on one GPU, in CUDA graphs, against what the memory and the tensor cores allow.

    python benchmarks/experts.py measure --out experts.jsonl     # the whole path by tokens per rank, and its parts
    python benchmarks/experts.py sweep --out sweep.jsonl         # each product alone, over tile sizes
    python benchmarks/experts.py plans --out plans.jsonl         # the whole path, the chosen plan beside variations of it

Floors: few rows: bytes of the touched experts' weights / measured read bandwidth; many rows: FLOP / measured rate of one dense
bfloat16 product + one write and one read of each intermediate that the path keeps (activated rows, output rows). Weights
are cold: a chain goes over several layers, and starts anew with more bytes than the L2 cache holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import ExpertScratch, ExpertWeights, quantize_weights, torch_path, triton_path, variants
from tokenferry.experts.plan import Plan, Tiles, plan

EP = 2
L2_BYTES = 50 << 20


@dataclasses.dataclass(frozen=True)
class Preset:
    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    topk: int
    activation: Activation = dataclasses.field(default_factory=Activation)
    bias: bool = False
    layers: int = 2

    @property
    def num_local(self):
        return self.num_experts // EP

    @property
    def bytes_per_expert(self):
        return 3 * self.hidden_size * self.intermediate_size * 2


GPT_OSS = Activation("clamped_swiglu", interleaved=True)
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("qwen3-30b-a3b", 2048, 768, 128, 8, layers=4),
        Preset("gpt-oss-20b", 2880, 2880, 32, 4, GPT_OSS, True),
        Preset("gpt-oss-120b", 2880, 2880, 128, 4, GPT_OSS, True),
        Preset("deepseek-v3", 7168, 2048, 256, 8, layers=1),
        Preset("mixtral-8x7b", 4096, 14336, 8, 2, layers=1),
    )
}


def few_candidates():
    for rows, rows_few, read, depth, warps, stages, per_sm in (
        (64, 16, 32, 128, 4, 4, 16),
        (64, 16, 32, 256, 4, 3, 16),
        (64, 16, 64, 64, 4, 6, 16),
        (64, 16, 64, 128, 4, 3, 16),
        (64, 16, 64, 128, 4, 4, 16),
        (64, 16, 64, 128, 8, 4, 16),
        (64, 16, 64, 256, 4, 2, 16),
        (64, 16, 64, 256, 8, 3, 16),
        (64, 16, 128, 64, 4, 4, 16),
        (64, 16, 128, 128, 4, 3, 16),
        (64, 16, 128, 64, 8, 5, 16),
        (64, 16, 128, 128, 8, 4, 16),
        (64, 16, 64, 128, 4, 3, 2),
        (64, 16, 64, 64, 4, 4, 16),
    ):
        yield rows, rows_few, read, depth, warps, stages, per_sm, "few"


def many_candidates():
    for rows, read, depth, warps, stages, per_sm in (
        (128, 256, 64, 8, 3, 1),
        (128, 256, 64, 8, 4, 1),
        (128, 128, 64, 4, 4, 2),
        (128, 128, 64, 8, 4, 2),
        (128, 128, 64, 8, 3, 2),
        (64, 256, 64, 4, 3, 2),
        (64, 256, 64, 8, 4, 1),
        (256, 128, 64, 8, 4, 1),
        (256, 128, 64, 8, 3, 1),
        (64, 128, 64, 4, 4, 2),
    ):
        yield rows, 0, read, depth, warps, stages, per_sm, "many"


def tiles_of(candidate, gated):
    rows, rows_few, read, depth, warps, stages, per_sm, _ = candidate
    return Tiles(
        rows=rows, rows_few=rows_few or rows, columns=read // (2 if gated else 1), depth=depth, num_warps=warps,
        num_stages=stages, programs_per_sm=per_sm,
    )  # fmt: skip


def variant_of(preset, **changes):
    """Without tensors, so that processes without a GPU can compile it."""
    L, H, I = preset.num_local, preset.hidden_size, preset.intermediate_size
    known = variants.Variant(
        num_local_experts=L, hidden_size=H, intermediate_size=I, topk=preset.topk, dtype=torch.bfloat16,
        weight_dtype=torch.bfloat16, index_dtype=torch.int32, out_dtype=torch.bfloat16, activation=preset.activation.name,
        gated=preset.activation.gated, interleaved=preset.activation.interleaved, up_bias=preset.bias, down_bias=preset.bias,
        up_strides=(2 * I * H, H, 1), down_strides=(H * I, I, 1), aligned=True, batch_invariant=False, max_rows=None,
    )  # fmt: skip
    return dataclasses.replace(known, **changes)


def compile_spec(spec):
    torch.set_num_threads(1)
    try:
        triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options())
    except Exception as error:  # noqa: BLE001 - a candidate that needs too much memory is reported and left out
        return f"{type(error).__name__}"
    return ""


def specs_of(variant):
    return variants.specs(variant, torch.device("cpu")).all


def precompile(variants):
    start = time.monotonic()
    wanted = list(dict.fromkeys(spec for variant in variants for spec in specs_of(variant)))
    with ProcessPoolExecutor(16) as pool:
        failed = sum(bool(text) for text in pool.map(compile_spec, wanted))
    print(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s, {failed} failed", flush=True)


# --- measuring ------------------------------------------------------------------------------------------------------------


def time_us(run, chain, repeats=7):
    """Median time of one of `chain` calls in a graph."""
    torch.cuda.synchronize()  # what was issued before may write what `run` reads
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(chain):
            run()
    times = []
    with torch.cuda.stream(stream):
        graph.replay()
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / chain)
    return statistics.median(times)


def read_bandwidth():
    big = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    return big.nbytes / time_us(lambda: torch.sum(big), 3) / 1e3


def dense_rate():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / time_us(lambda: a @ b, 5) / 1e6


def machine():
    return {"read_GB_per_s": round(read_bandwidth()), "dense_TFLOP_per_s": round(dense_rate())}


class Bench:
    """One preset's weights, and rows by tokens per rank."""

    def __init__(self, preset):
        self.preset = preset
        L, H, I = preset.num_local, preset.hidden_size, preset.intermediate_size

        def make(*shape):
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=shape[-1] ** -0.5)

        self.layers = [
            ExpertWeights(
                up_proj=make(L, 2 * I, H),
                down_proj=make(L, H, I),
                up_bias=make(L, 2 * I) if preset.bias else None,
                down_bias=make(L, H) if preset.bias else None,
            )
            for _ in range(preset.layers)
        ]
        self.scratch = ExpertScratch("cuda")

    def quantize(self):
        for place, weights in enumerate(self.layers):
            up, up_scale = quantize_weights(weights.up_proj)
            down, down_scale = quantize_weights(weights.down_proj)
            self.layers[place] = dataclasses.replace(
                weights, up_proj=up, up_scale=up_scale, down_proj=down, down_scale=down_scale
            )

    def rows(self, tokens, seed=0):
        """EP ranks of `tokens` each; every row's experts are distinct and uniform."""
        generator = torch.Generator("cuda").manual_seed(seed)
        preset, num = self.preset, EP * tokens
        idx = torch.rand(num, preset.num_experts, device="cuda", generator=generator).topk(preset.topk, 1).indices.int()
        return Dispatched(
            hidden=torch.randn(num, preset.hidden_size, device="cuda", dtype=torch.bfloat16, generator=generator),
            topk_idx=idx,
            topk_weights=torch.rand(num, preset.topk, device="cuda", generator=generator) / preset.topk,
            valid_tokens=torch.tensor([num], dtype=torch.int32, device="cuda"),
        )

    def load(self, rows):
        """Pairs and touched experts of this rank."""
        counts = torch.bincount(rows.topk_idx.flatten(), minlength=self.preset.num_experts)[: self.preset.num_local]
        return int(counts.sum()), int((counts > 0).sum())

    def floors_us(self, rows, facts):
        preset = self.preset
        pairs, touched = self.load(rows)
        weights = touched * preset.bytes_per_expert / facts["read_GB_per_s"] / 1e3
        flop = pairs * 6 * preset.hidden_size * preset.intermediate_size / facts["dense_TFLOP_per_s"] / 1e6
        kept = pairs * (preset.hidden_size + preset.intermediate_size) * 2 * 2 / facts["read_GB_per_s"] / 1e3
        return {"weights": weights, "flop": flop, "intermediates": kept}

    def run(self, rows, out, weights, scratch=None, **settings):
        return triton_path.run(rows, weights, 0, self.preset.activation, out, scratch or self.scratch, **settings)

    def whole(self, rows, **settings):
        """Microseconds of one layer's experts."""
        out = torch.empty_like(rows.hidden)

        def chain():
            for weights in self.layers:
                self.run(rows, out, weights, **settings)

        return time_us(chain, 2) / len(self.layers)

    def parts(self, rows, trial=None, products_only=False):
        """Microseconds of table, first product, second product and sum, each chained alone."""
        variant = variant_of(self.preset, plan=trial)
        loaded = triton_path.load(variant, self.scratch)
        out = torch.empty_like(rows.hidden)
        self.run(rows, out, self.layers[0], plan=trial)  # fills table and scratch
        num, L = rows.topk_idx.shape[0], self.preset.num_local
        buffers = self.scratch.reserve(variants.row_shape(variant), num, L, torch.bfloat16)
        table = (buffers.counts_L, buffers.offsets_L, buffers.pairs_P)
        settings = (*table, 0, self.preset.activation.alpha, self.preset.activation.limit)
        count = rows.valid_tokens

        def products(which):
            for weights in self.layers:
                matrix, bias = getattr(weights, f"{which}_proj"), getattr(weights, f"{which}_bias")
                source, target = rows.hidden, buffers.activated_PI
                if which == "down":
                    source, target = buffers.activated_PI, buffers.outputs_PH
                for product in getattr(loaded, which):
                    activation = self.preset.activation if which == "up" else None
                    given = triton_path.weights_argument(matrix, activation, product)
                    own_bias = count if bias is None else bias
                    product.launch(source, count, given, count, own_bias, target, *settings)

        def make_table():
            loaded.table(rows.topk_idx, count, *table, 0, num, 0)

        def make_sum():
            loaded.sum(buffers.outputs_PH, rows.topk_idx, rows.topk_weights, count, out, 0, buffers.num_rows, 0)

        done = {which: time_us(lambda which=which: products(which), 2) / len(self.layers) for which in ("up", "down")}
        return done if products_only else done | {"table": time_us(make_table, 10), "sum": time_us(make_sum, 10)}

    def library(self, rows):
        """The two grouped products of the library alone, on rows gathered beforehand, and its whole path."""
        L = self.preset.num_local
        local = torch.where(rows.topk_idx < L, rows.topk_idx, L).flatten()
        ordered, order = torch.sort(local, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(L, device="cuda", dtype=ordered.dtype), right=True, out_int32=True)
        gathered = rows.hidden.index_select(0, order // self.preset.topk)
        weights = self.layers[0]
        up = torch.nn.functional.grouped_mm(gathered, weights.up_proj.transpose(1, 2), offs=ends)
        middle = up[:, : self.preset.intermediate_size].contiguous()
        out = torch.empty_like(rows.hidden)
        return {
            "grouped_mm up": time_us(
                lambda: torch.nn.functional.grouped_mm(gathered, weights.up_proj.transpose(1, 2), offs=ends), 2, 3
            ),
            "grouped_mm down": time_us(
                lambda: torch.nn.functional.grouped_mm(middle, weights.down_proj.transpose(1, 2), offs=ends), 2, 3
            ),
            "library path": time_us(lambda: torch_path.run("static", rows, weights, 0, self.preset.activation, out), 2, 3),
        }

    def error(self, rows):
        """Share of the largest number by which a few rows differ from a float32 loop."""
        out = torch.full_like(rows.hidden, float("nan"))
        weights, L = self.layers[0], self.preset.num_local
        self.run(rows, out, weights)
        worst, largest = 0.0, 0.0
        for r in range(min(3, len(out))):
            expected = torch.zeros(self.preset.hidden_size, device="cuda")
            for expert, weight in zip(rows.topk_idx[r].tolist(), rows.topk_weights[r].tolist(), strict=True):
                if expert < L:
                    up = weights.up_proj[expert].float() @ rows.hidden[r].float()
                    up = up if weights.up_bias is None else up + weights.up_bias[expert].float()
                    down = weights.down_proj[expert].float() @ self.preset.activation(up)
                    expected += weight * (down if weights.down_bias is None else down + weights.down_bias[expert].float())
            worst = max(worst, (out[r].float() - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
        return worst / largest if largest else worst


def sweep(args, facts, record):
    deadline = time.monotonic() + args.seconds
    share = args.seconds / len(args.presets)
    for name in args.presets:
        own_deadline = min(deadline, time.monotonic() + share)
        bench = Bench(PRESETS[name])
        print(f"{name}: error {bench.error(bench.rows(32)):.1e}", flush=True)
        for tokens in args.tokens:
            rows = bench.rows(tokens)
            candidates = [] if tokens > 512 else list(few_candidates())
            candidates += [] if tokens < 128 else list(many_candidates())
            floors = bench.floors_us(rows, facts)
            floor = max(floors["weights"], floors["flop"])
            found = {"up": [], "down": []}
            for candidate in candidates:
                if time.monotonic() > own_deadline:
                    break
                try:
                    trial = Plan(up=(tiles_of(candidate, True),), down=(tiles_of(candidate, False),))
                    parts = bench.parts(rows, trial, products_only=True)
                except Exception as error:  # noqa: BLE001 - too much shared memory
                    record({"preset": name, "tokens": tokens, "candidate": candidate, "error": str(error)[:100]})
                    continue
                record({"preset": name, "tokens": tokens, "candidate": candidate, **parts, **floors})
                for which in found:
                    found[which].append((parts[which], candidate))
            for which, part in (("up", 2 / 3), ("down", 1 / 3)):
                best = sorted(found[which])[:4]
                line = "  ".join(f"{us:.1f}={'/'.join(map(str, c[:-1]))}" for us, c in best)
                print(f"  T={tokens} {which} floor {floor * part:.1f}: {line}", flush=True)
            if tokens >= 4096:
                compared = bench.library(rows)
                record({"preset": name, "tokens": tokens, **compared})
                print("  ", {key: round(value, 1) for key, value in compared.items()}, flush=True)
        del bench
        torch.cuda.empty_cache()


def measure(args, facts, record):
    print("preset T | pairs touched | table up down sum | whole floor ratio | invariant")
    deadline = time.monotonic() + args.seconds
    for name in args.presets:
        bench = Bench(PRESETS[name])
        for tokens in args.tokens:
            if time.monotonic() > deadline:
                print("time is up")
                return
            rows = bench.rows(tokens)
            floors = bench.floors_us(rows, facts)
            floor = (
                max(floors["weights"], floors["flop"])
                if tokens <= 32
                else max(floors["weights"], floors["flop"] + floors["intermediates"])
            )
            parts, whole = bench.parts(rows), bench.whole(rows)
            invariant = bench.whole(rows, batch_invariant=True)
            pairs, touched = bench.load(rows)
            line = {"preset": name, "tokens": tokens, "pairs": pairs, "touched": touched, **parts, "whole": whole, **floors}
            line |= {"floor": floor, "ratio": whole / floor, "batch_invariant": invariant, "error": bench.error(rows)}
            if tokens >= 4096:
                line |= bench.library(rows)
            record(line)
            cells = " ".join(f"{parts[key]:.1f}" for key in ("table", "up", "down", "sum"))
            print(
                f"{name} {tokens} | {pairs} {touched} | {cells} | {whole:.1f} {floor:.1f} {whole / floor:.2f} | "
                f"{invariant:.1f} | " + " ".join(f"{k}={line[k]:.0f}" for k in line if "grouped" in k or "library" in k),
                flush=True,
            )
        del bench
        torch.cuda.empty_cache()


def changed(launches, **changes):
    return tuple(dataclasses.replace(tiles, **changes) for tiles in launches)


def named_plans(preset):
    """The default, and what it is compared with."""
    default = plan(torch.bfloat16, preset.hidden_size, preset.intermediate_size, gated=preset.activation.gated)
    (many_up, few_up), (few_down, many_down) = default.up, default.down

    def many(**changes):
        return Plan(up=(*changed([many_up], **changes), few_up), down=(few_down, *changed([many_down], **changes)))

    return {
        "default": default,
        "few first": Plan(up=(few_up, many_up), down=(few_down, many_down)),
        "few alone": Plan(up=changed([few_up], max_rows=0), down=changed([few_down], max_rows=0)),
        "long tails": many(rows_few=many_up.rows),
        "pointers": many(tensor_map=False),
        "four stages": many(num_stages=4),
        "many from 33": Plan(
            up=(*changed([many_up], min_rows=33), *changed([few_up], max_rows=32)),
            down=(*changed([few_down], max_rows=32), *changed([many_down], min_rows=33)),
        ),
        "default again": default,
    }


FOR_MANY = ("long tails", "four stages", "pointers")


def float8(args, facts, record):
    """The whole path with block-scaled float8 weights, whose bytes are half."""
    print(f"library: {library_float8()}")
    for name in args.presets:
        bench = Bench(PRESETS[name])
        bench.quantize()
        for tokens in args.tokens:
            rows = bench.rows(tokens)
            whole, floors = bench.whole(rows), bench.floors_us(rows, facts)
            record({"preset": name, "tokens": tokens, "float8": True, "whole": whole, **floors})
            print(
                f"  {name} float8 T={tokens}: {whole:.1f}, weights {floors['weights'] / 2:.1f}, flop {floors['flop'] / 2:.1f}",
                flush=True,
            )
        del bench
        torch.cuda.empty_cache()


def library_float8():
    """What the library says to a grouped product with a scale per 128 x 128 and 1 x 128."""
    from torch.nn.functional import ScalingType, scaled_grouped_mm

    a = torch.ones(256, 256, device="cuda").to(torch.float8_e4m3fn)
    b = torch.ones(2, 256, 256, device="cuda").to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.ones(256, 2, device="cuda"), torch.ones(2, 2, 2, device="cuda")
    try:
        scaled_grouped_mm(
            a,
            b.transpose(1, 2),
            scale_a,
            ScalingType.BlockWise1x128,
            scale_b,
            ScalingType.BlockWise128x128,
            offs=torch.tensor([128, 256], dtype=torch.int32, device="cuda"),
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return f"refused: {str(error)[:300]}"
    return "served"


def plans(args, facts, record):
    deadline = time.monotonic() + args.seconds
    for name in args.presets:
        bench = Bench(PRESETS[name])
        for tokens in args.tokens:
            if time.monotonic() > deadline:
                return
            rows, cells = bench.rows(tokens), []
            for label, trial in named_plans(PRESETS[name]).items():
                if (label in FOR_MANY and tokens < 128) or (label == "few alone" and tokens > 512):
                    continue
                whole = bench.whole(rows, plan=trial)
                record({"preset": name, "tokens": tokens, "plan": label, "whole": whole})
                cells.append(f"{label} {whole:.1f}")
            print(f"  {name} T={tokens}: " + ", ".join(cells), flush=True)
        del bench
        torch.cuda.empty_cache()


def variants_for(args):
    for name in args.presets:
        if args.what != "float8":
            yield variant_of(PRESETS[name])
        if args.what == "plans":
            for trial in named_plans(PRESETS[name]).values():
                yield variant_of(PRESETS[name], plan=trial)
            continue
        if args.what == "float8":
            yield variant_of(PRESETS[name], weight_dtype=torch.float8_e4m3fn)
            continue
        if args.what == "measure":
            yield variant_of(PRESETS[name], batch_invariant=True)
            continue
        for candidate in itertools.chain(few_candidates(), many_candidates()):
            if candidate[-1] == "many" and max(args.tokens) < 128:
                continue
            yield variant_of(
                PRESETS[name],
                plan=Plan(up=(tiles_of(candidate, True),), down=(tiles_of(candidate, False),)),
            )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sweep", "plans", "measure", "float8", "compile"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    precompile(list(variants_for(args)))
    if args.what == "compile":
        return
    facts = machine()
    commit = args.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    print(head, facts, flush=True)
    lines = [head | facts]
    try:
        {"sweep": sweep, "plans": plans, "measure": measure, "float8": float8}[args.what](args, facts, lines.append)
    finally:
        if args.out:
            args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
