"""Experts' kernels compile for Hopper and Blackwell without a GPU, and keep to what was planned for them."""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget

from thinned import crossed
from tokenferry.experts import ExpertScratch, variants
from tokenferry.experts.plan import FEW_ROWS, class_of_rows, classes_of_rows, plan
from tokenferry.experts.scratch import RowShape
from tokenferry.kernels import wire
from tokenferry.kernels.launch import REGISTERS_PER_SM

SHARED_MEMORY_BYTES = {90: 232_448, 100: 232_448}
"""What one program may have, by capability (CUDA's programming guide)."""


def variant(H=2048, I=768, L=64, K=8, **changes) -> variants.Variant:
    known = {
        "num_local_experts": L, "hidden_size": H, "intermediate_size": I, "topk": K, "dtype": torch.bfloat16,
        "weight_dtype": torch.bfloat16, "index_dtype": torch.int32, "out_dtype": torch.bfloat16, "activation": "swiglu",
        "gated": True, "interleaved": False, "up_bias": False, "down_bias": False,
        "up_strides": (2 * I * H, H, 1), "down_strides": (H * I, I, 1),
        "aligned": True, "batch_invariant": False, "max_rows": None,
    }  # fmt: skip
    return variants.Variant(**{**known, **changes})


VARIANTS = {
    "qwen3-30b-a3b": variant(),
    "gpt-oss-20b": variant(2880, 2880, 16, 4, activation="clamped_swiglu", interleaved=True, up_bias=True, down_bias=True),
    "gpt-oss-20b-transposed": variant(
        2880, 2880, 16, 4, activation="clamped_swiglu", interleaved=True, up_bias=True, down_bias=True,
        up_strides=(2 * 2880 * 2880, 1, 2 * 2880), down_strides=(2880 * 2880, 1, 2880),
    ),
    "stacked-transposed-norm": variant(
        512, 384, 8, 2, activation="geglu_tanh", norm=True, up_strides=(768 * 512, 1, 768), down_strides=(384 * 512, 1, 512),
    ),
    "deepseek-v3-float8": variant(7168, 2048, 32, 8, weight_dtype=torch.float8_e4m3fn),
    "gpt-oss-20b-mxfp4": variant(
        2880, 2880, 16, 4, activation="clamped_swiglu", interleaved=True, up_bias=True, down_bias=True, weight_dtype=torch.int32,
        up_strides=(90 * 45 * 512, 45 * 512, 512, 1), down_strides=(45 * 45 * 512, 45 * 512, 512, 1),
    ),
    "one-cut-int64-ids": variant(batch_invariant=True, index_dtype=torch.int64, out_dtype=torch.float32),
    "squared-relu-fp16-odd": variant(
        76, 75, 3, 5, dtype=torch.float16, weight_dtype=torch.float16, activation="squared_relu", gated=False,
        up_strides=(75 * 76, 76, 1), down_strides=(75 * 76, 75, 1), max_rows=8,
    ),
    "fp32-transposed": variant(
        64, 32, 3, 2, dtype=torch.float32, weight_dtype=torch.float32, out_dtype=torch.bfloat16, activation="gelu", gated=False,
        up_strides=(64 * 32, 1, 32), down_strides=(64 * 32, 1, 64),
    ),
}  # fmt: skip


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize(("name", "capability"), crossed(VARIANTS, (90, 100)))
def test_compiles_to_a_cubin(name, capability) -> None:
    for spec in variants.specs(VARIANTS[name], torch.device("cpu")).all:
        kernel = triton.compile(spec.source(), target=GPUTarget("cuda", capability, 32), options=spec.options())
        assert kernel.metadata.shared <= SHARED_MEMORY_BYTES[capability], spec
        if spec.name == "expert_gemm_kernel" and capability == 90 and name == "qwen3-30b-a3b":
            product = "wgmma" if dict(spec.constants)["BM"] >= 64 else "mma.sync"  # a warp group multiplies 64 rows at least
            assert product in kernel.asm["ptx"] and "cp.async.cg.shared.global" in kernel.asm["ptx"]


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("product", ["up", "down"])
def test_the_second_launch_of_a_product_waits_after_its_tiles(product) -> None:
    """It runs beside the first. Who waits for it alone must find the first one's rows too, so it waits for that at its end."""
    first, second = getattr(variants.specs(VARIANTS["qwen3-30b-a3b"], torch.device("cpu")), product)
    for spec, waits_first in ((first, True), (second, False)):
        ptx = triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options()).asm["ptx"]
        last_product = max(ptx.rfind("wgmma"), ptx.rfind("mma.sync"))
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
        assert (ptx.index("griddepcontrol.wait") < ptx.index("mma")) == waits_first
        assert (ptx.index("griddepcontrol.wait") > last_product) != waits_first


def registers_of(cubin: bytes, path: Path) -> int:
    """Of a thread, as the assembler gave them out."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    told = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+) STACK:\d+", told)[1])


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("product", ["up", "down"])
def test_three_programs_for_few_packed_rows_fit_on_an_sm(product, tmp_path) -> None:
    """Few rows are bound by reading weights, and each program on an SM asks for more of them."""
    name, sm90 = "gpt-oss-20b-mxfp4", GPUTarget("cuda", 90, 32)
    planned = getattr(variants.chosen_plan(VARIANTS[name], torch.device("cpu")), product)
    compiled = getattr(variants.specs(VARIANTS[name], torch.device("cpu")), product)
    (tiles, spec), *others = [pair for pair in zip(planned, compiled, strict=True) if pair[0].by_warp]
    kernel = triton.compile(spec.source(), target=sm90, options=spec.options())
    registers = -(-registers_of(kernel.asm["cubin"], tmp_path / "cubin") // 8) * 8 * tiles.num_warps * 32
    assert not others and REGISTERS_PER_SM // registers >= 3 and SHARED_MEMORY_BYTES[90] // kernel.metadata.shared >= 3


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("size", [96, 160, 2880])
def test_packed_products_read_no_activated_row_before_they_wait_for_it(size) -> None:
    """Weights alone are asked for before. Where all steps along the depth are written out, no loop is left around them but that
    over tiles, whose loads the compiler would bring forward."""
    small = variant(size, size, 4, 3, weight_dtype=torch.int32)
    spec, *_ = variants.specs(small, torch.device("cpu")).down
    assert dict(spec.constants)["WARP_PAIRS"] > 0
    ptx = triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options()).asm["ptx"]
    assert "cp.async" in ptx and ptx.index("griddepcontrol.wait") < ptx.index("cp.async")
    assert "mma.sync" in ptx, "a warp multiplies by itself"


OPERANDS_IN_REGISTERS = [
    (name, quantized_rows, invariant)
    for name in ("qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-20b-transposed", "deepseek-v3-float8", "gpt-oss-20b-mxfp4")
    for quantized_rows in (False, True)
    for invariant in (False, True)
]


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize(("name", "quantized_rows", "invariant"), OPERANDS_IN_REGISTERS)
def test_no_product_goes_on_while_its_registers_take_the_next_operand(name, quantized_rows, invariant) -> None:
    """Packed weights are unpacked, and float8 rows become bfloat16, in registers that tensor cores read: there each step waits
    for all of its products. Where both operands are in shared memory, products may go on."""
    asked = dataclasses.replace(VARIANTS[name], batch_invariant=invariant, quantized_rows=quantized_rows)
    for spec in (specs := variants.specs(asked, torch.device("cpu"))).up + specs.down:
        ttgir = triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options()).asm["ttgir"]
        if re.search(r"warp_group_dot %.* : tensor<", ttgir):
            assert set(re.findall(r"warp_group_dot_wait .*pendings = (\d+)", ttgir)) == {"0"}, spec


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
def test_rows_are_quantized_by_rounded_divisions() -> None:
    """bfloat16 rows often lie exactly between two float8 numbers, where a division that misses goes the other way."""
    specs = variants.specs(VARIANTS["deepseek-v3-float8"], torch.device("cpu")).quantize
    assert specs
    for spec in specs:
        ptx = triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options()).asm["ptx"]
        assert "div.rn.f32" in ptx and "div.full.f32" not in ptx
        assert "fma.rn.f32" in ptx, "a product with the reciprocal alone is not the rounded quotient"


@pytest.mark.skipif(wire.INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-20b-transposed", "stacked-transposed-norm"])
def test_weights_come_in_the_widest_accesses(name, monkeypatch) -> None:
    """By tensor maps for many rows, and 16 bytes at a time for few, whichever of depth and columns lies side by side."""
    monkeypatch.setattr(variants, "has_pdl", lambda _: True)  # as on Hopper: there are tensor maps
    specs = variants.specs(VARIANTS[name], torch.device("cpu"))
    for spec in (*specs.up, *specs.down):
        ptx = triton.compile(spec.source(), target=GPUTarget("cuda", 90, 32), options=spec.options()).asm["ptx"]
        constants = dict(spec.constants)
        assert constants["TENSOR_MAP"] == (constants["MIN_ROWS"] > 1)
        assert ("cp.async.bulk.tensor" in ptx) == constants["TENSOR_MAP"]
        assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+)", ptx)) == {"0x10"}, spec


def test_what_serves_an_expert_depends_on_its_rows_alone() -> None:
    """No setting of the launch or the transport takes part, and each number of rows is served exactly once."""
    few = {"max_rows": FEW_ROWS}
    for settings in (
        {}, {"batch_invariant": True}, {"scaled": True}, {"gated": False}, {"max_rows": 8}, {"max_rows": 10**6}, few,
        few | {"scaled": True}, few | {"scaled": True, "in_blocks": True}, {"scaled": True, "in_blocks": True},
    ):  # fmt: skip
        chosen = plan(torch.bfloat16, 2048, 768, **settings)
        for launches in (chosen.up, chosen.down):
            for rows in (1, FEW_ROWS // 2, FEW_ROWS // 2 + 1, FEW_ROWS, FEW_ROWS + 1, 10**5):
                assert sum(tiles.min_rows <= rows and (rows <= tiles.max_rows or not tiles.max_rows) for tiles in launches) == 1


def test_a_small_capacity_needs_no_launch_for_many_rows() -> None:
    assert len(plan(torch.bfloat16, 2048, 768, max_rows=FEW_ROWS).up) == 1
    assert len(plan(torch.bfloat16, 2048, 768, max_rows=FEW_ROWS + 1).up) == 2


def test_a_step_that_promises_few_rows_has_kernels_of_its_own() -> None:
    assert classes_of_rows(8192, False) == (8192, FEW_ROWS)
    assert classes_of_rows(8192, True) == (8192,)
    assert classes_of_rows(FEW_ROWS, False) == (FEW_ROWS,)
    for max_rows, promised, batch_invariant, wanted in (
        (8192, None, False, 8192), (8192, 0, False, FEW_ROWS), (8192, FEW_ROWS, False, FEW_ROWS),
        (8192, FEW_ROWS + 1, False, 8192), (8192, FEW_ROWS, True, 8192), (40, 8, False, 40), (None, 8, False, None),
    ):  # fmt: skip
        assert class_of_rows(max_rows, promised, batch_invariant) == wanted


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3-float8", "gpt-oss-20b-mxfp4"])
def test_a_second_class_of_rows_compiles_two_kernels_more(name) -> None:
    device = torch.device("cpu")
    all_rows, few = (
        set(variants.specs(dataclasses.replace(VARIANTS[name], max_rows=rows), device).all)
        for rows in classes_of_rows(8192, False)
    )
    assert len(few - all_rows) == 2


def test_one_cut_has_one_kind_of_tile() -> None:
    for launches in (chosen := plan(torch.bfloat16, 2048, 768, batch_invariant=True)).up, chosen.down:
        assert len(launches) == 1 and launches[0].rows == launches[0].rows_few


def test_rows_of_a_chunk_follow_from_shape_and_memory() -> None:
    shape = RowShape(topk=8, hidden_size=7168, intermediate_size=2048, itemsize=2)
    assert shape.nbytes == 147_488
    assert ExpertScratch.rows_per_chunk(FakeScratch(1 << 30), shape) == 7280
    assert ExpertScratch.rows_per_chunk(FakeScratch(1), shape) == 1


class FakeScratch:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
