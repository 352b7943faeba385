"""The collective transport on GPUs, equal counts: NCCL's reduce-scatter between two ranks keeps the promised bits, and a step
launches what it must and no more."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import tokenferry as tf
from cases import same
from interpreter.test_collective_rows import ROUTINGS, SUMS, Routing, Sum, settings_of
from rank_pool import RankPools
from tokenferry.testing.data import make_inputs
from tokenferry.transports.collective.rows import KernelRowWork, RowWork

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
BITS = {FLOAT32: torch.int32, FLOAT16: torch.int16, BFLOAT16: torch.int16}

# --- bits of sums -----------------------------------------------------------------------------------------------------


def terms_of(rank: int, rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
    """By columns: zeros of both signs, sums that lie half-way between two numbers of 16 bits, normal values, and random bits,
    which are infinities, NaNs and subnormals too."""
    generator = torch.Generator().manual_seed(rank)
    quarter = hidden_size // 4
    terms = torch.randn(rows, hidden_size, generator=generator).to(dtype)
    info, shape = torch.iinfo(BITS[dtype]), (rows, quarter)
    terms[:, :quarter] = torch.randint(info.min, info.max, shape, dtype=BITS[dtype], generator=generator).view(dtype)
    subnormal = torch.randint(0, 1 << (23 if dtype == FLOAT32 else 7), shape, dtype=BITS[dtype], generator=generator)
    terms[:, quarter : 2 * quarter] = subnormal.view(dtype) * (-1.0) ** rank
    halves = torch.randint(1, 1 << 12, shape, generator=generator)
    terms[:, 2 * quarter : 3 * quarter] = (halves if rank else halves * 2.0**-9).to(dtype)
    terms[:, -1] = -0.0
    terms[:, -2] = -0.0 if rank else 0.0
    return terms


@dataclass(frozen=True)
class Sums:
    """What terms travel in, and what they become."""

    wire: torch.dtype
    result: torch.dtype
    counts: str = "equal"
    halves: bool = False

    def __str__(self) -> str:
        wire, result = (str(dtype).removeprefix("torch.") for dtype in (self.wire, self.result))
        return f"{wire}-to-{result}-{self.counts}{'-halves' if self.halves else ''}"


def sums_of_two(group: tf.EPGroup, case: Sums) -> int:
    compared = 0
    for hidden_size, all_tokens in ((2048, (1, 7, 64, 512, 4096)), (60, (1, 9))):
        config = tf.MoEConfig(hidden_size=hidden_size, num_experts=8, topk=2, dtype=case.result)
        settings = {"transport": "collective", "combine_dtype": case.wire, "counts": case.counts}
        with tf.Workspace(config, group, max_tokens_per_rank=max(all_tokens), **settings) as ws:
            layer = ws.dispatcher()
            for tokens in all_tokens:
                terms = [terms_of(rank, 2 * tokens, hidden_size, case.wire) for rank in range(2)]
                wanted = tf.reference.combine(terms, (tokens, tokens), case.wire, case.result)[group.rank]
                ws.begin_step(tokens)
                rows = torch.zeros(tokens, hidden_size, dtype=case.result, device=ws.device)
                ids = torch.zeros(tokens, 2, dtype=torch.int32, device=ws.device)
                layer.dispatch(rows, ids, torch.zeros(tokens, 2, device=ws.device))
                partial = terms[group.rank].to(ws.device)
                if case.halves:
                    layer.combine_begin(partial)
                    same(f"H {hidden_size}, T {tokens}", layer.combine_end(), wanted)
                else:
                    same(f"H {hidden_size}, T {tokens}", layer.combine(partial), wanted)
                compared += 1
    return compared


SUM_CASES = (
    Sums(FLOAT32, BFLOAT16),
    Sums(FLOAT32, FLOAT16),
    Sums(FLOAT32, FLOAT32),
    Sums(BFLOAT16, BFLOAT16),
    Sums(FLOAT16, FLOAT16),
    Sums(BFLOAT16, FLOAT32),
    Sums(FLOAT16, BFLOAT16),
    Sums(BFLOAT16, BFLOAT16, counts="uneven"),
    Sums(FLOAT32, BFLOAT16, halves=True),
)


@two_gpus
@pytest.mark.parametrize("case", SUM_CASES, ids=str)
def test_two_ranks_sum_to_the_bits_of_the_reference(on_ranks: RankPools, case: Sums) -> None:
    """Expected: NCCL adds two float32 terms as IEEE 754 says, and two of 16 bits with one rounding of the exact sum."""
    assert on_ranks(sums_of_two, 2, case, backend="nccl", timeout_s=120) == [7, 7]


# --- launches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launches:
    """A step of equal counts in a graph, and how many kernels its parts launch."""

    begin_step: int
    dispatch: int
    combine: int
    index_dtype: torch.dtype = torch.int64
    weight_dtype: torch.dtype = FLOAT32
    wire: torch.dtype = BFLOAT16
    real_on_device: bool = False
    tokens: int = 5


LAUNCHES = {
    "ids-and-weights-as-they-are": Launches(1, 1, 1, index_dtype=torch.int32),
    "int64-ids": Launches(1, 2, 1),
    "padding-known-to-the-device": Launches(1, 2, 1, index_dtype=torch.int32, real_on_device=True),
    "bf16-weights": Launches(1, 2, 1, index_dtype=torch.int32, weight_dtype=BFLOAT16),
    "fp32-wire-to-bf16": Launches(1, 1, 2, index_dtype=torch.int32, wire=FLOAT32),
    "sum-in-rank-order": Launches(1, 1, 2, index_dtype=torch.int32, wire=FLOAT16),
    "no-tokens": Launches(1, 0, 0, index_dtype=torch.int32, tokens=0),
}


def kernels_in(work: Callable[[], object], stream: torch.cuda.Stream) -> int:
    """How many kernels a graph of `work` launches."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    driver = ctypes.CDLL("libcuda.so.1")
    handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    nodes = (ctypes.c_void_p * max(1, count.value))()
    assert driver.cuGraphGetNodes(handle, nodes, ctypes.byref(count)) == 0
    kinds = []
    for node in nodes[: count.value]:
        kind = ctypes.c_int()
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        kinds.append(kind.value)
    return kinds.count(0) + kinds.count(1) + kinds.count(2)  # kernels, copies, fills: empty nodes and events take no time


def launches(group: tf.EPGroup, case: Launches) -> list[int]:
    config = tf.MoEConfig(hidden_size=256, num_experts=8, topk=3)
    settings = {"transport": "collective", "combine_dtype": case.wire, "counts": "equal"}
    settings["index_dtype"] = case.index_dtype
    with tf.Workspace(config, group, max_tokens_per_rank=8, **settings) as ws:
        T, layer, stream = case.tokens, ws.dispatcher(), torch.cuda.Stream()
        real = torch.tensor([3], dtype=torch.int32, device=ws.device) if case.real_on_device else None
        rows = (
            torch.zeros(T, 256, dtype=BFLOAT16, device=ws.device),
            torch.zeros(T, 3, dtype=case.index_dtype, device=ws.device),
            torch.zeros(T, 3, dtype=case.weight_dtype, device=ws.device),
        )
        partial = torch.zeros(2 * T, 256, dtype=case.wire, device=ws.device)

        def step() -> None:
            ws.begin_step(T, real)

        def dispatch() -> None:
            step()
            layer.dispatch(*rows)

        def forward() -> None:
            dispatch()
            layer.combine(partial)

        with torch.cuda.stream(stream):
            forward()
        torch.cuda.synchronize()
        counted = [kernels_in(step, stream)]
        counted.append(kernels_in(forward, stream))
        ws.begin_step(T, real)
        counted.append(kernels_in(lambda: layer.dispatch(*rows), stream))
        torch.cuda.synchronize()
        layer.combine(partial)
        torch.cuda.synchronize()
        whole_step, forward_kernels, dispatch_kernels = counted
        return [whole_step, dispatch_kernels, forward_kernels - whole_step - dispatch_kernels]


@two_gpus
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_launches_what_it_must(on_ranks: RankPools, name: str) -> None:
    case = LAUNCHES[name]
    wanted = [case.begin_step, case.dispatch, case.combine]
    assert on_ranks(launches, 2, case, backend="nccl", timeout_s=120) == [wanted] * 2


# --- graphs, padding ------------------------------------------------------------------------------------------------------


def graph_with_padding(group: tf.EPGroup, index_dtype: torch.dtype) -> None:
    config = tf.MoEConfig(hidden_size=64, num_experts=8, topk=3)
    with tf.Workspace(
        config, group, max_tokens_per_rank=8, transport="collective", counts="equal", index_dtype=index_dtype
    ) as ws:
        layer, stream, graph = ws.dispatcher(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        real = torch.zeros(1, dtype=torch.int32, device=ws.device)
        hidden = torch.zeros(6, 64, dtype=BFLOAT16, device=ws.device)
        rows = [hidden, torch.zeros(6, 3, dtype=torch.int64, device=ws.device), torch.zeros(6, 3, device=ws.device)]

        def forward() -> tf.Dispatched:
            ws.begin_step(6, real)
            got = layer.dispatch(*rows)
            layer.combine(got.hidden)
            return got

        with torch.cuda.stream(stream):
            forward()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            got = forward()
        for number in range(7):
            inputs = make_inputs(config, (6, 6), seed=number, payload="hostile")
            counts = (number, (number + 3) % 7)
            own = inputs[group.rank]
            for tensor, value in zip(rows, (own.hidden, own.topk_idx, own.topk_weights), strict=True):
                tensor.copy_(value)
            real.fill_(counts[group.rank])
            graph.replay()
            torch.cuda.synchronize()
            columns = [[getattr(each, name) for each in inputs] for name in ("hidden", "topk_idx", "topk_weights")]
            wanted = tf.reference.dispatch(*columns, num_real_tokens=counts)
            same("hidden", got.hidden, wanted.hidden)
            same("ids", got.topk_idx, wanted.topk_idx.to(index_dtype))
            same("weights", got.topk_weights, wanted.topk_weights)
        ws.check()


@two_gpus
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32-out", "int64-out"])
def test_a_graph_masks_other_padding_at_each_replay(on_ranks: RankPools, index_dtype: torch.dtype) -> None:
    on_ranks(graph_with_padding, 2, index_dtype, backend="nccl", timeout_s=120)


# --- the two kernels ------------------------------------------------------------------------------------------------------


@one_gpu
@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_is_written_as_by_operators(name: str) -> None:
    case: Routing = ROUTINGS[name]
    group = tf.EPGroup.alone("cuda:0")
    settings = settings_of(group, index_dtype=case.out, topk=case.topk)
    idx = torch.randint(-2, 8, (case.rows, case.topk), device="cuda").to(case.idx)
    if case.idx == torch.int64 and case.rows:
        idx[0, 0], idx[-1, -1] = 2**31, -(2**33)
    weights = torch.rand(case.rows, case.topk, device="cuda").to(case.weights)
    weights[:1] = 1e-40
    weights[1:2] = torch.nan
    weights[2:3] = -0.0
    real = torch.tensor([case.real], dtype=torch.int32, device="cuda") if case.real_on_device else case.real
    written = []
    for work in (RowWork(settings, BFLOAT16), KernelRowWork(settings, BFLOAT16)):
        out = torch.full(idx.shape, 77, dtype=case.out, device="cuda"), torch.full(idx.shape, 77.0, device="cuda")
        work.write_routing(*out, idx, weights, real)
        written.append(out)
    same("ids", written[1][0], written[0][0])
    same("weights", written[1][1], written[0][1])


GPU_SUMS = {
    **SUMS,
    "EP8-bf16": Sum(size=8, terms=BFLOAT16, result=BFLOAT16, hidden_size=2048, rows=100, wanted=97),
    "EP4-fp32-to-bf16": Sum(size=4, result=BFLOAT16, hidden_size=7168, rows=33, wanted=33),
    "EP3-bf16-begins-anywhere": Sum(size=3, terms=BFLOAT16, result=BFLOAT16, hidden_size=100, rows=9, wanted=9, aligned=False),
}


@one_gpu
@pytest.mark.parametrize("name", GPU_SUMS)
def test_terms_are_summed_as_by_operators(name: str) -> None:
    case = GPU_SUMS[name]
    group, shape = tf.EPGroup.alone("cuda:0"), (case.rows, case.hidden_size)
    for rank in range(case.size):
        settings = settings_of(group, rank=rank, size=case.size, combine_dtype=case.terms, hidden_size=case.hidden_size)
        terms = torch.stack([terms_of(each, *shape, case.terms) for each in range(case.size)]).to("cuda")
        shift = 0 if case.aligned else 1
        memory = torch.empty(terms[rank].numel() + shift, dtype=case.terms, device="cuda")
        own = memory[shift:].view(shape).copy_(terms[rank])
        terms[rank] = 99.0  # is not read
        by = [work(settings, case.result).sum_terms(terms, own, case.wanted) for work in (RowWork, KernelRowWork)]
        same(f"rank {rank}", by[1], by[0])
