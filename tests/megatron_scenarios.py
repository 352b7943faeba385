"""Scenarios of Megatron-Core's dispatchers between ranks: padding, shared experts, two groups, whole layers, wrong use."""

import dataclasses
import traceback
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from megatron_work import (
    BASE,
    NCCL,
    NVLS,
    Shape,
    W,
    combine,
    device_of,
    dispatch,
    expected,
    on,
    process_groups,
    same,
)
from patience import PATIENT_S
from tokenferry.activations import Activation
from tokenferry.errors import CapacityError, ConfigError, ShapeError, StateError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.integrations import megatron
from tokenferry.testing.data import RankInputs, make_inputs


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


def run_memory(group: tf.EPGroup) -> None:
    """The [G, *] buffers are counted in on the collective transport, which has none of its own: 28 bytes were reported."""
    shape = Shape(2)
    NVLS.allocate_buffers(W, shape.topk, shape.hidden_size, group)
    shown = (NVLS._symm_agv_hidden, NVLS._symm_agv_routing, NVLS._symm_agv_probs, NVLS._symm_rsv)
    workspace = NVLS._symm_rsv["handle"]
    counts = tf.Workspace.required_bytes(workspace.config, 2, W, transport="collective")
    assert workspace.transport == "collective"
    num_bytes = workspace.nbytes
    assert num_bytes == counts + sum(each["tensor"].nbytes for each in shown)
    megatron.reset()
    assert workspace.nbytes == num_bytes, "the buffers from before the reset are kept"


def run_one_order_each(group: tf.EPGroup) -> None:
    megatron.configure(combine_order="rank" if group.rank == 0 else "any")
    with pytest.raises(ConfigError, match="combine_order"):
        NVLS.allocate_buffers(W, 2, 16, group)


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
        group.channel.barrier("rank 0 gave up", PATIENT_S)
        return
    with pytest.raises(tf.PeerTimeoutError) as caught:
        dispatch(layer, shape.inputs((1, 1))[group.rank])
    with pytest.raises(tf.PeerTimeoutError):
        megatron.check()
    group.channel.barrier("rank 0 gave up", PATIENT_S)
    assert (caught.value.rank, caught.value.phase) == (1, "not-entered")


# --- small scenarios, in one start of two rank processes ------------------------------------------------------------

SCENARIOS = {
    "bfloat16-on-the-wire": (run_bfloat16_wire,),
    "row-buffers-are-counted-in": (run_memory,),
    "orders-of-sums-are-compared": (run_one_order_each,),
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
        megatron.configure(**dataclasses.asdict(megatron.Settings(timeout_s=PATIENT_S, open_timeout_s=PATIENT_S)))
        NCCL._use_allgather_v = False
        try:
            worker(group, *args)
        except BaseException:
            return {**outcomes, name: traceback.format_exc()}
        megatron.close()
        outcomes[name] = ""
    return outcomes
