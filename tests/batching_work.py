"""What the tests of continuous batching let a rank do."""

import time
from pathlib import Path
from typing import Any

import torch

import tokenferry as tf
from patience import PATIENT_S
from transformers_work import CAPACITY, Work, load, prompts, quiet, unmodified

NEW_TOKENS = 16
LENGTHS = (7, 11)


def settings(new_tokens: int, **options: Any) -> tuple[Any, Any]:
    """For generation and for batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return generation, ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=CAPACITY, **options)


def generate_batch(model: Any, work: Work, seed: int, **options: Any) -> list[list[int]]:
    results = model.generate_batch(prompts(work.prompt_lengths, seed), *settings(max(work.new_tokens, 1), **options))
    return [result.generated_tokens for result in results.values()]


def ask(manager: Any, seed: int) -> tuple[list[list[int]], float]:
    """The tokens for two requests, and after how many seconds they were there."""
    begun_s = time.monotonic()
    keys = manager.add_requests(prompts(LENGTHS, seed), max_new_tokens=NEW_TOKENS)
    results: dict[str, Any] = {}
    while len(results) < len(keys):
        result = manager.get_result(timeout=PATIENT_S)
        assert result is not None, f"no result: {manager.background_thread_status.fatal_error!r}"
        assert result.error is None, result.error
        if result.is_finished():
            results[result.request_id] = result.generated_tokens
    return [results[key] for key in keys], time.monotonic() - begun_s


def serve(group: tf.EPGroup, path: Path, transport: str, graphs: bool | None) -> tuple[bool, float]:
    """Managers that stay: rank 0 has work all the time. Rank 1 first has none, then some, then none, and then its manager is
    stopped, while rank 0 goes on. Returns whether the tokens are those of the unmodified model, and the longest answer's seconds.
    """
    quiet()
    model = load(path, group, transport=transport, dtype=torch.float32)
    generation, batching = settings(NEW_TOKENS, use_cuda_graph=graphs)
    made, seconds = [], []
    num_turns = 5 if group.rank == 0 else 2
    with model.continuous_batching_context_manager(generation, continuous_batching_config=batching) as manager:
        for turn in range(num_turns):
            if group.rank == 1:
                time.sleep(0.5)
            tokens, took_s = ask(manager, 10 * group.rank + turn)
            made.append(tokens)
            seconds.append(took_s)
    model.expert_parallel.finish()
    model.expert_parallel.close()
    plain = unmodified(path, dtype=torch.float32).to(group.device)
    work = Work(LENGTHS, NEW_TOKENS)
    wanted = [generate_batch(plain, work, 10 * group.rank + turn, use_cuda_graph=False) for turn in range(num_turns)]
    return made == wanted, max(seconds)
