"""A stand-in for flash-attn: the two entries that Megatron's dynamic batching calls, where that package is not installed.

flash-attn 2 is a compiled extension. `stand_in_for_flash_attention()` puts these entries in its place: Triton on GPUs, plain
torch on CPUs. They are for tests and examples: causal attention over a paged cache without windows, and not a fast one.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

VERSION = "2.8.3"
"""Whose arguments these entries take. Megatron asks for 2.7.3 or newer."""


def stand_in_for_flash_attention() -> bool:
    """Makes `import flash_attn` find these entries, unless the package is installed. True: it is the stand-in.

    It must come before megatron.core is imported, which looks for flash-attn then.
    """
    if "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn") is not None:
        return False
    if "flash_attn" not in sys.modules:
        module = ModuleType("flash_attn", __doc__)
        module.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
        module.__version__ = VERSION
        module.flash_attn_varlen_func = flash_attn_varlen_func
        module.flash_attn_with_kvcache = flash_attn_with_kvcache
        sys.modules["flash_attn"] = module
    return getattr(sys.modules["flash_attn"], "flash_attn_varlen_func", None) is flash_attn_varlen_func


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Requests of several lengths: q [tokens, heads, width], cumulative lengths [requests + 1]. Tokens behind them give zeros."""
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, _scale(q, options), 0)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Equal numbers of new tokens a request: q [requests, tokens, heads, width], whose keys are in the cache already."""
    scale = _scale(q, options)
    return _attention(q.flatten(0, 1), k_cache, v_cache, None, cache_seqlens, block_table, scale, q.shape[1]).view(q.shape)


def _scale(q: torch.Tensor, options: dict[str, Any]) -> float:
    """The softmax scale. Refuses what the stand-in does not do."""
    scale = options.pop("softmax_scale", None)
    served = {"causal": True, "window_size": (-1, -1), "return_attn_probs": False, "num_splits": 0}
    for name, value in options.items():
        wanted = served.get(name)
        if name not in served or (tuple(value) if isinstance(value, (tuple, list)) else value) != wanted:
            raise NotImplementedError(f"the flash-attn stand-in does not take {name}={value!r}: install flash-attn for that")
    return q.shape[-1] ** -0.5 if scale is None else scale


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_ends: torch.Tensor | None,
    key_counts: torch.Tensor,
    pages: torch.Tensor,
    scale: float,
    queries_per_request: int,
) -> torch.Tensor:
    """See `attention_kernel.launch`."""
    if q.device.type == "cuda":
        from engine_harness import attention_kernel

        return attention_kernel.launch(q, k, v, query_ends, key_counts, pages, scale, queries_per_request)
    requests, out = pages.shape[0], torch.zeros_like(q)
    starts = range(0, requests * queries_per_request + 1, queries_per_request) if query_ends is None else query_ends.tolist()
    counts = key_counts.tolist() if query_ends is None else key_counts.diff().tolist()
    for request, (start, end, num_keys) in enumerate(zip(starts, starts[1:], counts, strict=False)):
        if end > start:
            used = pages[request, : -(-num_keys // k.shape[1])].long()
            keys, values = (cache[used].flatten(0, 1)[:num_keys] for cache in (k, v))
            out[start:end] = one_request(q[start:end], keys, values, scale)
    return out


def one_request(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's attention for the last q.shape[0] of keys.shape[0] tokens: [tokens, heads, width] in the dtype of q."""
    queries, num_keys = q.shape[0], keys.shape[0]
    seen = torch.ones(queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - queries)
    q_HTD, keys_HTD, values_HTD = (each.transpose(0, 1).float() for each in (q, keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        q_HTD[None], keys_HTD[None], values_HTD[None], attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).to(q.dtype)
