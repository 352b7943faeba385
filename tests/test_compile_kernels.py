"""Every kernel compiles to a cubin for Hopper and Blackwell without a GPU, quickly at any group size, and holds the
instructions that it is meant to hold."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from patience import PATIENT_S
from tokenferry.kernels import (
    abort,
    combine,
    control_words,
    counts,
    dispatch,
    expert_table,
    fixed_linear,
    load_counts,
    own_routing,
    route,
    router_linear,
    term_sum,
    wire,
)
from tokenferry.kernels.control_block import MAX_LAYERS, MAX_RANKS, PHASES, Record
from tokenferry.kernels.launch import options, source, specify
from tokenferry.transports.symmetric.tuning import MAX_REGISTERS

pytestmark = pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")

DISPATCH = {
    "FORMAT": 0, "H": 7168, "HIDDEN": tl.bfloat16, "POWER_OF_TWO": 0,
    "ROW_WORDS": 3584, "K": 8, "IDX": tl.int64, "WEIGHTS": tl.bfloat16, "OUT_IDX": tl.int32, "WORDS": 4, "BLOCK": 256,
    "MULTICAST": 0, "MAX_PROGRAMS": 512, "FLAG_BLOCK": 0, "SPLIT": 0, "TELEMETRY": 0, "PDL": 1,
}  # fmt: skip
COMBINE = {
    "H": 7168, "PARTIAL": tl.bfloat16, "WIRE": tl.bfloat16, "OUT": tl.bfloat16, "WORDS": 4, "BLOCK": 256,
    "SWITCH_SUM": 0, "MAX_PROGRAMS": 512, "FLAG_BLOCK": 0, "SPLIT": 0, "PDL": 1, **combine.NO_LOADS,
}  # fmt: skip
COUNTING = {name: value for name, value in COMBINE.items() if name not in combine.NO_LOADS}
COUNTING |= {"TELEMETRY": 1, "TOPK": 8, "IDS": tl.int32}
TABLE = {**expert_table.SIGNATURE, "topk_idx": "*i32"}
TABLE_SIZES = {"K": 8, "FEW": 1024, "MIDDLE": 4096, "MANY": 8192, "PDL": 1}
VARIANTS = {
    "counts-EP2": (counts.counts_kernel, counts.SIGNATURE, {"LANES": 32, "TELEMETRY": 0, "PDL": 1}, 1),
    "counts-EP72": (counts.counts_kernel, counts.SIGNATURE, {"LANES": 128, "TELEMETRY": 0, "PDL": 1}, 1),
    "counts-telemetry": (counts.counts_kernel, counts.SIGNATURE, {"LANES": 32, "TELEMETRY": 1, "PDL": 1}, 1),
    "abort": (abort.abort_kernel, abort.SIGNATURE, {"PDL": 0}, 1),
    "add": (control_words.add_kernel, control_words.SIGNATURE, {"PDL": 0}, 1),
    "dispatch": (dispatch.dispatch_kernel, dispatch.SIGNATURE, DISPATCH, 8),
    "dispatch-K7-half-packets-int64-out": (
        dispatch.dispatch_kernel,
        dispatch.SIGNATURE,
        {**DISPATCH, "K": 7, "ROW_WORDS": 18, "WORDS": 2, "OUT_IDX": tl.int64, "WEIGHTS": tl.float16, "BLOCK": 128},
        4,
    ),
    "dispatch-multicast": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "MULTICAST": 1}, 8),
    "dispatch-few-tokens": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "FLAG_BLOCK": 512}, 8),
    "dispatch-fp8": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "FORMAT": 1, "ROW_WORDS": 1848}, 8),
    "dispatch-fp8-quantized": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "FORMAT": 2, "ROW_WORDS": 1848}, 8),
    "dispatch-fp8-fp32-H2880-multicast": (
        dispatch.dispatch_kernel,
        dispatch.SIGNATURE,
        {**DISPATCH, "FORMAT": 1, "H": 2880, "HIDDEN": tl.float32, "ROW_WORDS": 744, "MULTICAST": 1, "POWER_OF_TWO": 1},
        8,
    ),
    "dispatch-bytes": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "FORMAT": 3}, 8),
    "dispatch-telemetry": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "TELEMETRY": 1}, 8),
    "dispatch-telemetry-few-tokens": (
        dispatch.dispatch_kernel,
        dispatch.SIGNATURE,
        {**DISPATCH, "TELEMETRY": 1, "FLAG_BLOCK": 512},
        8,
    ),
    "combine-telemetry": (combine.combine_kernel, combine.COUNTING_SIGNATURE, COUNTING, 8),
    "combine-telemetry-few-tokens": (
        combine.combine_kernel,
        combine.COUNTING_SIGNATURE,
        {**COUNTING, "FLAG_BLOCK": 512, "IDS": tl.int64},
        8,
    ),
    "combine-telemetry-split": (
        combine.combine_kernel,
        combine.COUNTING_SIGNATURE,
        {**COUNTING, "SPLIT": 2, "BLOCK": 512},
        16,
    ),
    "combine-fp8-telemetry": (
        combine.combine_kernel,
        combine.COUNTING_SIGNATURE,
        {**COUNTING, "WIRE": tl.float8e4nv},
        8,
    ),
    "table": (expert_table.expert_table_kernel, TABLE, {**expert_table.NO_LOADS, **TABLE_SIZES}, 8),
    "table-telemetry": (
        expert_table.expert_table_kernel,
        {**expert_table.COUNTING_SIGNATURE, "topk_idx": "*i32"},
        {"TELEMETRY": 1, **TABLE_SIZES},
        8,
    ),
    "load-counts": (
        load_counts.load_counts_kernel,
        load_counts.SIGNATURE,
        {"K": 8, "BLOCK": load_counts.BLOCK, "PDL": 1},
        load_counts.NUM_WARPS,
    ),
    "combine": (combine.combine_kernel, combine.SIGNATURE, COMBINE, 8),
    "combine-few-tokens": (combine.combine_kernel, combine.SIGNATURE, {**COMBINE, "FLAG_BLOCK": 512}, 8),
    "dispatch-split": (dispatch.dispatch_kernel, dispatch.SIGNATURE, {**DISPATCH, "SPLIT": 2, "BLOCK": 512}, 16),
    "combine-split": (combine.combine_kernel, combine.SIGNATURE, {**COMBINE, "SPLIT": 2, "BLOCK": 512}, 16),
    "combine-16-warps": (combine.combine_kernel, combine.SIGNATURE, {**COMBINE, "BLOCK": 512}, 16),
    "combine-sum-in-the-switch": (
        combine.combine_kernel,
        combine.SIGNATURE,
        {**COMBINE, "PARTIAL": tl.float32, "WIRE": tl.float32, "SWITCH_SUM": 1},
        8,
    ),
    "combine-fp32-to-bf16": (combine.combine_kernel, combine.SIGNATURE, {**COMBINE, "PARTIAL": tl.float32}, 8),
    "combine-fp16-to-fp32-wire": (
        combine.combine_kernel,
        combine.SIGNATURE,
        {**COMBINE, "PARTIAL": tl.float16, "WIRE": tl.float32},
        8,
    ),
    "combine-unrounded": (
        combine.combine_kernel,
        combine.SIGNATURE,
        {**COMBINE, "PARTIAL": tl.float32, "WIRE": tl.float32, "OUT": tl.float32},
        8,
    ),
    "combine-unrounded-bf16-wire": (combine.combine_kernel, combine.SIGNATURE, {**COMBINE, "OUT": tl.float32}, 8),
    "combine-fp8": (combine.combine_kernel, combine.SIGNATURE, {**COMBINE, "WIRE": tl.float8e4nv}, 8),
    "combine-fp8-quantized-few-tokens": (
        combine.combine_kernel,
        combine.SIGNATURE,
        {**COMBINE, "WIRE": tl.float8e4nv, "PARTIAL": tl.float8e4nv, "FLAG_BLOCK": 512},
        8,
    ),
    "combine-fp8-fp32-H2880": (
        combine.combine_kernel,
        combine.SIGNATURE,
        {**COMBINE, "WIRE": tl.float8e4nv, "PARTIAL": tl.float32, "OUT": tl.float32, "H": 2880},
        8,
    ),
    "combine-half-packets": (
        combine.combine_kernel,
        combine.SIGNATURE,
        {**COMBINE, "H": 36, "WIRE": tl.float16, "OUT": tl.float32, "WORDS": 2, "BLOCK": 512},
        16,
    ),
}


def compiled(name: str, capability: int) -> triton.compiler.CompiledKernel:
    kernel, signature, constants, num_warps = VARIANTS[name]
    registers = MAX_REGISTERS if name.startswith(("dispatch", "combine")) else None
    return triton.compile(
        source(kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options=options(num_warps, True, max_registers=registers),
    )


def sass(cubin: bytes, folder: Path) -> str:
    """What ptxas made of it; the disassembler comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        pytest.skip("this build of Triton has no nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([str(tool), str(path)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_to_a_cubin(name: str, capability: int) -> None:
    assert len(compiled(name, capability).asm["cubin"]) > 1000


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(
    ("D", "N", "dtype"),
    [(2048, 128, torch.bfloat16), (2880, 5760, torch.float16), (75, 7, torch.float32)],
    ids=["router", "shared-expert", "odd"],
)
def test_the_product_of_batch_invariant_layers_compiles(D: int, N: int, dtype: torch.dtype, capability: int) -> None:
    constants = fixed_linear.constants_of(D, N, dtype, has_bias=True, pdl=True)
    kinds = dict.fromkeys(("ROWS", "WEIGHT", "BIAS_DTYPE", "OUT"), dtype)
    spec = specify(
        fixed_linear.fixed_linear_kernel, fixed_linear.SIGNATURE, constants, num_warps=fixed_linear.NUM_WARPS, dtypes=kinds
    )
    kernel = triton.compile(spec.source(), target=GPUTarget("cuda", capability, 32), options=spec.options())
    assert kernel.metadata.shared <= 99 * 1024, "two programs on an SM"
    assert ("mma" in kernel.asm["ptx"]) == (dtype != torch.float32)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(("E", "H"), [(128, 2048), (256, 7168), (32, 2880), (7, 75)], ids=str)
def test_the_router_s_product_of_few_rows_compiles(E: int, H: int, capability: int, tmp_path: Path) -> None:
    constants = router_linear.constants_of(E, H, has_bias=True, pdl=True)
    kinds = {"ROWS": torch.bfloat16, "OUT": torch.float32}
    spec = specify(
        router_linear.router_linear_kernel, router_linear.SIGNATURE, constants, num_warps=router_linear.warps_of(H), dtypes=kinds,
        aligned=True,
    )  # fmt: skip
    kernel = triton.compile(spec.source(), target=GPUTarget("cuda", capability, 32), options=spec.options())
    assert ("ld.global.v4" in kernel.asm["ptx"]) == (H % 8 == 0), "rows at multiples of 16 bytes are read 16 bytes at a time"
    assert not re.search(r"\b(LDL|STL)\b", sass(kernel.asm["cubin"], tmp_path)), "nothing may spill"


@pytest.mark.parametrize("capability", [90, 100])
def test_packets_are_16_bytes_and_polls_skip_the_cache(capability: int, tmp_path: Path) -> None:
    for name in ("dispatch", "dispatch-few-tokens", "combine", "combine-few-tokens", "combine-16-warps"):
        text = sass(compiled(name, capability).asm["cubin"], tmp_path)
        assert "LDG.E.128.STRONG.SYS" in text, "the poll"
        assert "STG.E.128.STRONG.SYS" in text, "the packet, and the sentinel that is put back"
        if capability == 90:  # where it was tuned
            assert not re.search(r"\b(LDL|STL)\b", text), "nothing may spill"


@pytest.mark.parametrize("capability", [90, 100])
def test_multicast_stores_are_there_and_only_there(capability: int, tmp_path: Path) -> None:
    ptx = {name: compiled(name, capability).asm["ptx"] for name in ("dispatch", "dispatch-multicast")}
    assert "multimem.st.relaxed.sys.global.v4.f32" in ptx["dispatch-multicast"]
    assert "multimem" not in ptx["dispatch"]
    # In SASS a multicast store is an ordinary 16-byte store (ptxas 12.9): the address alone makes it a multicast.
    assert "STG.E.128.STRONG.SYS" in sass(compiled("dispatch-multicast", capability).asm["cubin"], tmp_path)


@triton.jit
def switch_sum(multicast_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    a, b, c, d = wire.multicast_sum(multicast_ptr + lanes * 16, lanes < BLOCK, multicast_ptr)
    wire.store(out_ptr + lanes * 16, a, b, c, d, lanes < BLOCK, 4)


@pytest.mark.parametrize("capability", [90, 100])
def test_the_sum_in_the_switch_compiles(capability: int, tmp_path: Path) -> None:
    signature = {"multicast_ptr": "i64", "out_ptr": "i64", "BLOCK": "constexpr"}
    kernel = triton.compile(
        source(switch_sum, signature, {"BLOCK": 128}), target=GPUTarget("cuda", capability, 32), options=options(4, False)
    )
    assert "multimem.ld_reduce.relaxed.sys.global.add.v4.f32" in kernel.asm["ptx"]
    text = sass(kernel.asm["cubin"], tmp_path)
    assert "LDGMC" in text, sorted(set(re.findall(r"[A-Z][A-Z0-9]+(?:\.[A-Z0-9_]+)+", text)))


COLLECTIVE = {
    "own-routing": specify(
        own_routing.own_routing_kernel,
        own_routing.SIGNATURE,
        {"K": 8, "BLOCK": 1024, "PDL": 1},
        num_warps=4,
        dtypes={"IDX": torch.int64, "WEIGHTS": torch.bfloat16, "OUT_IDX": torch.int64},
    ),
    "term-sum-EP8": specify(
        term_sum.term_sum_kernel,
        term_sum.SIGNATURE,
        {"SIZE": 8, "H": 7168, "BLOCK": 1024, "PDL": 1},
        num_warps=4,
        dtypes={"TERM": torch.bfloat16, "OUT": torch.bfloat16},
        aligned=True,
    ),
}


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", COLLECTIVE)
def test_kernels_of_the_collective_transport_compile(name: str, capability: int) -> None:
    spec = COLLECTIVE[name]
    kernel = triton.compile(spec.source(), target=GPUTarget("cuda", capability, 32), options=spec.options())
    assert ("ld.global.v4" in kernel.asm["ptx"]) == spec.aligned, "rows at multiples of 16 bytes are read 16 bytes at a time"


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("terms", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_terms_are_not_added_in_a_dtype_that_cannot_hold_them(terms: torch.dtype, result: torch.dtype) -> None:
    """LLVM narrows the sum of two to the result's dtype where it holds the digits, and forgets the exponents."""
    constants = {"SIZE": 2, "H": 8, "BLOCK": 1024, "PDL": 1}
    spec = specify(term_sum.term_sum_kernel, term_sum.SIGNATURE, constants, num_warps=4, dtypes={"TERM": terms, "OUT": result})
    kernel = triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options())
    narrow = {"add.rn.f16": torch.float16, "add.rn.bf16": torch.bfloat16}
    added = set(re.findall(r"\badd\.rn\.(?:bf16|f16|f32)", kernel.asm["ptx"]))
    assert added
    assert all(name == "add.rn.f32" or narrow[name] == terms == result for name in added)


ROUTE = {
    "TOPK_GROUPS": 1, "GROUP_TOPK": 1, "SIGMOID": False, "TOPK_BEFORE_SCORE": False, "RENORMALIZE": True, "CORRECTED": False,
    "PDL": True,
}  # fmt: skip
ROUTES = {
    "softmax-E128-K8": {**ROUTE, "G": 1, "M": 128, "K": 8, "GROUPS": 1, "MEMBERS": 128},
    "deepseek-E256-K8": {
        **ROUTE, "G": 8, "M": 32, "K": 8, "GROUPS": 8, "MEMBERS": 32,
        "TOPK_GROUPS": 4, "GROUP_TOPK": 2, "SIGMOID": True, "CORRECTED": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("name", ROUTES)
def test_one_warp_routes_a_row_without_shared_memory(name: str, capability: int, tmp_path: Path) -> None:
    types = {"*LOGITS": "*bf16", "*IDX": "*i32"}
    signature = {argument: types.get(kind, kind) for argument, kind in route.SIGNATURE.items()}
    kernel = triton.compile(
        source(route.route_kernel, signature, ROUTES[name]), target=GPUTarget("cuda", capability, 32), options=options(1, True)
    )
    assert kernel.metadata.shared == 0
    assert not re.search(r"\b(LDL|STL)\b", sass(kernel.asm["cubin"], tmp_path)), "nothing may spill"


@pytest.mark.alone
def test_a_cold_compilation_takes_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", COLD], check=True, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)})
    assert time.monotonic() - start < PATIENT_S


COLD = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from tokenferry.kernels import counts
from tokenferry.kernels.launch import options, source
triton.compile(source(counts.counts_kernel, counts.SIGNATURE, {"LANES": 128, "TELEMETRY": 0, "PDL": 1}),
               target=GPUTarget("cuda", 90, 32), options=options(1, True))
"""


def test_a_poll_refuses_blocks_that_are_not_whole_threads() -> None:
    """A packet that two threads wait for is cleared by one, and the other waits for ever; seen on a GPU."""
    constants = {**DISPATCH, "BLOCK": 128}
    with pytest.raises(triton.compiler.CompilationError) as caught:
        triton.compile(
            source(dispatch.dispatch_kernel, dispatch.SIGNATURE, constants),
            target=GPUTarget("cuda", 90, 32),
            options=options(8, True),
        )
    reason: BaseException | None = caught.value
    while reason is not None and "owner thread" not in str(reason):
        reason = reason.__cause__
    assert reason is not None


def test_records_fit_one_word() -> None:
    record = Record(rank=1, reporter=0, phase="data-missing", step=7, layer=-1)
    assert record.pack() == 0x4200010000000007


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("rank", [0, MAX_RANKS - 1])
@pytest.mark.parametrize("layer", [-1, 0, 4095, 4096, MAX_LAYERS - 1])
def test_every_field_of_a_record_goes_to_its_limit_and_leaves_the_others_alone(phase: str, rank: int, layer: int) -> None:
    record = Record(rank=rank, reporter=MAX_RANKS - 1 - rank, phase=phase, step=2**24 - 1, layer=layer)
    word = record.pack()
    assert 0 < word < 2**63
    assert Record.unpack(word) == record


@pytest.mark.parametrize("reader", [0, 1, 2**23, 2**24 - 1, 2**24, 2**31 + 5], ids="reader-in-{}".format)
@pytest.mark.parametrize("ahead", [-1, 0, 1, 60])
def test_the_step_of_a_record_is_whole_again_beyond_its_24_bits(reader: int, ahead: int) -> None:
    late = max(0, reader + ahead)
    record = Record(rank=1, reporter=0, phase="not-entered", step=late, layer=-1)
    assert Record.unpack(record.pack()).step_near(reader) == late
