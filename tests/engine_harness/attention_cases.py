"""Inputs of paged attention, and torch's attention a request at a time to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine_harness.attention import flash_attn_varlen_func, flash_attn_with_kvcache

PAD_TOKENS = 3
"""Rows behind the last request, as Megatron pads a batch."""


@dataclass(frozen=True)
class AttentionCase:
    """`requests` are pairs of new tokens and keys, the new tokens' own included. One page's tokens are `page`."""

    requests: Sequence[tuple[int, int]]
    num_heads: int = 4
    key_heads: int = 2
    width: int = 16
    page: int = 16

    def make(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(len(self.requests))
        most_pages = max(-(-keys // self.page) for _, keys in self.requests)
        num_pages = 2 + len(self.requests) * most_pages
        tokens = sum(new for new, _ in self.requests) + PAD_TOKENS
        q = torch.randn(tokens, self.num_heads, self.width, generator=generator)
        # As Megatron keeps them: one layer's part of a larger tensor.
        caches = torch.randn(2, num_pages, self.page, self.key_heads, self.width, generator=generator)
        pages = torch.randperm(num_pages, generator=generator)[: len(self.requests) * most_pages].view(-1, most_pages).int()
        new, keys = (torch.tensor([0, *column]).cumsum(0).int() for column in zip(*self.requests, strict=True))
        made = {"q": q.to(dtype), "k": caches[0].to(dtype), "v": caches[1].to(dtype), "pages": pages, "new": new, "keys": keys}
        return {name: tensor.to(device) for name, tensor in made.items()}


MIXED = {
    "one-token": AttentionCase([(1, 1)]),
    "decode": AttentionCase([(1, 40), (1, 3), (1, 16)]),
    "prefill": AttentionCase([(33, 33), (16, 16), (5, 5)], page=32),
    "mixed": AttentionCase([(1, 70), (20, 20), (1, 2), (9, 31)]),
    "an-empty-request": AttentionCase([(4, 20), (0, 0), (2, 2)]),
    "groups-of-3-heads": AttentionCase([(7, 9), (1, 50)], num_heads=6, key_heads=2, width=32),
}
EQUAL = {
    "one-token-each": AttentionCase([(1, 40), (1, 3), (1, 16)]),
    "three-tokens-each": AttentionCase([(3, 40), (3, 3), (3, 18)]),
}


def wanted(made: dict[str, torch.Tensor], case: AttentionCase) -> torch.Tensor:
    """Attention as it is defined: for each new token the softmax over the keys that it sees. Padding gives zeros."""
    out, place = torch.zeros(made["q"].shape, dtype=torch.float64), 0
    q, k, v = (made[name].double().cpu() for name in ("q", "k", "v"))
    for request, (new, keys) in enumerate(case.requests):
        pages = made["pages"][request].long().cpu()
        own_keys, own_values = (cache[pages].flatten(0, 1)[:keys] for cache in (k, v))
        for number in range(new):
            seen = keys - new + number + 1
            for head in range(case.num_heads):
                key_head = head // (case.num_heads // case.key_heads)
                scores = own_keys[:seen, key_head] @ q[place, head] * case.width**-0.5
                out[place, head] = scores.softmax(0) @ own_values[:seen, key_head]
            place += 1
    return out


def check_mixed(case: AttentionCase, dtype: torch.dtype, device: torch.device | str, tolerance: float) -> None:
    made = case.make(dtype, device)
    got = flash_attn_varlen_func(
        made["q"], made["k"], made["v"], made["new"], made["keys"], 0, 0, block_table=made["pages"], causal=True
    )
    torch.testing.assert_close(got.double().cpu(), wanted(made, case), rtol=tolerance, atol=tolerance)


def check_equal(case: AttentionCase, dtype: torch.dtype, device: torch.device | str, tolerance: float) -> None:
    made, new = case.make(dtype, device), case.requests[0][0]
    q = made["q"][:-PAD_TOKENS].unflatten(0, (len(case.requests), new))
    got = flash_attn_with_kvcache(
        q, made["k"], made["v"], cache_seqlens=made["keys"].diff(), block_table=made["pages"], causal=True
    )
    reference = wanted(made, case)[:-PAD_TOKENS]
    torch.testing.assert_close(got.flatten(0, 1).double().cpu(), reference, rtol=tolerance, atol=tolerance)
