"""The attention masks of a decode step, where layers with a sliding window stand beside others.

They cannot be made within a recorded forward, since such layers count their tokens on the host. transformers makes each of them
by some fifteen launches, a share of them copies from the host: with gpt-oss-20b's shapes `generate()` took 0.85 ms more around a
step than with Qwen3's (2 x H200, 2026-11-26). One new token sees all that is no padding, or the last of it, so that each mask is
the caller's own, cut or padded.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from tokenferry.errors import ShapeError

_KINDS: Final = MappingProxyType({"full_attention": StaticLayer, "sliding_attention": StaticSlidingWindowLayer})
"""Names in a configuration's `layer_types`, and the layer of a static cache that belongs to each."""


def check_dimensions(attention_mask: object) -> None:
    """Refuses a mask that `generate()` cannot lengthen.

    Raises:
        ShapeError: it has more than two dimensions, so that no column can be added for a new token. transformers finds that out
            where prompts are numbers, and with `inputs_embeds` after the prompt's forward, which all ranks had taken part in.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() > 2:
        raise ShapeError(
            f"attention_mask must be [batch, length] in generate(), which adds a column for each new token; got "
            f"{list(attention_mask.shape)}. The model's own forward takes masks of four dimensions"
        )


def masks_of_windows(
    config: Any, cache: StaticCache, mask_BN: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """What transformers' `create_masks_for_generate` returns for one new token of each sequence.

    Args:
        config: of the text model. Its attention is "sdpa", whose masks are of bool, or "eager", whose masks are added to scores.
        mask_BN: [B, N], zero for padding, one column for each token so far and one for the new one.
        dtype: of masks that are added.

    Returns:
        [B, 1, 1, length of the layers' keys] by layer type; None: these layers are not known here.
    """
    layers: list[Any] = cache.layers
    if not getattr(config, "is_causal", True) or len(getattr(config, "layer_types", None) or ()) != len(layers):
        return None
    by_kind: dict[str, Any] = {}
    for kind, layer in zip(config.layer_types, layers, strict=True):
        if type(layer) is not _KINDS.get(kind) or by_kind.setdefault(kind, layer).max_cache_len != layer.max_cache_len:
            return None
    window, num_tokens = by_kind.get("sliding_attention"), mask_BN.shape[1]
    if window is None or window.cumulative_length_int != num_tokens - 1:
        return None
    seen_BN = mask_BN.to(torch.bool)
    if config._attn_implementation == "eager":
        seen_BN = torch.where(seen_BN, 0.0, torch.finfo(dtype).min).to(dtype)
    return {kind: _fitted(seen_BN, layer.max_cache_len)[:, None, None] for kind, layer in by_kind.items()}


def _fitted(seen_BN: torch.Tensor, length: int) -> torch.Tensor:
    """Its last columns, or with more of them for what lies ahead, which nothing sees."""
    num_tokens = seen_BN.shape[1]
    if num_tokens >= length:
        return seen_BN[:, num_tokens - length :]
    unseen = False if seen_BN.dtype == torch.bool else torch.finfo(seen_BN.dtype).min
    return pad(seen_BN, (0, length - num_tokens), value=unseen)
