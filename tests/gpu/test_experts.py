"""The experts' kernels on a GPU: against float64, in graphs at other counts, with garbage beyond the valid rows, to the bit."""

import dataclasses

import pytest
import torch

import tokenferry as tf
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import Experts, ExpertsConfig, ExpertScratch, torch_path
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing.numeric import same_bits

pytestmark = pytest.mark.gpu

NUM_EXPERTS, LOCAL, TOPK, H = 7, range(2, 5), 3, 128
CAPACITY = 700
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-6}
GPT_OSS = Activation("clamped_swiglu", interleaved=True)


def make_experts(activation=None, dtype=torch.bfloat16, bias=True, intermediate_size=96, **settings) -> Experts:
    torch.manual_seed(11)
    shape = ExpertsConfig(
        hidden_size=H, intermediate_size=intermediate_size, num_experts=NUM_EXPERTS, activation=activation or GPT_OSS, bias=bias
    )
    experts = Experts(shape, LOCAL, dtype=dtype, device="cuda", **settings)
    for name in ("up_bias", "down_bias"):
        if bias:
            getattr(experts, name).normal_()
    return experts


def make_rows(valid: int, dtype=torch.bfloat16, seed=5, capacity=CAPACITY) -> Dispatched:
    """Of `capacity` rows the first `valid` count; the others are NaN with ids of local experts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    idx = torch.rand(capacity, NUM_EXPERTS, device="cuda", generator=generator).argsort(1)[:, :TOPK].int()
    rows = Dispatched(
        hidden=torch.randn(capacity, H, device="cuda", generator=generator).to(dtype),
        topk_idx=torch.where(torch.rand(idx.shape, device="cuda", generator=generator) < 0.1, -1, idx),
        topk_weights=torch.rand(capacity, TOPK, device="cuda", generator=generator),
        valid_tokens=torch.tensor([valid], dtype=torch.int32, device="cuda"),
    )
    rows.hidden[valid:] = torch.nan
    rows.topk_idx[valid:] = LOCAL.start
    rows.topk_weights[valid:] = torch.nan
    return rows


def in_float64(experts: Experts, rows: Dispatched) -> torch.Tensor:
    valid = int(rows.valid_tokens)
    x = rows.hidden[:valid].double()
    total = torch.zeros(valid, H, dtype=torch.float64, device="cuda")
    for local, expert in enumerate(LOCAL):
        up = x @ experts.up_proj[local].double().T
        up = up if experts.up_bias is None else up + experts.up_bias[local].double()
        down = activate(experts.config.activation, up) @ experts.down_proj[local].double().T
        down = down if experts.down_bias is None else down + experts.down_bias[local].double()
        share = (rows.topk_weights[:valid].double() * (rows.topk_idx[:valid] == expert)).sum(1, keepdim=True)
        total += down * share
    return total


def activate(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    if activation.name == "squared_relu":
        return x.relu() ** 2
    gate, up = (x[:, 0::2], x[:, 1::2]) if activation.interleaved else x.chunk(2, 1)
    if activation.name == "swiglu":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * (gate * activation.alpha).sigmoid() * (up + 1)


def assert_right(out: torch.Tensor, experts: Experts, rows: Dispatched) -> None:
    valid = int(rows.valid_tokens)
    if not valid:
        return
    expected = in_float64(experts, rows)
    error = ((out[:valid].double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE[rows.hidden.dtype], f"V={valid}: {error:.1e}"


COUNTS = (0, 1, 2, 37, 64, 200, 449, CAPACITY)
"""An expert gets about V * 3 / 7 rows: both cuts of the products, and short last tiles of each."""


@pytest.mark.parametrize(
    ("activation", "dtype", "bias"),
    [
        (GPT_OSS, torch.bfloat16, True),
        (Activation("swiglu"), torch.bfloat16, False),
        (Activation("squared_relu"), torch.float16, True),
        (Activation("swiglu"), torch.float32, False),
    ],
    ids=["gpt-oss-bf16", "swiglu-bf16", "squared-relu-fp16", "swiglu-fp32"],
)
def test_any_number_of_rows_equals_float64(activation, dtype, bias) -> None:
    experts = make_experts(activation, dtype, bias)
    for valid in COUNTS:
        rows = make_rows(valid, dtype)
        out = torch.full_like(rows.hidden, 7.0)
        experts(rows, out=out)
        assert_right(out, experts, rows)
        assert bool((out[valid:] == 7.0).all()), "rows beyond V were written"


def test_numbers_that_no_int32_holds_are_nobodys_experts() -> None:
    """Cut to 32 bits they would be local ones."""
    experts, rows = make_experts(), make_rows(64)
    none = dataclasses.replace(rows, topk_idx=torch.where(rows.topk_idx == LOCAL.start, -1, rows.topk_idx.long()))
    wide = dataclasses.replace(
        rows, topk_idx=torch.where(rows.topk_idx == LOCAL.start, 2**32 + LOCAL.start, rows.topk_idx.long())
    )
    assert_right(experts(wide), experts, wide)
    assert same_bits(experts(wide)[:64], experts(none)[:64])


def test_sizes_that_fit_no_tile_and_no_packet() -> None:
    experts = make_experts(intermediate_size=75)
    for valid in (1, 100, CAPACITY):
        rows = make_rows(valid)
        assert_right(experts(rows), experts, rows)


def test_weights_that_lie_transposed_serve_without_a_copy() -> None:
    experts = make_experts()
    for name in ("up_proj", "down_proj"):
        stored = getattr(experts, name).data.transpose(1, 2).contiguous()
        getattr(experts, name).data = stored.transpose(1, 2)
    for valid in (3, CAPACITY):
        rows = make_rows(valid)
        assert_right(experts(rows), experts, rows)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_graph_serves_any_count_with_the_bits_of_an_eager_call() -> None:
    experts = make_experts()
    static = make_rows(1)
    out = torch.zeros_like(static.hidden)
    experts(static, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts(static, out=out)
    scratch = experts.scratch
    assert scratch is not None
    assert_right(out, experts, static)  # the first float64 product takes memory of the library's for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
    for step, valid in enumerate((5, CAPACITY, 0, 1, 64, 65, 300)):
        rows = make_rows(valid, seed=step)
        for field in dataclasses.fields(static)[:4]:
            getattr(static, field.name).copy_(getattr(rows, field.name))
        scratch._memory.fill_(0xFF)  # NaNs, and counts of -1: what an earlier step left there must not matter
        out.fill_(7.0)
        graph.replay()
        eager = torch.full_like(out, 7.0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            experts(static, out=eager)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert same_bits(out.cpu(), eager.cpu())
        assert_right(out, experts, static)
        del rows, eager
    assert torch.cuda.memory_stats()["allocated_bytes.all.current"] == before


def test_one_cut_makes_a_row_independent_of_the_others() -> None:
    experts = make_experts(batch_invariant=True)
    rows = make_rows(CAPACITY)
    whole = experts(rows)
    assert_right(whole, experts, rows)
    for begin, end in ((0, 1), (17, 19), (100, 164), (3, 600)):
        part = Dispatched(
            hidden=rows.hidden[begin:end].clone(),
            topk_idx=rows.topk_idx[begin:end].clone(),
            topk_weights=rows.topk_weights[begin:end].clone(),
            valid_tokens=torch.tensor([end - begin], dtype=torch.int32, device="cuda"),
        )
        assert same_bits(experts(part).cpu(), whole[begin:end].cpu())


def test_rounds_cover_all_rows_in_little_memory() -> None:
    one, many = make_experts(batch_invariant=True), make_experts(batch_invariant=True)
    many.scratch = ExpertScratch("cuda", max_bytes=100 * TOPK * (H + 96 + 2) * 2)
    for valid in (0, 99, 101, CAPACITY):
        rows = make_rows(valid)
        assert same_bits(one(rows)[:valid].cpu(), many(rows)[:valid].cpu())
    assert many.scratch.nbytes < 200_000


def test_the_sum_is_rounded_once_to_the_wire() -> None:
    experts, rows = make_experts(), make_rows(300)
    exact = experts(rows, out=torch.empty(CAPACITY, H, device="cuda"))
    for wire in (torch.bfloat16, torch.float16):
        got = experts(rows, out=torch.empty(CAPACITY, H, device="cuda", dtype=wire))
        assert same_bits(got[:300].cpu(), exact[:300].to(wire).cpu())


def test_float8_equals_the_products_of_what_it_stands_for() -> None:
    experts = make_experts(Activation("swiglu"), intermediate_size=256)
    experts.up_proj[1] *= 8
    experts.quantize()
    for valid in (1, 60, CAPACITY):
        rows = make_rows(valid)
        got = experts(rows)[:valid]
        on_cpu = Dispatched(
            hidden=rows.hidden[:valid].cpu(),
            topk_idx=rows.topk_idx[:valid].cpu(),
            topk_weights=rows.topk_weights[:valid].cpu(),
            valid_tokens=rows.valid_tokens.cpu(),
        )
        weights = dataclasses.replace(
            experts.weights,
            **{name: value.cpu() for name, value in vars(experts.weights).items() if isinstance(value, torch.Tensor)},
        )
        out = torch.empty(valid, H)
        expected = torch_path.run("trimmed", on_cpu, weights, LOCAL.start, experts.config.activation, out)
        error = ((got.cpu().float() - expected).abs().max() / expected.abs().max()).item()
        assert error < 2.5e-2, f"V={valid}: {error:.1e}"  # a sum's last bit may move an activated number by a step of float8


def test_a_layer_of_one_rank_in_graphs_shares_one_prepared_scratch() -> None:
    """EP 1: graphs of 64 and of 256 rows, and eager calls, all right beside one another."""
    group = tf.EPGroup(device=torch.device("cuda", torch.cuda.current_device()))
    config = tf.MoEConfig(hidden_size=H, num_experts=NUM_EXPERTS, topk=TOPK)
    shape = ExpertsConfig(hidden_size=H, intermediate_size=96, num_experts=NUM_EXPERTS, activation=GPT_OSS)
    with tf.Workspace(config, group, max_tokens_per_rank=256) as ws:
        layers = []
        for _ in range(2):
            router = Router(RouterConfig(hidden_size=H, num_experts=NUM_EXPERTS, topk=TOPK), device=ws.device)
            layers.append(MoELayer(ws, router, Experts(shape, range(NUM_EXPERTS), device=ws.device)))
        first, second = (layer.experts.scratch for layer in layers)
        assert first is second is not None
        held = first.nbytes
        hidden = torch.randn(256, H, device=ws.device, dtype=torch.bfloat16)

        def forward(count: int) -> torch.Tensor:
            ws.begin_step(count)
            x = hidden[:count]
            for layer in layers:
                x = layer(x)
            return x

        eager = {count: forward(count) for count in (0, 1, 64, 256)}
        for count in (64, 256):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                forward(count)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = forward(count)
            graph.replay()
            torch.cuda.synchronize()
            assert same_bits(out.cpu(), eager[count].cpu())
        assert first.nbytes == held
