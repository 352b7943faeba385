"""Fills Triton's cache with the kernels of the benchmark's shapes, many at a time, on a machine that has many cores.

python benchmarks/precompile.py
"""

import itertools
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from triton.backends.compiler import GPUTarget

from tokenferry.kernels import combine, counts, dispatch
from tokenferry.kernels.launch import DTYPES, options, source
from tokenferry.transports.symmetric.layout import MAX_PROGRAMS
from tokenferry.transports.symmetric.loading import FLOAT_DTYPES, INDEX_DTYPES


def compile_one(task):
    kernel, constants, num_warps = task
    module = {"dispatch": dispatch, "combine": combine, "counts": counts}[kernel]
    function = getattr(module, f"{kernel}_kernel")
    constants = {name: DTYPES.get(value, value) if isinstance(value, torch.dtype) else value for name, value in constants.items()}
    triton.compile(
        source(function, module.SIGNATURE, constants), target=GPUTarget("cuda", 90, 32), options=options(num_warps, True)
    )
    return 1


def tasks(hidden_sizes, all_warps, topk):
    yield "counts", {"LANES": 32, "PDL": 1}, 1
    for hidden_size, num_warps in itertools.product(hidden_sizes, all_warps):
        for idx, weights in itertools.product(INDEX_DTYPES, FLOAT_DTYPES):
            constants = {"ROW_WORDS": hidden_size // 2, "K": topk, "IDX": idx, "WEIGHTS": weights, "OUT_IDX": torch.int32,
                         "WORDS": 4, "BLOCK": num_warps * 32, "MULTICAST": 0, "MAX_PROGRAMS": MAX_PROGRAMS,
                         "FLAG_BLOCK": 0, "SPLIT": 0, "TELEMETRY": 0, "PDL": 1}  # fmt: skip
            yield "dispatch", constants, num_warps
        for partial in FLOAT_DTYPES:
            constants = {"H": hidden_size, "PARTIAL": partial, "WIRE": torch.bfloat16, "OUT": torch.bfloat16, "WORDS": 4,
                         "BLOCK": num_warps * 32, "SWITCH_SUM": 0, "MAX_PROGRAMS": MAX_PROGRAMS, "FLAG_BLOCK": 0, "SPLIT": 0,
                         "PDL": 1}  # fmt: skip
            yield "combine", constants, num_warps


if __name__ == "__main__":
    everything = [*tasks((7168, 2048), (4, 8, 16), 8), *tasks((72,), (4, 8, 16), 3), *tasks((64,), (4, 8, 16), 2)]
    with ProcessPoolExecutor(16) as pool:
        print(sum(pool.map(compile_one, everything)), "kernels")
