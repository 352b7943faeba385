"""What a model was loaded with, and what its layers were found to be called with.

T this rank's rows, H hidden size, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenferry.integrations.transformers.exchange import Rows


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


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a layer's experts are called with. A rank without requests sends empty tensors of just this kind."""

    hidden_size: int
    num_experts: int
    topk: int
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype

    def empty_rows(self, device: torch.device) -> Rows:
        """What a rank without tokens sends."""
        return Rows(
            torch.empty(0, self.hidden_size, dtype=self.hidden_dtype, device=device),
            torch.empty(0, self.topk, dtype=torch.int64, device=device),
            torch.empty(0, self.topk, dtype=self.weight_dtype, device=device),
        )
