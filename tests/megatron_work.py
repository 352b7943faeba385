"""Megatron-Core's dispatchers between ranks: shapes, what an MoE layer does with a dispatcher; round trips."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.integrations import megatron
from tokenferry.testing.data import RankInputs, make_inputs
from tokenferry.testing.numeric import first_difference

NCCL, NVLS = megatron.NCCLAllGatherDispatcher, megatron.NVLSAllGatherVDispatcher
BASE = megatron.InferenceAllGatherDispatcherBase
W = 8


@dataclass(frozen=True)
class Shape:
    """A layer and its group."""

    ep: int
    topk: int = 2
    hidden_size: int = 16
    experts_per_rank: int = 2

    @property
    def rows(self) -> tf.MoEConfig:
        return tf.MoEConfig(hidden_size=self.hidden_size, num_experts=self.ep * self.experts_per_rank, topk=self.topk)

    def config(self, **changes) -> megatron.InferenceMoEConfig:
        sizes = {"moe_router_topk": self.topk, "num_moe_experts": self.rows.num_experts, "hidden_size": self.hidden_size}
        return megatron.InferenceMoEConfig(**sizes, expert_model_parallel_size=self.ep, **changes)

    def make(self, cls, groups, *, first: bool = True, **changes):
        """A layer's dispatcher of this rank."""
        rank = groups.ep.rank if isinstance(groups.ep, tf.EPGroup) else dist.get_rank(groups.ep)
        indices = list(range(rank * self.experts_per_rank, (rank + 1) * self.experts_per_rank))
        return cls(self.experts_per_rank, indices, self.config(**changes), groups, first)

    def inputs(self, tokens, seed: int = 0, **changes) -> list[RankInputs]:
        return make_inputs(self.rows, tokens, seed=seed, partial_dtype=torch.float32, **changes)


@dataclass(frozen=True)
class Case:
    """Steps of `layers` layers on one group. `uneven` is the NCCL class's mode."""

    shape: Shape
    steps: tuple[tuple[int, ...], ...]
    uneven: bool = True
    layers: int = 2
    aliased: bool = True


def same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    difference = first_difference(got, want)
    assert not difference, f"{name}: {difference}"


def process_groups(group: tf.EPGroup, name: str) -> None:
    """Makes torch's default group of these ranks. `name` is used once in a process: a store keeps what it was told."""
    backend = "nccl" if group.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(name, group.store), rank=group.rank, world_size=group.size)


def device_of(layer) -> torch.device:
    """Of this rank. The workers below run on GPUs too."""
    if isinstance(layer.ep_group, tf.EPGroup):
        return layer.ep_group.device
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if on_gpu else torch.device("cpu")


def dispatch(layer, own: RankInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What an MoE layer does up to its experts; hidden states are [S, 1, H], as there."""
    own = own if layer.ep_group is None else on(device_of(layer), own)
    hidden, probs = layer.dispatch_preprocess(own.hidden.unsqueeze(1), own.topk_idx, own.topk_weights)
    hidden, none, probs = layer.dispatch_postprocess(*layer.token_dispatch(hidden, probs))
    assert none is None
    return hidden, probs


def on(device: torch.device, own: RankInputs) -> RankInputs:
    return RankInputs(own.hidden.to(device), own.topk_idx.to(device), own.topk_weights.to(device), own.partial.to(device))


def combine(layer, partial: torch.Tensor) -> torch.Tensor:
    rows = layer.combine_preprocess(partial.to(layer.routing_map.device))
    return layer.combine_postprocess(layer.token_combine(rows)).squeeze(1)


def expected(inputs: list[RankInputs], tokens, real=None) -> tuple[tf.Dispatched, list[torch.Tensor]]:
    columns = [[getattr(i, name) for i in inputs] for name in ("hidden", "topk_idx", "topk_weights")]
    gathered = tf.reference.dispatch(*columns, num_real_tokens=real)
    return gathered, tf.reference.combine([i.partial for i in inputs], tokens, torch.float32, torch.bfloat16)


# --- dispatch and combine -------------------------------------------------------------------------------------------


def run_nvls(group: tf.EPGroup, case: Case) -> int:
    shape = case.shape
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    layers = [shape.make(NVLS, megatron.ProcessGroups(ep=group), first=i == 0) for i in range(case.layers)]
    addresses = [t.data_ptr() for t in (NVLS._step_metadata, NVLS._symm_agv_hidden["tensor"], NVLS._get_rsv_tensor())]
    for step, tokens in enumerate(case.steps):
        for number, layer in enumerate(layers):
            check_nvls_layer(group, case, layer, tokens, seed=10 * step + number)
    assert addresses == [t.data_ptr() for t in (NVLS._step_metadata, NVLS._symm_agv_hidden["tensor"], NVLS._get_rsv_tensor())]
    megatron.check()
    return len(case.steps)


def check_nvls_layer(group: tf.EPGroup, case: Case, layer, tokens, seed: int) -> None:
    inputs = case.shape.inputs(tokens, seed, payload="hostile")
    gathered, combined = expected(inputs, tokens)
    V, G = sum(tokens), W * group.size
    hidden, probs = dispatch(layer, inputs[group.rank])
    assert hidden.shape == (G, case.shape.hidden_size)
    assert probs.shape == layer.routing_map.shape == (G, case.shape.topk)
    assert (hidden.dtype, probs.dtype, layer.routing_map.dtype) == (torch.bfloat16, torch.float32, torch.int64)
    same("hidden", hidden[:V], gathered.hidden)
    same("probs", probs[:V], gathered.topk_weights)
    same("routing", layer.routing_map[:V], gathered.topk_idx.long())
    assert (layer.routing_map[V:] == -1).all()
    assert NVLS._step_metadata.tolist() == [V, sum(tokens[: group.rank]), max(tokens)]
    assert (NVLS._rank_token_offset().item(), NVLS._ep_max_tokens().item()) == (sum(tokens[: group.rank]), max(tokens))
    assert NVLS._symm_metadata["tensor"].tolist() == list(tokens)
    assert BASE._valid_tokens().item() == V
    assert BASE._get_host_valid_tokens_estimate() == tokens[group.rank] * group.size
    assert layer._local_tokens == tokens[group.rank]
    rsv = NVLS._get_rsv_tensor()
    assert (rsv.shape, rsv.dtype) == (hidden.shape, torch.float32)
    partial = rsv if case.aliased else torch.empty_like(rsv)
    partial[:V] = inputs[group.rank].partial.to(rsv.device)
    partial[V:] = float("nan")
    got = combine(layer, partial)
    assert got.dtype == torch.bfloat16
    same("combined", got, combined[group.rank])


def run_nccl(group: tf.EPGroup, case: Case) -> int:
    shape = case.shape
    NCCL.allocate_buffers()
    NCCL._use_allgather_v = case.uneven
    layers = [shape.make(NCCL, megatron.ProcessGroups(ep=group), first=i == 0) for i in range(case.layers)]
    for step, tokens in enumerate(case.steps):
        for number, layer in enumerate(layers):
            inputs = shape.inputs(tokens, 10 * step + number, payload="hostile")
            gathered, combined = expected(inputs, tokens)
            hidden, probs = dispatch(layer, inputs[group.rank])
            same("hidden", hidden, gathered.hidden)
            same("probs", probs, gathered.topk_weights)
            same("routing", layer.routing_map, gathered.topk_idx.long())
            assert BASE._valid_tokens().tolist() == [sum(tokens)]
            assert BASE._get_host_valid_tokens_estimate() == sum(tokens)
            assert NCCL._local_tokens_per_rank == (list(tokens) if case.uneven else None)
            same("combined", combine(layer, inputs[group.rank].partial), combined[group.rank])
    return len(case.steps)


UNEVEN = {
    "EP2-uneven": Case(Shape(2), ((3, 1), (1, 8), (0, 2), (0, 0), (5, 5))),
    "EP3-K3-H10-uneven": Case(Shape(3, topk=3, hidden_size=10), ((3, 0, 1), (8, 8, 8), (0, 0, 1)), aliased=False),
    "EP4-K1-uneven": Case(Shape(4, topk=1), ((1, 2, 3, 4), (0, 8, 0, 1)), layers=1),
}
EQUAL = {
    "EP2-equal": Case(Shape(2), ((4, 4), (1, 1)), uneven=False),
    "EP4-equal": Case(Shape(4), ((2,) * 4, (8,) * 4), uneven=False, layers=1),
}
NCCL_CASES = {**{name: UNEVEN[name] for name in ("EP3-K3-H10-uneven", "EP4-K1-uneven")}, **EQUAL}


NVLS_CASES = {**UNEVEN, "EP4-equal": EQUAL["EP4-equal"]}


def run_alone(group: tf.EPGroup) -> list[int]:
    shape = Shape(1)
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group))
    own = shape.inputs((5,))[0]
    hidden, _ = dispatch(layer, own)
    same("hidden", hidden, own.hidden)
    same("combined", combine(layer, own.partial), own.partial.bfloat16())
    return NVLS._step_metadata.tolist()
