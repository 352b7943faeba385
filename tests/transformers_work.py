"""What the transformers tests let a rank do: load a tiny model and generate from prompts that its rank number fixes."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tokenferry as tf

CAPACITY = 64


@dataclass(frozen=True)
class Work:
    """What one rank generates: prompts of these lengths, so many new tokens each. No prompts: it only takes part."""

    prompt_lengths: tuple[int, ...] = ()
    new_tokens: int = 0


def quiet() -> None:
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()


def load(path: Path, group: tf.EPGroup, **kwargs: Any) -> Any:
    from tokenferry.integrations.transformers import from_pretrained

    return from_pretrained(str(path), group=group, **({"max_tokens_per_rank": CAPACITY, "timeout_s": 20.0} | kwargs))


def unmodified(path: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def prompts(lengths: tuple[int, ...], rank: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


def generate(model: Any, work: Work, rank: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """One batch, padded on the left."""
    if not work.prompt_lengths:
        return [], []
    longest = max(work.prompt_lengths)
    padded = [(longest - len(prompt), prompt) for prompt in prompts(work.prompt_lengths, rank)]
    ids = torch.tensor([[0] * padding + prompt for padding, prompt in padded], device=model.device)
    mask = torch.tensor([[0] * padding + [1] * len(prompt) for padding, prompt in padded], device=model.device)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=work.new_tokens, output_logits=True, return_dict_in_generate=True
    )
    return made.sequences[:, longest:].tolist(), list(made.logits)


def generate_batch(model: Any, work: Work, rank: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=max(work.new_tokens, 1), do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=CAPACITY)
    results = model.generate_batch(prompts(work.prompt_lengths, rank), generation, batching)
    return [result.generated_tokens for result in results.values()], []
