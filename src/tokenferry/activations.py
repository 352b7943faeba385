"""The non-linear step of an expert, between its two matrix products. Shared by routed and shared experts.

Legend of shape suffixes: N columns of the first product (2·I with a gate, else I), I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from tokenferry.errors import ConfigError

ActivationName = Literal[
    "swiglu", "clamped_swiglu", "limited_swiglu", "geglu", "geglu_tanh", "squared_relu", "gelu", "gelu_tanh", "relu", "silu"
]
"""Those named after a gated linear unit (glu) take a gate and an up half; the others take one row of numbers and no gate."""

GATED = frozenset({"swiglu", "clamped_swiglu", "limited_swiglu", "geglu", "geglu_tanh"})


@dataclass(frozen=True)
class Activation:
    """Which activation, and how the gate lies in the first product's columns.

    Attributes:
        name: one of `ActivationName`.
        interleaved: False: the columns are all gates, then all ups. True: gate 0, up 0, gate 1, up 1, ... (gpt-oss checkpoints).
        alpha: of `clamped_swiglu`, the steepness of its sigmoid (gpt-oss: 1.702). Others do not read it.
        limit: of `clamped_swiglu` and `limited_swiglu`: the gate is clamped from above, the up half on both sides (gpt-oss: 7.0);
            likewise. `clamped_swiglu` then adds 1 to the up half, as gpt-oss does; `limited_swiglu` is `swiglu` behind the clamp,
            as deepseek-v4 has it.

    Raises:
        ConfigError: an unknown name, `interleaved` without a gate, or a limit that is not positive.
    """

    name: ActivationName = "swiglu"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        if self.name not in get_args(ActivationName):
            raise ConfigError(f"activation must be one of {', '.join(get_args(ActivationName))}; got {self.name!r}")
        if self.interleaved and not self.gated:
            raise ConfigError(f"interleaved describes a gate and an up half, but {self.name} has no gate; drop interleaved")
        if not self.limit > 0:
            raise ConfigError(f"limit must be positive, got {self.limit!r}")

    @property
    def gated(self) -> bool:
        """Whether the first product has 2·I columns."""
        return self.name in GATED

    def num_columns(self, intermediate_size: int) -> int:
        """N, the columns of the first product."""
        return 2 * intermediate_size if self.gated else intermediate_size

    def __call__(self, product_N: torch.Tensor) -> torch.Tensor:
        """Activate the rows of a first product.

        The arithmetic is float32 and is rounded once, to the dtype of the input: a fused kernel that keeps its
        accumulator in registers computes the same.

        Args:
            product_N: [..., N], any floating dtype.

        Returns:
            [..., I], same dtype, contiguous.
        """
        if not self.gated:
            return _plain(self.name, product_N.float()).to(product_N.dtype)
        gate_I, up_I = self._halves(product_N)
        if self.name == "swiglu":
            return F.silu(gate_I.float()).mul_(up_I).to(product_N.dtype)
        if self.name in ("geglu", "geglu_tanh"):
            return F.gelu(gate_I.float(), approximate="none" if self.name == "geglu" else "tanh").mul_(up_I).to(product_N.dtype)
        gate_I = gate_I.float().clamp(max=self.limit)
        up_I = up_I.float().clamp(min=-self.limit, max=self.limit)
        if self.name == "limited_swiglu":
            return F.silu(gate_I).mul_(up_I).to(product_N.dtype)
        return gate_I.mul(torch.sigmoid(gate_I * self.alpha)).mul_(up_I.add_(1.0)).to(product_N.dtype)

    def _halves(self, product_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.interleaved:
            return product_N[..., 0::2], product_N[..., 1::2]
        gate_I, up_I = product_N.chunk(2, dim=-1)
        return gate_I, up_I


def _plain(name: ActivationName, x: torch.Tensor) -> torch.Tensor:
    match name:
        case "squared_relu":
            return F.relu(x).square()
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "silu":
            return F.silu(x)
    raise AssertionError(name)
