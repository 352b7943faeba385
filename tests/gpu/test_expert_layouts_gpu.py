"""The experts' kernels on a GPU on weights as other libraries store them: against float64, in a graph, with garbage beyond V."""

import pytest
import torch

from expert_layouts import Layout, rows_for
from foreign_experts import FAMILIES, TOPK, skip_what_is_newer, some_choices
from foreign_experts import NUM_EXPERTS as ALL_EXPERTS
from test_experts import LOCAL, NUM_EXPERTS, TOLERANCE, loop_in_float64
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import BorrowedExperts, Experts, ExpertsConfig, ExpertScratch, ExpertWeights

pytestmark = pytest.mark.gpu

CAPACITY = 400
COUNTS = (0, 1, 33, CAPACITY)
"""With all rows an expert gets about 170: both cuts of the products."""
SIZES = {"hidden_size": 160, "intermediate_size": 144}
GPT_OSS = Activation("clamped_swiglu", interleaved=True, limit=0.5)
LAYOUTS = {
    "transposed-interleaved-bias": Layout(GPT_OSS, bias=True, transposed=True, **SIZES),
    "transposed-stacked": Layout(Activation(), transposed=True, **SIZES),
    "transposed-no-gate-bias": Layout(Activation("squared_relu"), bias=True, transposed=True, **SIZES),
    "transposed-fp32": Layout(Activation(), transposed=True, dtype=torch.float32, **SIZES),
    "transposed-odd": Layout(GPT_OSS, bias=True, transposed=True, hidden_size=76, intermediate_size=75),
    "interleaved": Layout(Activation("limited_swiglu", interleaved=True, limit=0.5), **SIZES),
    "depth-first": Layout(Activation("geglu_tanh"), depth_first=True, **SIZES),
}


def on_gpu(layout: Layout) -> tuple[BorrowedExperts, Dispatched, torch.Tensor]:
    """The experts, their rows, and what float64 makes of these."""
    experts, rows = layout.build(CAPACITY)
    expected = loop_in_float64(experts, rows).cuda()
    parts = Dispatched(
        hidden=rows.hidden.cuda(),
        topk_idx=rows.topk_idx.cuda(),
        topk_weights=rows.topk_weights.cuda(),
        valid_tokens=rows.valid_tokens.cuda(),
    )
    borrowed = BorrowedExperts(layout.view(experts.cuda()), LOCAL, experts.config.activation, dtype=layout.dtype)
    scratch = ExpertScratch("cuda")
    borrowed.prepare(scratch, topk=3, max_rows=CAPACITY, out_dtypes=[layout.dtype])
    return borrowed, parts, expected


def poison(rows: Dispatched, clean: Dispatched, valid: int) -> None:
    """The first `valid` rows as they were; behind them NaNs, and numbers of local experts."""
    for name, garbage in (("hidden", torch.nan), ("topk_idx", LOCAL.start), ("topk_weights", torch.nan)):
        getattr(rows, name).copy_(getattr(clean, name))
        getattr(rows, name)[valid:] = garbage
    rows.valid_tokens.fill_(valid)


def copy_of(rows: Dispatched) -> Dispatched:
    return Dispatched(
        hidden=rows.hidden.clone(),
        topk_idx=rows.topk_idx.clone(),
        topk_weights=rows.topk_weights.clone(),
        valid_tokens=rows.valid_tokens.clone(),
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_equals_float64_eager_and_in_a_graph(name) -> None:
    experts, clean, expected = on_gpu(LAYOUTS[name])
    rows, out = copy_of(clean), torch.zeros_like(clean.hidden)
    experts(rows, out=out)
    graph, replayed = torch.cuda.CUDAGraph(), torch.zeros_like(out)
    with torch.cuda.graph(graph):
        experts(rows, out=replayed)
    for valid in COUNTS:
        poison(rows, clean, valid)
        out.fill_(7.0)
        replayed.fill_(7.0)
        experts(rows, out=out)
        graph.replay()
        assert torch.equal(out, replayed), f"V={valid}: a graph gives other bits"
        assert bool((out[valid:] == 7.0).all()), f"V={valid}: rows beyond V were written"
        if valid:
            error = ((out[:valid].double() - expected[:valid]).abs().max() / expected.abs().max()).item()
            assert error <= TOLERANCE[LAYOUTS[name].dtype], f"V={valid}: {error:.1e}"


def test_offsets_beyond_an_int32() -> None:
    """9.7 GB: weights that lie [depth, expert, column], 2^25 numbers from one depth to the next. A tile has at most 128 depths:
    both the last depth within the first tile and the step to the second one are beyond 2^31."""
    depth, far = 144, 1 << 25
    shape = ExpertsConfig(hidden_size=depth, intermediate_size=depth, num_experts=NUM_EXPERTS, activation=Activation("relu"))
    torch.manual_seed(4)
    experts, rows = Experts(shape, LOCAL, dtype=torch.bfloat16), rows_for(depth, torch.bfloat16, CAPACITY)
    expected = loop_in_float64(experts, rows)
    memory = torch.empty(far * depth, dtype=torch.bfloat16, device="cuda")
    up = memory.as_strided(experts.up_proj.shape, (depth, 1, far)).copy_(experts.up_proj)
    down = memory.as_strided(experts.down_proj.shape, (depth, 1, far), far // 2).copy_(experts.down_proj)
    on_device = BorrowedExperts(ExpertWeights(up_proj=up, down_proj=down), LOCAL, shape.activation, dtype=torch.bfloat16)
    on_device.prepare(ExpertScratch("cuda"), topk=3, max_rows=CAPACITY, out_dtypes=[torch.bfloat16])
    for valid in (20, CAPACITY):
        some = Dispatched(
            hidden=rows.hidden[:valid].cuda(),
            topk_idx=rows.topk_idx[:valid].cuda(),
            topk_weights=rows.topk_weights[:valid].cuda(),
            valid_tokens=torch.tensor([valid], dtype=torch.int32, device="cuda"),
        )
        error = ((on_device(some).cpu().double() - expected[:valid]).abs().max() / expected.abs().max()).item()
        assert error <= TOLERANCE[torch.bfloat16]


@pytest.mark.filterwarnings("default")  # transformers warns of its own affairs
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_transformers_give_the_sums_of_their_own_function(name) -> None:
    pytest.importorskip("transformers")
    from tokenferry.integrations.transformers.kernel_experts import KernelExperts

    skip_what_is_newer(name)
    module = FAMILIES[name].make().cuda()
    kernels = KernelExperts(module, range(ALL_EXPERTS), torch.float32)
    hidden, idx, weights = (part.cuda() for part in some_choices())
    kernels.borrowed.prepare(ExpertScratch("cuda"), topk=TOPK, max_rows=len(hidden), out_dtypes=[torch.float32])
    valid = torch.tensor([len(hidden)], dtype=torch.int32, device="cuda")
    rows = Dispatched(hidden=hidden, topk_idx=idx.int(), topk_weights=weights, valid_tokens=valid)
    expected = module(hidden, idx, weights)
    assert (kernels(rows, torch.empty_like(hidden)) - expected).abs().max() < 1e-4 * expected.abs().max()
