"""From text to token ids and back: the model's tokenizer, its chat template, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenferry.errors import ConfigError


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, padding on the left as generation needs it.

    Raises:
        ConfigError: there is none. transformers makes an empty one then, for which every text is nothing.
    """
    import transformers

    remedy = "fetch its files (tokenizer.json, tokenizer_config.json and so on), or save_pretrained() the model's tokenizer there"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    except Exception as error:  # tokenizers raises bare Exceptions
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {first_line}; {remedy}") from error
    if not tokenizer("tokens")["input_ids"]:
        raise ConfigError(f"{folder} holds no tokenizer; {remedy}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, as a user's message if the model has a chat template."""
    if not tokenizer.chat_template:
        return [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def stop_token_ids(model: Any) -> frozenset[int]:
    """Ids that end an answer."""
    stop = model.generation_config.eos_token_id
    return frozenset(stop if isinstance(stop, (list, tuple)) else () if stop is None else (stop,))


def cut_after_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    """`ids` up to the first stop id, which stays; what follows in a batch is padding."""
    end = next((number for number, token_id in enumerate(ids, start=1) if token_id in stop_ids), len(ids))
    return ids[:end]
