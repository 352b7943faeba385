"""Experts on gathered rows against a float64 loop, on all three ways through, whatever lies in rows that do not count.

Tolerances, as a share of the largest expected number (the worst measured on CPUs, times two or three): float32 1e-6,
float16 2e-3, bfloat16 1.5e-2 (two products, an activation and the result are each rounded to the dtype).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from plain_moe import plain_expert
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.errors import DtypeError
from tokenferry.experts import (
    Experts,
    ExpertsConfig,
    ExpertWeights,
    apply_experts,
    choose_path,
    quantize_weights,
    torch_path,
)
from tokenferry.testing.numeric import same_bits

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
NUM_EXPERTS = 7
LOCAL = range(2, 5)
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """One shape of experts; the id names what differs from the plainest."""

    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    dtype: torch.dtype = torch.float32
    hidden_size: int = 32
    intermediate_size: int = 24
    num_rows: int = 19
    topk: int = 3

    def build(self):
        torch.manual_seed(11)
        shape = ExpertsConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=NUM_EXPERTS,
            activation=self.activation,
            bias=self.bias,
        )
        experts = Experts(shape, LOCAL, dtype=self.dtype)
        for bias in (experts.up_bias, experts.down_bias):
            if bias is not None:
                bias.normal_()
        return experts, self.rows()

    def rows(self):
        generator = torch.Generator().manual_seed(5)
        idx = torch.rand(self.num_rows, NUM_EXPERTS, generator=generator).argsort(1)[:, : self.topk]
        idx = torch.where(torch.rand(idx.shape, generator=generator) < 0.15, -1, idx).to(torch.int32)
        return gathered(
            torch.randn(self.num_rows, self.hidden_size, generator=generator).to(self.dtype),
            idx,
            torch.rand(self.num_rows, self.topk, generator=generator),
        )


def gathered(hidden, topk_idx, topk_weights, num_valid=None):
    valid = len(hidden) if num_valid is None else num_valid
    return Dispatched(
        hidden=hidden, topk_idx=topk_idx, topk_weights=topk_weights, valid_tokens=torch.tensor([valid], dtype=torch.int32)
    )


def loop_in_float64(experts, rows):
    """For each row, choice after choice, this rank's experts only."""
    expected = torch.zeros(rows.hidden.shape, dtype=torch.float64)
    for r, (ids, weights) in enumerate(zip(rows.topk_idx.tolist(), rows.topk_weights.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert in LOCAL:
                expected[r] += weight * plain_expert(rows.hidden[r], experts, expert - LOCAL.start)
    return expected


def assert_close(actual, expected, tolerance):
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"error {error:.2e} of the largest number, {tolerance:.0e} allowed"


CASES = {
    "swiglu": Case(),
    "swiglu-interleaved": Case(Activation("swiglu", interleaved=True)),
    "clamped": Case(Activation("clamped_swiglu", limit=0.5), bias=True),
    "clamped-interleaved": Case(Activation("clamped_swiglu", interleaved=True, limit=0.5), bias=True),
    "limited-interleaved": Case(Activation("limited_swiglu", interleaved=True, limit=0.5)),
    "geglu": Case(Activation("geglu"), bias=True),
    "geglu-tanh": Case(Activation("geglu_tanh")),
    "squared-relu": Case(Activation("squared_relu")),
    "gelu": Case(Activation("gelu"), bias=True),
    "gelu-tanh": Case(Activation("gelu_tanh")),
    "relu": Case(Activation("relu"), bias=True),
    "silu": Case(Activation("silu")),
    "bias": Case(bias=True),
    "unaligned": Case(hidden_size=7, intermediate_size=5),
    "unaligned-bias": Case(hidden_size=6, intermediate_size=5, bias=True),
    "one-choice": Case(topk=1),
    "every-expert": Case(topk=NUM_EXPERTS),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16-clamped-interleaved": Case(Activation("clamped_swiglu", interleaved=True), bias=True, dtype=torch.bfloat16),
    "bf16-unaligned": Case(hidden_size=6, intermediate_size=5, dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16),
    "fp16-squared-relu": Case(Activation("squared_relu"), bias=True, dtype=torch.float16),
}
STATIC_CASES = [name for name in CASES if "unaligned" not in name]


@pytest.fixture(params=["trimmed", "static", "dense"])
def path(request, monkeypatch):
    """Each way through, on CPU tensors, with NaNs in memory that nothing has written yet."""
    monkeypatch.setattr(torch_path, "choose_path", lambda *_: request.param)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_experts_equal_a_float64_loop(name):
    experts, rows = CASES[name].build()
    assert_close(experts(rows), loop_in_float64(experts, rows), TOLERANCE[CASES[name].dtype])


@pytest.mark.parametrize("name", STATIC_CASES)
def test_every_way_through_equals_a_float64_loop(name, path):
    experts, rows = CASES[name].build()
    assert_close(experts(rows), loop_in_float64(experts, rows), TOLERANCE[CASES[name].dtype])


def test_a_row_worked_by_hand():
    # One row [1, 2]; expert 2 doubles, expert 3 triples (relu, identity up); choices: expert 3 with 0.5, none, expert 2 with 10.
    experts = Experts(
        ExpertsConfig(hidden_size=2, intermediate_size=2, num_experts=4, activation=Activation("relu")),
        range(2, 4),
        dtype=torch.float32,
    )
    experts.load(torch.eye(2).expand(2, 2, 2), torch.stack([2 * torch.eye(2), 3 * torch.eye(2)]))
    rows = gathered(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, -1, 2]], dtype=torch.int32), torch.tensor([[0.5, NAN, 10.0]]))
    assert experts(rows).tolist() == [[21.5, 43.0]]


# --- what must not leak -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_garbage_in_rows_and_choices_that_do_not_count_changes_no_bit(path, dtype):
    experts, clean = Case(dtype=dtype, bias=True).build()
    num_valid = 12
    idx = clean.topk_idx.clone()
    idx[num_valid:] = -1
    zeroed = gathered(clean.hidden.clone(), idx, clean.topk_weights.clone(), num_valid)
    zeroed.hidden[num_valid:] = 0
    zeroed.topk_weights[idx < 0] = 0
    poisoned = gathered(clean.hidden.clone(), idx, clean.topk_weights.clone(), num_valid)
    poisoned.hidden[num_valid:] = NAN
    poisoned.topk_weights[idx < 0] = NAN
    assert same_bits(experts(poisoned)[:num_valid], experts(zeroed)[:num_valid])


def test_a_nan_weight_of_another_ranks_expert_stays_there(path):
    experts, rows = Case().build()
    elsewhere = ~torch.isin(rows.topk_idx, torch.tensor(LOCAL))
    rows.topk_weights[elsewhere] = NAN
    assert torch.isfinite(experts(rows)).all()


def test_rows_without_a_local_expert_are_zero(path):
    experts, rows = Case(bias=True).build()
    rows.topk_idx.fill_(LOCAL.stop)
    assert same_bits(experts(rows), torch.zeros_like(rows.hidden))


def test_no_rows_at_all(path):
    experts, rows = Case(num_rows=0).build()
    assert experts(rows).shape == (0, 32)


def test_an_expert_named_twice_counts_twice(path):
    experts, rows = Case(topk=2).build()
    rows.topk_idx.fill_(LOCAL.start + 1)
    assert_close(experts(rows), loop_in_float64(experts, rows), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["static", "dense"])
def test_the_ways_for_gpus_ask_the_host_nothing(monkeypatch, name):
    """Tensors on "meta" have no values: .item(), .tolist(), nonzero and masks as indices would raise."""
    monkeypatch.setattr(torch_path, "choose_path", lambda *_: name)
    shape = ExpertsConfig(
        hidden_size=16, intermediate_size=8, num_experts=NUM_EXPERTS, activation=Activation("clamped_swiglu"), bias=True
    )
    experts = Experts(shape, LOCAL, device="meta")
    with torch.device("meta"):
        hidden = torch.empty(6, 16, dtype=torch.bfloat16)
        rows = gathered(hidden, torch.empty(6, 2, dtype=torch.int32), torch.empty(6, 2), 0)
        assert experts(rows, out=torch.empty(6, 16)).shape == (6, 16)


# --- where it is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_sum_is_rounded_once_to_the_wire(path, wire):
    experts, rows = Case().build()
    exact, out = experts(rows), torch.full((19, 32), NAN, dtype=wire)
    assert experts(rows, out=out) is out
    assert same_bits(out, exact.to(wire))


def test_the_sum_over_choices_is_float32_on_a_bfloat16_wire(path):
    # Outputs 1 and 2^-9 with weights 1 and 1, twice the latter: bfloat16 steps would lose both small terms.
    experts = Experts(
        ExpertsConfig(hidden_size=8, intermediate_size=8, num_experts=1, activation=Activation("relu")),
        range(1),
        dtype=torch.bfloat16,
    )
    experts.load(torch.eye(8).expand(1, 8, 8), torch.eye(8).expand(1, 8, 8))
    weights = torch.tensor([[1.0, 2.0**-8, 2.0**-8]])
    rows = gathered(torch.ones(1, 8, dtype=torch.bfloat16), torch.zeros(1, 3, dtype=torch.int32), weights)
    assert experts(rows)[0, 0].item() == 1 + 2.0**-7


def test_two_runs_give_the_same_bits(path):
    experts, rows = Case(dtype=torch.bfloat16).build()
    assert same_bits(experts(rows), experts(rows))


# --- loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["as-stored", "transposed"])
@pytest.mark.parametrize("whole", [True, False], ids=["all-experts", "own-experts"])
def test_load_takes_this_ranks_part(whole, transposed):
    experts, _ = Case(bias=True).build()
    parts = [
        torch.randn(NUM_EXPERTS, 48, 32),
        torch.randn(NUM_EXPERTS, 32, 24),
        torch.randn(NUM_EXPERTS, 48),
        torch.randn(NUM_EXPERTS, 32),
    ]
    given = parts if whole else [part[LOCAL.start : LOCAL.stop] for part in parts]
    if transposed:
        given = [given[0].transpose(1, 2).contiguous(), given[1].transpose(1, 2).contiguous(), *given[2:]]
    experts.load(*given, transposed=transposed)
    for name, part in zip(("up_proj", "down_proj", "up_bias", "down_bias"), parts, strict=True):
        assert torch.equal(getattr(experts, name), part[LOCAL.start : LOCAL.stop])


def test_transposed_views_serve_without_a_copy(path):
    experts, rows = Case().build()
    own = experts.weights
    views = ExpertWeights(
        up_proj=own.up_proj.transpose(1, 2).contiguous().transpose(1, 2),
        down_proj=own.down_proj.transpose(1, 2).contiguous().transpose(1, 2),
    )
    actual = apply_experts(rows, views, LOCAL.start, experts.config.activation)
    assert_close(actual, loop_in_float64(experts, rows), TOLERANCE[torch.float32])


def test_on_cpus_the_trimmed_way_is_chosen():
    experts, rows = Case().build()
    assert choose_path(rows.hidden, experts.weights) == "trimmed"


# --- float8 -------------------------------------------------------------------------------------------------------------


def test_float8_weights_by_hand():
    # One matrix of 2 x 130: two blocks of scales. 448 * 2 needs scale 2; zeros have scale 1.
    weights = torch.zeros(1, 2, 130)
    weights[0, 0, :3] = torch.tensor([896.0, -3.0, 32.0])
    weights[0, 1, 129] = 7.0
    quantized, scale = quantize_weights(weights)
    torch.testing.assert_close(scale, torch.tensor([[[2.0, 7 / 448]]]))
    assert quantized.float()[0, 0, :3].tolist() == [448.0, -1.5, 16.0]
    assert quantized.float()[0, 1, 129].item() == 448.0


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_float8_experts_are_close_to_the_ones_they_were_made_from(bias):
    case = Case(dtype=torch.bfloat16, bias=bias, hidden_size=160, intermediate_size=144)
    experts, rows = case.build()
    expected = loop_in_float64(experts, rows)
    experts.quantize()
    assert experts.up_proj.dtype == torch.float8_e4m3fn and experts.dtype == torch.bfloat16
    error = (experts(rows).double() - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.1  # 3 bits are 2.6 % a number: 3.7 % a product, twice that behind a gate, and the next product


def test_experts_are_quantized_once_and_loaded_before():
    experts, _ = Case(dtype=torch.bfloat16).build()
    weights = experts.up_proj.float(), experts.down_proj.float()
    experts.quantize()
    with pytest.raises(DtypeError, match=r"these are torch\.float8_e4m3fn"):
        experts.quantize()
    with pytest.raises(DtypeError, match="float8 already; load before that"):
        experts.load(*weights)
    with pytest.raises(DtypeError, match=r"these are torch\.float32"):
        Case().build()[0].quantize()


def test_float8_experts_refuse_float32_rows():
    experts, _ = Case(dtype=torch.bfloat16).build()
    experts.quantize()
    with pytest.raises(DtypeError, match=r"hidden is torch\.float32 but float8 experts take"):
        experts(Case().rows())


# --- documentation ------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "experts.md"


@pytest.mark.parametrize("number", [0, 1], ids=["own-weights", "borrowed-weights"])
def test_the_examples_of_the_page_run_as_they_stand(number):
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 2
    example = examples[number]
    exec(compile(example, "docs/experts.md", "exec"), {})


# --- GPUs ---------------------------------------------------------------------------------------------------------------


def on_gpu(experts, rows):
    moved = Dispatched(
        hidden=rows.hidden.cuda(),
        topk_idx=rows.topk_idx.cuda(),
        topk_weights=rows.topk_weights.cuda(),
        valid_tokens=rows.valid_tokens.cuda(),
    )
    return experts.cuda(), moved


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", CASES)
def test_experts_on_a_gpu_equal_a_float64_loop_and_never_wait(name):
    experts, rows = CASES[name].build()
    expected = loop_in_float64(experts, rows)
    experts, rows = on_gpu(experts, rows)
    experts(rows)  # libraries may synchronise while they start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = experts(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(actual.cpu(), expected, TOLERANCE[CASES[name].dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bf16", "swiglu"])
def test_a_captured_call_serves_other_routing(name):
    experts, rows = CASES[name].build()
    other = torch.where(rows.topk_idx >= 0, (rows.topk_idx + 1) % NUM_EXPERTS, rows.topk_idx)
    experts_cpu, rows_cpu = CASES[name].build()
    expected = loop_in_float64(experts_cpu, gathered(rows_cpu.hidden, other, rows_cpu.topk_weights))
    experts, rows = on_gpu(experts, rows)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        experts(rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(rows)
    rows.topk_idx.copy_(other)
    graph.replay()
    assert_close(out.cpu(), expected, TOLERANCE[CASES[name].dtype])
