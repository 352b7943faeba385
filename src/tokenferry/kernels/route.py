"""A row's experts and weights in one launch. `tokenferry.router.route` does the same with a chain of PyTorch operators.

Legend: T rows, E experts, K chosen experts, G groups, M experts of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tokenferry.kernels import wire
from tokenferry.kernels.launch import has_pdl, launch_unbound

ONE_WARP: int = 512
"""Of at most so many experts a single warp chooses: its maxima need neither shared memory nor barriers."""
SIGNATURE = {
    "logits": "*LOGITS",
    "correction": "*fp32",
    "topk_weights": "*fp32",
    "topk_idx": "*IDX",
    "scale": "fp32",
    "epsilon": "fp32",
    "G": "constexpr",
    "M": "constexpr",
    "K": "constexpr",
    "GROUPS": "constexpr",
    "MEMBERS": "constexpr",
    "TOPK_GROUPS": "constexpr",
    "GROUP_TOPK": "constexpr",
    "SIGMOID": "constexpr",
    "TOPK_BEFORE_SCORE": "constexpr",
    "RENORMALIZE": "constexpr",
    "CORRECTED": "constexpr",
    "PDL": "constexpr",
}


@triton.jit
def sort_key(value, number):
    """An int64, larger for the larger value, NaN above all, and among equal values for the lower number. -0.0 equals 0.0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(value != value, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@triton.jit
def best_groups(choice, in_group, number, TOPK_GROUPS: tl.constexpr, GROUP_TOPK: tl.constexpr, G: tl.constexpr):
    """[GROUPS, 1]: whether a group is one of the TOPK_GROUPS whose GROUP_TOPK best members sum up to the most."""
    NONE: tl.constexpr = -0x8000000000000000
    keys = tl.where(in_group, sort_key(choice, number), NONE)
    total = tl.zeros([choice.shape[0]], tl.float32)
    for _ in tl.static_range(GROUP_TOPK):
        hit = keys == tl.max(keys, axis=1)[:, None]
        total += tl.sum(tl.where(hit, choice, 0.0), axis=1)
        keys = tl.where(hit, NONE, keys)
    group = tl.arange(0, choice.shape[0])
    group_keys = tl.where(group < G, sort_key(total, group), NONE)
    kept = group < 0
    for _ in tl.static_range(TOPK_GROUPS):
        hit = group_keys == tl.max(group_keys, axis=0)
        kept = kept | hit
        group_keys = tl.where(hit, NONE, group_keys)
    return kept[:, None]


@triton.jit
def softmax(values, is_there):
    """Over all elements where `is_there`; 0 elsewhere."""
    values = tl.where(is_there, values, float("-inf"))
    powers = tl.exp(values - tl.max(values))
    return tl.div_rn(powers, tl.sum(powers) + tl.zeros_like(powers))


@triton.jit
def sigmoid(values):
    return tl.div_rn(tl.full(values.shape, 1.0, tl.float32), 1.0 + tl.exp(-values))


@triton.jit
def route_kernel(
    logits,
    correction,
    topk_weights,
    topk_idx,
    scale,
    epsilon,
    G: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOPK_BEFORE_SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    CORRECTED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for each row. Its experts are a [GROUPS, MEMBERS] block, both powers of two, of which [G, M] exist.

    Args:
        logits: [T, G * M].
        correction: [G * M], read if CORRECTED.
        topk_weights, topk_idx: [T, K] out, in descending order of what the choice was made by; among equals the lower number
            comes first. Where corrections of -inf leave fewer than K experts in the kept groups, the rest is -1 with weight 0.
        scale, epsilon: factor of the weights, and what is added to their sum.
        TOPK_GROUPS, GROUP_TOPK: how many groups are kept, and how many of its best members a group is scored by; used if G > 1.
        SIGMOID: the score is the sigmoid of a logit, else the softmax.
        TOPK_BEFORE_SCORE: K logits are chosen first, and these alone are scored.

    Example:
        Logits ln 1, ln 4, ln 1, ln 2, two chosen by softmax: experts 1 and 3 with weights 0.5 and 0.25; renormalised 2/3 and 1/3.
        With corrections -inf, 0, -inf, -inf: expert 1 with weight 0.5, then -1 with weight 0.
    """
    NONE: tl.constexpr = -0x8000000000000000
    MINUS_INFINITY: tl.constexpr = -0x7F800001  # the upper half of its key; the upper half of NONE is below it
    CHOSEN: tl.constexpr = triton.next_power_of_2(K)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, MEMBERS)[None, :]
    number = group * M + member
    is_there = (group < G) & (member < M)
    wire.wait_for_previous_kernel(PDL)
    wire.let_next_kernel_start(PDL)
    value = tl.load(logits + row * (G * M) + number, mask=is_there, other=0.0).to(tl.float32)
    if TOPK_BEFORE_SCORE:
        score = value
    elif SIGMOID:
        score = sigmoid(value)
    else:
        score = softmax(value, is_there)
    choice = score
    if CORRECTED:
        choice = score + tl.load(correction + number, mask=is_there, other=0.0)
    if G > 1:
        kept = best_groups(choice, is_there, number, TOPK_GROUPS, GROUP_TOPK, G)
        choice = tl.where(kept, choice, float("-inf"))
    keys = tl.where(is_there, sort_key(choice, number), NONE)
    position = tl.arange(0, CHOSEN)
    weights = tl.zeros([CHOSEN], tl.float32)
    numbers = tl.zeros([CHOSEN], tl.int32)
    for k in tl.static_range(K):
        best = tl.max(tl.max(keys, axis=1), axis=0)
        hit = keys == best
        weights = tl.where(position == k, tl.sum(tl.sum(tl.where(hit, score, 0.0), axis=1), axis=0), weights)
        found = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
        if CORRECTED:
            found = tl.where((best >> 32) > MINUS_INFINITY, found, -1)
        numbers = tl.where(position == k, found, numbers)
        keys = tl.where(hit, NONE, keys)
    if TOPK_BEFORE_SCORE:
        weights = sigmoid(weights) if SIGMOID else softmax(weights, position < K)
    if CORRECTED:
        weights = tl.where(numbers >= 0, weights, 0.0)
    if RENORMALIZE:
        total = tl.sum(tl.where(position < K, weights, 0.0)) + epsilon
        weights = tl.div_rn(weights, total + tl.zeros_like(weights))
        if CORRECTED:  # in a row without any expert the division was 0 / 0
            weights = tl.where(numbers >= 0, weights, 0.0)
    tl.store(topk_weights + row * K + position, weights * scale, mask=position < K)
    tl.store(topk_idx + row * K + position, numbers.to(topk_idx.dtype.element_ty), mask=position < K)


def route(
    logits_TE: torch.Tensor,
    correction_E: torch.Tensor | None,
    *,
    topk: int,
    num_groups: int,
    topk_groups: int,
    group_score_topk: int,
    is_sigmoid: bool,
    topk_before_score: bool,
    renormalize: bool,
    epsilon: float,
    scale: float,
    idx_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_weights [T, K] float32 and topk_idx [T, K], on the current stream. Arguments as `RouterConfig` has them."""
    T, E = logits_TE.shape
    weights_TK = torch.empty(T, topk, dtype=torch.float32, device=logits_TE.device)
    idx_TK = torch.empty(T, topk, dtype=idx_dtype, device=logits_TE.device)
    if T == 0:
        return weights_TK, idx_TK
    logits_TE = logits_TE.contiguous()
    correction_E = None if correction_E is None else correction_E.float().contiguous()
    M = E // num_groups
    groups, members = triton.next_power_of_2(num_groups), triton.next_power_of_2(M)
    launch_unbound(
        route_kernel,
        T,
        (
            logits_TE,
            logits_TE if correction_E is None else correction_E,  # without a correction the pointer is not followed
            weights_TK,
            idx_TK,
            scale,
            epsilon,
        ),
        {
            "G": num_groups,
            "M": M,
            "K": topk,
            "GROUPS": groups,
            "MEMBERS": members,
            "TOPK_GROUPS": topk_groups,
            "GROUP_TOPK": group_score_topk,
            "SIGMOID": is_sigmoid,
            "TOPK_BEFORE_SCORE": topk_before_score,
            "RENORMALIZE": renormalize,
            "CORRECTED": correction_E is not None,
            "PDL": has_pdl(logits_TE.device),
        },
        num_warps=1 if groups * members <= ONE_WARP else 4,
        device=logits_TE.device,
    )
    return weights_TK, idx_TK
