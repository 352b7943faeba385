"""Whether ways make the same tokens: exactly, of tiny models in float32; how often, of large ones in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from tokenferry.benchmarking.model_ways import EAGERLY, NOT_COMPILED, graphs_wanted, ours, unmodified
from tokenferry.benchmarking.records import Record
from tokenferry.benchmarking.timing import MEETING_TIMEOUT_S, GroupTimer
from tokenferry.groups import EPGroup
from tokenferry.testing.tiny_models import tiny_config

PROMPT_LENGTHS: Final = (9, 14)
"""Of one prompt a rank, in turn."""
NEW_TOKENS: Final = 12
CAPACITY: Final = 64


def agreement(timer: GroupTimer, tokens: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> Record:
    """How often a token is the plain model's, where all tokens before it were; behind a difference the contexts differ.

    Returns:
        `agreement`, and `compared`, the number of tokens that it is of, on all ranks together. Collective.
    """
    equal = compared = 0
    for mine, other in zip(tokens, expected, strict=True):
        prefix = common_prefix(mine, other)
        equal += prefix
        compared += min(prefix + 1, len(mine), len(other))
    everyone = timer.group.channel.exchange(timer.group.unique_name("bench/agreement"), [equal, compared], MEETING_TIMEOUT_S)
    equal, compared = (sum(each) for each in zip(*everyone, strict=True))
    return {"agreement": round(equal / compared, 4) if compared else None, "compared": compared}


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens at the start are equal."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, pair in pairs if pair[0] != pair[1]), min(len(left), len(right)))


def check_family(timer: GroupTimer, family: str, transport: str) -> Record:
    """Whether the tokens of a tiny model in float32 are the plain model's on every rank, by graphs and without where both are.

    Returns:
        `family`, and `equal_tokens` of all ranks. Collective.
    """
    named = {"what": "model tokens", "family": family, "dtype": "float32"}
    equal = _tokens_are_equal(timer.group, family, transport)
    return named | {"equal_tokens": timer.slowest(0.0 if equal else 1.0) == 0.0}


def _tokens_are_equal(group: EPGroup, family: str, transport: str) -> bool:
    config = tiny_config(family)
    config._attn_implementation = "eager"  # the same everywhere: families differ in what they take by default
    length = PROMPT_LENGTHS[group.rank % len(PROMPT_LENGTHS)]
    generator = torch.Generator(device="cpu").manual_seed(group.rank)
    ids = torch.randint(3, 259, (2, length), generator=generator, dtype=torch.int64, device="cpu").to(group.device)
    expected = _generated(unmodified(group, config, torch.float32), ids)
    model = ours(group, config, CAPACITY, transport, torch.float32, **graphs_wanted())
    try:
        settings: Any = (NOT_COMPILED, EAGERLY) if graphs_wanted() else ({},)
        found = [_generated(model, ids, **each) for each in settings]
        model.expert_parallel.finish()
    finally:
        model.expert_parallel.close()
    return all(tokens == expected for tokens in found)


def _generated(model: Any, ids: torch.Tensor, **settings: Any) -> list[list[int]]:
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **settings,
    )
    tokens: list[list[int]] = made[:, ids.shape[1] :].tolist()
    return tokens
