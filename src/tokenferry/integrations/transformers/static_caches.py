"""The static caches that `generate()` takes where the user named none. Kept, since a recorded forward is of one cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import DynamicCache, StaticCache

MOST_KEPT: Final = 4
"""Caches that are kept for later calls, of different batches and lengths."""
MOST_KEPT_BYTES: Final = 2 << 30
"""Of the caches that are kept beside the one that was used last. A cache of 32 sequences of 4096 tokens of Qwen3-30B-A3B has
12 GiB, of one sequence of 1024 tokens 0.1 GiB."""
_GRANULE: Final = 64
"""Lengths are rounded up to it, so that calls of about the same length share a cache. PyTorch's attention copies a mask whose
rows are no multiple of 16 bytes long, in each layer."""


@dataclass(eq=False)
class _Kept:
    kind: object
    num_tokens: int
    cache: StaticCache
    is_lent: bool = True


class StaticCaches:
    """At most `MOST_KEPT` caches. One that is lent is not lent again before `take_back`."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        """Those that were used last come last."""

    def lend(self, kind: object, num_tokens: int, make: Callable[[int], StaticCache]) -> StaticCache:
        """An empty cache for at least `num_tokens`, from those that are kept if one fits: its length costs attention time, so
        that a much longer one does not.

        Args:
            kind: what else a cache must agree in, the batch size above all.
            make: a new one of this length.
        """
        longest = rounded(num_tokens + num_tokens // 2)
        fitting = [each for each in self._kept if each.kind == kind and num_tokens <= each.num_tokens <= longest]
        fitting = [each for each in fitting if not each.is_lent]
        if fitting:
            lent = min(fitting, key=lambda each: each.num_tokens)
            self._kept.remove(lent)
            lent.is_lent = True
            lent.cache.reset()
        else:
            self._drop(lambda free: len(free) >= MOST_KEPT or _bytes_of(free) > MOST_KEPT_BYTES)  # before memory is asked for
            lent = _Kept(kind, rounded(num_tokens), make(rounded(num_tokens)))
        self._kept.append(lent)
        return lent.cache

    def take_back(self) -> None:
        """Those that were lent may be lent again."""
        for each in self._kept:
            each.is_lent = False
        self._drop(lambda free: len(free) > MOST_KEPT or _bytes_of(free[:-1]) > MOST_KEPT_BYTES)

    def holds(self, cache: object) -> bool:
        """Whether it is one of these."""
        return any(each.cache is cache for each in self._kept)

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()

    def _drop(self, are_too_many: Callable[[list[_Kept]], bool]) -> None:
        """Forgets those that are not lent, the first ones first, until they are not too many."""
        free = [each for each in self._kept if not each.is_lent]
        while free and are_too_many(free):
            self._kept.remove(free.pop(0))


def _bytes_of(kept: list[_Kept]) -> int:
    return sum(num_bytes(each.cache) for each in kept)


def rounded(num_tokens: int) -> int:
    """The length of a new cache for so many tokens."""
    return -(-num_tokens // _GRANULE) * _GRANULE


def num_bytes(cache: StaticCache) -> int:
    """On the device, as far as it is made by now."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def expected_bytes(config: Any, batch_size: int, num_tokens: int, dtype: torch.dtype) -> int:
    """What a static cache takes at most, by the names that configurations have in common."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    both = 2 * width
    if getattr(config, "kv_lora_rank", None):  # latent attention, whose caches hold what the latents expand to
        both = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return int(config.num_hidden_layers * batch_size * num_tokens * heads * both * dtype.itemsize)


def growing(cache: StaticCache, config: Any) -> DynamicCache:
    """A copy that grows, of a cache whose layers are all `StaticLayer`s. Waits for the device."""
    copied, num_tokens = DynamicCache(config=config), int(cache.get_seq_length())
    for number, layer in enumerate(cache.layers):
        copied.update(layer.keys[:, :, :num_tokens].clone(), layer.values[:, :, :num_tokens].clone(), number)  # type: ignore[union-attr,index]
    return copied
