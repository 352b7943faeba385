"""Megatron-Core's dispatchers between rank processes on gloo: rows exact, sums the bits of the reference."""

import dataclasses
import importlib.util
import inspect
import traceback
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.activations import Activation
from tokenferry.errors import CapacityError, ConfigError, ShapeError, StateError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks
from tokenferry.testing.data import RankInputs, make_inputs
from tokenferry.testing.numeric import first_difference

pytestmark = pytest.mark.ranks

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


@pytest.mark.parametrize("case", NVLS_CASES.values(), ids=NVLS_CASES)
def test_nvls_round_trips(case: Case) -> None:
    assert run_ranks(run_nvls, case.shape.ep, case) == [len(case.steps)] * case.shape.ep


@pytest.mark.parametrize("case", NCCL_CASES.values(), ids=NCCL_CASES)
def test_nccl_round_trips(case: Case) -> None:
    assert run_ranks(run_nccl, case.shape.ep, case) == [len(case.steps)] * case.shape.ep


def run_nvls_on_kernels(group: tf.EPGroup, case: Case) -> str:
    megatron.configure(transport="p2p")
    run_nvls(group, case)
    return NVLS._symm_rsv["handle"].transport


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case",
    [Case(Shape(2), ((3, 1), (0, 8), (0, 0))), Case(Shape(3, topk=3, hidden_size=12), ((8, 0, 1), (1, 2, 3)), aliased=False)],
    ids=["EP2", "EP3-K3-H12"],
)
def test_nvls_round_trips_on_the_symmetric_kernels(case: Case) -> None:
    """No multicast, an EP size that is no power of two, and odd K: the original has none of them."""
    transports = run_ranks(run_nvls_on_kernels, case.shape.ep, case, env={"TRITON_INTERPRET": "1"})
    assert transports == ["p2p"] * case.shape.ep


def run_alone(group: tf.EPGroup) -> list[int]:
    shape = Shape(1)
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group))
    own = shape.inputs((5,))[0]
    hidden, _ = dispatch(layer, own)
    same("hidden", hidden, own.hidden)
    same("combined", combine(layer, own.partial), own.partial.bfloat16())
    return NVLS._step_metadata.tolist()


def test_group_of_one_process() -> None:
    assert run_ranks(run_alone, 1) == [[5, 0, 5]]


def run_bfloat16_wire(group: tf.EPGroup) -> None:
    shape, tokens = Shape(2), (3, 2)
    megatron.configure(combine_dtype=torch.bfloat16)
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    assert NVLS._get_rsv_tensor().dtype == torch.bfloat16
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group))
    inputs = shape.inputs(tokens)
    dispatch(layer, inputs[group.rank])
    partial = torch.zeros(2 * W, shape.hidden_size)
    partial[:5] = inputs[group.rank].partial
    want = tf.reference.combine([i.partial for i in inputs], tokens, torch.bfloat16, torch.bfloat16)
    same("combined", combine(layer, partial), want[group.rank])


# --- padding, multi-token prediction --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddingCase:
    """`real` counts rows of the whole sequence, of which rank r of `tp` holds rows from r·T on."""

    cls: str
    tokens: tuple[int, ...]
    real: int
    sequence_parallel: bool
    expected: tuple[int, ...]
    mtp_rows: int | None = None
    mtp_real: int = 0
    mtp_expected: tuple[int, ...] = ()


PADDING = {
    "NVLS-every-rank-its-own": PaddingCase("nvls", (4, 4), 3, False, (3, 3)),
    "NVLS-sequence-parallel": PaddingCase("nvls", (4, 4), 6, True, (4, 2)),
    "NVLS-sequence-parallel-none-left": PaddingCase("nvls", (4, 4), 3, True, (3, 0)),
    "NVLS-capture-masks-all": PaddingCase("nvls", (4, 4), 0, False, (0, 0)),
    "NVLS-prediction-of-2-rows": PaddingCase("nvls", (4, 5), 4, False, (4, 4), 2, 1, (1, 1)),
    "NVLS-prediction-sequence-parallel": PaddingCase("nvls", (4, 4), 7, True, (4, 3), 2, 3, (2, 1)),
    "NCCL-uneven": PaddingCase("nccl-uneven", (4, 5), 3, False, (3, 3), 2, 1, (1, 1)),
    "NCCL-uneven-sequence-parallel": PaddingCase("nccl-uneven", (4, 4), 7, True, (4, 3), 2, 3, (2, 1)),
    "NCCL-equal": PaddingCase("nccl-equal", (4, 4), 6, True, (4, 2), 2, 3, (2, 1)),
}


def run_padding(group: tf.EPGroup, case: PaddingCase) -> None:
    shape, cls = Shape(2), NVLS if case.cls == "nvls" else NCCL
    NCCL._use_allgather_v = case.cls == "nccl-uneven"
    if cls is NVLS:
        NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    groups = megatron.ProcessGroups(ep=group, tp=group if case.sequence_parallel else None)
    main, prediction = shape.make(cls, groups), shape.make(cls, groups, first=False)
    assert main.sp_rank == (group.rank if case.sequence_parallel else 0)
    cls.set_real_token_count_tensor(torch.tensor([case.real], dtype=torch.int32, device=group.device))
    check_masked_layer(group, main, shape.inputs(case.tokens), case.tokens, case.expected)
    if case.mtp_rows is not None:
        cls.modify_real_token_count_for_mtp(case.mtp_real)
        supplied = (case.mtp_rows,) * 2
        # Equal counts cost nothing: the NCCL class gives such a forward a step of its own size.
        step_rows = supplied if case.cls == "nccl-equal" else case.tokens
        inputs = shape.inputs(step_rows, 1, supplied=supplied)
        check_masked_layer(group, prediction, inputs, step_rows, case.mtp_expected)
    cls.set_real_token_count_tensor(None)


def check_masked_layer(group: tf.EPGroup, layer, inputs: list[RankInputs], tokens, real: tuple[int, ...]) -> None:
    own = on(device_of(layer), inputs[group.rank])
    given = own.topk_idx.clone()
    dispatch(layer, own)
    same("the router's tensor", own.topk_idx, given)
    for rank, theirs in enumerate(inputs):
        start, supplied = sum(tokens[:rank]), theirs.hidden.shape[0]
        routing = layer.routing_map[start : start + tokens[rank]]
        same(f"rank {rank}'s real rows", routing[: real[rank]], theirs.topk_idx[: real[rank]])
        assert (routing[real[rank] :] == -1).all(), f"rank {rank}'s padding rows reach an expert"
        assert supplied <= tokens[rank]
    rows = layer.routing_map.shape[0]
    out = combine(layer, torch.ones(rows, own.hidden.shape[1]))
    assert out.shape == own.hidden.shape


# --- shared experts -------------------------------------------------------------------------------------------------


class RecordingShared:
    """A shared expert that doubles, and remembers what it saw."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.saw: list[torch.Size] = []

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.saw.append(hidden.shape)
        if self.stream is not None:
            assert torch.cuda.current_stream(hidden.device) == self.stream
            torch.cuda._sleep(20_000_000)  # some 10 ms: who does not join the stream adds what is not there yet
        return hidden * 2


def run_shared(group: tf.EPGroup, external: bool) -> None:
    shape, tokens = Shape(2), (3, 2)
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    overlap = {"moe_shared_expert_overlap": True, "moe_shared_expert_intermediate_size": 8}
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group), **overlap)
    shared = RecordingShared(group.device)
    layer.set_shared_experts(shared)
    layer._external_shared_expert_launch = external
    assert layer.use_nccl_stream
    inputs = shape.inputs(tokens)
    own = inputs[group.rank]
    dispatch(layer, own)
    assert (layer._shared_expert_output is None) == external
    partial = torch.zeros(2 * W, shape.hidden_size)
    partial[:5] = own.partial
    combined = expected(inputs, tokens)[1][group.rank]
    same("with the shared expert", combine(layer, partial), combined if external else combined + own.hidden * 2)
    assert layer._shared_expert_output is None
    assert shared.saw == ([] if external else [torch.Size([tokens[group.rank], 1, 16])])


# --- several groups -------------------------------------------------------------------------------------------------


def run_two_groups(group: tf.EPGroup) -> None:
    process_groups(group, "two groups")
    wide, narrow = Shape(2, hidden_size=32, topk=3), Shape(2, hidden_size=8, topk=1)
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    NVLS.allocate_buffers(W, wide.topk, wide.hidden_size, first)
    NVLS.set_real_token_count_tensor(torch.tensor([2], dtype=torch.int32, device=group.device))
    NVLS.allocate_buffers(4, narrow.topk, narrow.hidden_size, second)
    assert NVLS._per_rank_worst_case_token_count == 4
    assert NVLS._get_rsv_tensor().shape == (8, 8)
    assert NVLS._real_token_count_tensor is None, "the first group's count is not the second's"
    a = wide.make(NVLS, megatron.ProcessGroups(ep=first))
    later = wide.make(NVLS, megatron.ProcessGroups(ep=first), first=False)
    b = narrow.make(NVLS, megatron.ProcessGroups(ep=second))
    for seed in range(3):
        tokens_a, tokens_b = (3, 4), (4, 1 + seed)
        inputs_a, inputs_b = wide.inputs(tokens_a, seed), narrow.inputs(tokens_b, seed)
        hidden_a, _ = dispatch(a, inputs_a[group.rank])
        assert NVLS._get_rsv_tensor().shape == (16, 32), "between its dispatch and combine a group's own buffers are shown"
        assert BASE._valid_tokens().item() == 7
        hidden_b, _ = dispatch(b, inputs_b[group.rank])  # both in flight
        assert BASE._valid_tokens().item() == 5 + seed
        gathered_a, combined_a = expected(inputs_a, tokens_a, real=(2, 2))
        gathered_b, combined_b = expected(inputs_b, tokens_b)
        same("first group", hidden_a[:7], gathered_a.hidden)
        same("first group's ids", a.routing_map[:7], gathered_a.topk_idx.long())
        same("second group", hidden_b[: 5 + seed], gathered_b.hidden)
        same("second group's ids", b.routing_map[: 5 + seed], gathered_b.topk_idx.long())
        for layer, shape, inputs, combined in ((b, narrow, inputs_b, combined_b), (a, wide, inputs_a, combined_a)):
            own = inputs[group.rank].partial
            partial = torch.zeros(layer.routing_map.shape[0], shape.hidden_size)
            partial[: own.shape[0]] = own
            same("combined", combine(layer, partial), combined[group.rank])
        dispatch(later, inputs_a[group.rank])
        assert NVLS._get_rsv_tensor().shape == (16, 32), "so it is in a layer that begins no step"
        combine(later, NVLS._get_rsv_tensor())
        assert NVLS._get_rsv_tensor().shape == (8, 8), "outside a layer the group allocated last is shown"
    megatron.close()
    dist.destroy_process_group()


def run_expert_tensor_parallel(group: tf.EPGroup) -> None:
    process_groups(group, "expert tensor parallelism")
    shape, tokens = Shape(2), (2, 3, 1, 2)
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], [0, 1], [2, 3])]
    ep, expt_tp = pairs[group.rank % 2], pairs[2 + group.rank // 2]
    groups = megatron.ProcessGroups(ep=ep, expt_tp=expt_tp, tp=expt_tp, tp_ep=dist.group.WORLD)
    with pytest.raises(ValueError, match="expert_tensor_parallel_size is 2"):
        shape.make(NVLS, groups)
    NCCL._use_allgather_v = True
    layer = shape.make(NCCL, groups)
    assert (layer.ep_size, layer.ep_rank, layer.tp_size, layer.tp_rank) == (2, group.rank // 2, 2, group.rank % 2)
    inputs = make_inputs(shape.rows, tokens, seed=0, partial_dtype=torch.float32)
    gathered, combined = expected(inputs, tokens)
    same("hidden", dispatch(layer, inputs[group.rank])[0], gathered.hidden)
    same("combined", combine(layer, inputs[group.rank].partial), combined[group.rank])
    megatron.close()
    dist.destroy_process_group()


def test_rows_travel_between_all_shards_of_an_expert() -> None:
    run_ranks(run_expert_tensor_parallel, 4)


# --- whole layers ---------------------------------------------------------------------------------------------------


def run_layer_alone_and_in_a_crowd(group: tf.EPGroup, backend: str) -> list[str]:
    """One token's bits, whatever else is in the batch: dispatch and combine in batch-invariant mode."""
    shape = Shape(group.size)
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group), batch_invariant_mode=True, inference_grouped_gemm_backend=backend)
    token = shape.inputs((1, 0, 0)[: group.size], seed=99)[0]
    results = []
    for tokens in ((1, 0, 0)[: group.size], (1, 8, 3)[: group.size], (8, 0, 1)[: group.size]):
        inputs = shape.inputs(tokens, seed=sum(tokens))
        first = inputs[0]
        hidden, ids, probs = (
            torch.cat([mine, others[1:]])
            for mine, others in zip(
                (token.hidden, token.topk_idx, token.topk_weights),
                (first.hidden, first.topk_idx, first.topk_weights),
                strict=True,
            )
        )
        inputs[0] = dataclasses.replace(first, hidden=hidden, topk_idx=ids, topk_weights=probs)
        gathered, _ = dispatch(layer, inputs[group.rank])
        out = combine(layer, gathered.float() * torch.tensor([0.3, 1e-3, 7.7])[group.rank])
        if group.rank == 0:
            results.append(out[0].view(torch.int16).tolist())
    return [str(result) for result in results]


def test_a_tokens_bits_do_not_depend_on_the_batch() -> None:
    alone, *crowded = run_ranks(run_layer_alone_and_in_a_crowd, 3, "torch")[0]
    assert crowded == [alone, alone]


def run_experts_through_class_methods(group: tf.EPGroup, name: str) -> None:
    """Experts that read the class methods, as Megatron's do, between dispatch and combine: against all experts on one rank."""
    shape, tokens = Shape(2, experts_per_rank=3, hidden_size=16), (4, 3)
    if name == "nvls":
        NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    NCCL._use_allgather_v = name == "nccl"
    torch.manual_seed(5)
    every = ExpertsConfig(hidden_size=16, intermediate_size=8, num_experts=6, activation=Activation("squared_relu"))
    experts = Experts(every, range(6)).to(group.device)
    layer = shape.make(NVLS if name == "nvls" else NCCL, megatron.ProcessGroups(ep=group))
    own = on(group.device, shape.inputs(tokens)[group.rank])

    def run(layer, start: int, count: int, out):
        hidden, probs = dispatch(layer, own)
        return combine(
            layer,
            megatron.fused_moe(
                hidden,
                probs,
                experts.up_proj[start : start + count],
                experts.down_proj[start : start + count],
                activation_type="squared_relu",
                num_local_experts=count,
                local_expert_start=start,
                valid_tokens=BASE._valid_tokens(),
                routing_map=layer.routing_map,
                out=out(),
            ),
        )

    got = run(layer, group.rank * 3, 3, NVLS._get_rsv_tensor if name == "nvls" else lambda: None)
    alone = NCCL(6, list(range(6)), shape.config())
    torch.testing.assert_close(got, run(alone, 0, 6, lambda: None), rtol=2e-2, atol=1e-3)


# --- wrong use ------------------------------------------------------------------------------------------------------


def run_wrong_uses(group: tf.EPGroup) -> None:
    shape = Shape(2)
    groups = megatron.ProcessGroups(ep=group)
    layer = shape.make(NVLS, groups)
    own = shape.inputs((3, 2))[group.rank]
    with pytest.raises(StateError, match=r"top-k 2 .*allocated: nothing\. Call .*allocate_buffers"):
        dispatch(layer, own)
    with pytest.raises(ConfigError, match="topk must be a positive int"):
        NVLS.allocate_buffers(W, 0, 16, group)
    NVLS.allocate_buffers(W, 2, 24, group)
    with pytest.raises(StateError, match=r"hidden size 16.*hidden_size=24"):
        dispatch(layer, own)
    NVLS.allocate_buffers(W, 2, 16, group)
    with pytest.raises(StateError, match="token_dispatch"):
        layer.token_combine(torch.zeros(16, 16))
    with pytest.raises(CapacityError, match="begin_step announced 0"):
        dispatch(shape.make(NVLS, groups, first=False), own)
    with pytest.raises(CapacityError, match="num_tokens is 9 but the workspace was opened for 8"):
        dispatch(layer, shape.inputs((9, 9))[group.rank])
    dispatch(layer, own)
    with pytest.raises(ShapeError, match=r"expert output must be \[16, 16\]"):
        layer.token_combine(torch.zeros(5, 16))
    combine(layer, torch.zeros(16, 16))  # a refused call can be made again
    address = NVLS._step_metadata.data_ptr()
    NVLS.allocate_buffers(W, 2, 16, group)
    assert NVLS._step_metadata.data_ptr() == address, "the same allocation again changes nothing"
    with pytest.raises(ConfigError, match="max_tokens_per_rank differs"):
        NVLS.allocate_buffers(W + group.rank, 4, 16, group)
    NVLS.allocate_buffers(W + 4, 2, 16, group)
    dispatch(layer, shape.inputs((9, 9))[group.rank])
    combine(layer, torch.zeros(24, 16))
    NVLS._delete_buffers()
    with pytest.raises(StateError, match="allocate_buffers"):
        NVLS._rank_token_offset()


def run_flashinfer(group: tf.EPGroup) -> None:
    shape = Shape(2)
    NVLS.allocate_buffers(W, 2, 16, group)
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group), inference_grouped_gemm_backend="flashinfer")
    dispatch(layer, shape.inputs((8, 8))[group.rank])
    assert NVLS._get_rsv_tensor() is None
    combine(layer, torch.zeros(16, 16))
    assert NVLS._get_rsv_tensor() is not None
    dispatch(layer, shape.inputs((1, 2))[group.rank])
    assert (layer.routing_map[3:] == -1).all(), "FlashInfer's kernel does not know V"
    combine(layer, torch.zeros(16, 16))


def run_late_rank(group: tf.EPGroup) -> None:
    megatron.configure(timeout_s=0.5)
    shape = Shape(2)
    NVLS.allocate_buffers(W, 2, 16, group)
    layer = shape.make(NVLS, megatron.ProcessGroups(ep=group))
    if group.rank == 1:
        group.channel.barrier("rank 0 gave up", 20.0)
        return
    with pytest.raises(tf.PeerTimeoutError) as caught:
        dispatch(layer, shape.inputs((1, 1))[group.rank])
    with pytest.raises(tf.PeerTimeoutError):
        megatron.check()
    group.channel.barrier("rank 0 gave up", 20.0)
    assert (caught.value.rank, caught.value.phase) == (1, "not-entered")


# --- small scenarios, in one start of two rank processes ------------------------------------------------------------

SCENARIOS = {
    "bfloat16-on-the-wire": (run_bfloat16_wire,),
    **{f"padding-{name}": (run_padding, case) for name, case in PADDING.items()},
    "shared-experts-launched-by-the-dispatcher": (run_shared, False),
    "shared-experts-launched-by-the-layer": (run_shared, True),
    "two-groups-in-a-process": (run_two_groups,),
    "experts-between-nvls-dispatch-and-combine": (run_experts_through_class_methods, "nvls"),
    "experts-between-nccl-dispatch-and-combine": (run_experts_through_class_methods, "nccl"),
    "flashinfer-gets-no-float32-buffer-and-no-stale-rows": (run_flashinfer,),
    "wrong-uses-say-what-to-do": (run_wrong_uses,),
    "late-rank-is-named": (run_late_rank,),
}


def run_scenarios(group: tf.EPGroup) -> dict[str, str]:
    """Each scenario's traceback, empty if it passed. The first that fails is the last that is run."""
    outcomes = {}
    for name, (worker, *args) in SCENARIOS.items():
        megatron.configure(**dataclasses.asdict(megatron.Settings(timeout_s=5.0, open_timeout_s=5.0)))
        NCCL._use_allgather_v = False
        try:
            worker(group, *args)
        except BaseException:
            return {**outcomes, name: traceback.format_exc()}
        megatron.close()
        outcomes[name] = ""
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return run_ranks(run_scenarios, 2)


@pytest.mark.parametrize("name", SCENARIOS)
def test_between_two_ranks(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(name, "not run: one before it failed") == "", f"rank {rank}: {outcome.get(name)}"


# --- the real megatron-core -----------------------------------------------------------------------------------------


def megatron_setup(group: tf.EPGroup) -> SimpleNamespace:
    """megatron-core's own objects for a group of these ranks."""
    warnings.simplefilter("ignore")
    if group.device.type == "cpu":
        torch.cuda.current_device = lambda: "cpu"  # its dispatchers ask for the device so
    process_groups(group, "megatron")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import experts, moe_layer, token_dispatcher_inference
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = dist.group.WORLD
    groups.tp = groups.expt_tp = [dist.new_group([rank]) for rank in range(group.size)][group.rank]
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=2 * group.size, moe_router_topk=2,
        transformer_impl="inference_optimized", moe_router_dtype="fp32", add_bias_linear=False, normalization="RMSNorm",
        expert_model_parallel_size=group.size, moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    return SimpleNamespace(config=config, groups=groups, original=token_dispatcher_inference, layer=moe_layer, experts=experts)


def run_megatron_steps(group: tf.EPGroup, layer, switch) -> list[tuple[torch.Tensor, ...]]:
    """Rows and sums of a few steps; `switch` holds the mode of the NCCL classes."""
    results = []
    for tokens, uneven in (((3, 3), False), ((2, 5), True), ((1, 8), True)):
        switch._use_allgather_v = uneven
        own, V = Shape(2).inputs(tokens, seed=sum(tokens))[group.rank], sum(tokens)
        hidden, probs = dispatch(layer, own)
        partial = torch.full((hidden.shape[0], 16), float("nan"))
        partial[:V] = own.partial
        results.append((hidden[:V].clone(), probs[:V].clone(), layer.routing_map[:V].clone(), combine(layer, partial)))
    return results


def same_names(theirs: type, ours: type) -> None:
    """Every name that their class defines is ours too, with the same parameters."""
    for name in vars(theirs):
        assert hasattr(ours, name), f"{ours.__name__} has no {name}"
        if not name.startswith("__") and callable(getattr(theirs, name)):
            parameters = [list(inspect.signature(getattr(cls, name)).parameters) for cls in (theirs, ours)]
            assert parameters[0] == parameters[1], f"{ours.__name__}.{name}"


def run_against_megatron(group: tf.EPGroup) -> str:
    theirs = megatron_setup(group)
    original = theirs.original.NCCLAllGatherDispatcher
    original.allocate_buffers()
    arguments = {
        "num_local_experts": 2,
        "local_expert_indices": [2 * group.rank, 2 * group.rank + 1],
        "config": theirs.config,
        "pg_collection": theirs.groups,
    }
    wanted = run_megatron_steps(group, original(**arguments), original)
    for name in (BASE.__name__, NCCL.__name__, NVLS.__name__):
        same_names(getattr(theirs.original, name), getattr(megatron, name))
    undo = megatron.install()
    assert theirs.layer.NVLSAllGatherVDispatcher is theirs.experts.NVLSAllGatherVDispatcher is NVLS
    assert issubclass(theirs.layer.NCCLAllGatherDispatcher, theirs.original.MoEAllGatherTokenDispatcher)
    NCCL.allocate_buffers()
    NVLS.allocate_buffers(per_rank_worst_case_token_count=W, topk=2, hidden_size=16, ep_group=theirs.groups.ep)
    for cls in (theirs.layer.NCCLAllGatherDispatcher, theirs.layer.NVLSAllGatherVDispatcher):
        for want, ours in zip(wanted, run_megatron_steps(group, cls(**arguments), NCCL), strict=True):
            for name, a, b in zip(("hidden", "probs", "routing", "combined"), ours, want, strict=True):
                same(f"{cls.__name__} {name}", a, b)
    undo()
    assert theirs.layer.NCCLAllGatherDispatcher is original
    megatron.close()
    dist.destroy_process_group()
    return undo.version


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (it needs Python 3.12)")
def test_same_bits_as_megatrons_own_dispatcher() -> None:
    versions = run_ranks(run_against_megatron, 2, env={"NO_VCS_VERSION": "1"})
    assert versions[0].startswith(megatron.KNOWN_VERSIONS)
