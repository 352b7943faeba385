"""This rank's experts of one MoE layer by our own kernels, on the model's own parameters.

No family has code here: what `@use_experts_implementation` leaves on a module says how its parameters lie, and its activation is
recognised by its results. What is not recognised stays with the model's own code (`local_experts.py`).

H hidden size, I intermediate size, E experts, e experts of this rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from tokenferry.activations import Activation, ActivationName
from tokenferry.dispatched import Dispatched
from tokenferry.errors import UsageError
from tokenferry.experts import BorrowedExperts, ExpertScratch, ExpertWeights
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.settings import LayerShape, Options

_PLAIN: Final[tuple[ActivationName, ...]] = ("relu", "squared_relu", "gelu", "gelu_tanh", "silu")
_GATED: Final[tuple[ActivationName, ...]] = ("swiglu", "clamped_swiglu", "limited_swiglu", "geglu", "geglu_tanh")
_LIMITS: Final = ("limit", "swiglu_limit")
_ALPHAS: Final = ("alpha", "swiglu_alpha")
"""Names under which modules keep what their clamped activations need. What they are good for is tried out."""
_BLOCK: Final = (128, 128)
_NUM_PROBES: Final = 512


class NotServed(Exception):
    """Why our kernels do not run a layer's experts."""


class KernelExperts:
    """The experts of one module, by our kernels.

    Args:
        module: the experts, decorated, loaded, and cut to this rank's.
        owned: this rank's experts.
        dtype: of the hidden rows.

    Raises:
        NotServed: with the reason.
    """

    def __init__(self, module: nn.Module, owned: range, dtype: torch.dtype) -> None:
        self._module = module
        self._names = _parameter_names(module)
        self._parameters = {role: module._parameters[name] for role, name in self._names.items()}
        try:
            norm = known_norm(module)
            weights = ExpertWeights.view(**self._parameters, **norm, transposed=bool(module.is_transposed))  # type: ignore[arg-type]
            self.borrowed = BorrowedExperts(weights, owned, known_activation(module), dtype=dtype)
        except UsageError as error:
            raise NotServed(str(error)) from error

    @property
    def holds(self) -> bool:
        """Whether the module still has the parameters that were borrowed: an adapter may have put others in their place."""
        parameters = self._module._parameters
        return all(parameters.get(name) is self._parameters[role] for role, name in self._names.items())

    def __call__(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor:
        """The partial rows, in `out`. Rows >= V are neither read nor written."""
        return self.borrowed(dispatched, out=out)


def prepare_together(kernels: Sequence[KernelExperts], group: EPGroup, options: Options, shape: LayerShape) -> ExpertScratch:
    """Loads the kernels of all layers, which run one after another and so share a scratch."""
    scratch = ExpertScratch(group.device)
    for each in kernels:
        each.borrowed.prepare(
            scratch,
            topk=shape.topk,
            max_rows=options.max_tokens_per_rank * group.size,
            out_dtypes=[options.combine_dtype or shape.hidden_dtype],
        )
    return scratch


def _parameter_names(module: Any) -> dict[str, str]:
    """Names of the module's parameters by the arguments of `ExpertWeights.view`."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    roles = {"up": up, "down": "down_proj"}
    if module.has_bias:
        roles |= {"up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}
    found = {name for name, _ in module.named_parameters() if not name.startswith("post_expert_norm.")}
    if {f"{up}_scale_inv", "down_proj_scale_inv"} <= found:
        roles |= {"up_scale": f"{up}_scale_inv", "down_scale": "down_proj_scale_inv"}
        if getattr(module, "activation_scheme", None) != "dynamic" or tuple(module.block_size or ()) != _BLOCK:
            raise NotServed("its float8 has other scales than one for each 128 x 128 weights and for each 128 numbers of a row")
    if found != set(roles.values()):
        raise NotServed(f"its parameters are {', '.join(sorted(found))}, and ours takes {', '.join(sorted(roles.values()))}")
    return roles


def known_activation(module: Any) -> Activation:
    """Ours that computes what the module's does, on a few hundred numbers in float32.

    Raises:
        NotServed: there is none.
    """
    device = module.down_proj.device
    generator = torch.Generator().manual_seed(0)
    limits = _floats(module, _LIMITS)
    numbers = torch.randn(2, _NUM_PROBES, generator=generator, dtype=torch.float32, device="cpu") * max(
        [6.0, *(2 * limit for limit in limits)]
    )
    numbers = torch.cat([numbers, torch.randn(2, _NUM_PROBES, generator=generator, dtype=torch.float32, device="cpu")], dim=1).to(
        device
    )
    compute = module._apply_gate if module.has_gate else module.act_fn
    try:
        with torch.no_grad():
            expected = compute(numbers)
    except Exception as error:
        raise NotServed(f"its activation could not be tried out: {error}") from error
    for activation in _candidates(bool(module.has_gate), limits, _floats(module, _ALPHAS)):
        if torch.allclose(activation(numbers), expected, rtol=1e-4, atol=1e-6):
            return activation
    raise NotServed(f"its activation ({type(module.act_fn).__name__ if hasattr(module, 'act_fn') else 'a gate'}) is none of ours")


def known_norm(module: Any) -> dict[str, Any]:
    """What `ExpertWeights.view` is to know of the norm behind each expert, recognised by its results; nothing if there is none.

    Raises:
        NotServed: it does something else than scaling, then dividing by the root of the mean square.
    """
    if not getattr(module, "has_post_expert_norm", False):
        return {}
    norm = module.post_expert_norm
    weights = [parameter.detach().float() for parameter in norm.parameters()]
    epsilon = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    if len(weights) == 1 and weights[0].dim() == 1 and isinstance(epsilon, float):
        [weight_H] = weights
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(8, len(weight_H), generator=generator, dtype=torch.float32, device="cpu").to(weight_H.device)
        with torch.no_grad():
            expected = norm(rows)
        for scale_H in (1.0 + weight_H, weight_H.clone()):
            scaled = rows * scale_H
            if torch.allclose(
                scaled * torch.rsqrt(scaled.square().mean(1, keepdim=True) + epsilon), expected, rtol=1e-4, atol=1e-6
            ):
                return {"norm_scale": scale_H, "norm_epsilon": epsilon}
    raise NotServed(f"the norm behind each expert ({type(norm).__name__}) is none of ours")


def _candidates(gated: bool, limits: list[float], alphas: list[float]) -> Iterator[Activation]:
    if not gated:
        yield from map(Activation, _PLAIN)
        return
    for name, interleaved in itertools.product(_GATED, (False, True)):
        settings = itertools.product(limits, alphas or [1.0]) if name in ("clamped_swiglu", "limited_swiglu") else [(7.0, 1.0)]
        for limit, alpha in settings:
            yield Activation(name, interleaved=interleaved, alpha=alpha, limit=limit)


def _floats(module: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return sorted({float(value) for value in values if isinstance(value, (int, float)) and 0 < value < math.inf})
