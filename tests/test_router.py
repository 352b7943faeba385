"""Choice and weights: against numbers worked by hand, against loops in float64, against the families' own routers."""

from __future__ import annotations

import copy
import importlib
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plain_moe import plain_route
from tokenferry.errors import ConfigError, DtypeError, ShapeError
from tokenferry.router import NOT_LOADED, Router, RouterConfig, _is_few_rows, few_rows, route

DEEPSEEK = {
    "score_function": "sigmoid",
    "score_correction_bias": True,
    "num_groups": 4,
    "topk_groups": 2,
    "renormalize": True,
    "renormalize_epsilon": 1e-20,
    "scaling_factor": 2.5,
}
GPT_OSS = {"topk_before_score": True, "linear_bias": True, "float32_logits": False}


def config(num_experts, topk, hidden_size=4, **rules):
    return RouterConfig(hidden_size=hidden_size, num_experts=num_experts, topk=topk, **rules)


def logits_of(*probabilities):
    """Logits whose softmax is exactly these probabilities (up to rounding)."""
    return torch.tensor([[math.log(p) for p in probabilities]])


def sigmoid_logits_of(*scores):
    return torch.tensor([[math.log(s / (1 - s)) for s in scores]])


# --- numbers worked by hand ---------------------------------------------------------------------------------------------


def test_softmax_scores_are_the_weights():
    weights, idx = route(logits_of(0.125, 0.5, 0.125, 0.25), config(4, 2))
    assert idx.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.25]]))


def test_renormalised_weights_sum_to_one():
    weights, _ = route(logits_of(0.125, 0.5, 0.125, 0.25), config(4, 2, renormalize=True))
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 1 / 3]]))


def test_the_scaling_factor_comes_after_renormalising():
    weights, _ = route(logits_of(0.125, 0.5, 0.125, 0.25), config(4, 2, renormalize=True, scaling_factor=3.0))
    torch.testing.assert_close(weights, torch.tensor([[2.0, 1.0]]))


def test_topk_before_softmax_shares_one_among_the_chosen():
    logits = torch.tensor([[0.0, math.log(3.0), -9.0, -9.0]])
    weights, idx = route(logits, config(4, 2, topk_before_score=True))
    assert idx.tolist() == [[1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))


def test_topk_before_sigmoid_scores_each_chosen_alone():
    logits = torch.tensor([[-5.0, math.log(3.0), -9.0, 0.0]])
    weights, idx = route(logits, config(4, 2, score_function="sigmoid", topk_before_score=True))
    assert idx.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.5]]))


def test_the_correction_changes_the_choice_and_not_the_weights():
    logits, correction = sigmoid_logits_of(0.9, 0.5, 0.2, 0.6), torch.tensor([0.0, 0.0, 1.0, 0.0])
    rules = config(4, 2, score_function="sigmoid", score_correction_bias=True)
    weights, idx = route(logits, rules, correction)
    assert idx.tolist() == [[2, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.2, 0.9]]))


def test_the_best_expert_of_a_dropped_group_is_not_chosen():
    # Groups (0 1) (2 3) (4 5) score 0.9 + 0.1, 0.6 + 0.6, 0.55 + 0.5: the first is dropped, and expert 0 with it.
    logits = sigmoid_logits_of(0.9, 0.1, 0.6, 0.59, 0.55, 0.5)
    weights, idx = route(logits, config(6, 3, score_function="sigmoid", num_groups=3, topk_groups=2))
    assert idx.tolist() == [[2, 3, 4]]
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.59, 0.55]]))


def test_a_group_scored_by_its_best_expert_alone():
    logits = sigmoid_logits_of(0.9, 0.1, 0.6, 0.59, 0.55, 0.5)
    rules = config(6, 2, score_function="sigmoid", num_groups=3, topk_groups=1, group_score_topk=1)
    assert route(logits, rules)[1].tolist() == [[0, 1]]


def test_a_dropped_group_loses_also_to_negative_scores():
    # All corrected scores are negative. Zeros in place of the dropped ones would win.
    logits, correction = sigmoid_logits_of(0.5, 0.5, 0.4, 0.4), torch.full((4,), -2.0)
    rules = config(4, 2, score_function="sigmoid", num_groups=2, topk_groups=1, score_correction_bias=True)
    assert sorted(route(logits, rules, correction)[1][0].tolist()) == [0, 1]


def test_the_epsilon_keeps_weights_finite_when_all_scores_vanish():
    logits = torch.full((1, 4), -200.0)  # sigmoid underflows to 0 in float32
    rules = config(4, 2, score_function="sigmoid", renormalize=True, renormalize_epsilon=1e-20)
    assert route(logits, rules)[0].tolist() == [[0.0, 0.0]]


# --- loops in float64 ---------------------------------------------------------------------------------------------------

RULES = {
    "softmax": {},
    "softmax-renormalised": {"renormalize": True},
    "softmax-groups-by-best": {"num_groups": 4, "topk_groups": 2, "group_score_topk": 1, "scaling_factor": 16.0},
    "softmax-correction": {"score_correction_bias": True, "renormalize": True},
    "softmax-of-chosen": {"topk_before_score": True},
    "sigmoid": {"score_function": "sigmoid"},
    "sigmoid-of-chosen": {"score_function": "sigmoid", "topk_before_score": True},
    "sigmoid-correction": {"score_function": "sigmoid", "score_correction_bias": True},
    "deepseek": DEEPSEEK,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_route_equals_loops_in_float64(name, dtype):
    generator = torch.Generator().manual_seed(7)
    rules = config(16, 4, **RULES[name])
    logits = torch.randn(33, 16, generator=generator).to(dtype)
    if dtype == torch.bfloat16:  # equal logits have no order: keep them apart, exactly in bfloat16
        logits = torch.stack([torch.randperm(16, generator=generator) for _ in range(33)]).to(dtype) / 8 - 1
    correction = torch.randn(16, generator=generator) * 0.3 if rules.score_correction_bias else None
    weights, idx = route(logits, rules, correction)
    expected = plain_route(logits, rules, correction)
    assert weights.dtype == torch.float32
    assert idx.tolist() == [[expert for expert, _ in row] for row in expected]
    torch.testing.assert_close(
        weights.double(), torch.tensor([[w for _, w in row] for row in expected]).double(), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
def test_indices_have_the_dtype_that_was_asked_for(idx_dtype):
    assert route(torch.randn(3, 4), config(4, 2, idx_dtype=idx_dtype))[1].dtype == idx_dtype


def test_zero_rows_give_zero_rows():
    router = Router(config(16, 4, hidden_size=8, **DEEPSEEK), dtype=torch.bfloat16)
    weights, idx = router(torch.empty(0, 8, dtype=torch.bfloat16))
    assert weights.shape == idx.shape == (0, 4)


def test_routing_asks_the_host_nothing():
    """Tensors on "meta" have no values: .item(), nonzero and masks as indices would raise."""
    for rules in (DEEPSEEK, GPT_OSS):
        router = Router(config(16, 4, hidden_size=8, **rules), device="meta")
        assert router(torch.empty(5, 8, dtype=torch.bfloat16, device="meta"))[1].shape == (5, 4)


# --- the module ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("float32_logits", "weight"), [(True, 1 / (1 + math.exp(-0.5))), (False, 0.5)], ids=["fp32", "as hidden"]
)
def test_logits_are_computed_in_the_dtype_that_was_asked_for(float32_logits, weight):
    hidden = torch.ones(1, 256, dtype=torch.bfloat16)
    router = Router(config(2, 1, hidden_size=256, float32_logits=float32_logits))
    router.weight[0] = 1.0  # logit 256
    router.weight[1] = 0.0
    router.weight[1, 0], router.weight[1, 1] = 256.0, 0.5  # logit 256.5: in bfloat16 256 too
    assert math.isclose(router(hidden)[0].item(), weight, rel_tol=1e-6)


FAMILIES = {
    "qwen3_moe": ("Qwen3MoeTopKRouter", {"renormalize": True, "float32_logits": False}, {"norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeTopKRouter", {"float32_logits": False}, {}),
    "olmoe": ("OlmoeTopKRouter", {"float32_logits": False}, {}),
    "mixtral": ("MixtralTopKRouter", {"renormalize": True, "float32_logits": False}, {}),
    "gpt_oss": ("GptOssTopKRouter", GPT_OSS, {}),
    "deepseek_v3": ("DeepseekV3TopkRouter", DEEPSEEK, {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "glm4_moe": ("Glm4MoeTopkRouter", DEEPSEEK, {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "nemotron_h": ("NemotronHTopkRouter", DEEPSEEK, {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_router_equals_the_one_of(family):
    pytest.importorskip("transformers", reason="transformers is not installed")
    class_name, rules, settings = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    settings = {"hidden_size": 32, "num_experts_per_tok": 4, "norm_topk_prob": rules.get("renormalize", False)} | settings
    theirs = getattr(module, class_name)(_their_config(**settings))
    ours = Router(config(16, 4, hidden_size=32, **rules), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        if rules.get("linear_bias"):
            theirs.bias.copy_(ours.bias.copy_(torch.randn(16, generator=generator)))
        if rules.get("score_correction_bias"):
            theirs.e_score_correction_bias.copy_(ours.score_correction_bias.copy_(torch.randn(16, generator=generator) * 0.2))
        hidden = torch.randn(40, 32, generator=generator)
        weights, idx = ours(hidden)
        _, their_weights, their_idx = theirs(hidden)
    ours_TE, theirs_TE = _by_expert(weights, idx, 16), _by_expert(their_weights, their_idx, 16)
    assert torch.equal(ours_TE > 0, theirs_TE > 0)
    # Where theirs leaves the chosen unsorted, the sum behind renormalising has another order: last bits.
    torch.testing.assert_close(ours_TE, theirs_TE, rtol=3e-7 if "score_correction_bias" in rules else 0, atol=0)


def _their_config(**settings):
    """What these routers read of a model's configuration, under each of its names."""
    return type("Config", (), settings | {"num_experts": 16, "num_local_experts": 16})()


def _by_expert(weights, idx, num_experts):
    return torch.zeros(len(idx), num_experts).scatter_(1, idx.long(), weights.float())


# --- wrong use ----------------------------------------------------------------------------------------------------------

WRONG_SETTINGS = {
    "more chosen than there are": ({"topk": 9}, "topk is 9 but there are only 8 experts"),
    "no expert chosen": ({"topk": 0}, "topk must be at least 1, got 0"),
    "unknown score": ({"score_function": "tanh"}, "softmax or sigmoid, got 'tanh'"),
    "short indices": ({"idx_dtype": torch.int16}, "torch.int32 or torch.int64, got torch.int16"),
    "unequal groups": ({"num_groups": 3}, "8 experts do not form 3 equal groups"),
    "more groups kept than there are": ({"num_groups": 2, "topk_groups": 3}, "topk_groups is 3 but there are only 2 groups"),
    "groups too small for their score": ({"num_groups": 8, "topk_groups": 8}, "group_score_topk is 2 but a group has only 1"),
    "groups too small for the choice": ({"num_groups": 4, "topk_groups": 1, "topk": 3}, "topk is 3 but 1 groups hold only 2"),
    "correction of scores that come later": ({"topk_before_score": True, "score_correction_bias": True}, "drop one"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_settings_that_cannot_work_are_refused(case):
    settings, message = WRONG_SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**({"hidden_size": 4, "num_experts": 8, "topk": 2} | settings))


def test_logits_for_another_number_of_experts_are_refused():
    with pytest.raises(ShapeError, match=r"logits must be \[T, 8\] .* got \[3, 7\]"):
        route(torch.zeros(3, 7), config(8, 2))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_correction_comes_with_its_setting(wanted):
    with pytest.raises(ConfigError, match="score_correction_bias is"):
        route(torch.zeros(3, 8), config(8, 2, score_correction_bias=wanted), None if wanted else torch.zeros(8))


def test_hidden_rows_of_another_size_are_refused():
    with pytest.raises(ShapeError, match=r"\[T, 4\] .* got \[3, 5\]"):
        Router(config(8, 2))(torch.zeros(3, 5))


def test_hidden_rows_of_another_dtype_are_refused_without_float32_logits():
    with pytest.raises(DtypeError, match=r"float32 but the router's weight is torch\.bfloat16"):
        Router(config(8, 2, float32_logits=False))(torch.zeros(3, 4))


# --- experts that are switched off, by hand --------------------------------------------------------------------------------

OFF = -math.inf


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        pytest.param([0.0, OFF, 0.0, OFF, 0.0, 0.0, 0.0, 0.0], [7, 6, 4], id="two-groups-stand-complete"),
        pytest.param([0.0, OFF] * 4, [2, 0, -1], id="one-of-each-group-is-off"),
        pytest.param([OFF] * 8, [-1, -1, -1], id="all-are-off"),
    ],
)
def test_neither_a_switched_off_expert_nor_one_of_a_third_group_is_chosen(correction, expected):
    """Scores rise with the number but for expert 2's; a group is as good as its two best, so one with an expert off is the worst,
    and of equals the lower number is kept."""
    rules = config(8, 3, **{**DEEPSEEK, "scaling_factor": 1.0})
    logits = torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.4, 0.35, 0.5, 0.6]])
    weights, idx = route(logits, rules, torch.tensor(correction))
    assert idx[0].tolist() == expected
    is_off = idx[0] == -1
    assert weights[0][is_off].tolist() == [0.0] * int(is_off.sum())
    if not is_off.all():
        assert weights[0].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("num_experts", "hidden_size", "most"), [(8, 4096, 64), (32, 2880, 64), (128, 2048, 48), (256, 7168, 6)])
def test_the_kernel_for_few_rows_serves_where_it_is_the_faster_one(num_experts: int, hidden_size: int, most: int) -> None:
    assert few_rows(num_experts, hidden_size) == most


def test_a_copy_has_no_loaded_kernel() -> None:
    """A launch can neither be copied nor pickled."""
    router = Router(config(8, 2), dtype=torch.float32)
    router._loaded = (torch.device("cpu"), torch.float32, lambda: None)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert twin._loaded == NOT_LOADED
        assert torch.equal(twin.weight, router.weight)


@pytest.mark.parametrize(
    ("dtype", "trained", "expected"),
    [
        pytest.param(torch.bfloat16, False, True, id="served"),
        pytest.param(torch.bfloat16, True, False, id="weight-wants-a-gradient"),
        pytest.param(torch.float64, False, False, id="sums-of-float64"),
    ],
)
def test_what_the_kernel_for_few_rows_cannot_do_is_left_to_operators(dtype: torch.dtype, trained: bool, expected: bool) -> None:
    with FakeTensorMode():
        weight = torch.empty(8, 4, dtype=dtype, device="cuda").requires_grad_(trained)
        assert _is_few_rows(torch.empty(2, 4, dtype=dtype, device="cuda"), weight, None) == expected
