"""Megatron-Core's dispatchers on GPUs: the workers of the CPU ranks, CUDA graphs, and megatron-core itself beside ours."""

import dataclasses
import functools
import importlib.util
import itertools
import random
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenferry as tf
from megatron_scenarios import (
    PADDING,
    run_bfloat16_wire,
    run_experts_through_class_methods,
    run_layer_alone_and_in_a_crowd,
    run_padding,
    run_shared,
    run_two_groups,
)
from megatron_work import BASE, NCCL, NVLS, Case, Shape, device_of, expected, on, run_alone, run_nccl, run_nvls, same
from rank_pool import RankPools
from ranks.test_megatron_core import megatron_setup, run_against_megatron
from tokenferry.experts import ExpertScratch
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks

two_gpus = pytest.mark.gpu(count=2)
one_gpu = pytest.mark.gpu(count=1)

# --- the workers of the CPU ranks, in one start of two rank processes ------------------------------------------------

SHAPE = Shape(2)
"""One shape where that serves: each is compiled anew on a machine without a cache."""
COUNTS = ((3, 1), (1, 8), (0, 2), (0, 0), (5, 5), (8, 8))


def run_batch_invariant(group: tf.EPGroup) -> None:
    alone, *crowded = run_layer_alone_and_in_a_crowd(group, "torch") or ["rank 0 compares"]
    assert crowded == [alone] * len(crowded)


SCENARIOS = {
    "nvls-uneven": (run_nvls, Case(SHAPE, COUNTS)),
    "nvls-uneven-own-output": (run_nvls, Case(SHAPE, COUNTS, aliased=False)),
    "nvls-uneven-K3-H12": (run_nvls, Case(Shape(2, topk=3, hidden_size=12), COUNTS)),
    "nvls-equal": (run_nvls, Case(SHAPE, ((4, 4), (1, 1)))),
    "nccl-uneven": (run_nccl, Case(SHAPE, COUNTS)),
    "nccl-equal": (run_nccl, Case(SHAPE, ((4, 4), (1, 1)), uneven=False)),
    "bfloat16-on-the-wire": (run_bfloat16_wire,),
    **{f"padding-{name}": (run_padding, case) for name, case in PADDING.items()},
    "shared-experts-launched-by-the-dispatcher": (run_shared, False),
    "shared-experts-launched-by-the-layer": (run_shared, True),
    "a-tokens-bits-do-not-depend-on-the-batch": (run_batch_invariant,),
    "experts-between-nvls-dispatch-and-combine": (run_experts_through_class_methods, "nvls"),
    "experts-between-nccl-dispatch-and-combine": (run_experts_through_class_methods, "nccl"),
    "two-groups-in-a-process": (run_two_groups,),
}


def run_scenarios(group: tf.EPGroup) -> dict[str, str]:
    """Each scenario's traceback, empty if it passed. The first that fails is the last that is run."""
    outcomes = {}
    for name, (worker, *args) in SCENARIOS.items():
        # Named, so that a machine without peer access fails instead of taking the collective transport.
        megatron.configure(**dataclasses.asdict(megatron.Settings(transport="p2p", timeout_s=20.0, open_timeout_s=60.0)))
        NCCL._use_allgather_v, NCCL._local_tokens_per_rank = False, None
        try:
            worker(group, *args)
            torch.cuda.synchronize()
            megatron.check()
        except BaseException:
            return {**outcomes, name: traceback.format_exc()}
        megatron.close()
        outcomes[name] = ""
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return run_ranks(run_scenarios, 2, backend="nccl", timeout_s=240.0)


@two_gpus
@pytest.mark.parametrize("name", SCENARIOS)
def test_between_two_gpus(name: str, request: pytest.FixtureRequest) -> None:
    for rank, outcome in enumerate(request.getfixturevalue("outcomes")):  # so that a skipped test does not start ranks
        assert outcome.get(name, "not run: one before it failed") == "", f"rank {rank}: {outcome.get(name)}"


def with_classes_as_new(group: tf.EPGroup, worker: Callable[..., Any]) -> Any:
    """What the classes hold belongs to the process, which runs other tests too."""
    megatron.configure(**dataclasses.asdict(megatron.Settings()))
    NCCL._use_allgather_v, NCCL._local_tokens_per_rank = False, None
    NVLS.set_real_token_count_tensor(None)
    result = worker(group)
    megatron.close()
    NVLS.set_real_token_count_tensor(None)
    return result


# --- CUDA graphs ------------------------------------------------------------------------------------------------------

LARGEST = 512
BUCKETS = (0, 1, 7, 64, 200, LARGEST)
GRAPH_SHAPE = Shape(2, hidden_size=64)


class CapturedForward:
    """One forward of two layers for one count of local rows: static inputs, a graph, and the tensors it writes.

    The first layer's experts write into the RSV buffer and its shared expert overlaps; the second's output is a tensor of its
    own.
    """

    def __init__(self, layers: list, count: int, device: torch.device) -> None:
        H, K = GRAPH_SHAPE.hidden_size, GRAPH_SHAPE.topk
        self.layers = layers
        self.hidden = torch.zeros(count, 1, H, dtype=torch.bfloat16, device=device)
        self.routing = torch.zeros(count, K, dtype=torch.int64, device=device)
        self.probs = torch.zeros(count, K, device=device)
        self.partial = torch.zeros(2 * LARGEST, H, device=device)
        self.graph = torch.cuda.CUDAGraph()
        self.results: list[tuple[torch.Tensor, ...]] = []

    def __call__(self) -> list[tuple[torch.Tensor, ...]]:
        done = []
        for layer in self.layers:
            rows = layer.dispatch_preprocess(self.hidden, self.routing, self.probs)
            hidden, _, probs = layer.dispatch_postprocess(*layer.token_dispatch(*rows))
            kept = hidden.clone(), layer.routing_map.clone(), probs.clone(), BASE._valid_tokens().clone()  # views till combine
            partial = self.partial
            if layer is self.layers[0]:
                partial = NVLS._get_rsv_tensor().copy_(partial)
            done.append((*kept, layer.combine_postprocess(layer.token_combine(layer.combine_preprocess(partial)))))
        return done

    def capture(self, stream: torch.cuda.Stream) -> None:
        """After an eager forward, in which the peer takes part."""
        with torch.cuda.stream(stream):
            self()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.results = self()

    def load(self, own) -> None:
        self.hidden.copy_(own.hidden.unsqueeze(1))
        self.routing.copy_(own.topk_idx)
        self.probs.copy_(own.topk_weights)
        self.partial.fill_(float("nan"))[: own.partial.shape[0]].copy_(own.partial)


def graph_layers(group: tf.EPGroup) -> list:
    overlap = {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 8}
    layers = [
        GRAPH_SHAPE.make(NVLS, megatron.ProcessGroups(ep=group), first=True, **overlap),
        GRAPH_SHAPE.make(NVLS, megatron.ProcessGroups(ep=group), first=False),
    ]
    layers[0].set_shared_experts(megatron.StreamedSharedExperts(lambda hidden: hidden * 2, torch.cuda.Stream(group.device)))
    return layers


def run_nvls_graphs(group: tf.EPGroup) -> int:
    """A graph for each bucket of local rows, captured while the peer captures the same; replayed at every pair of buckets."""
    megatron.configure(transport="p2p", timeout_s=20.0, open_timeout_s=60.0)
    NVLS.allocate_buffers(LARGEST, GRAPH_SHAPE.topk, GRAPH_SHAPE.hidden_size, group)
    real = torch.zeros(1, dtype=torch.int32, device=group.device)
    NVLS.set_real_token_count_tensor(real)
    layers, stream = graph_layers(group), torch.cuda.Stream(group.device)
    forwards = {count: CapturedForward(layers, count, group.device) for count in BUCKETS}
    for count in BUCKETS:
        forwards[count].capture(stream)
    pairs = [*itertools.product(BUCKETS, repeat=2)] * 2
    rng = random.Random(4)
    rng.shuffle(pairs)
    for seed, counts in enumerate(pairs):
        reals = tuple(rng.choice((0, count, rng.randint(0, count))) for count in counts)
        eager = [rng.random() < 0.2 for _ in counts]
        inputs = GRAPH_SHAPE.inputs(counts, seed)
        forward = forwards[counts[group.rank]]
        with torch.cuda.stream(stream):
            forward.load(on(group.device, inputs[group.rank]))
            real.fill_(reals[group.rank])
            if eager[group.rank]:
                results = forward()
            else:
                forward.graph.replay()
                results = forward.results
        stream.synchronize()
        megatron.check()
        gathered, combined = expected(inputs, counts, real=reals)
        check_forward(results, gathered, combined[group.rank], inputs[group.rank].hidden, sum(counts))
    megatron.close()
    return len(pairs)


def check_forward(results: list, gathered: tf.Dispatched, combined: torch.Tensor, hidden: torch.Tensor, valid: int) -> None:
    for number, (rows, routing, probs, count, out) in enumerate(results):
        assert count.tolist() == [valid]
        same("hidden", rows[:valid], gathered.hidden)
        same("probs", probs[:valid], gathered.topk_weights)
        same("routing", routing[:valid], gathered.topk_idx.long())
        assert bool((routing[valid:] == -1).all())
        same("combined", out.squeeze(1), combined + hidden * 2 if number == 0 else combined)


@two_gpus
def test_nvls_graphs_replay_at_any_counts_up_to_512(on_ranks: RankPools) -> None:
    assert on_ranks(with_classes_as_new, 2, run_nvls_graphs, backend="nccl", timeout_s=200.0) == [2 * len(BUCKETS) ** 2] * 2


def run_nccl_graph(group: tf.EPGroup) -> int:
    """Equal counts, which the NCCL class can capture after one eager step."""
    NCCL.allocate_buffers()
    NCCL._use_allgather_v = False
    layer, count = GRAPH_SHAPE.make(NCCL, megatron.ProcessGroups(ep=group)), 5
    hidden = torch.zeros(count, 1, 64, dtype=torch.bfloat16, device=group.device)
    routing = torch.zeros(count, 2, dtype=torch.int64, device=group.device)
    probs, partial = torch.zeros(count, 2, device=group.device), torch.zeros(2 * count, 64, device=group.device)

    def forward() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, _ = layer.token_dispatch(*layer.dispatch_preprocess(hidden, routing, probs))
        return rows, layer.routing_map, layer.combine_postprocess(layer.token_combine(partial))

    stream, graph = torch.cuda.Stream(group.device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        rows, ids, out = forward()
    for seed in range(6):
        inputs = GRAPH_SHAPE.inputs((count, count), seed)
        own = on(group.device, inputs[group.rank])
        given = (own.hidden.unsqueeze(1), own.topk_idx, own.topk_weights, own.partial)
        for tensor, value in zip((hidden, routing, probs, partial), given, strict=True):
            tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        gathered, combined = expected(inputs, (count, count))
        same("hidden", rows, gathered.hidden)
        same("routing", ids, gathered.topk_idx.long())
        same("combined", out.squeeze(1), combined[group.rank])
        assert BASE._valid_tokens().tolist() == [2 * count]
    megatron.close()
    return count


@two_gpus
def test_nccl_graph_replays_with_other_rows(on_ranks: RankPools) -> None:
    assert on_ranks(with_classes_as_new, 2, run_nccl_graph, backend="nccl", timeout_s=100.0) == [5, 5]


@one_gpu
def test_group_of_one_gpu(on_ranks: RankPools) -> None:
    assert on_ranks(with_classes_as_new, 1, run_alone, backend="nccl", timeout_s=100.0) == [[5, 0, 5]]


# --- megatron-core itself ---------------------------------------------------------------------------------------------

with_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed (0.19 is known; its wheel needs Python 3.12)",
)
INTERMEDIATE = 32


def run_megatrons_experts(group: tf.EPGroup) -> tuple[str, float]:
    """Dispatch, experts, combine: all of megatron-core's, then its experts between our dispatches, then our experts too."""
    theirs = megatron_setup(group)
    from megatron.core.inference.moe import ActivationType, vllm_fused_moe

    generator = torch.Generator().manual_seed(7)
    shape, H, tokens, device = Shape(2), 16, (6, 6), group.device
    fc1 = (torch.randn(4, INTERMEDIATE, H, generator=generator) / 4).bfloat16()
    fc2 = (torch.randn(4, H, INTERMEDIATE, generator=generator) / 6).bfloat16()
    start = 2 * group.rank
    weights = [w[start : start + 2].contiguous().to(device) for w in (fc1, fc2)]
    own = on(device, shape.inputs(tokens, seed=8)[group.rank])
    arguments = {
        "num_local_experts": 2,
        "local_expert_indices": [start, start + 1],
        "config": theirs.config,
        "pg_collection": theirs.groups,
    }

    def forward(layer, experts, out) -> torch.Tensor:
        rows = layer.dispatch_preprocess(own.hidden.unsqueeze(1), own.topk_idx, own.topk_weights)
        hidden, _, probs = layer.dispatch_postprocess(*layer.token_dispatch(*rows))
        done = experts(
            hidden, probs, *weights, ActivationType.SQUARED_RELU, 2, start,
            valid_tokens=theirs.experts.InferenceAllGatherDispatcherBase._valid_tokens(),
            routing_map=layer.routing_map, out=out(), num_tokens_hint=sum(tokens),
        )  # fmt: skip
        return layer.combine_postprocess(layer.token_combine(layer.combine_preprocess(done)))

    original = theirs.original.NCCLAllGatherDispatcher
    original.allocate_buffers()
    wanted = forward(original(**arguments), vllm_fused_moe, lambda: None)
    worst = 0.0
    megatron.configure(transport="p2p", timeout_s=20.0, open_timeout_s=60.0)
    with megatron.install() as installed:
        theirs.layer.NCCLAllGatherDispatcher.allocate_buffers()
        NVLS.allocate_buffers(per_rank_worst_case_token_count=64, topk=2, hidden_size=H, ep_group=theirs.groups.ep)
        nvls = theirs.layer.NVLSAllGatherVDispatcher(**arguments)
        assert device_of(nvls) == device
        same(
            "their experts, our NVLS class",
            forward(nvls, vllm_fused_moe, theirs.experts.NVLSAllGatherVDispatcher._get_rsv_tensor),
            wanted,
        )
        same(
            "their experts, our NCCL class",
            forward(theirs.layer.NCCLAllGatherDispatcher(**arguments), vllm_fused_moe, lambda: None),
            wanted,
        )
        for scratch in (None, ExpertScratch(device)):
            ours = forward(nvls, functools.partial(megatron.fused_moe, scratch=scratch), NVLS._get_rsv_tensor)
            torch.cuda.synchronize()
            megatron.check()
            worst = max(worst, ((ours - wanted).abs().max() / wanted.abs().max()).item())
    assert wanted.abs().max() > 0.1, "the experts do something"
    megatron.close()
    torch.distributed.destroy_process_group()
    return installed.version, worst


@two_gpus
@with_megatron
def test_rows_and_sums_have_the_bits_of_megatrons_own_dispatcher() -> None:
    versions = run_ranks(run_against_megatron, 2, backend="nccl", timeout_s=200.0, env={"NO_VCS_VERSION": "1"})
    assert versions[0].startswith(megatron.KNOWN_VERSIONS)


@two_gpus
@with_megatron
def test_a_layer_gives_what_it_gives_on_megatrons_own_dispatcher() -> None:
    results = run_ranks(run_megatrons_experts, 2, backend="nccl", timeout_s=200.0, env={"NO_VCS_VERSION": "1"})
    for version, worst in results:
        assert version.startswith(megatron.KNOWN_VERSIONS)
        assert worst < 2e-2, "our experts round bfloat16 intermediates elsewhere, and no more than that"
