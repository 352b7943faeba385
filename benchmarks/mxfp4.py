"""Experts with MXFP4 weights on one GPU, a rank of two: bits and times beside bfloat16 ones, and another project's products.

    python benchmarks/mxfp4.py mxfp4.jsonl --tokens 1 32 4096
    python benchmarks/mxfp4.py mxfp4.jsonl --triton-kernels FOLDER    # see benchmarks/mxfp4_external.py

Times are of CUDA graphs with weights that are not in the cache: four layers, each with the experts of one checkpoint in another
order. At T = 1 rows are drawn until 4 experts have some, the expected number.
"""

import argparse
import json
from pathlib import Path

import torch
import triton

from expert_layers import ExpertBench, num_local
from tokenferry.benchmarking import PRESETS, device_rates
from tokenferry.experts import ExpertWeights, mxfp4, triton_path, variants
from tokenferry.testing.numeric import first_difference

PRESET = next(preset for preset in PRESETS if preset.name == "gpt-oss-20b")
SHIFTS = (0, 4, 8, 12)
BYTES_PER_WEIGHT = 4.25 / 8


def random_checkpoint(seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    L, H, I = num_local(PRESET), PRESET.hidden_size, PRESET.intermediate_size
    parts = []
    for rows, depth in ((2 * I, H), (H, I)):
        shape = (L, rows, depth // mxfp4.GROUP)
        parts.append(torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda", generator=generator))
        parts.append(torch.randint(118, 123, shape, dtype=torch.uint8, device="cuda", generator=generator))
    return parts


def rows_of(bench, tokens):
    seeds = range(100) if tokens == 1 else (0,)
    found = (bench.rows(tokens, seed) for seed in seeds)
    return next(rows for rows in found if tokens > 1 or bench.load(rows)[1] == 4)


class Packed:
    """Layers of packed experts, and one of the weights that they stand for."""

    def __init__(self, bench):
        self.bench, parts = bench, random_checkpoint()
        biases = {"up_bias": bench.layers[0].up_bias, "down_bias": bench.layers[0].down_bias}
        self.plain = ExpertWeights(
            up_proj=torch.stack([mxfp4.dequantize(*each) for each in zip(*parts[:2], strict=True)]),
            down_proj=torch.stack([mxfp4.dequantize(*each) for each in zip(*parts[2:], strict=True)]),
            **biases,
        )
        self.checkpoints = [[part.roll(shift, 0) for part in parts] for shift in SHIFTS]
        self.layers = [ExpertWeights.from_mxfp4(*each, PRESET.activation, **biases) for each in self.checkpoints]

    def difference(self, rows):
        """From what bfloat16 experts give, "" if none."""
        packed, plain = torch.empty_like(rows.hidden), torch.empty_like(rows.hidden)
        self.bench.run(rows, packed, self.layers[0])
        self.bench.run(rows, plain, self.plain)
        return first_difference(packed, plain)

    def whole(self, rows, layers):
        self.bench.layers = layers
        return self.bench.whole(rows)

    def products(self, rows):
        """A call of both products of all layers, and the buffers that it leaves results in."""
        bench, (up, down) = self.bench, (self.layers[0].up_proj, self.layers[0].down_proj)
        bench.run(rows, torch.empty_like(rows.hidden), self.layers[0])
        variant = variants.variant_of(
            self.layers[0], PRESET.activation, PRESET.topk, torch.bfloat16, rows.topk_idx.dtype, torch.bfloat16
        )
        assert (variant.up_strides, variant.down_strides) == (up.stride(), down.stride())
        loaded = triton_path.load(variant, bench.scratch)
        buffers = bench.scratch.reserve(
            variants.row_shape(variant), len(rows.topk_idx), variant.num_local_experts, torch.bfloat16
        )
        table = (buffers.counts_L, buffers.offsets_L, buffers.pairs_P, 0, PRESET.activation.alpha, PRESET.activation.limit)
        unread = rows.valid_tokens

        def call():
            for weights in self.layers:
                for each in loaded.up:
                    parts = weights.up_proj, weights.up_scale, weights.up_bias
                    each.launch(rows.hidden, unread, 0, *parts, buffers.activated_PI, unread, *table)
                for each in loaded.down:
                    parts = weights.down_proj, weights.down_scale, weights.down_bias
                    each.launch(buffers.activated_PI, unread, 0, *parts, buffers.outputs_PH, unread, *table)

        return call, buffers


def compared(packed, external, rows):
    """Microseconds of both products, ours and the external ones, and how far these are from ours."""
    call, buffers = packed.products(rows)
    ours = packed.bench.time_us(call, 2) / len(packed.layers)
    call()
    num_pairs = int(buffers.counts_L.sum())
    pairs = buffers.pairs_P[:num_pairs].long()
    gathered, routing = rows.hidden[pairs // PRESET.topk].contiguous(), external.routing_of(buffers.counts_L.int(), num_pairs)
    last = len(packed.layers) - 1
    outputs = external.run(last, gathered, routing)[1].reshape(num_pairs, -1).float()
    expected = buffers.outputs_PH[pairs].float()
    theirs = packed.bench.time_us(lambda: [external.run(n, gathered, routing) for n in range(last + 1)], 2) / (last + 1)
    return {"products_us": ours, "external_us": theirs, "distance": ((outputs - expected).norm() / expected.norm()).item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 4096])
    parser.add_argument("--triton-kernels", type=Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    bench = ExpertBench(PRESET)
    packed, plain = Packed(bench), bench.layers
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": args.commit}
    facts |= device_rates(torch.device("cuda"))
    external = None
    if args.triton_kernels:
        from mxfp4_external import ExternalProducts

        biases = packed.plain.up_bias, packed.plain.down_bias
        external = ExternalProducts(args.triton_kernels, packed.checkpoints, *biases, PRESET.activation)
    for tokens in args.tokens:
        rows = rows_of(bench, tokens)
        pairs, touched = bench.load(rows)
        num_weights = touched * 3 * PRESET.hidden_size * PRESET.intermediate_size
        found = {"preset": PRESET.name, "tokens": tokens, "pairs": pairs, "touched": touched}
        found |= {"floor_us": num_weights * BYTES_PER_WEIGHT / facts["read_gb_per_s"] / 1e3, "bits": packed.difference(rows)}
        found |= {"packed_us": packed.whole(rows, packed.layers), "bfloat16_us": packed.whole(rows, plain)}
        found |= compared(packed, external, rows) if external else {}
        print({name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}, flush=True)
        with args.output.open("a") as file:
            file.write(json.dumps(found | facts) + "\n")


if __name__ == "__main__":
    main()
