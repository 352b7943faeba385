"""Fills Triton's cache with the kernels of a layer benchmark, many at a time: a run on a bare machine is mostly compiling.

python benchmarks/precompile.py [--presets qwen3-30b-a3b,deepseek-v3] [--float8] [--processes 16]

It needs no GPU, and compiles for Hopper with 132 SMs: what another GPU needs is compiled when it is asked for.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from expert_plans import variant_of
from tokenferry import MoEConfig
from tokenferry.benchmarking.presets import PRESETS
from tokenferry.dispatched import FLOAT8, RowFormat
from tokenferry.experts import variants
from tokenferry.kernels.launch import specify
from tokenferry.transports.symmetric import layout, loading, tuning

CAPACITY, EP, SMS = 4096, 2, 132
WANTED = []
"""What the processes compile. They are forks, since a kernel cannot be pickled."""


def exchange_specs(preset, dispatch_format):
    """Every kernel that moves rows for a workspace of CAPACITY."""
    config = MoEConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk)
    settings = SimpleNamespace(
        config=config, group=SimpleNamespace(device=torch.device("cuda"), size=EP), max_tokens_per_rank=CAPACITY,
        combine_dtype=torch.bfloat16, combine_order="rank", result_dtype=torch.bfloat16, index_dtype=torch.int32,
        dispatch_format=RowFormat.of(dispatch_format), recorder=None, max_ctas=None,
    )  # fmt: skip
    found = []

    def note(kernel, signature, constants, num_warps, device, *, max_registers=None):
        found.append(specify(kernel, signature, constants, num_warps=num_warps, max_registers=max_registers))
        return SimpleNamespace(resident=2 * SMS)

    loading.prepare, loading.has_pdl, tuning._num_sms = note, lambda device: True, lambda settings: SMS
    cut = layout.plan(config, EP, CAPACITY, torch.bfloat16, dispatch_format=settings.dispatch_format)
    chosen = tuning.choose_tuning(settings, cut)
    few = tuning.choose_few_tokens(settings, cut, chosen)
    loading.load_row_kernels(settings, chosen, multicast=False)
    if few is not None:
        loading.load_row_kernels(settings, few.tuning, multicast=False, flag_block=chosen.block)
    return found


def expert_specs(preset, float8):
    """Every kernel of the preset's experts, for rows as they are and, of float8 weights, for quantized ones too."""
    variants.has_pdl = lambda device: True
    if preset.mxfp4:
        return variants.specs(variant_of(preset, weight_dtype=torch.int32), torch.device("cpu")).all
    if not float8:
        return variants.specs(variant_of(preset), torch.device("cpu")).all
    made = (variant_of(preset, weight_dtype=FLOAT8, quantized_rows=quantized) for quantized in (False, True))
    return [spec for variant in made for spec in variants.specs(variant, torch.device("cpu")).all]


def compile_spec(number):
    spec = WANTED[number]
    torch.set_num_threads(1)
    try:
        triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options())
    except Exception as error:  # noqa: BLE001 - it fails again, and is told, where it is asked for
        return f"{spec.name}: {type(error).__name__}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default=",".join(preset.name for preset in PRESETS))
    parser.add_argument("--float8", action="store_true")
    parser.add_argument("--processes", type=int, default=16)
    given = parser.parse_args()
    start, specs = time.monotonic(), {}
    for preset in (preset for preset in PRESETS if preset.name in given.presets.split(",")):
        for dispatch_format in ("same", "fp8_block128") if given.float8 else ("same",):
            specs |= dict.fromkeys(exchange_specs(preset, dispatch_format))
        specs |= dict.fromkeys(expert_specs(preset, given.float8))
    WANTED[:] = specs
    with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("fork")) as pool:
        failed = [text for text in pool.map(compile_spec, range(len(WANTED))) if text]
    print(f"{len(WANTED)} kernels compiled in {time.monotonic() - start:.0f} s", *failed, sep="\n")


if __name__ == "__main__":
    main()
