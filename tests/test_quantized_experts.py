"""Experts on quantized rows by the library's operators, and whole layers on every format that they take."""

import pytest
import torch

import tokenferry as tf
from quantized_experts import CASES, differing_terms, pair, quantized_terms
from rank_pool import RankPools
from tokenferry.dispatched import QuantizedRows
from tokenferry.experts import Experts, ExpertsConfig, apply_experts
from tokenferry.integrations.megatron import fused_moe
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing import same_bits

H, NUM_EXPERTS = 272, 6


@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
@pytest.mark.parametrize("name", CASES)
def test_quantized_rows_are_not_quantized_again(name: str, float8: bool) -> None:
    experts, came, plain = pair(CASES[name], float8=float8)
    assert came.hidden.scales.stride(0) > came.hidden.scales.shape[1] or came.hidden.scales.shape[1] % 4 == 0
    got = experts(came)
    assert got.dtype == CASES[name].dtype
    assert same_bits(got, experts(plain))


def test_the_dtype_between_the_products_is_the_weights_unless_another_is_given() -> None:
    experts, came, _ = pair(CASES["no-gate-float16"], float8=True)
    activation = experts.config.activation
    assert apply_experts(came, experts.weights, 2, activation).dtype == torch.bfloat16
    assert apply_experts(came, experts.weights, 2, activation, dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_quantized_as_the_specification_says(name: str, float8: bool) -> None:
    experts, _, plain = pair(CASES[name], float8=float8)
    assert not differing_terms(*quantized_terms(experts, plain, 19))


WRONG = {
    "bfloat16-values": (
        lambda rows: QuantizedRows(rows.values.bfloat16(), rows.scales),
        tf.DtypeError,
        "must have float8_e4m3fn",
    ),
    "float16-scales": (lambda rows: QuantizedRows(rows.values, rows.scales.half()), tf.DtypeError, "and float32 scales"),
    "a-scale-less": (
        lambda rows: QuantizedRows(rows.values, rows.scales[:, :-1]),
        tf.ShapeError,
        r"hidden.scales must be \[19, 3\]",
    ),
    "a-column-less": (lambda rows: QuantizedRows(rows.values[:, :-1], rows.scales), tf.ShapeError, r"hidden must be \[R, 272\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_quantized_rows_that_do_not_fit(name: str) -> None:
    spoil, error, said = WRONG[name]
    experts, came, _ = pair(CASES["swiglu"], float8=False)
    rows = tf.Dispatched(
        hidden=spoil(came.hidden), topk_idx=came.topk_idx, topk_weights=came.topk_weights, valid_tokens=came.valid_tokens
    )
    with pytest.raises(error, match=said):
        experts(rows)


@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
def test_fused_moe_takes_quantized_rows_and_writes_quantized_terms(float8: bool) -> None:
    experts, came, plain = pair(CASES["swiglu"], float8=float8)
    weights, terms = experts.weights, []
    for rows in (came, plain):
        out = QuantizedRows(torch.zeros(19, H, dtype=torch.float8_e4m3fn), torch.zeros(19, 3))
        given = (weights.up_proj, weights.down_proj, experts.config.activation, 3, 2, rows.valid_tokens, rows.topk_idx)
        scales = {"fc1_scale": weights.up_scale, "fc2_scale": weights.down_scale}
        assert fused_moe(rows.hidden, rows.topk_weights, *given, out=out, **scales) is out
        terms.append(out)
    assert not differing_terms(*terms)


def fused(**changed: object) -> object:
    experts, came, _ = pair(CASES["swiglu"], float8=True)
    weights = experts.weights
    given = {
        "hidden_states": came.hidden, "probs": came.topk_weights, "fc1_weight": weights.up_proj, "fc2_weight": weights.down_proj,
        "activation_type": experts.config.activation, "num_local_experts": 3, "local_expert_start": 2,
        "valid_tokens": came.valid_tokens, "routing_map": came.topk_idx, "fc1_scale": weights.up_scale,
        "fc2_scale": weights.down_scale,
    }  # fmt: skip
    return fused_moe(**{**given, **changed})


WRONG_FUSED = {
    "rows-of-another-size": ({"hidden_states": torch.zeros(19, 271).bfloat16()}, tf.ShapeError, r"^hidden_states must be \[R, 2"),
    "no-scales": ({"fc1_scale": None}, tf.DtypeError, "^fc1_weight is torch.float8_e4m3fn but there is no fc1_scale"),
    "scales-of-another-shape": ({"fc2_scale": torch.ones(3, 1, 1)}, tf.ShapeError, "^fc2_scale must be .* for fc2_weight"),
    "float32-rows": ({"hidden_states": torch.zeros(19, H)}, tf.DtypeError, "^hidden_states is torch.float32 but float8 experts"),
    "out-of-another-size": ({"out": torch.zeros(18, H)}, tf.ShapeError, r"^out is \[18, 272\] but there are .*; give one for"),
    "out-elsewhere": ({"out": torch.zeros(19, H, device="meta")}, tf.DeviceError, "^out is on meta but hidden_states is on cpu"),
    "a-gate-too-many": ({"activation_type": "squared_relu"}, tf.ShapeError, r"^fc1_weight must be \[3, 144, 272\]"),
    "matrices-of-one-expert": ({"fc2_weight": torch.zeros(H, 144)}, tf.ShapeError, "^fc2_weight must have num_local_experts, 3"),
}


@pytest.mark.parametrize("name", WRONG_FUSED)
def test_errors_of_fused_moe_name_its_own_arguments(name: str) -> None:
    changed, error, said = WRONG_FUSED[name]
    with pytest.raises(error, match=said):
        fused(**changed)


# --- whole layers -----------------------------------------------------------------------------------------------------


def layer_of(ws: tf.Workspace, *, float8: bool) -> MoELayer:
    torch.manual_seed(1)
    router = Router(RouterConfig(hidden_size=H, num_experts=NUM_EXPERTS, topk=2), device=ws.device)
    shape = ExpertsConfig(hidden_size=H, intermediate_size=48, num_experts=NUM_EXPERTS)
    every = Experts(shape, range(NUM_EXPERTS), device=ws.device)
    mine = Experts(shape, ws.group.expert_range(NUM_EXPERTS), device=ws.device)
    mine.load(every.up_proj, every.down_proj)
    if float8:
        mine.quantize()
    return MoELayer(ws, router, mine)


def layers(group: tf.EPGroup, transport: str, float8: bool) -> list[float]:
    """How far a layer of quantized rows is from one of plain rows, and whether the halves, solo and fewer rows work."""
    config = tf.MoEConfig(hidden_size=H, num_experts=NUM_EXPERTS, topk=2)
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(group.rank)).bfloat16().to(group.device)
    outputs = []
    for dispatch_format in ("same", "fp8_block128"):
        with tf.Workspace(
            config, group, max_tokens_per_rank=8, transport=transport, dispatch_format=dispatch_format, timeout_s=20
        ) as ws:
            layer = layer_of(ws, float8=float8)
            with ws.solo():
                ws.begin_step(3)
                assert layer(hidden[:3]).shape == (3, H)
            ws.begin_step(5 - group.rank, 4 - group.rank)
            outputs.append(layer(hidden[: 4 - group.rank]).float())
    plain, quantized = outputs
    return [((quantized - plain).norm() / plain.norm()).item()]


@pytest.mark.ranks
@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
@pytest.mark.parametrize("world_size", [1, 2], ids=["EP1", "EP2"])
def test_a_layer_of_quantized_rows_is_near_one_of_plain_rows(on_ranks: RankPools, world_size: int, float8: bool) -> None:
    """float8 weights multiply the same float8 rows either way: then the outputs are equal to the bit."""
    transport = "local" if world_size == 1 else "collective"
    for [error] in on_ranks(layers, world_size, transport, float8):
        assert error == 0 if float8 else 1e-3 < error < 0.06


@pytest.mark.interpreter
@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
def test_a_layer_of_quantized_rows_over_symmetric_memory(on_ranks: RankPools, float8: bool) -> None:
    for [error] in on_ranks(layers, 2, "p2p", float8, env={"TRITON_INTERPRET": "1"}, timeout_s=120):
        assert error == 0 if float8 else 1e-3 < error < 0.06


# --- combine in float8 ------------------------------------------------------------------------------------------------


def float8_terms(group: tf.EPGroup, transport: str, dispatch_format: str) -> tuple[float, bool]:
    """How far a layer is whose terms travel in float8, and whether its bits are those of terms quantized by themselves."""
    config = tf.MoEConfig(hidden_size=H, num_experts=NUM_EXPERTS, topk=2)
    hidden = torch.randn(5, H, generator=torch.Generator().manual_seed(group.rank)).bfloat16().to(group.device)
    settings = {"transport": transport, "dispatch_format": dispatch_format, "timeout_s": 20}
    outputs, terms = [], None
    for combine_dtype in (None, torch.float8_e4m3fn):
        with tf.Workspace(config, group, max_tokens_per_rank=8, combine_dtype=combine_dtype, **settings) as ws:
            layer = layer_of(ws, float8=False)
            with ws.solo():
                ws.begin_step(2)
                assert layer(hidden[:2]).shape == (2, H)
            ws.begin_step(5 - group.rank, 4 - group.rank)
            outputs.append(layer(hidden[: 4 - group.rank]))
            ws.begin_step(4 - group.rank)
            weights, idx = layer.router(hidden[: 4 - group.rank])
            got = layer.dispatcher.dispatch(hidden[: 4 - group.rank], idx, weights)
            sums = layer.experts(got, out=torch.empty(got.hidden.shape, device=group.device))
            terms = layer.dispatcher.combine(sums, got)
    plain, quantized = outputs
    near = ((quantized.float() - plain.float()).norm() / plain.float().norm()).item()
    return near, same_bits(quantized, terms)


@pytest.mark.ranks
@pytest.mark.parametrize("dispatch_format", ["same", "fp8_block128"])
@pytest.mark.parametrize(("world_size", "transport"), [(1, "local"), (2, "collective")], ids=["EP1", "EP2"])
def test_a_layer_whose_terms_are_float8(on_ranks: RankPools, world_size: int, transport: str, dispatch_format: str) -> None:
    for error, is_same in on_ranks(float8_terms, world_size, transport, dispatch_format):
        assert is_same and 1e-3 < error < 0.06


@pytest.mark.interpreter
@pytest.mark.parametrize("dispatch_format", ["same", "fp8_block128"])
def test_a_layer_whose_terms_are_float8_over_symmetric_memory(on_ranks: RankPools, dispatch_format: str) -> None:
    given = ("p2p", dispatch_format)
    for error, is_same in on_ranks(float8_terms, 2, *given, env={"TRITON_INTERPRET": "1"}, timeout_s=120):
        assert is_same and 1e-3 < error < 0.06
