"""The expert that every token visits: one MLP on this rank's own rows, whole on every rank.

It needs nothing from the other ranks, so it can run while rows travel: between the halves of a dispatch, or on a side stream.

Legend of shape suffixes: T this rank's rows, H hidden size, I intermediate size, N columns of the first product (2·I with a
gate, else I).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.activations import Activation
from tokenferry.errors import ConfigError, DtypeError, ShapeError, check_kind
from tokenferry.fixed_linear import fixed_linear


@dataclass(frozen=True, kw_only=True)
class SharedExpertsConfig:
    """The shape of the shared MLP. Several shared experts of a model are one MLP of their summed intermediate size.

    Attributes:
        hidden_size: H, the full hidden size, also in a latent layer.
        intermediate_size: I, summed over the shared experts.
        activation: between the products.
        bias: both products have a bias.
        output_gate: the result is multiplied by sigmoid(hidden · output_gate), one number a row (qwen2_moe).

    Raises:
        ConfigError: a size below 1.
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    output_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}; give an int")
        check_kind("activation", self.activation, Activation)


class SharedExperts(nn.Module):
    """Parameters (no gradients): `up_proj` [N, H], `down_proj` [H, I], `up_bias` [N], `down_bias` [H], `output_gate` [1, H].

    Args:
        batch_invariant: a row's bits do not depend on T or on the other rows: the products are `fixed_linear`.
    """

    up_proj: nn.Parameter
    down_proj: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    output_gate: nn.Parameter | None

    def __init__(
        self,
        config: SharedExpertsConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.batch_invariant = config, batch_invariant
        H, I = config.hidden_size, config.intermediate_size
        N = config.activation.num_columns(I)
        shapes = {"up_proj": (N, H), "down_proj": (H, I), "up_bias": (N,), "down_bias": (H,), "output_gate": (1, H)}
        present = {"up_bias": config.bias, "down_bias": config.bias, "output_gate": config.output_gate}
        for name, shape in shapes.items():
            tensor = torch.zeros(shape, dtype=dtype, device=device) if present.get(name, True) else None
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        nn.init.normal_(self.up_proj, std=H**-0.5)
        nn.init.normal_(self.down_proj, std=I**-0.5)
        if self.output_gate is not None:
            nn.init.normal_(self.output_gate, std=H**-0.5)

    def prepare(self) -> None:
        """On CUDA, if batch-invariant: loads what a call launches. Loading waits for the device, so not amid steps."""
        weight: torch.Tensor = self.up_proj
        if self.batch_invariant and weight.is_cuda:
            self(torch.zeros(1, self.config.hidden_size, dtype=weight.dtype, device=weight.device))

    @torch.no_grad()
    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H], same dtype; T may be 0. Activation and output gate are float32, each rounded once.

        Raises:
            ShapeError, DtypeError: `hidden` is not [T, H] of the parameters' dtype.
        """
        check_kind("hidden", hidden_TH, torch.Tensor)
        if hidden_TH.dim() != 2 or hidden_TH.shape[1] != self.config.hidden_size:
            raise ShapeError(f"hidden must be [T, {self.config.hidden_size}] (the shared experts'), got {list(hidden_TH.shape)}")
        if hidden_TH.dtype != self.up_proj.dtype:
            raise DtypeError(f"hidden is {hidden_TH.dtype} but the shared experts are {self.up_proj.dtype}; convert one of them")
        linear = fixed_linear if self.batch_invariant else F.linear
        up_TN = linear(hidden_TH, self.up_proj, self.up_bias)
        output_TH = linear(self.config.activation(up_TN), self.down_proj, self.down_bias)
        if self.output_gate is None:
            return output_TH
        gate_T1 = torch.sigmoid(linear(hidden_TH, self.output_gate).float())
        return (output_TH * gate_T1).to(output_TH.dtype)

    def begin(self, hidden_TH: torch.Tensor, stream: torch.cuda.Stream | None = None) -> PendingShared:
        """Start `forward`, on `stream` if there is one, else at once on the current stream.

        Args:
            hidden_TH: as `forward`. It must not be written before `wait`.
            stream: a side stream; it is made to wait for the current one first. Capturable (a fork; `wait` is the join).
                Without rows it is left alone: there is nothing to overlap, and a fork without a kernel would put a second,
                needless dependency before the next launch.

        Returns:
            What `wait()` turns into the result. Call it exactly once, on the stream that was current here.
        """
        if stream is None or hidden_TH.shape[0] == 0:
            return PendingShared(self.forward(hidden_TH))
        stream.wait_stream(torch.cuda.current_stream(hidden_TH.device))
        with torch.cuda.stream(stream):
            return PendingShared(self.forward(hidden_TH), hidden_TH, stream)

    def extra_repr(self) -> str:
        return repr(self.config)


@dataclass(frozen=True, eq=False)
class PendingShared:
    """A shared expert under way.

    Why no `record_stream`: this object keeps `hidden` alive until the join, after which the current stream is behind the side
    stream; the result comes from the side stream's pool, and whoever next allocates there (`begin`) waits for the current stream
    first. record_stream would, during a graph capture, keep every layer's result from being reused until the capture ends.
    """

    output_TH: torch.Tensor
    hidden_TH: torch.Tensor | None = None
    stream: torch.cuda.Stream | None = None

    def wait(self) -> torch.Tensor:
        """The result [T, H], ready for the current stream."""
        if self.stream is not None:
            torch.cuda.current_stream(self.output_TH.device).wait_stream(self.stream)
        return self.output_TH
