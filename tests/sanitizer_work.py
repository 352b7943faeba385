"""What runs under compute-sanitizer (gpu/test_sanitizer.py): every kernel, in small cases whose results are compared.

    python tests/sanitizer_work.py PART

On a GPU, or on the CPU with TRITON_INTERPRET=1 (but for the planted faults).

The tool promises no two kernels at once, and one that waits for another rank's would then wait for ever. So two virtual ranks of
one process take turns in halves: both send before either receives, and no kernel ever waits. The exchange of counts has no
halves: rank 1's packet is laid into rank 0's buffer beforehand, as rank 1 will send it.

`peers` is not part of the test: two virtual ranks that do wait for each other, to try what a version of the tool allows. It needs
CUDA_MODULE_LOADING=EAGER and CUDA_DEVICE_MAX_CONNECTIONS=32, and gives up after 20 seconds of waiting.
"""

import contextlib
import dataclasses
import sys
import time

import torch
import triton
import triton.language as tl

import tokenferry as tf
from cases import Case, StepCase, begin, expected_dispatch, run_case, run_layer, same
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import Experts, ExpertsConfig, ExpertScratch, torch_path
from tokenferry.kernels import wire
from tokenferry.testing.data import make_inputs
from tokenferry.testing.ranks import run_virtual
from tokenferry.transports.symmetric.layout import SLOT_ROWS

DEVICE = torch.device("cpu") if wire.INTERPRETED else torch.device("cuda", 0)

# --- dispatch and combine -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A workspace, and the rows of two ranks in each step. One rank alone runs rank 0's."""

    hidden_size: int
    topk: int
    counts: tuple[tuple[int, int], ...]
    capacity: int
    dtype: torch.dtype = torch.bfloat16
    combine_dtype: torch.dtype | None = None
    index_dtype: torch.dtype = torch.int32


IN_SLOTS = ((0, 0), (5, 0), (0, 8), (8, 8), (7, 3), (8, 1))
IN_BULK = ((0, 0), (40, 13), (SLOT_ROWS, 3), (SLOT_ROWS + 1, 0), (0, 1025), (1025, 1025), (1, 700), (7, 2))
"""Steps of more than SLOT_ROWS rows go the bulk way."""
SLOTS = (
    Shape(hidden_size=16, topk=2, counts=IN_SLOTS, capacity=8),
    Shape(hidden_size=6, topk=3, counts=IN_SLOTS, capacity=8, dtype=torch.float32, index_dtype=torch.int64),  # rows of 24 bytes
)
BULK = (
    Shape(hidden_size=12, topk=3, counts=IN_BULK, capacity=1025),  # rows of 24 bytes
    Shape(
        hidden_size=72, topk=2, counts=IN_BULK, capacity=1025, combine_dtype=torch.float32, index_dtype=torch.int64
    ),
)  # fmt: skip

KINDS = (torch.float32, torch.bfloat16, torch.float16)


def step_of(number: int, tokens: tuple[int, ...]) -> StepCase:
    """The step `number`: dtypes, padding, rows not supplied and halves go round."""
    return StepCase(
        tokens,
        real=tuple(rows - rows // 3 for rows in tokens) if number % 2 else None,
        supplied=tuple(rows // 2 for rows in tokens) if number % 4 == 3 else None,
        real_as_tensor=number % 4 == 1,
        index_dtype=(torch.int32, torch.int64)[number % 2],
        weight_dtype=KINDS[number % 3],
        partial_dtype=KINDS[(number + number // 3) % 3],
        halves=number % 3 == 0,
        own_buffer=number % 2 == 0,
        seed=number,
    )


def opened(group: tf.EPGroup, shape: Shape) -> tf.Workspace:
    config = tf.MoEConfig(hidden_size=shape.hidden_size, num_experts=8, topk=shape.topk, dtype=shape.dtype)
    return tf.Workspace(
        config,
        group,
        max_tokens_per_rank=shape.capacity,
        transport="p2p",
        combine_dtype=shape.combine_dtype,
        index_dtype=shape.index_dtype,
        timeout_s=1000,
    )


def alone(shape: Shape) -> int:
    """One rank, as itself and in `solo()`."""
    with opened(tf.EPGroup(device=DEVICE), dataclasses.replace(shape, index_dtype=torch.int32)) as ws:
        layer = ws.dispatcher()
        steps = [step_of(number, counts[:1]) for number, counts in enumerate(shape.counts)]
        for step in steps:
            begin(ws, step)
            run_layer(ws, layer, step, 0)
        with ws.solo():
            begin(ws, steps[3])
            run_layer(ws, layer, steps[3], 0)
        ws.check()
    return len(steps) + 1


def foretell(ws: tf.Workspace, source: int, num_tokens: int) -> None:
    """Lays the count packet of rank `source` for the next step where `ws` waits for it."""
    memory, step = ws._transport.memory, ws._step_index + 1
    at = memory.layout.counts.offset + ((step & 1) * ws.group.size + source) * 16
    packet = torch.tensor([num_tokens, 0, step, ws.generation], dtype=torch.int32)
    memory.buffer[at : at + 16].view(torch.int32).copy_(packet)


def by_turns(shape: Shape) -> int:
    """Two ranks of this process, both in this thread and on its stream."""
    ranks = run_virtual(opened, 2, shape, device=DEVICE)
    layers = [ws.dispatcher() for ws in ranks]
    for number, counts in enumerate(shape.counts):
        step = step_of(number, counts)
        foretell(ranks[0], 1, counts[1])
        for ws in ranks:
            begin(ws, step)
        one_layer(ranks, layers, step)
    for ws in ranks:
        ws.check()
    ranks[0].fail("the end")  # the kernel that writes abort records
    try:
        ranks[1].check()
    except tf.PeerFailedError as error:
        assert error.rank == 0, error
    else:
        raise AssertionError("no abort record has come")
    for ws in ranks:
        ws.close()
    return len(shape.counts) + 1


def one_layer(ranks: list[tf.Workspace], layers: list[tf.Dispatcher], step: StepCase) -> None:
    """`cases.run_layer` of both ranks, half by half."""
    config, valid = ranks[0].config, sum(step.tokens)
    inputs = make_inputs(
        config,
        step.tokens,
        seed=step.seed,
        payload="hostile",
        index_dtype=step.index_dtype,
        weight_dtype=step.weight_dtype,
        partial_dtype=step.partial_dtype,
        supplied=step.supplied,
    )
    expected = expected_dispatch(inputs, step)
    given = [[tensor.to(DEVICE) for tensor in (own.hidden, own.topk_idx, own.topk_weights)] for own in inputs]
    for layer, tensors in zip(layers, given, strict=True):
        layer.dispatch_begin(*tensors)
    got = [layer.dispatch_end() for layer in layers]
    partials = []
    for layer, each, own in zip(layers, got, inputs, strict=True):
        same("hidden", each.hidden[:valid], expected.hidden)
        same("topk_idx", each.topk_idx[:valid].int(), expected.topk_idx)
        same("topk_weights", each.topk_weights[:valid], expected.topk_weights)
        assert bool((each.topk_idx[valid:] == -1).all()), "rows beyond the valid ones have no expert"
        if step.own_buffer and own.partial.dtype == layer.combine_input().dtype:
            partial = layer.combine_input()
        else:
            partial = torch.empty(each.hidden.shape, dtype=own.partial.dtype, device=DEVICE)
        partial[:valid] = own.partial.to(DEVICE)
        partials.append(partial)
    for layer, partial, each in zip(layers, partials, got, strict=True):
        layer.combine_begin(partial, each)
    results = [layer.combine_end() for layer in layers]
    wanted = tf.reference.combine([own.partial for own in inputs], step.tokens, ranks[0].combine_dtype, config.dtype)
    for result, total, own in zip(results, wanted, inputs, strict=True):
        same("combined", result, total[: own.hidden.shape[0]])


def peers() -> int:
    case = Case(hidden_size=16, transport="p2p", steps=tuple(StepCase(counts) for counts in IN_SLOTS))
    return sum(run_virtual(run_case, 2, case, device=DEVICE))


def protocol(shapes: tuple[Shape, ...]) -> int:
    return sum(alone(shape) + by_turns(shape) for shape in shapes)


# --- experts --------------------------------------------------------------------------------------------------------------

NUM_EXPERTS, LOCAL, TOPK = 7, range(2, 5), 3
GPT_OSS = Activation("clamped_swiglu", interleaved=True)
SWIGLU = Activation("swiglu")
COUNTS = (0, 1, 37) if wire.INTERPRETED else (0, 1, 37, 64, 300)
"""Of 300 rows an expert gets some 128: tiles for many rows, besides those for few."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsCase:
    activation: Activation = SWIGLU
    dtype: torch.dtype = torch.bfloat16
    hidden_size: int = 128
    intermediate_size: int = 128
    bias: bool = False
    batch_invariant: bool = False
    float8: bool = False
    index_dtype: torch.dtype = torch.int32


ODD = (
    ExpertsCase(activation=GPT_OSS, hidden_size=104, intermediate_size=75, bias=True),
    ExpertsCase(activation=Activation("squared_relu"), dtype=torch.float16, hidden_size=72, intermediate_size=40),
    ExpertsCase(dtype=torch.float32, hidden_size=33, intermediate_size=17, index_dtype=torch.int64),
    ExpertsCase(hidden_size=136, batch_invariant=True),
)
TENSOR_MAPS = (
    ExpertsCase(activation=GPT_OSS, intermediate_size=96, bias=True),
    ExpertsCase(hidden_size=264, intermediate_size=200),
)
FLOAT8 = (
    ExpertsCase(float8=True, intermediate_size=256),
    ExpertsCase(float8=True, hidden_size=264, intermediate_size=136, bias=True),
    ExpertsCase(float8=True, batch_invariant=True),
)


def rows_of(case: ExpertsCase, valid: int, routing: str) -> Dispatched:
    """As many rows as there are, plus three of NaNs that chose a local expert."""
    generator = torch.Generator().manual_seed(valid + 1)
    rows = valid + 3
    idx = torch.rand(rows, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOPK]
    idx = torch.where(torch.rand(idx.shape, generator=generator) < 0.1, -1, idx)
    if routing == "one expert":
        idx[:, 0], idx[:, 1:] = LOCAL[1], -1
    elif routing == "none":
        idx.fill_(-1)
    hidden = torch.randn(rows, case.hidden_size, generator=generator).to(case.dtype)
    weights = torch.rand(rows, TOPK, generator=generator)
    hidden[valid:], weights[valid:], idx[valid:] = torch.nan, torch.nan, LOCAL.start
    return Dispatched(
        hidden=hidden.to(DEVICE),
        topk_idx=idx.to(DEVICE, case.index_dtype),
        topk_weights=weights.to(DEVICE),
        valid_tokens=torch.tensor([valid], dtype=torch.int32, device=DEVICE),
    )


def on_cpu(experts: Experts, rows: Dispatched, valid: int) -> torch.Tensor:
    """By the library's operators, in float32."""
    weights = experts.weights
    weights = dataclasses.replace(
        weights, **{name: each.cpu() for name, each in vars(weights).items() if isinstance(each, torch.Tensor)}
    )
    if weights.up_scale is None:
        weights = dataclasses.replace(
            weights, **{name: each.float() for name, each in vars(weights).items() if isinstance(each, torch.Tensor)}
        )
    hidden = rows.hidden[:valid].cpu()
    given = Dispatched(
        hidden=hidden if weights.up_scale is not None else hidden.float(),
        topk_idx=rows.topk_idx[:valid].cpu(),
        topk_weights=rows.topk_weights[:valid].cpu(),
        valid_tokens=rows.valid_tokens.cpu(),
    )
    out = torch.empty(valid, hidden.shape[1])
    return torch_path.run("trimmed", given, weights, LOCAL.start, experts.config.activation, out)


def assert_close(case: ExpertsCase, out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """No output is far off, and all of them together are close.

    In float8 a single output says little. Hopper's float8 tensor cores keep some 14 bits of a sum, so that about one activated
    number in thirty lands on the other side of a rounding to bfloat16, and some of these a whole step of float8 (7 % at most)
    away. Noise of 1e-4 to 3e-4 on the first product's sums, put into the CPU's operators, gives what an H100 gave (2026-11-26): a
    root mean square of 0.1 % of the largest output, single outputs 1 to 3 % off. A wrong scale or row moves the mean square.
    """
    errors = (out - expected).abs()
    largest = max(expected.abs().max().item(), 1e-3)
    worst, mean_square = 3e-2, 3e-2
    if case.float8:
        worst, mean_square = 1e-1, 5e-3
    error, rms = errors.max().item() / largest, errors.square().mean().sqrt().item() / largest
    assert error <= worst, f"{what}: an output is off by {error:.1e} of the largest, not {worst:.0e}; mean square {rms:.1e}"
    assert rms <= mean_square, f"{what}: the mean square is off by {rms:.1e} of the largest, not {mean_square:.0e}"


def experts_of(cases: tuple[ExpertsCase, ...]) -> int:
    compared = 0
    for case in cases:
        torch.manual_seed(11)
        shape = ExpertsConfig(
            hidden_size=case.hidden_size,
            intermediate_size=case.intermediate_size,
            num_experts=NUM_EXPERTS,
            activation=case.activation,
            bias=case.bias,
        )
        experts = Experts(shape, LOCAL, dtype=case.dtype, device=DEVICE, batch_invariant=case.batch_invariant)
        for bias in (experts.up_bias, experts.down_bias):
            if bias is not None:
                bias.normal_()
        if case.float8:
            experts.quantize()
        attached = {}
        for number, valid in enumerate((*COUNTS, *COUNTS[-2:])):
            routing = "some" if number < len(COUNTS) else ("one expert", "none")[number - len(COUNTS)]
            experts.scratch = ExpertScratch(DEVICE)  # as large as this call needs, and no larger
            experts.scratch.attached = attached
            rows = rows_of(case, valid, routing)
            out = torch.full(rows.hidden.shape, 7.0, device=DEVICE)
            experts(rows, out=out)
            assert bool((out[valid:] == 7.0).all()), "rows beyond V were written"
            if valid:
                expected = on_cpu(experts, rows, valid)
                assert_close(case, out[:valid].cpu(), expected, f"{case}, {valid} rows, {routing}")
            compared += 1
    return compared


# --- router ---------------------------------------------------------------------------------------------------------------


def router() -> int:
    import routes  # here: it brings pytest, which the other parts do without

    for case in routes.CASES:
        error = case.error(DEVICE.type)
        assert not error, f"{case}: {error}"
    held = routes.hostile(DEVICE.type)
    assert all(held.values()), held
    return len(routes.CASES) + len(held)


# --- faults that the tool has to find -------------------------------------------------------------------------------------


@triton.jit
def store_one_too_many_kernel(tensor, num, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(tensor + lanes, lanes.to(tl.float32), mask=lanes <= num)


RACE: tl.constexpr = tl.constexpr(
    "{ .reg .u32 %t; .shared .align 4 .b32 words[128]; mov.u32 $0, words; shl.b32 %t, $1, 2; add.u32 %t, $0, %t; "
    "st.shared.u32 [%t], $1; add.u32 %t, $1, 32; and.b32 %t, %t, 127; shl.b32 %t, %t, 2; add.u32 %t, $0, %t; "
    "ld.shared.u32 $0, [%t]; }"
)


@triton.jit
def race_kernel(out, BLOCK: tl.constexpr):
    """Each thread stores a word of shared memory and reads one that a thread of the next warp stores, without a barrier."""
    lanes = tl.arange(0, BLOCK)
    seen = tl.inline_asm_elementwise(RACE, "=&r,r", [lanes], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out + lanes, seen)


def planted_store() -> int:
    tensor = torch.zeros(1000, device=DEVICE)
    store_one_too_many_kernel[(1,)](tensor, 1000, BLOCK=1024)
    with contextlib.suppress(RuntimeError):  # the tool may end the context too; its own exit code shall stand
        torch.cuda.synchronize()
    return 1


def planted_race() -> int:
    out = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    race_kernel[(1,)](out, BLOCK=128, num_warps=4)
    torch.cuda.synchronize()
    return 1


PARTS = {
    "slots": lambda: protocol(SLOTS),
    "bulk": lambda: protocol(BULK),
    "peers": peers,
    "experts": lambda: experts_of(ODD),
    "experts-tensor-maps": lambda: experts_of(TENSOR_MAPS),
    "experts-float8": lambda: experts_of(FLOAT8),
    "router": router,
    "planted-store": planted_store,
    "planted-race": planted_race,
}


if __name__ == "__main__":
    start = time.monotonic()
    compared = PARTS[sys.argv[1]]()
    print(f"done: {sys.argv[1]}, {compared} cases in {time.monotonic() - start:.1f} s")
