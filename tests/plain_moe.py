"""The oracle of the layer tests: a mixture-of-experts layer in one process, in float64, with loops that a reader can check.

It shares nothing with the package but the modules' weights and settings.
"""

from __future__ import annotations

import torch

from tokenferry.activations import Activation
from tokenferry.experts import Experts
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts


def plain_route(logits, config: RouterConfig, correction=None):
    """For each row a list of (expert, weight), in the order in which they were chosen."""
    return [_route_row([float(x) for x in row], config, correction) for row in logits.double()]


def _route_row(logits, config, correction):
    score = _softmax if config.score_function == "softmax" else _sigmoid
    everyone = range(config.num_experts)
    if config.topk_before_score:
        chosen = sorted(everyone, key=lambda e: -logits[e])[: config.topk]
        weights = score([logits[e] for e in chosen])
    else:
        scores = score(logits)
        rank_by = [scores[e] + (0.0 if correction is None else float(correction[e])) for e in everyone]
        allowed = _experts_of_best_groups(rank_by, config) if config.num_groups > 1 else everyone
        chosen = sorted(allowed, key=lambda e: -rank_by[e])[: config.topk]
        weights = [scores[e] for e in chosen]
    if config.renormalize:
        total = sum(weights) + config.renormalize_epsilon
        weights = [w / total for w in weights]
    return [(e, w * config.scaling_factor) for e, w in zip(chosen, weights, strict=True)]


def _experts_of_best_groups(rank_by, config):
    size = config.num_experts // config.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
    best = sorted(groups, key=lambda group: -sum(sorted((rank_by[e] for e in group), reverse=True)[: config.group_score_topk]))
    return [e for group in best[: config.topk_groups] for e in group]


def _softmax(values):
    return torch.softmax(torch.tensor(values, dtype=torch.float64), 0).tolist()


def _sigmoid(values):
    return torch.sigmoid(torch.tensor(values, dtype=torch.float64)).tolist()


def plain_activation(activation: Activation, product):
    """One row of a first product, [N] float64 -> [I]."""
    if activation.name in ("geglu", "geglu_tanh"):
        gate, up = product.chunk(2)
        return plain_activation(Activation("gelu" if activation.name == "geglu" else "gelu_tanh"), gate) * up
    if activation.name in ("swiglu", "clamped_swiglu", "limited_swiglu"):
        half = len(product) // 2
        gate, up = (product[0::2], product[1::2]) if activation.interleaved else (product[:half], product[half:])
        if activation.name == "swiglu":
            return gate / (1 + torch.exp(-gate)) * up
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        if activation.name == "limited_swiglu":
            return up * gate / (1 + torch.exp(-gate))
        return (up + 1) * gate / (1 + torch.exp(-activation.alpha * gate))
    positive = product * (product > 0)
    return {
        "relu": lambda: positive,
        "squared_relu": lambda: positive * positive,
        "silu": lambda: product / (1 + torch.exp(-product)),
        "gelu": lambda: product * 0.5 * (1 + torch.erf(product / 2**0.5)),
        "gelu_tanh": lambda: product * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (product + 0.044715 * product**3))),
    }[activation.name]()


def plain_mlp(row, up_proj, down_proj, up_bias, down_bias, activation):
    """One expert on one row, float64."""
    product = up_proj.double() @ row.double()
    if up_bias is not None:
        product = product + up_bias.double()
    output = down_proj.double() @ plain_activation(activation, product)
    return output if down_bias is None else output + down_bias.double()


def plain_expert(row, experts: Experts, index: int):
    """Expert `index` (local) of `experts` on one row."""
    bias = experts.config.bias
    return plain_mlp(
        row,
        experts.up_proj[index],
        experts.down_proj[index],
        experts.up_bias[index] if bias else None,
        experts.down_bias[index] if bias else None,
        experts.config.activation,
    )


def plain_shared(row, shared: SharedExperts):
    """The shared expert on one row."""
    output = plain_mlp(row, shared.up_proj, shared.down_proj, shared.up_bias, shared.down_bias, shared.config.activation)
    if shared.output_gate is None:
        return output
    return output * torch.sigmoid(shared.output_gate[0].double() @ row.double())


def plain_moe(hidden, router: Router, experts: Experts, shared: SharedExperts | None = None, down=None, up=None):
    """The whole layer, float64 [T, H]; `experts` holds all of them; `down` and `up` are torch.nn.Linear without bias."""
    logits = hidden.double() @ router.weight.double().T
    if router.bias is not None:
        logits = logits + router.bias.double()
    result = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, choice in enumerate(plain_route(logits, router.config, router.score_correction_bias)):
        row = hidden[t].double() if down is None else down.weight.double() @ hidden[t].double()
        total = torch.zeros_like(row)
        for expert, weight in choice:
            total = total + weight * plain_expert(row, experts, expert)
        result[t] = total if up is None else up.weight.double() @ total
        if shared is not None:
            result[t] += plain_shared(hidden[t], shared)
    return result
