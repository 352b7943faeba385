"""How long a token takes in continuous batching."""

from __future__ import annotations

import time
from typing import Any, Final

from tokenferry.benchmarking.timing import GroupTimer

PAGE_SIZE: Final = 256
MAX_BATCH_TOKENS: Final = 2048


def time_batching(
    timer: GroupTimer, model: Any, prompts: list[list[int]], new_tokens: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """Times `generate_batch()` on all ranks at once, after a first call that is not timed.

    Args:
        model: the plain one, or ours, which gets CUDA graphs where its transport takes them.
        new_tokens: of each prompt, at least 2.

    Returns:
        `ttft_ms` until all prompts have their first token, `token_ms` for each further one of all prompts, `call_s` altogether,
        of each the slowest rank's, and `graphs`; and the new tokens of each prompt.
    """
    ours = getattr(model, "expert_parallel", None)
    graphs = timer.group.device.type == "cuda" and (ours is None or ours.workspace.active_transport.fixed_rows is not None)
    _batch(timer, model, prompts, min(new_tokens, 8), graphs)
    start_s = time.perf_counter()
    made = _batch(timer, model, prompts, new_tokens, graphs)
    passed_s = time.perf_counter() - start_s
    stamps = [result.timestamps for result in made]
    first_s, last_s = max(times[0] for times in stamps), max(times[-1] for times in stamps)
    created_s = min(result.created_time for result in made)
    token_ms = timer.slowest(1e3 * (last_s - first_s) / (new_tokens - 1))
    figures = {
        "ttft_ms": round(timer.slowest(1e3 * (first_s - created_s)), 2),
        "token_ms": round(token_ms, 3),
        "call_s": round(timer.slowest(passed_s), 3),
        "tokens_per_s": round(1e3 * len(prompts) / token_ms, 1),
        "graphs": graphs,
    }
    return figures, [result.generated_tokens for result in made]


def _batch(timer: GroupTimer, model: Any, prompts: list[list[int]], new_tokens: int, graphs: bool) -> list[Any]:
    """The results in the order of the prompts."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = -(-(len(prompts[0]) + new_tokens) // PAGE_SIZE)
    batching = ContinuousBatchingConfig(
        num_blocks=max(8, 2 * pages * len(prompts)),
        block_size=PAGE_SIZE,
        max_batch_tokens=min(MAX_BATCH_TOKENS, sum(map(len, prompts))),
        use_cuda_graph=graphs,
    )
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    timer.meet()
    results = model.generate_batch(prompts, generation, batching, record_timestamps=True, max_new_tokens=new_tokens)
    timer.synchronize()
    if hasattr(model, "expert_parallel"):
        model.expert_parallel.finish()
    return list(results.values())
