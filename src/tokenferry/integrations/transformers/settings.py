"""What a model was loaded with, what its layers were found to be called with, and the workspace that follows from both.

T this rank's rows, H hidden size, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tokenferry.config import MoEConfig
from tokenferry.dispatched import FLOAT8, RowFormat
from tokenferry.errors import CapacityError, ConfigError
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.exchange import Rows
from tokenferry.workspace import Workspace

CudaGraphs = Literal["auto"] | bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `from_pretrained` was asked for."""

    max_tokens_per_rank: int
    transport: str
    combine_dtype: torch.dtype | None
    exact: bool
    serialize: bool
    own_kernels: bool
    """Our own expert kernels, wherever they serve; else the model's own expert function."""
    timeout_s: float
    open_timeout_s: float
    cuda_graphs: CudaGraphs = "auto"
    """Whether decode steps of `generate()` are CUDA graphs."""
    dispatch_format: str | RowFormat = "same"

    def __post_init__(self) -> None:
        row_format = RowFormat.of(self.dispatch_format)
        if row_format.name == "bytes":
            raise ConfigError("dispatch_format 'bytes' carries no hidden rows of a model; take 'same' or 'fp8_block128'")
        if self.exact and not row_format.is_same:
            raise ConfigError(
                f"exact=True and dispatch_format {row_format.name!r} exclude one another; take dispatch_format='same'"
            )
        if self.exact and self.combine_dtype == FLOAT8:
            raise ConfigError(f"exact=True and combine_dtype {FLOAT8} exclude one another; leave combine_dtype out")


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a layer's experts are called with. A rank without requests sends empty tensors of just this kind."""

    hidden_size: int
    num_experts: int
    topk: int
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype

    @classmethod
    def of(cls, rows: Rows, num_experts: int) -> LayerShape:
        """As a layer was called with them."""
        return cls(
            hidden_size=rows.hidden_TH.shape[1],
            num_experts=num_experts,
            topk=rows.topk_idx_TK.shape[1],
            hidden_dtype=rows.hidden_TH.dtype,
            weight_dtype=rows.topk_weights_TK.dtype,
        )

    def empty_rows(self, device: torch.device) -> Rows:
        """What a rank without tokens sends."""
        return Rows(
            torch.empty(0, self.hidden_size, dtype=self.hidden_dtype, device=device),
            torch.empty(0, self.topk, dtype=torch.int64, device=device),
            torch.empty(0, self.topk, dtype=self.weight_dtype, device=device),
        )


def over_capacity(num_tokens: int, capacity: int) -> CapacityError:
    """A forward has more tokens than `max_tokens_per_rank`."""
    return CapacityError(
        f"this forward has {num_tokens} tokens (batch, times beams, times length) but max_tokens_per_rank is {capacity}; load "
        f"the model with max_tokens_per_rank={num_tokens}, send fewer prompts at once, or have generate() split long ones with "
        f"prefill_chunk_size (times the prompts of the batch, at most {capacity})"
    )


def open_workspace(group: EPGroup, options: Options, shape: LayerShape) -> Workspace:
    """The workspace that all layers of such a model share. Collective. Raises as `Workspace`."""
    config = MoEConfig(
        hidden_size=shape.hidden_size * (shape.topk if options.exact else 1),
        num_experts=shape.num_experts,
        topk=shape.topk,
        dtype=shape.hidden_dtype,
    )
    return Workspace(
        config,
        group,
        max_tokens_per_rank=options.max_tokens_per_rank,
        transport=options.transport,
        dispatch_format=options.dispatch_format,
        combine_dtype=None if options.exact else options.combine_dtype,
        timeout_s=options.timeout_s,
        open_timeout_s=options.open_timeout_s,
    )
