"""Whether forwards of a model can be captured in CUDA graphs, as far as that is known before one is tried."""

from __future__ import annotations

from typing import Protocol

import torch

from tokenferry.integrations.transformers.kernel_experts import implementation_of
from tokenferry.integrations.transformers.layer import LOCAL_EXPERTS, ExpertLayer
from tokenferry.integrations.transformers.local_experts import has_grouped_rows
from tokenferry.integrations.transformers.settings import Options
from tokenferry.workspace import Workspace


class Loaded(Protocol):
    """What is looked at of a model: its `ExpertParallel`."""

    options: Options
    layers: tuple[ExpertLayer, ...]

    @property
    def workspace(self) -> Workspace: ...


def why_not_captured(parallel: Loaded) -> str | None:
    """What in a forward would wait for the host, and what to do about it; None: nothing that is known. On CUDA devices."""
    workspace = parallel.workspace
    if workspace.active_transport.counts_pass_through_hosts:
        return (
            f"the transport is {workspace.transport!r}, whose counts pass through the host; load the model with "
            "transport='p2p' or 'nvls'"
        )
    if parallel.options.exact:
        return "exact=True has the host read every rank's count of tokens; load the model without it"
    reasons = (why_layer_waits(layer) for layer in parallel.layers)
    return next((reason for reason in reasons if reason is not None), None)


def why_layer_waits(layer: ExpertLayer) -> str | None:
    """The same for the experts of one layer."""
    if layer.kernels is not None and layer.kernels.holds:
        return None
    implementation = implementation_of(layer.module)
    down = getattr(layer.module, "down_proj", None)
    if not isinstance(down, torch.Tensor):
        return None
    if implementation == "eager":
        return "experts_implementation is 'eager', which has the host read which experts were chosen; leave it out"
    grouped = implementation == "grouped_mm" or (implementation == LOCAL_EXPERTS and has_grouped_rows(layer.module))
    if grouped and down.dtype in (torch.float32, torch.float16):
        return (
            f"transformers' own function runs the experts, and in {down.dtype} grouped_mm has the host read the rows of each; "
            "load the model in bfloat16, or with experts_implementation='batched_mm'"
        )
    return None
