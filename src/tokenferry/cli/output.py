"""Results for programs: one JSON object on standard output, or records in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final

from tokenferry.cli.job import Job, RankResult
from tokenferry.cli.reference import Comparison

SCHEMA: Final = 1
"""Raised when a key changes its meaning or goes."""


def as_json(command: str, job: Job, results: Sequence[RankResult], comparison: Comparison | None = None) -> str:
    """The run as JSON text. `verify` is there only for that command; `largest_logit_difference` is null if unknown."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "model": job.model,
        "max_new_tokens": job.max_new_tokens,
        "exact": job.exact,
        "dispatch_format": job.dispatch_format,
        "combine_dtype": job.combine_dtype,
        "ranks": [_rank(result) for result in results],
        "prompts": sorted((entry for result in results for entry in _answers(job, result)), key=lambda entry: entry["prompt_id"]),
    }
    if comparison is not None:
        difference = comparison.largest_logit_difference
        document["verify"] = {
            "passed": comparison.passed,
            "reasons": list(comparison.reasons),
            "num_equal": comparison.num_equal,
            "num_prompts": comparison.num_prompts,
            "num_equal_tokens": comparison.num_equal_tokens,
            "num_tokens": comparison.num_tokens,
            "largest_logit_difference": None if math.isnan(difference) else difference,
        }
    return json.dumps(document, indent=1, ensure_ascii=False)


def _rank(result: RankResult) -> dict[str, Any]:
    return {
        "rank": result.rank,
        "device": result.device,
        "transport": result.transport,
        "dtype": result.dtype,
        "num_prompts": len(result.answers),
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_new_tokens": result.num_new_tokens,
        "generate_s": result.generate_s,
        "total_s": result.total_s,
        "tokens_per_s": result.tokens_per_s,
        "communication_share": result.communication_share,
        "num_layers": result.num_layers,
        "experts": list(range(*result.experts)),
        "num_experts": result.num_experts,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def _answers(job: Job, result: RankResult) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": answer.prompt,
            "rank": result.rank,
            "prompt": job.prompts[answer.prompt],
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "num_prompt_tokens": answer.num_prompt_tokens,
            "complete": answer.complete,
        }
        for answer in result.answers
    ]
