"""Which rank answers which prompts, and in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

TOKENS_PER_BATCH: Final = 2048
"""A batch's padded prompts hold at most this many tokens, unless one prompt alone is longer."""


def spread(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Prompt numbers for each rank: the longest prompts to rank 0, the shortest to the last, about equal tokens for each.

    So ranks hold different numbers of prompts wherever lengths differ, and a rank's own prompts are of similar length. With
    fewer prompts than ranks some ranks get none.

    Example:
        Lengths (10, 4, 3, 2, 1) hold 20 tokens in all. The middle of the first prompt lies at 5 and that of the others at 12,
        15.5, 18 and 19.5: for 2 ranks the first goes to rank 0 and the others to rank 1.
    """
    order = sorted(range(len(lengths)), key=lambda prompt: (-lengths[prompt], prompt))
    total = sum(lengths)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    before = 0
    for prompt in order:
        middle = before + lengths[prompt] / 2
        ranks[min(int(middle * num_ranks / total), num_ranks - 1)].append(prompt)
        before += lengths[prompt]
    return ranks


def batches(prompts: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """A rank's prompts, in order, cut into batches of at most `TOKENS_PER_BATCH` tokens, padding included."""
    cut: list[list[int]] = []
    for prompt in prompts:
        if cut and padded_tokens([*cut[-1], prompt], lengths) <= TOKENS_PER_BATCH:
            cut[-1].append(prompt)
        else:
            cut.append([prompt])
    return cut


def padded_tokens(batch: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of a batch whose prompts are padded to the longest."""
    return len(batch) * max((lengths[prompt] for prompt in batch), default=0)


def capacity(lengths: Sequence[int], num_ranks: int) -> int:
    """`max_tokens_per_rank`: the most tokens that any rank brings to one forward, at least 1."""
    sizes = [padded_tokens(batch, lengths) for prompts in spread(lengths, num_ranks) for batch in batches(prompts, lengths)]
    return max(1, *sizes)
