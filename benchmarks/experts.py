"""Times the experts of one rank (of EP 2) on one GPU, in CUDA graphs, against what the memory and the tensor cores allow.

    python benchmarks/experts.py measure --out experts.jsonl     # the whole path by tokens per rank, and its parts
    python benchmarks/experts.py sweep --out sweep.jsonl         # each product alone, over tile sizes
    python benchmarks/experts.py plans --out plans.jsonl         # the whole path, the chosen plan beside variations of it
    python benchmarks/experts.py few --tokens 1 8 32 64 128      # the same over cuts for experts with few rows

Floors: few rows: bytes of the touched experts' weights / measured read bandwidth; many rows: FLOP / measured rate of one dense
bfloat16 product + one write and one read of each intermediate that the path keeps (activated rows, output rows). Weights
are cold: a chain goes over several layers, and starts anew with more bytes than the L2 cache holds.
"""

import argparse
import itertools
import json
import subprocess
import time
from pathlib import Path

import torch
import triton

from expert_layers import ExpertBench
from expert_plans import few_candidates, few_plans, float8_plans, many_candidates, named_plans, plan_of, precompile, variant_of
from tokenferry.benchmarking import PRESETS, device_rates
from tokenferry.dispatched import FLOAT8

PRESETS_BY_NAME = {preset.name: preset for preset in PRESETS}


def sweep(args, facts, record):
    deadline = time.monotonic() + args.seconds
    share = args.seconds / len(args.presets)
    for name in args.presets:
        share_deadline = min(deadline, time.monotonic() + share)
        bench = ExpertBench(PRESETS_BY_NAME[name])
        print(f"{name}: error {bench.error(bench.rows(32)):.1e}", flush=True)
        for tokens in args.tokens:
            rows = bench.rows(tokens)
            candidates = [] if tokens > 512 else list(few_candidates())
            candidates += [] if tokens < 128 else list(many_candidates())
            floors = bench.floors_us(rows, facts)
            floor = max(floors["weights"], floors["flop"])
            found = {"up": [], "down": []}
            for candidate in candidates:
                if time.monotonic() > share_deadline:
                    break
                try:
                    parts = bench.parts(rows, variant_of(bench.preset, plan=plan_of(candidate)), products_only=True)
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
        bench = ExpertBench(PRESETS_BY_NAME[name])
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
            parts, whole = bench.parts(rows, variant_of(bench.preset)), bench.whole(rows)
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


FOR_MANY = ("long tails", "four stages", "pointers")


def float8(args, facts, record):
    """The whole path with block-scaled float8 weights, whose bytes are half: beside bfloat16, with rows that come quantized, and
    by other plans."""
    print(f"library: {library_float8()}")
    deadline = time.monotonic() + args.seconds
    for name in args.presets:
        bench = ExpertBench(PRESETS_BY_NAME[name])
        plain = {tokens: bench.whole(bench.rows(tokens)) for tokens in args.tokens}
        bench.quantize()
        plans = float8_plans(PRESETS_BY_NAME[name])
        for tokens in args.tokens:
            if time.monotonic() > deadline:
                print("time is up")
                return
            rows, floors = bench.rows(tokens), bench.floors_us(bench.rows(tokens), facts)
            came = bench.quantized(rows)
            line = {"preset": name, "tokens": tokens, "float8": True, "bfloat16": plain[tokens], **floors}
            line |= {"whole": bench.whole(rows), "quantized_rows": bench.whole(came), "error": bench.error(came)}
            figures = {"bf16": plain[tokens], "float8": line["whole"], "rows too": line["quantized_rows"]}
            figures |= {"weights": floors["weights"] / 2, "flop": floors["flop"] / 2}
            told = ", ".join(f"{label} {us:.1f}" for label, us in figures.items())
            print(f"  {name} T={tokens}: {told}, error {line['error']:.1e}", flush=True)
            line["plans"] = {}
            for label, trial in plans.items() if args.plans else ():
                if (label.startswith("many") and tokens < 128) or (label.startswith("few") and tokens > 512):
                    continue
                try:
                    line["plans"][label] = bench.whole(came, plan=trial)
                except Exception as error:  # noqa: BLE001 - too much shared memory
                    line["plans"][label] = float("nan")
                    print(f"    {label}: {str(error)[:100]}")
            record(line)
            if line["plans"]:
                print("    " + ", ".join(f"{label} {us:.1f}" for label, us in line["plans"].items()), flush=True)
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
        bench = ExpertBench(PRESETS_BY_NAME[name])
        for tokens in args.tokens:
            if time.monotonic() > deadline:
                return
            rows, cells = bench.rows(tokens), []
            for label, trial in named_plans(PRESETS_BY_NAME[name]).items():
                if (label in FOR_MANY and tokens < 128) or (label == "few alone" and tokens > 512):
                    continue
                whole = bench.whole(rows, plan=trial)
                record({"preset": name, "tokens": tokens, "plan": label, "whole": whole})
                cells.append(f"{label} {whole:.1f}")
            print(f"  {name} T={tokens}: " + ", ".join(cells), flush=True)
        del bench
        torch.cuda.empty_cache()


def few(args, facts, record):
    """The whole path over cuts for experts with few rows."""
    deadline = time.monotonic() + args.seconds
    for name in args.presets:
        bench, trials = ExpertBench(PRESETS_BY_NAME[name]), few_plans(PRESETS_BY_NAME[name])
        print(f"{name}: T | {' | '.join(trials)}", flush=True)
        for tokens in args.tokens:
            if time.monotonic() > deadline:
                return
            rows = bench.rows(tokens)
            times = {label: bench.whole(rows, plan=trial) for label, trial in trials.items()}
            record({"preset": name, "tokens": tokens, "whole_us_by_cut": times})
            print(f"  {tokens:4} | " + " | ".join(f"{us:.1f}" for us in times.values()), flush=True)
        del bench
        torch.cuda.empty_cache()


def variants_for(args):
    for name in args.presets:
        if args.what == "few":
            yield from (variant_of(PRESETS_BY_NAME[name], plan=trial) for trial in few_plans(PRESETS_BY_NAME[name]).values())
            continue
        yield variant_of(PRESETS_BY_NAME[name])
        if args.what == "plans":
            for trial in named_plans(PRESETS_BY_NAME[name]).values():
                yield variant_of(PRESETS_BY_NAME[name], plan=trial)
            continue
        if args.what == "float8":
            for quantized in (False, True):
                yield variant_of(PRESETS_BY_NAME[name], weight_dtype=FLOAT8, quantized_rows=quantized)
            for trial in float8_plans(PRESETS_BY_NAME[name]).values() if args.plans else ():
                yield variant_of(PRESETS_BY_NAME[name], weight_dtype=FLOAT8, quantized_rows=True, plan=trial)
            continue
        if args.what == "measure":
            yield variant_of(PRESETS_BY_NAME[name], batch_invariant=True)
            continue
        for candidate in itertools.chain(few_candidates(), many_candidates()):
            if candidate[-1] == "many" and max(args.tokens) < 128:
                continue
            yield variant_of(PRESETS_BY_NAME[name], plan=plan_of(candidate))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sweep", "plans", "few", "measure", "float8", "compile"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS_BY_NAME))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plans", action="store_true", help="with float8: other plans too")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    precompile(list(variants_for(args)))
    if args.what == "compile":
        return
    facts = device_rates(torch.device("cuda"))
    commit = args.commit or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    print(head, facts, flush=True)
    lines = [head | facts]
    try:
        {"sweep": sweep, "plans": plans, "few": few, "measure": measure, "float8": float8}[args.what](args, facts, lines.append)
    finally:
        if args.out:
            args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
