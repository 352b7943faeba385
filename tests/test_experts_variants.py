"""`fields_of` gives a variant's fields by place: each operand and setting changes the fields of its own name, and no other."""

from dataclasses import fields, replace

import pytest
import torch

pytest.importorskip("triton")

from tokenferry.activations import Activation
from tokenferry.experts import variants
from tokenferry.experts.plan import Plan
from tokenferry.experts.weights import ExpertWeights

L, H, I, K = 3, 16, 24, 2
NO_LAUNCHES = Plan(up=(), down=())
CALL = {
    "weights": ExpertWeights(up_proj=torch.zeros(L, 2 * I, H), down_proj=torch.zeros(L, H, I)),
    "activation": Activation(), "topk": K, "dtype": torch.float16, "index_dtype": torch.int64, "out_dtype": torch.bfloat16,
    "aligned": True, "batch_invariant": False, "max_rows": None, "plan": None, "quantized_rows": False,
}  # fmt: skip
FIELDS = {
    "num_local_experts": L, "hidden_size": H, "intermediate_size": I, "topk": K, "dtype": torch.float16,
    "weight_dtype": torch.float32, "index_dtype": torch.int64, "out_dtype": torch.bfloat16, "activation": "swiglu", "gated": True,
    "interleaved": False, "up_bias": False, "down_bias": False, "up_strides": (2 * I * H, H, 1), "down_strides": (H * I, I, 1),
    "aligned": True, "batch_invariant": False, "max_rows": None, "plan": None, "norm": False, "quantized_rows": False,
}  # fmt: skip
CHANGES = {
    "nothing": ({}, {}),
    "topk": ({"topk": 7}, {"topk": 7}),
    "dtype": ({"dtype": torch.float32}, {"dtype": torch.float32}),
    "index dtype": ({"index_dtype": torch.int32}, {"index_dtype": torch.int32}),
    "out dtype": ({"out_dtype": torch.float32}, {"out_dtype": torch.float32}),
    "activation": ({"activation": Activation("geglu")}, {"activation": "geglu"}),
    "gate": ({"activation": Activation("gelu")}, {"activation": "gelu", "gated": False}),
    "interleaved": ({"activation": Activation(interleaved=True)}, {"interleaved": True}),
    "aligned": ({"aligned": False}, {"aligned": False}),
    "batch invariant": ({"batch_invariant": True}, {"batch_invariant": True}),
    "max rows": ({"max_rows": 11}, {"max_rows": 11}),
    "plan": ({"plan": NO_LAUNCHES}, {"plan": NO_LAUNCHES}),
    "quantized rows": ({"quantized_rows": True}, {"quantized_rows": True}),
}
"""What a call changes, and what of its variant."""
WEIGHTS = {
    "weight dtype": (
        {"up_proj": torch.zeros(L, 2 * I, H, dtype=torch.bfloat16), "down_proj": torch.zeros(L, H, I, dtype=torch.bfloat16)},
        {"weight_dtype": torch.bfloat16},
    ),
    "up transposed": ({"up_proj": torch.zeros(L, H, 2 * I).mT}, {"up_strides": (2 * I * H, 1, 2 * I)}),
    "down transposed": ({"down_proj": torch.zeros(L, I, H).mT}, {"down_strides": (H * I, 1, H)}),
    "up bias": ({"up_bias": torch.zeros(L, 2 * I)}, {"up_bias": True}),
    "down bias": ({"down_bias": torch.zeros(L, H)}, {"down_bias": True}),
    "norm": ({"norm_scale": torch.zeros(H)}, {"norm": True}),
    "address": ({"up_bias": torch.zeros(L * 2 * I + 1)[1:].view(L, 2 * I)}, {"up_bias": True, "aligned": False}),
}


def named(variant: variants.Variant) -> dict[str, object]:
    """Its fields by name."""
    return {field.name: getattr(variant, field.name) for field in fields(variant)}


@pytest.mark.parametrize("case", CHANGES)
def test_a_setting_changes_the_fields_of_its_name(case: str) -> None:
    changed, expected = CHANGES[case]
    assert named(variants.variant_of(**{**CALL, **changed})) == {**FIELDS, **expected}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_change_the_fields_of_their_name(case: str) -> None:
    changed, expected = WEIGHTS[case]
    weights = replace(CALL["weights"], **changed)
    assert named(variants.variant_of(**{**CALL, "weights": weights})) == {**FIELDS, **expected}
