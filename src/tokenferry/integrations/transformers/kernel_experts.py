"""This rank's experts of one MoE layer by our own kernels, on the model's own parameters.

No family has code here: what `@use_experts_implementation` leaves on a module says how its parameters lie, and its activation is
recognised by its results. What is not recognised stays with the model's own code (`local_experts.py`).

H hidden size, I intermediate size, E experts, e experts of this rank.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn

from tokenferry.activations import Activation, ActivationName
from tokenferry.dispatched import Dispatched, PartialRows, RowFormat
from tokenferry.errors import UsageError
from tokenferry.experts import BorrowedExperts, ExpertScratch, ExpertWeights
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.packed_experts import PackedExperts
from tokenferry.integrations.transformers.settings import LayerShape, Options

_PLAIN: Final[tuple[ActivationName, ...]] = ("relu", "squared_relu", "gelu", "gelu_tanh", "silu")
_GATED: Final[tuple[ActivationName, ...]] = ("swiglu", "clamped_swiglu", "limited_swiglu", "geglu", "geglu_tanh")
_LIMITS: Final = ("limit", "swiglu_limit")
_ALPHAS: Final = ("alpha", "swiglu_alpha")
"""Names under which modules keep what their clamped activations need. What they are good for is tried out."""
_BLOCK: Final = (128, 128)
_NUM_PROBES: Final = 512
_FAR: Final = 1e3
"""Times normal numbers: a clamp that no attribute tells of shows itself there, and the square of a square is still finite."""


class NotServed(Exception):
    """Why our kernels do not run a layer's experts."""


class KernelExperts:
    """The experts of one module, by our kernels.

    Args:
        module: the experts, decorated, loaded, and cut to this rank's.
        owned: this rank's experts.
        dtype: of the hidden rows.
        packed: how the module holds its experts if they are packed; they lie on the device by now.

    Raises:
        NotServed: with the reason.
    """

    def __init__(self, module: nn.Module, owned: range, dtype: torch.dtype, packed: PackedExperts | None = None) -> None:
        self._module = module
        names = parameter_names(module) if packed is None else packed.names
        self._borrowed_from = [_Source.of(module, name) for name in names.values()]
        self._implementation = implementation_of(module)
        self._copied_from: tuple[_Source, int] | None = None
        try:
            if packed is not None:
                self.borrowed = BorrowedExperts(packed.weights(module), owned, packed.activation, dtype=dtype)
                return
            norm = known_norm(module)
            if norm:
                [(name, weight)] = module.post_expert_norm.named_parameters()  # type: ignore[union-attr]
                holder = module.post_expert_norm.get_submodule(name.rpartition(".")[0])  # type: ignore[union-attr]
                self._copied_from = _Source(holder._parameters, name.rpartition(".")[2]), _version_of(weight)
            parameters: dict[str, Any] = {role: module._parameters[name] for role, name in names.items()}
            weights = ExpertWeights.view(**parameters, **norm, transposed=bool(module.is_transposed))
            self.borrowed = BorrowedExperts(weights, owned, known_activation(module, weights.down_proj.device), dtype=dtype)
        except UsageError as error:
            raise NotServed(str(error)) from error

    @property
    def holds(self) -> bool:
        """Whether our kernels still compute what the module would. See `what_changed`."""
        return self.what_changed() is None

    def what_changed(self) -> str | None:
        """Why our kernels no longer compute what the module would, or None. Each eager call of a layer asks, so it is cheap.

        The parameters are borrowed as views, which follow what is written to them, but not what is put in their place: an
        adapter, another `.data`, a copy in another dtype. The scale of a norm is a copy, which follows nothing.
        """
        for source in self._borrowed_from:
            if not source.is_same():
                return "its parameters are no longer those that were borrowed"
        if self._copied_from is not None:
            source, version = self._copied_from
            if not source.is_same() or _version_of(source.parameter) != version:
                return "the norm behind each expert was changed"
        if implementation_of(self._module) != self._implementation:
            return "another experts_implementation was set"
        return None

    def __call__(self, dispatched: Dispatched, out: PartialRows) -> PartialRows:
        """The partial rows, in `out`. Rows >= V are neither read nor written."""
        partial: PartialRows = self.borrowed(dispatched, out=out)
        return partial


def prepare_together(
    kernels: Sequence[KernelExperts], group: EPGroup, options: Options, shape: LayerShape
) -> tuple[ExpertScratch, dict[KernelExperts, str]]:
    """Loads the kernels of all layers, which run one after another and so share a scratch.

    Returns:
        The scratch; and why some could not be loaded, for want of a compiler, of shared memory or of anything else. Those must
        not be called. Each rank decides alone: what a layer sends does not depend on whose function computed it.
    """
    scratch = ExpertScratch(group.device)
    failed: dict[KernelExperts, str] = {}
    for each in kernels:
        try:
            each.borrowed.prepare(
                scratch,
                topk=shape.topk,
                max_rows=options.max_tokens_per_rank * group.size,
                out_dtypes=[options.combine_dtype or shape.hidden_dtype],
                quantized_rows=RowFormat.of(options.dispatch_format).is_quantized,
            )
        except Exception as error:  # noqa: BLE001  # Triton, its compilers and the driver have no error in common
            failed[each] = f"its kernels could not be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
    return scratch, failed


def implementation_of(module: Any) -> str | None:
    """The `experts_implementation` that the module's own function goes by."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


class _Source:
    """A parameter, or a buffer, and where its numbers were when it was borrowed."""

    __slots__ = ("_facts", "_name", "_parameters", "parameter")

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Source:
        return cls(module._buffers if name in module._buffers else module._parameters, name)

    def __init__(self, parameters: Any, name: str) -> None:
        self._parameters, self._name = parameters, name
        self.parameter = parameters[name]
        kind = type(self.parameter)
        if kind not in (nn.Parameter, torch.Tensor):  # of a subclass's tensor, nn.Parameter() makes one of that subclass
            raise NotServed(f"its {name} is a {kind.__name__}, which may keep its numbers elsewhere")
        self._facts = _facts(self.parameter)

    def is_same(self) -> bool:
        """Whether the module still has this parameter, and its numbers lie where they lay."""
        return self._parameters.get(self._name) is self.parameter and _facts(self.parameter) == self._facts


def _facts(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.stride()


def _version_of(tensor: torch.Tensor) -> int:
    """Tensors made in inference mode count no versions."""
    return -1 if tensor.is_inference() else tensor._version


def parameter_names(module: Any) -> dict[str, str]:
    """Names of the module's parameters by the arguments of `ExpertWeights.view`.

    Raises:
        NotServed: it has others.
    """
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


def known_activation(module: Any, device: torch.device | str = "cpu") -> Activation:
    """Ours that computes what the module's does, on a few hundred numbers in float32, on `device`.

    Raises:
        NotServed: there is none.
    """
    generator = torch.Generator().manual_seed(0)
    limits = _floats(module, _LIMITS)
    normal = torch.randn(6, _NUM_PROBES, generator=generator, dtype=torch.float32, device="cpu")
    sizes = torch.tensor([max([6.0, *(2 * limit for limit in limits)]), 1.0, _FAR], dtype=torch.float32, device="cpu")
    numbers = (normal * sizes.repeat(2).unsqueeze(1)).to(device)
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
    weights = list(norm.parameters())
    epsilon = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
    if len(weights) == 1 and weights[0].dim() == 1 and isinstance(epsilon, float):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(8, len(weights[0]), generator=generator, dtype=torch.float32, device="cpu").to(weights[0].device)
        expected, weight_H = _try_norm(norm, rows, generator)
        for scale_of in _SCALES:
            scaled = rows * scale_of(weight_H)
            if torch.allclose(
                scaled * torch.rsqrt(scaled.square().mean(1, keepdim=True) + epsilon), expected, rtol=1e-4, atol=1e-6
            ):
                return {"norm_scale": scale_of(weights[0].detach()), "norm_epsilon": epsilon}
    raise NotServed(f"the norm behind each expert ({type(norm).__name__}) is none of ours")


_SCALES: Final[tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = (
    lambda weight: (1.0 + weight).float(),
    lambda weight: 1.0 + weight.float(),
    lambda weight: weight.float().clone(),
)
"""What a norm makes of its weight. The first two differ in 16 bits."""


def _try_norm(norm: nn.Module, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What a copy of the norm makes of rows, and the random weight that it was given: with ones, or zeros, norms of other kinds
    would give the same results."""
    try:
        with torch.no_grad():
            copied = copy.deepcopy(norm)
            [weight_H] = copied.parameters()
            weight_H.copy_(torch.randn(len(weight_H), generator=generator, dtype=torch.float32, device="cpu"))
            return copied(rows), weight_H.detach()
    except Exception as error:
        raise NotServed(f"the norm behind each expert could not be tried out: {error}") from error


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
