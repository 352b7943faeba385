"""The grouped product in the interpreter on weights as other libraries store them: views, and never a copy."""

import pytest
import torch

import tokenferry as tf
from expert_layouts import Layout, rows_for
from test_experts import LOCAL, NUM_EXPERTS, TOLERANCE, loop_in_float64
from tokenferry.activations import Activation
from tokenferry.experts import Experts, ExpertsConfig, ExpertScratch, ExpertWeights, triton_path, variants
from tokenferry.experts.plan import Plan, Tiles
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def tiles(**changes) -> Tiles:
    common = {"rows": 16, "rows_few": 4, "columns": 16, "depth": 16, "num_warps": 4, "num_stages": 2, "programs_per_sm": 1}
    return Tiles(**{**common, **changes})


POINTERS = Plan(up=(tiles(min_rows=7), tiles(max_rows=6)), down=(tiles(max_rows=6), tiles(min_rows=7)))
MAPS = Plan(up=(tiles(tensor_map=True),), down=(tiles(tensor_map=True),))


GPT_OSS = Activation("clamped_swiglu", interleaved=True, limit=0.5)
LAYOUTS = {
    "transposed-interleaved-bias": Layout(GPT_OSS, bias=True, transposed=True),
    "transposed-interleaved-bias-maps": Layout(GPT_OSS, bias=True, transposed=True, plan=MAPS),
    "transposed-stacked": Layout(Activation(), transposed=True),
    "transposed-stacked-bias-maps": Layout(Activation("limited_swiglu", limit=0.5), bias=True, transposed=True, plan=MAPS),
    "transposed-no-gate": Layout(Activation("squared_relu"), bias=True, transposed=True),
    "transposed-no-gate-maps": Layout(Activation("squared_relu"), transposed=True, plan=MAPS),
    "transposed-fp32": Layout(GPT_OSS, bias=True, transposed=True, dtype=torch.float32),
    "transposed-unaligned": Layout(GPT_OSS, bias=True, transposed=True, hidden_size=7, intermediate_size=5, plan=MAPS),
    "transposed-stacked-unaligned": Layout(Activation(), transposed=True, hidden_size=9, intermediate_size=21),
    "interleaved": Layout(Activation(interleaved=True)),
    "interleaved-maps": Layout(Activation(interleaved=True), plan=MAPS),
    "depth-first": Layout(Activation(), depth_first=True),
    "depth-first-interleaved-maps": Layout(GPT_OSS, bias=True, depth_first=True, plan=MAPS),
}
MAPPED = [name for name, layout in LAYOUTS.items() if layout.plan is MAPS and "unaligned" not in name]


def all_layouts(group: tf.EPGroup) -> dict[str, tuple[float, bool]]:
    """The largest error as a share of the largest number, and whether weights came by a descriptor."""
    found = {}
    for name, layout in LAYOUTS.items():
        experts, rows = layout.build()
        weights, activation = layout.view(experts), experts.config.activation
        expected = loop_in_float64(experts, rows)
        out, scratch = torch.full(rows.hidden.shape, torch.nan, dtype=layout.dtype), ExpertScratch("cpu")
        triton_path.run(rows, weights, LOCAL.start, activation, out, scratch, plan=layout.plan or POINTERS)
        [loaded] = triton_path.kernels_of(scratch).by_variant.values()
        mapped = {bool(product.descriptor_block) for product in (*loaded.up, *loaded.down)}
        found[name] = (((out.double() - expected).abs().max() / expected.abs().max()).item(), mapped == {True})
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[float, bool]]:
    return run_ranks(all_layouts, 1, env=INTERPRETER, timeout_s=240)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_equals_a_float64_loop(found, name) -> None:
    assert found[name][0] <= TOLERANCE[LAYOUTS[name].dtype]


def test_weights_come_by_descriptors_where_tiles_ask_for_them(found) -> None:
    assert [name for name, (_, mapped) in found.items() if mapped] == MAPPED


# --- stacks longer than an int32 counts -----------------------------------------------------------------------------------


FAR, FAR_EXPERT = 1 << 26, (1 << 30) + 24
STRIDES = {"depth": (48, 1, FAR), "column": (48, FAR, 1), "expert": (FAR_EXPERT, 48, 1)}
"""Of weights [3, 48, 48] whose last number is beyond 2^31, along one of their dimensions: by depth they lie [depth, expert,
column]. The memory between the numbers is never touched, so it is never there."""


def far_apart(group: tf.EPGroup, along: str) -> list[float]:
    """The largest error by pointers and by descriptors. All depths lie in one tile, the first and the last. (The interpreter
    counts steps from tile to tile without a limit; the GPU test has two tiles.)"""
    shape = ExpertsConfig(hidden_size=48, intermediate_size=48, num_experts=NUM_EXPERTS, activation=Activation("relu"))
    torch.manual_seed(4)
    experts, rows = Experts(shape, LOCAL, dtype=torch.bfloat16), rows_for(48, torch.bfloat16)
    expected = loop_in_float64(experts, rows)
    strides, memory = STRIDES[along], torch.empty(FAR * 48, dtype=torch.bfloat16)
    up = memory.as_strided(experts.up_proj.shape, strides).copy_(experts.up_proj)
    down = memory.as_strided(experts.down_proj.shape, strides, max(strides) // 2).copy_(experts.down_proj)
    weights, errors = ExpertWeights(up_proj=up, down_proj=down), []
    whole = Plan(up=(tiles(depth=64),), down=(tiles(depth=64),))
    for plan in (whole, MAPS):
        out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.bfloat16)
        triton_path.run(rows, weights, LOCAL.start, shape.activation, out, ExpertScratch("cpu"), plan=plan)
        errors.append(((out.double() - expected).abs().max() / expected.abs().max()).item())
    return errors


@pytest.mark.parametrize("along", STRIDES)
def test_offsets_beyond_an_int32(along: str) -> None:
    by_pointers, by_maps = run_ranks(far_apart, 1, along, env=INTERPRETER, timeout_s=240)[0]
    assert by_pointers <= TOLERANCE[torch.bfloat16]
    assert by_maps <= TOLERANCE[torch.bfloat16]


def test_a_transposed_stack_whose_rows_are_no_packets_comes_by_pointers() -> None:
    """The ups begin I numbers behind the gates: 21 bfloat16 are no multiple of 16 bytes."""
    layout = Layout(Activation(), transposed=True, hidden_size=32, intermediate_size=20)
    experts, _ = layout.build()
    variant = variants.variant_of(
        layout.view(experts), experts.config.activation, 3, torch.bfloat16, torch.int32, torch.bfloat16, plan=MAPS
    )
    assert not variants.uses_tensor_map(variant, MAPS.up[0], True, 1)
    assert variants.uses_tensor_map(variant, MAPS.down[0], False, 1)
