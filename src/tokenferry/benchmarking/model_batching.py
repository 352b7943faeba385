"""How long a token takes in transformers' continuous batching."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from typing import Any, Final

from tokenferry.benchmarking.timing import GroupTimer

PAGE_SIZE: Final = 256
MAX_BATCH_TOKENS: Final = 2048


def time_batching(
    timer: GroupTimer, model: Any, prompts: list[list[int]], new_tokens: int
) -> tuple[dict[str, Any], list[list[int]]]:
    """Times `generate_batch()` on all ranks at once: the second call of two, with the manager of the first, whose graphs are
    captured by then. Requests share no cached prefix.

    Args:
        model: the plain one, or ours, which gets CUDA graphs where it takes them.
        prompts: of this rank.
        new_tokens: of each prompt, at least 2.

    Returns:
        `ttft_ms` until all prompts have their first token, `token_ms` for each further one of all prompts, `median_ms` between
        two tokens of one prompt, `call_s` altogether, of each the slowest rank's, `tokens_per_s` of a rank, and `graphs`; and the
        new tokens of each prompt.
    """
    graphs = timer.group.device.type == "cuda" and _takes_graphs(model)
    for _ in range(2):
        timer.meet()
        start_s = time.perf_counter()
        made = _batch(model, prompts, new_tokens, graphs)
        passed_s = time.perf_counter() - start_s
        if hasattr(model, "expert_parallel"):
            model.expert_parallel.finish()
    timer.meet()
    model.destroy_cached_continuous_batching_manager()
    stamps = [result.timestamps for result in made]
    first_s, last_s = max(times[0] for times in stamps), max(times[-1] for times in stamps)
    gaps_s = [later - earlier for times in stamps for earlier, later in itertools.pairwise(times)]
    token_ms = timer.slowest(1e3 * (last_s - first_s) / (new_tokens - 1))
    figures = {
        "ttft_ms": round(timer.slowest(1e3 * (first_s - start_s)), 2),
        "token_ms": round(token_ms, 3),
        "median_ms": round(timer.slowest(1e3 * statistics.median(gaps_s)), 3),
        "call_s": round(timer.slowest(passed_s), 3),
        "tokens_per_s": round(1e3 * len(prompts) / token_ms, 1),
        "graphs": graphs,
    }
    return figures, [result.generated_tokens for result in made]


def _takes_graphs(model: Any) -> bool:
    from tokenferry.integrations.transformers.capturable import why_not_captured

    return not hasattr(model, "expert_parallel") or why_not_captured(model.expert_parallel) is None


def _batch(model: Any, prompts: list[list[int]], new_tokens: int, graphs: bool) -> list[Any]:
    """The results in the order of the prompts."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = math.ceil((max(map(len, prompts)) + new_tokens) / PAGE_SIZE)
    batching = ContinuousBatchingConfig(
        num_blocks=max(8, 2 * pages * len(prompts)),
        block_size=PAGE_SIZE,
        max_batch_tokens=min(MAX_BATCH_TOKENS, sum(map(len, prompts))),
        allow_block_sharing=False,
        use_cuda_graph=graphs,
    )
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(
        prompts, generation, batching, record_timestamps=True, persistent_manager=True, max_new_tokens=new_tokens
    )
    return list(results.values())
