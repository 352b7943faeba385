"""Times the experts of one rank with weights as `nn.Linear` has them, and transposed as gpt-oss checkpoints do, read as views.

    python benchmarks/expert_layouts.py --presets gpt-oss-20b --out layouts.jsonl

The whole path in a CUDA graph, weights cold, as `benchmarks/experts.py measure`.
"""

import argparse
import json
from pathlib import Path

import torch
import triton

from expert_layers import ExpertBench
from tokenferry.benchmarking import PRESETS

PRESETS_BY_NAME = {preset.name: preset for preset in PRESETS}


def measure(name, counts, record):
    bench, found = ExpertBench(PRESETS_BY_NAME[name]), {}
    for layout in ("as linear", "transposed"):
        if layout == "transposed":
            bench.transpose()
        for tokens in counts:
            rows = bench.rows(tokens)
            found[layout, tokens] = whole = bench.whole(rows)
            record({"preset": name, "tokens": tokens, "layout": layout, "whole_us": whole, "error": bench.error(rows)})
    for tokens in counts:
        plain, turned = found["as linear", tokens], found["transposed", tokens]
        print(f"  {name} T={tokens}: {plain:.1f} us, transposed {turned:.1f} ({turned / plain:.2f}x)", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS_BY_NAME), default=["gpt-oss-20b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    lines = [{"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}]
    lines[0]["commit"] = args.commit
    try:
        for name in args.presets:
            measure(name, args.tokens, lines.append)
            torch.cuda.empty_cache()
    finally:
        if args.out:
            args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
