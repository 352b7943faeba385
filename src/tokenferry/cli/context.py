"""How many tokens a model's context holds, and whether prompts and answers fit into it: checked before any weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenferry.errors import ConfigError

NAMES: Final = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names under which the configurations of model families hold the length of their context."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model's context holds by its `config.json`, or None if that does not say. A stretched rotary embedding
    (`factor` in its parameters) counts."""
    text_config = config.get("text_config") or {}
    for settings in (config, text_config):
        for name in NAMES:
            length = settings.get(name)
            if isinstance(length, int) and not isinstance(length, bool) and length > 0:
                return max(length, *(_stretched(rope, length) for rope in _ropes(settings)), 0)
    return None


def _ropes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of the model's rotary embeddings: one set, or one for each kind of layer."""
    found = [settings.get(name) for name in ("rope_parameters", "rope_scaling")]
    sets = [each for each in found if isinstance(each, Mapping)]
    return [*sets, *(part for each in sets for part in each.values() if isinstance(part, Mapping))]


def _stretched(rope: Mapping[str, Any], length: int) -> int:
    """The context that a factor makes of the original one; 0 where `length` is stretched already, as Llama 3's is."""
    factor, original = rope.get("factor", 1), rope.get("original_max_position_embeddings", length)
    if isinstance(original, int | float) and original < length:
        return 0
    return int(factor * original) if all(isinstance(each, (int, float)) for each in (factor, original)) else 0


def check_new_tokens(config: Mapping[str, Any], max_new_tokens: int) -> None:
    """What is known without a tokenizer.

    Raises:
        ConfigError: not even a prompt of one token leaves room for `max_new_tokens`.
    """
    limit = context_length(config)
    if limit is not None and max_new_tokens >= limit:
        raise ConfigError(
            f"--max-new-tokens is {max_new_tokens}, but the model's context holds {limit} tokens, the prompt's included; "
            f"give at most {limit - 1}"
        )


def check_prompts(folder: Path, lengths: Sequence[int], max_new_tokens: int) -> None:
    """`lengths`: tokens of each prompt, as the model gets them.

    Raises:
        ConfigError: a prompt and the longest answer to it are more than the model's context; the longest such prompt is named.
    """
    limit = context_length(json.loads((folder / "config.json").read_text()))
    if limit is None or not lengths:
        return
    prompt = max(range(len(lengths)), key=lambda number: lengths[number])
    longest = lengths[prompt]
    if longest + max_new_tokens <= limit:
        return
    shorten = f"shorten the prompt to {limit - max_new_tokens} tokens"
    remedy = shorten if longest >= limit else f"{shorten}, or give --max-new-tokens {limit - longest}"
    raise ConfigError(
        f"prompt {prompt} has {longest} tokens and --max-new-tokens is {max_new_tokens}, but the model's context holds {limit} "
        f"tokens; {remedy} at most"
    )
