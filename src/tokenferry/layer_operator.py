"""A whole MoE layer as one PyTorch operator, `tokenferry::moe`: for models that are compiled around their MoE layers.

Whoever puts layers into a model attaches to the workspace what runs one of them eagerly (`serve_layers`): it begins the step in
the first layer, dispatches, runs the experts, combines, and reports errors. None of that is traced, so that no guard of the
compiler depends on the state of a step, and a reset compiles nothing anew.

No buffer of the workspace is an argument, and nothing is said to be changed: a layer gets rows and returns new ones. So the
layers of a model stand in order because each reads, through the residual stream, what the one before it returned; a compiler has
no other order to choose from. Effect tokens, which would order operators that share no data, are not needed for this, and they
would be inputs and outputs of the compiled code. What data does not order is found when it runs: `run` is given the layer's
number, and refuses one whose turn has not come.

Shape suffixes: T this rank's rows, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from tokenferry.errors import StateError
from tokenferry.operators import Callee, define, find_workspace

LAYERS_NAME: Final = "layers of compiled code"
"""Name in `Workspace.attached` of what runs a layer."""

RunLayer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden_TH, topk_idx_TK, topk_weights_TK) -> new [T, H] of the dtype of `hidden_TH`."""


def serve_layers(workspace: Callee, run: RunLayer) -> None:
    """Has `run` compute the layers of compiled code on this workspace until it is closed. Called again, it replaces `run`."""
    workspace.attached[LAYERS_NAME] = run


def moe(
    number: int, layer: int, hidden_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
) -> torch.Tensor:
    """A layer's forward, for code that is being compiled. Inference only: the result carries no gradient.

    Args:
        number: of the workspace (`Workspace.number`).
        layer: as the `run` of `serve_layers` knows it.
        hidden_TH, topk_idx_TK, topk_weights_TK: this rank's rows.

    Returns:
        [T, H], new and contiguous.

    Raises:
        StateError: the workspace is gone or closed, or nothing was attached to it.
        Others as `run`.
    """
    summed_TH: torch.Tensor = _MOE(number, layer, hidden_TH.detach(), topk_idx_TK, topk_weights_TK.detach())
    return summed_TH


def _moe(
    workspace: int, layer: int, hidden_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
) -> torch.Tensor:
    callee = find_workspace(workspace)
    run: RunLayer | None = callee.attached.get(LAYERS_NAME)
    if run is None:
        callee.lifecycle.require_open("compiled code")
        raise StateError("compiled code: no layers are attached to the workspace; call serve_layers() once it is open")
    return run(layer, hidden_TH, topk_idx_TK, topk_weights_TK)


def _moe_shapes(
    workspace: int, layer: int, hidden_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(hidden_TH, memory_format=torch.contiguous_format)


_MOE: Final = define(
    "moe(SymInt workspace, SymInt layer, Tensor hidden, Tensor topk_idx, Tensor topk_weights) -> Tensor",
    _moe,
    _moe_shapes,
    # Inductor's CUDA graphs stop before it: what the host does in a layer would not be done in a replay.
    tags=[torch.Tag.cudagraph_unsafe],
)
