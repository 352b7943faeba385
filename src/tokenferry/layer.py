"""A whole mixture-of-experts layer: router → dispatch → experts → combine, with shared experts and latent projections.

Legend of shape suffixes: T this rank's rows, R gathered rows, H full hidden size, D hidden size of the routed experts (the latent
size; D = H without latent projections), K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn, SupportsIndex, get_args

import torch
from torch import nn

from tokenferry.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError, check_kind, refuse_pickling
from tokenferry.experts import Experts
from tokenferry.fixed_linear import FixedLinear
from tokenferry.precision import refuse_conversion
from tokenferry.router import Router
from tokenferry.shared_experts import PendingShared, SharedExperts
from tokenferry.workspace import Workspace

SharedOverlap = Literal["off", "between", "stream"]
"""When the shared expert runs: in line, before anything else; between the halves of the dispatch; on a side stream."""


class MoELayer(nn.Module):
    """One MoE layer on this rank's tokens. Inference only.

    The order of events is the reference system's (Megatron-Core's inference layer). "off": shared expert on the full rows →
    route the full rows → project down → dispatch → experts → combine → project up → add the shared expert's result, last.
    "stream": it starts after the routing, on the side stream, and is joined where it is added. "between", which that system
    does not have: it starts right after the rows have left (`dispatch_begin`) and ends before they are waited for.

    Args:
        workspace: opened for this layer's shape: its hidden_size is D. The caller begins a step once per model forward
            (`workspace.begin_step`), for all layers.
        router: on rows of H.
        experts: this rank's, on rows of D.
        shared_experts: on rows of H; None for none.
        latent_down, latent_up: modules that take [T, H] to [T, D] and [T, D] to [T, H] (two `torch.nn.Linear`); both or neither.
        shared_overlap: see `SharedOverlap`. "stream" needs CUDA: on CPU tensors it runs in line. All give the same bits.
        batch_invariant: a promise that a token's bits do not depend on what else is in the step, on any rank. Every part has to
            be made for it: router, experts and shared experts with `batch_invariant=True`, the projections as `FixedLinear`.
        side_stream: for "stream"; layers that never run at the same time may share one. Default: one of the layer's own.

    Raises:
        ConfigError: the parts do not fit one another, or the workspace; both numbers are named.
    """

    def __init__(
        self,
        workspace: Workspace,
        router: Router,
        experts: Experts,
        *,
        shared_experts: SharedExperts | None = None,
        latent_down: nn.Module | None = None,
        latent_up: nn.Module | None = None,
        shared_overlap: SharedOverlap = "off",
        side_stream: torch.cuda.Stream | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        check_kind("workspace", workspace, Workspace)
        check_kind("router", router, Router)
        check_kind("experts", experts, Experts)
        if shared_overlap not in get_args(SharedOverlap):
            raise ConfigError(f"shared_overlap must be one of {', '.join(get_args(SharedOverlap))}; got {shared_overlap!r}")
        if (latent_down is None) != (latent_up is None):
            raise ConfigError("latent_down and latent_up belong together; give both or neither")
        if workspace.dispatch_format.name == "bytes":
            raise ConfigError(
                "a MoELayer moves hidden rows, but the workspace has dispatch_format 'bytes'; call the dispatcher and experts of "
                "your own"
            )
        self.workspace, self.dispatcher = workspace, workspace.dispatcher()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts
        self.latent_down, self.latent_up = latent_down, latent_up
        self.shared_overlap: SharedOverlap = shared_overlap
        self._side_stream = side_stream
        if shared_experts is not None and shared_overlap == "stream" and side_stream is None and workspace.device.type == "cuda":
            self._side_stream = torch.cuda.Stream(workspace.device)
        self._check_parts()
        if batch_invariant:
            self._check_invariance()
        router.prepare(workspace.config.dtype)  # here, since loading a kernel waits for the device
        experts.prepare(workspace)
        for part in (shared_experts, latent_down, latent_up):
            if isinstance(part, SharedExperts | FixedLinear):
                part.prepare()
        experts.bind(workspace)

    def _check_parts(self) -> None:
        config, routing, experts = self.workspace.config, self.router.config, self.experts.config
        full_size = routing.hidden_size
        pairs: list[tuple[str, object, str, object]] = [
            ("router topk", routing.topk, "workspace topk", config.topk),
            ("router num_experts", routing.num_experts, "workspace num_experts", config.num_experts),
            ("experts num_experts", experts.num_experts, "workspace num_experts", config.num_experts),
            ("experts hidden_size", experts.hidden_size, "workspace hidden_size", config.hidden_size),
            ("experts dtype", self.experts.dtype, "workspace dtype", config.dtype),
            ("workspace result_dtype", self.workspace.result_dtype, "workspace dtype", config.dtype),
        ]
        if self.latent_down is None:
            pairs.append(("router hidden_size", full_size, "workspace hidden_size", config.hidden_size))
        if self.shared_experts is not None:
            shared_size = self.shared_experts.config.hidden_size
            pairs.append(("shared experts hidden_size", shared_size, "router hidden_size", full_size))
        for name, value, other_name, other in pairs:
            if value != other:
                raise ConfigError(f"{name} is {value} but {other_name} is {other}; they must be equal")
        self._check_expert_range()

    def _check_invariance(self) -> None:
        """One part whose bits depend on the number of rows is enough to break the promise."""
        remedies = {
            "router": "make it with batch_invariant=True",
            "experts": "make them with batch_invariant=True",
            "shared_experts": "make them with batch_invariant=True",
            "latent_down": "make it a FixedLinear",
            "latent_up": "make it a FixedLinear",
        }
        for name, remedy in remedies.items():
            part = getattr(self, name)
            if part is not None and not getattr(part, "batch_invariant", False):
                raise ConfigError(f"batch_invariant is True, but {name} is not batch-invariant; {remedy}")
        if self.workspace.combine_order != "rank":
            raise ConfigError(
                "batch_invariant is True, but the workspace sums terms in any order; open it with combine_order='rank'"
            )

    def _check_expert_range(self) -> None:
        """Again after a reset: in a smaller group other ranges are due, and rows for a lost expert would come back as zeros."""
        group = self.workspace.group
        expected = group.expert_range(self.workspace.config.num_experts)
        if self.experts.expert_range != expected:
            raise ConfigError(
                f"this rank's experts are {self.experts.expert_range} but rank {group.rank} of {group.size} holds {expected}; "
                "build Experts with group.expert_range(num_experts) and load them"
            )
        self._generation = self.workspace.generation

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        refuse_pickling(self, "it stands on an open workspace: save its parts' state_dict(), and make a layer on each rank")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Casts and moves, by a module around this one too. Raises where the open workspace could not follow, before this layer
        changes; what stands before it in a module around it is converted by then."""
        workspace = self.workspace
        if workspace.lifecycle.closed:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        refuse_conversion(fn, workspace.config.dtype, workspace.device, "a MoELayer")
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output for this rank's rows. Every rank calls it in every step, with [0, H] if it has none.

        Args:
            hidden: [..., H] in the workspace's dtype; its rows are at most the num_tokens of the step.

        Returns:
            As `hidden` in shape and dtype; a new tensor.

        Raises:
            ShapeError, DtypeError, DeviceError: `hidden` is not [..., H] of the workspace's dtype, on its device.
            ConfigError: after a reset to another group, if the experts are still the old group's.
            Others as `Dispatcher.dispatch` and `Dispatcher.combine`.
        """
        if self.workspace.generation != self._generation:
            self._check_expert_range()
        self._check_hidden(hidden)
        hidden_TH = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        shared = self._begin_shared(hidden_TH) if self.shared_overlap == "off" else None
        topk_weights_TK, topk_idx_TK = self.router(hidden_TH)
        if self.shared_overlap == "stream":
            shared = self._begin_shared(hidden_TH)
        routed_TD = hidden_TH if self.latent_down is None else self.latent_down(hidden_TH)
        if self.shared_overlap == "between" and self.shared_experts is not None:
            self.dispatcher.dispatch_begin(routed_TD, topk_idx_TK, topk_weights_TK)
            shared = self._begin_shared(hidden_TH)
            gathered = self.dispatcher.dispatch_end()
        else:
            gathered = self.dispatcher.dispatch(routed_TD, topk_idx_TK, topk_weights_TK)
        partial_RD = self.experts(gathered, out=self.dispatcher.combine_input())
        output: torch.Tensor = self.dispatcher.combine(partial_RD, gathered)
        if self.latent_up is not None:
            output = self.latent_up(output)
        if shared is not None:
            output = output + shared.wait()
        return output.view(hidden.shape)

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        check_kind("hidden", hidden, torch.Tensor)
        full_size, workspace = self.router.config.hidden_size, self.workspace
        if hidden.dim() < 1 or hidden.shape[-1] != full_size:
            raise ShapeError(f"hidden must be [..., {full_size}] (the router's hidden_size), got {list(hidden.shape)}")
        if hidden.dtype != workspace.config.dtype:
            raise DtypeError(f"hidden is {hidden.dtype} but the workspace moves {workspace.config.dtype}; convert it with .to()")
        if hidden.device != workspace.device:
            raise DeviceError(f"hidden is on {hidden.device} but the workspace is on {workspace.device}; move it there")
        if hidden.layout is not torch.strided:
            raise LayoutError(f"hidden must be a dense tensor, got {hidden.layout}; call .to_dense()")

    def _begin_shared(self, hidden_TH: torch.Tensor) -> PendingShared | None:
        if self.shared_experts is None:
            return None
        return self.shared_experts.begin(hidden_TH, self._side_stream if self.shared_overlap == "stream" else None)

    def extra_repr(self) -> str:
        return f"{self.workspace!r}, shared_overlap={self.shared_overlap!r}"
