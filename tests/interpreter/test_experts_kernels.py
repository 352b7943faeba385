"""The experts' kernels in the interpreter: every shape of experts, and garbage where nothing may be read."""

import dataclasses

import pytest
import torch

import test_experts as plain
import tokenferry as tf
from test_experts import CASES, LOCAL, TOLERANCE, Case, gathered
from tokenferry.activations import Activation
from tokenferry.experts import Experts, ExpertsConfig, ExpertScratch, torch_path, triton_path, variants
from tokenferry.experts.plan import Plan, Tiles
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import same_bits

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def tiles(**changes) -> Tiles:
    common = {"rows": 16, "rows_few": 4, "columns": 16, "depth": 16, "num_warps": 4, "num_stages": 2, "programs_per_sm": 1}
    return Tiles(**{**common, **changes})


TWO_CUTS = Plan(up=(tiles(min_rows=7), tiles(max_rows=6)), down=(tiles(max_rows=6), tiles(min_rows=7)))
"""As the real plans, small: an expert goes one way or the other by its rows, and a last tile may be short."""
ONE_CUT = Plan(up=(tiles(rows_few=16),), down=(tiles(rows_few=16),))


def by_kernels(experts, rows, *, plan=TWO_CUTS, scratch=None, out=None):
    if out is None:
        out = torch.full(rows.hidden.shape, torch.nan, dtype=rows.hidden.dtype)
    scratch = scratch or ExpertScratch("cpu")
    return triton_path.run(rows, experts.weights, LOCAL.start, experts.config.activation, out, scratch, plan=plan)


# --- every shape ----------------------------------------------------------------------------------------------------------


def all_cases(group: tf.EPGroup) -> dict[str, float]:
    errors = {}
    for name, case in CASES.items():
        experts, rows = case.build()
        expected = plain.loop_in_float64(experts, rows)
        errors[name] = ((by_kernels(experts, rows).double() - expected).abs().max() / expected.abs().max()).item()
    return errors


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return run_ranks(all_cases, 1, env=INTERPRETER, timeout_s=240)[0]


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_a_float64_loop(errors, name) -> None:
    assert errors[name] <= TOLERANCE[CASES[name].dtype]


# --- what must not be read, and what must not matter ----------------------------------------------------------------------


def poison(scratch: ExpertScratch) -> ExpertScratch:
    """Every word of it a NaN, and a count or position of -1."""
    scratch._memory = torch.full((1 << 20,), 0xFF, dtype=torch.uint8)
    return scratch


def properties(group: tf.EPGroup) -> dict[str, bool]:
    experts, rows = Case(bias=True, dtype=torch.bfloat16, num_rows=30).build()
    clean = by_kernels(experts, rows)
    held = {"two runs": same_bits(clean, by_kernels(experts, rows))}

    valid = 13
    beyond = gathered(rows.hidden.clone(), rows.topk_idx.clone(), rows.topk_weights.clone(), valid)
    beyond.hidden[valid:] = torch.nan
    beyond.topk_idx[valid:] = LOCAL.start  # a row that does not count may name an expert of ours
    beyond.topk_weights[valid:] = torch.nan
    only = gathered(rows.hidden[:valid].clone(), rows.topk_idx[:valid].clone(), rows.topk_weights[:valid].clone())
    out = torch.full((30, 32), 7.0, dtype=torch.bfloat16)
    got = by_kernels(experts, beyond, scratch=poison(ExpertScratch("cpu")), out=out)
    held["rows beyond V are not read"] = same_bits(got[:valid], by_kernels(experts, only))
    held["rows beyond V are not written"] = bool((out[valid:] == 7.0).all())

    ids = dataclasses.replace(rows, topk_idx=rows.topk_idx.long())
    held["int64 ids"] = same_bits(clean, by_kernels(experts, ids))
    for name in ("bf16", "bf16-clamped-interleaved", "fp16-squared-relu"):
        other, other_rows = CASES[name].build()
        maps = Plan(up=(tiles(tensor_map=True),), down=(tiles(tensor_map=True),))
        pointers = Plan(up=(tiles(),), down=(tiles(),))
        got = by_kernels(other, other_rows, plan=maps)
        held[f"tensor maps, {name}"] = same_bits(got, by_kernels(other, other_rows, plan=pointers))
    nowhere = dataclasses.replace(rows, topk_idx=torch.full_like(rows.topk_idx, LOCAL.stop))
    held["no local expert gives +0"] = same_bits(by_kernels(experts, nowhere), torch.zeros_like(rows.hidden))
    for valid in (0, 30):
        none = dataclasses.replace(rows, valid_tokens=torch.tensor([valid], dtype=torch.int32))
        out = by_kernels(experts, none, out=torch.full((30, 32), 7.0, dtype=torch.bfloat16))
        held[f"V={valid}"] = same_bits(out, clean) if valid else bool((out == 7.0).all())

    crowd = Case(bias=True, num_rows=70).build()
    expected = plain.loop_in_float64(*crowd)
    error = (by_kernels(*crowd, plan=ONE_CUT).double() - expected).abs().max() / expected.abs().max()
    held["one cut: experts with more rows than a tile"] = bool(error < 1e-6)

    narrow = ExpertScratch("cpu", max_bytes=7 * 3 * (32 + 24 + 2) * 2)
    one_chunk = by_kernels(experts, rows, plan=ONE_CUT)
    held["five chunks"] = same_bits(one_chunk, by_kernels(experts, rows, plan=ONE_CUT, scratch=narrow))
    held["chunks fit their memory"] = narrow.nbytes < 6000
    first = gathered(rows.hidden[:1], rows.topk_idx[:1], rows.topk_weights[:1])
    alone = by_kernels(experts, first, plan=ONE_CUT)
    held["one cut: a row alone has the same bits"] = same_bits(alone, one_chunk[:1])

    growing, last = ExpertScratch("cpu"), 0
    for count in (*range(1, 31), 5):
        some = gathered(rows.hidden[:count], rows.topk_idx[:count], rows.topk_weights[:count])
        last = by_kernels(experts, some, plan=ONE_CUT, scratch=growing)
    held["steps of ever more rows do not pile up memory"] = growing.nbytes < 4 * 30 * 3 * (32 + 24 + 2) * 2
    held["buffers for more rows serve fewer"] = same_bits(last, one_chunk[:5])

    for name in ("clamped_swiglu", "relu"):
        shape = ExpertsConfig(hidden_size=32, intermediate_size=24, num_experts=7, activation=Activation(name))
        marked = gathered(rows.hidden.clone(), rows.topk_idx.clone(), rows.topk_weights.clone())
        marked.hidden[4] = torch.nan
        marked.topk_idx[4] = LOCAL.start
        got = by_kernels(Experts(shape, LOCAL), marked).isnan()
        held[f"a NaN stays one, {name}"] = bool(got[4].all()) and int(got.any(1).sum()) == 1

    wide = torch.full((30, 64), 7.0, dtype=torch.float32)
    exact = by_kernels(experts, rows, out=torch.empty(30, 32, dtype=torch.float32))
    by_kernels(experts, rows, out=wide[:, ::2])
    held["a bfloat16 wire"] = bool(((exact - clean).abs() <= exact.abs() * 2.0**-7).all())  # it truncates; GPUs round: tests/gpu
    held["rows that lie apart"] = same_bits(wide[:, ::2].contiguous(), exact) and bool((wide[:, 1::2] == 7.0).all())
    return held


PROPERTIES = (
    "two runs",
    "rows beyond V are not read",
    "rows beyond V are not written",
    "int64 ids",
    "tensor maps, bf16",
    "tensor maps, bf16-clamped-interleaved",
    "tensor maps, fp16-squared-relu",
    "no local expert gives +0",
    "V=0",
    "V=30",
    "one cut: experts with more rows than a tile",
    "five chunks",
    "chunks fit their memory",
    "one cut: a row alone has the same bits",
    "steps of ever more rows do not pile up memory",
    "buffers for more rows serve fewer",
    "a NaN stays one, clamped_swiglu",
    "a NaN stays one, relu",
    "a bfloat16 wire",
    "rows that lie apart",
)


@pytest.fixture(scope="module")
def held() -> dict[str, bool]:
    return run_ranks(properties, 1, env=INTERPRETER, timeout_s=240)[0]


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(held, name) -> None:
    assert held[name]


def test_every_property_is_asserted(held) -> None:
    assert set(held) == set(PROPERTIES)


# --- prepared ahead -------------------------------------------------------------------------------------------------------


def prepared(group: tf.EPGroup) -> dict[str, bool]:
    """What `prepare` loads is all that steps ask for, and layers share it."""
    config = tf.MoEConfig(hidden_size=32, num_experts=7, topk=3)
    shape = ExpertsConfig(hidden_size=32, intermediate_size=24, num_experts=7)
    held = {}
    with tf.Workspace(config, group, max_tokens_per_rank=5, transport="p2p") as ws:
        stacks = [Experts(shape, group.expert_range(7)) for _ in range(2)]
        for experts in stacks:
            experts.prepare(ws)
        scratch = stacks[0].scratch
        held["one scratch"] = scratch is stacks[1].scratch
        num_kernels, num_bytes = len(triton_path.kernels_of(scratch).by_variant), scratch.nbytes
        layer = ws.dispatcher()
        for count in (group.rank * 5, 3, 0):
            ws.begin_step(count)
            idx = torch.randint(7, (count, 3), dtype=torch.int32)
            got = layer.dispatch(torch.randn(count, 32).bfloat16(), idx, torch.rand(count, 3))
            expected = torch_path.run(
                "trimmed", got, stacks[1].weights, stacks[1].expert_range.start, shape.activation, torch.empty(10, 32)
            )
            partial = stacks[1](got, out=layer.combine_input())
            valid = int(got.valid_tokens)
            close = (partial[:valid].float() - expected[:valid]).abs().max() <= 0.02 * expected.abs().max() if valid else True
            held[f"T={count}"] = bool(close)
            layer.combine(partial, got)
        loaded = triton_path.kernels_of(scratch).by_variant
        held["nothing was loaded or taken later"] = (len(loaded), scratch.nbytes) == (num_kernels, num_bytes)
    held["closing lets go of it"] = not ws.attached
    with tf.Workspace(config, group, max_tokens_per_rank=5, transport="p2p") as ws:
        stacks[0].prepare(ws, small := ExpertScratch("cpu", max_bytes=4000))
        stacks[1].prepare(ws)
        held["a scratch that is given serves the layers to come"] = stacks[1].scratch is small
        stacks[1].prepare(ws, other := ExpertScratch("cpu"))
        stacks[0].prepare(ws)
        held["a second one serves its own layer alone"] = stacks[0].scratch is small and stacks[1].scratch is other
    return held


def test_prepare_loads_all_that_steps_ask_for() -> None:
    for held in run_ranks(prepared, 2, env=INTERPRETER, timeout_s=240):
        assert all(held.values()), held


# --- found again ----------------------------------------------------------------------------------------------------------


def asked_again(group: tf.EPGroup) -> dict[str, bool]:
    """The same weights, whose memory is another one at the third call, as when an engine loads them anew: transposed then."""
    experts, rows = CASES["swiglu"].build()
    scratch = ExpertScratch("cpu")
    known = triton_path.kernels_of(scratch)
    held, kinds = {}, []
    for turn in ("first", "the same again", "transposed", "the first again"):
        up = experts.up_proj.data.contiguous()
        experts.up_proj.data = up.transpose(1, 2).contiguous().transpose(1, 2) if turn == "transposed" else up
        expected = plain.loop_in_float64(experts, rows)
        error = (by_kernels(experts, rows, scratch=scratch).double() - expected).abs().max() / expected.abs().max()
        held[f"{turn}: right"] = bool(error <= TOLERANCE[CASES["swiglu"].dtype])
        kinds.append((len(known.by_fields), len(known.by_variant)))
    held["one more kind, where strides changed"] = kinds == [(1, 1), (1, 1), (2, 2), (2, 2)]
    return held


def test_kernels_are_found_by_what_the_weights_are_now() -> None:
    [held] = run_ranks(asked_again, 1, env=INTERPRETER)
    assert all(held.values()), held


# --- the entry of the Megatron integration --------------------------------------------------------------------------------


def fused(group: tf.EPGroup) -> dict[str, bool]:
    """Stale ids of local experts and NaNs beyond V, as another dispatcher's buffers may hold."""
    shape = ExpertsConfig(hidden_size=32, intermediate_size=24, num_experts=7, activation=Activation("squared_relu"))
    torch.manual_seed(2)
    experts, valid = Experts(shape, LOCAL), 11
    rows = Case(dtype=torch.bfloat16).rows()
    rows.hidden[valid:] = torch.nan
    rows.topk_idx[valid:] = LOCAL.start

    def run(scratch: ExpertScratch | None, valid: int = valid, **settings) -> torch.Tensor:
        return megatron.fused_moe(
            rows.hidden, rows.topk_weights, experts.up_proj, experts.down_proj, "squared_relu", len(LOCAL), LOCAL.start,
            valid_tokens=torch.tensor([valid], dtype=torch.int32), routing_map=rows.topk_idx.long(), scratch=scratch,
            out=torch.full((19, 32), 7.0), **settings,
        )  # fmt: skip

    plain, by_kernels = run(None), run(poison(ExpertScratch("cpu")))
    alone, crowded = (run(ExpertScratch("cpu"), count, batch_invariant=True) for count in (1, valid))
    error = (plain[:valid] - by_kernels[:valid]).abs().max() / plain[:valid].abs().max()
    return {
        "rows": bool(error < TOLERANCE[torch.bfloat16]),
        "beyond V, without scratch": bool((plain[valid:] == 0).all()),
        "beyond V, with scratch": bool((by_kernels[valid:] == 7.0).all()),
        "batch-invariant": same_bits(alone[:1], crowded[:1]),
    }


def test_fused_moe_with_a_scratch_is_gated_by_the_count() -> None:
    [held] = run_ranks(fused, 1, env=INTERPRETER, timeout_s=240)
    assert all(held.values()), held


# --- float8 ---------------------------------------------------------------------------------------------------------------


def float8_products(group: tf.EPGroup) -> list[float]:
    """Rows whose numbers float8 holds exactly, with another scale in each group of 128. The first product picks rows' numbers, so
    that the second one's rows are exact too: in others a sum's last bit may move an activated number by a step of float8."""
    torch.manual_seed(3)
    H, I = 160, 144
    shape = ExpertsConfig(hidden_size=H, intermediate_size=I, num_experts=7, activation=Activation("relu"), bias=True)
    experts = Experts(shape, LOCAL)
    pick = torch.zeros(3, I, H)
    for expert in range(3):
        pick[expert, torch.arange(I), torch.randperm(H)[:I]] = 4.0**expert
        pick[expert, [0, 128]] = 0
        pick[expert, 0, 0] = pick[expert, 128, 128] = 4.0**expert
    experts.load(
        pick, torch.randn(3, H, I) * torch.tensor([1.0, 40.0]).repeat_interleave(128)[:I], experts.up_bias, experts.down_bias
    )
    experts.quantize()
    rows = Case(hidden_size=H, dtype=torch.bfloat16).rows()
    exact = torch.tensor([0.5, 1.0, 1.5, -1.0, -3.0, 26.0])[torch.randint(6, rows.hidden.shape)]
    exact[:, [0, 128]] = 448.0
    exact[:, 128:] *= 8
    rows.hidden.copy_(exact)
    cut = Plan(up=(tiles(rows_few=16, columns=64, depth=128),), down=(tiles(rows_few=16, columns=64, depth=128),))
    expected = torch_path.run("trimmed", rows, experts.weights, LOCAL.start, shape.activation, torch.empty(19, H))
    got = by_kernels(experts, rows, plan=cut, out=torch.empty(19, H))
    two = [tiles(columns=64, depth=128, min_rows=7, prequantize=True), tiles(columns=64, depth=128, max_rows=6)]
    poisoned = poison(ExpertScratch("cpu"))
    prequantized = by_kernels(experts, rows, plan=Plan(up=tuple(two), down=tuple(two)), out=torch.empty(19, H), scratch=poisoned)
    blocks = {"columns": 128, "depth": 128, "tensor_map": True, "prequantize": True, "in_blocks": True}
    many, few = tiles(min_rows=7, **blocks), tiles(max_rows=6, rows_few=16, swapped=True, **blocks)
    plan = Plan(up=(many, few), down=(few, dataclasses.replace(many, columns=256)))
    in_blocks = by_kernels(experts, rows, plan=plan, out=torch.empty(19, H), scratch=poison(ExpertScratch("cpu")))
    return [((one - expected).abs().max() / expected.abs().max()).item() for one in (got, prequantized, in_blocks)]


def test_float8_equals_the_products_of_what_it_stands_for() -> None:
    in_tiles, prequantized, in_blocks = run_ranks(float8_products, 1, env=INTERPRETER, timeout_s=240)[0]
    assert in_tiles < TOLERANCE[torch.bfloat16]
    assert prequantized < TOLERANCE[torch.bfloat16]
    assert in_blocks < TOLERANCE[torch.bfloat16]


# --- wrong use, and debug mode ----------------------------------------------------------------------------------------


def quantized_too_late(group: tf.EPGroup) -> str:
    experts = Experts(ExpertsConfig(hidden_size=32, intermediate_size=32, num_experts=2), range(2))
    with tf.Workspace(tf.MoEConfig(hidden_size=32, num_experts=2, topk=1), group, max_tokens_per_rank=2) as ws:
        experts.prepare(ws)
        with pytest.raises(tf.StateError) as caught:
            experts.quantize()
    return str(caught.value)


def test_prepared_experts_are_not_quantized_any_more() -> None:
    assert "quantize them before MoELayer" in run_ranks(quantized_too_late, 1, env=INTERPRETER, timeout_s=240)[0]


def poisoned_between(group: tf.EPGroup) -> list[int]:
    """Bytes of a scratch after two calls of the same experts, where neither wrote; the first call's garbage lies between."""
    experts, rows = Case(num_rows=4).build()
    scratch, left = ExpertScratch("cpu"), []
    for _ in range(2):
        partial = torch.zeros(rows.hidden.shape, dtype=rows.hidden.dtype)
        shape = variants.row_shape(variants.variant_of(experts.weights, experts.config.activation, rows.topk_idx.shape[1],
            rows.hidden.dtype, rows.topk_idx.dtype, partial.dtype, batch_invariant=False, max_rows=64))  # fmt: skip
        scratch.reserve(shape, 64, len(LOCAL), rows.hidden.dtype)
        triton_path.run(rows, experts.weights, LOCAL.start, experts.config.activation, partial, scratch, max_rows=64)
        left.append(int(scratch._memory[-256]))
        scratch._memory.zero_()
    return left


def test_debug_mode_poisons_the_scratch_before_each_call() -> None:
    assert run_ranks(poisoned_between, 1, env={**INTERPRETER, "TOKENFERRY_DEBUG": "1"})[0] == [0xFF, 0xFF]
