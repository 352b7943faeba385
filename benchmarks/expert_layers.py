"""One rank's experts (of EP 2) of a known model on one GPU: their weights, rows for them, what they take, and their floors."""

import dataclasses

import torch

from tokenferry import EPGroup, reference
from tokenferry.benchmarking import GroupTimer
from tokenferry.dispatched import Dispatched, QuantizedRows
from tokenferry.experts import ExpertScratch, ExpertWeights, float8, quantize_weights, torch_path, triton_path, variants

EP = 2
LAYERS = {"qwen3-30b-a3b": 4, "gpt-oss-20b": 2, "gpt-oss-120b": 2, "deepseek-v3": 1, "mixtral-8x7b": 1}
"""Layers in a chain, so many that a layer's weights have left the L2 cache when it comes again."""


def num_local(preset):
    """Experts of one rank."""
    return preset.num_experts // EP


def bytes_per_expert(preset):
    return 3 * preset.hidden_size * preset.intermediate_size * 2


def product(matrix, scales, expert, row):
    if scales is None:
        return matrix.float() @ row
    return float8.dequantize(matrix, scales[expert]) @ float8.rounded_rows(row[None])[0]


class ExpertBench:
    """One preset's weights, and rows by tokens per rank."""

    def __init__(self, preset):
        self.preset = preset
        L, H, I = num_local(preset), preset.hidden_size, preset.intermediate_size

        def make(*shape):
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=shape[-1] ** -0.5)

        self.layers = [
            ExpertWeights(
                up_proj=make(L, 2 * I, H),
                down_proj=make(L, H, I),
                up_bias=make(L, 2 * I) if preset.bias else None,
                down_bias=make(L, H) if preset.bias else None,
            )
            for _ in range(LAYERS[preset.name])
        ]
        self.scratch = ExpertScratch("cuda")
        self._timer = GroupTimer(EPGroup(device="cuda"), repeats=7)

    def time_us(self, run, chain):
        """Microseconds of one of `chain` calls in a graph."""
        torch.cuda.synchronize()  # what was issued before may write what `run` reads
        return self._timer.time_graph(lambda: [run() for _ in range(chain)], chain)[0]

    def quantize(self):
        for number, weights in enumerate(self.layers):
            up, up_scale = quantize_weights(weights.up_proj)
            down, down_scale = quantize_weights(weights.down_proj)
            self.layers[number] = dataclasses.replace(
                weights, up_proj=up, up_scale=up_scale, down_proj=down, down_scale=down_scale
            )

    def transpose(self):
        """Weights as gpt-oss checkpoints have them, [L, H, N] and [L, I, H], used as views."""
        for number, weights in enumerate(self.layers):
            up, down = (matrices.transpose(1, 2).contiguous() for matrices in (weights.up_proj, weights.down_proj))
            biases = {"up_bias": weights.up_bias, "down_bias": weights.down_bias}
            self.layers[number] = ExpertWeights.view(up, down, transposed=True, **biases)

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

    def quantized(self, rows):
        """The same, quantized by the sender."""
        return dataclasses.replace(rows, hidden=reference.quantize(rows.hidden))

    def load(self, rows):
        """Pairs and touched experts of this rank."""
        counts = torch.bincount(rows.topk_idx.flatten(), minlength=self.preset.num_experts)[: num_local(self.preset)]
        return int(counts.sum()), int((counts > 0).sum())

    def floors_us(self, rows, facts):
        preset = self.preset
        pairs, touched = self.load(rows)
        weights = touched * bytes_per_expert(preset) / facts["read_gb_per_s"] / 1e3
        flop = pairs * 6 * preset.hidden_size * preset.intermediate_size / facts["gemm_tflops"] / 1e6
        kept = pairs * (preset.hidden_size + preset.intermediate_size) * 2 * 2 / facts["read_gb_per_s"] / 1e3
        return {"weights": weights, "flop": flop, "intermediates": kept}

    def run(self, rows, out, weights, scratch=None, **settings):
        settings = {"dtype": torch.bfloat16, **settings}
        return triton_path.run(rows, weights, 0, self.preset.activation, out, scratch or self.scratch, **settings)

    def whole(self, rows, **settings):
        """Microseconds of one layer's experts."""
        out = torch.empty(rows.hidden.shape, dtype=torch.bfloat16, device="cuda")

        def chain():
            for weights in self.layers:
                self.run(rows, out, weights, **settings)

        return self.time_us(chain, 2) / len(self.layers)

    def parts(self, rows, variant, products_only=False):
        """Microseconds of table, first product, second product and sum, each chained alone."""
        loaded = triton_path.load(variant, self.scratch)
        out = torch.empty_like(rows.hidden)
        self.run(rows, out, self.layers[0], plan=variant.plan)  # fills table and scratch
        num, L = rows.topk_idx.shape[0], num_local(self.preset)
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
                    given_bias = count if bias is None else bias
                    product.launch(source, count, 0, given, count, given_bias, target, count, *settings)

        def make_table():
            loaded.table(rows.topk_idx, count, *table, 0, num, 0)

        def make_sum():
            loaded.sum(
                buffers.outputs_PH, rows.topk_idx, rows.topk_weights, count, out, count, 0, 0, buffers.num_rows, 0, count, 0.0
            )

        done = {which: self.time_us(lambda which=which: products(which), 2) / len(self.layers) for which in ("up", "down")}
        return done if products_only else done | {"table": self.time_us(make_table, 10), "sum": self.time_us(make_sum, 10)}

    def library(self, rows):
        """The two grouped products of the library alone, on rows gathered beforehand, and its whole path."""
        L = num_local(self.preset)
        local = torch.where(rows.topk_idx < L, rows.topk_idx, L).flatten()
        ordered, order = torch.sort(local, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(L, device="cuda", dtype=ordered.dtype), right=True, out_int32=True)
        gathered = rows.hidden.index_select(0, order // self.preset.topk)
        weights = self.layers[0]
        up = torch.nn.functional.grouped_mm(gathered, weights.up_proj.transpose(1, 2), offs=ends)
        middle = up[:, : self.preset.intermediate_size].contiguous()
        out = torch.empty_like(rows.hidden)
        return {
            "grouped_mm up": self.time_us(
                lambda: torch.nn.functional.grouped_mm(gathered, weights.up_proj.transpose(1, 2), offs=ends), 2
            ),
            "grouped_mm down": self.time_us(
                lambda: torch.nn.functional.grouped_mm(middle, weights.down_proj.transpose(1, 2), offs=ends), 2
            ),
            "library path": self.time_us(lambda: torch_path.run("static", rows, weights, 0, self.preset.activation, out), 2),
        }

    def error(self, rows, **settings):
        """Share of the largest number by which a few rows differ from a float32 loop; for float8 weights one on what these and
        quantized rows stand for."""
        out = torch.full(rows.hidden.shape, float("nan"), dtype=torch.bfloat16, device="cuda")
        weights, L = self.layers[0], num_local(self.preset)
        self.run(rows, out, weights, **settings)
        hidden = rows.hidden.dequantize() if isinstance(rows.hidden, QuantizedRows) else rows.hidden.float()
        worst, largest = 0.0, 0.0
        for r in range(min(3, len(out))):
            expected = torch.zeros(self.preset.hidden_size, device="cuda")
            for expert, weight in zip(rows.topk_idx[r].tolist(), rows.topk_weights[r].tolist(), strict=True):
                if expert < L:
                    up = product(weights.up_proj[expert], weights.up_scale, expert, hidden[r])
                    up = up if weights.up_bias is None else up + weights.up_bias[expert].float()
                    activated = self.preset.activation(up).bfloat16().float()
                    down = product(weights.down_proj[expert], weights.down_scale, expert, activated)
                    expected += weight * (down if weights.down_bias is None else down + weights.down_bias[expert].float())
            worst = max(worst, (out[r].float() - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
        return worst / largest if largest else worst
