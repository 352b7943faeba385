"""The unmodified model, alone in one process, on the same batches; and how the ranks' answers compare with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenferry.cli.job import Answer, Job, RankResult
from tokenferry.cli.spread import batches, spread
from tokenferry.cli.start import PRELOAD, OnMessage, rank_environment
from tokenferry.cli.tokens import load_tokenizer, tokenize
from tokenferry.cli.work import Send, answer_batch, model_folder, torch_dtype
from tokenferry.demo.quiet import quiet_transformers
from tokenferry.supervisor import run_processes


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `verify` found.

    Attributes:
        reasons: why it failed, empty if it passed.
        num_equal: prompts whose tokens are all equal.
        num_equal_tokens, num_tokens: positions of the answers with the same token, and all. After a token that differs, an answer
            goes on from another text.
        largest_logit_difference: over the tokens up to and including the first that differs; NaN if there is none.
    """

    reasons: tuple[str, ...]
    num_equal: int
    num_prompts: int
    num_equal_tokens: int
    num_tokens: int
    largest_logit_difference: float

    @property
    def passed(self) -> bool:
        """Whether every condition of `verify` holds."""
        return not self.reasons


def reference_answers(job: Job, num_ranks: int, num_threads: int, on_message: OnMessage) -> list[Answer]:
    """What transformers alone answers: the same batches as the ranks', one after the other, in a process of its own.

    `num_threads` must be a rank's: another number changes last bits.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # also under torchrun
    environment = {**rank_environment(num_threads), **alone}
    [answers] = run_processes(
        _reference_process, 1, (job, num_ranks), timeout_s=None, env=environment, preload=PRELOAD, on_message=on_message
    )
    return list(answers)


def _reference_process(rank: int, world_size: int, store_path: str, job: Job, num_ranks: int, send: Send) -> list[Answer]:
    import transformers

    from tokenferry.integrations.transformers.packed_experts import unpacking

    quiet_transformers()
    with model_folder(job, Path(store_path).parent) as folder:
        tokenizer = load_tokenizer(folder)
        token_ids = tokenize(tokenizer, job.prompts)
        quantization = getattr(transformers.AutoConfig.from_pretrained(folder), "quantization_config", None)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(job), **unpacking(quantization))
    model.to(job.device)
    lengths = [len(ids) for ids in token_ids]
    send({"prompts": len(token_ids), "total": len(token_ids) * job.max_new_tokens})
    answers = [
        answer
        for prompts in spread(lengths, num_ranks)
        for batch in batches(prompts, lengths)
        for answer in answer_batch(job, model, tokenizer, token_ids, batch, send)
    ]
    send({"done": True})
    return answers


def compare(results: Sequence[RankResult], reference: Sequence[Answer], *, is_lossy: bool = False) -> Comparison:
    """Whether EP layers were installed, every answer is complete, and every token is the reference's. Where rows travel quantized
    (`is_lossy`), other tokens are counted, and are no reason to fail."""
    by_prompt = {answer.prompt: answer for answer in reference}
    reasons, num_equal, num_equal_tokens, num_tokens, differences = [], 0, 0, 0, [float("nan")]
    for result in results:
        if result.num_layers == 0:
            reasons.append(f"rank {result.rank}: no MoE layer is under expert parallelism")
        for answer in result.answers:
            expected = by_prompt.pop(answer.prompt)
            if not answer.complete:
                reasons.append(f"rank {result.rank}, prompt {answer.prompt}: ended after {len(answer.token_ids)} tokens")
            first = first_difference(answer.token_ids, expected.token_ids)
            pairs = zip(answer.token_ids, expected.token_ids, strict=False)
            num_equal_tokens += sum(got == want for got, want in pairs)
            num_tokens += len(expected.token_ids)
            if first is None:
                num_equal += 1
            elif not is_lossy:
                got, want = (list(ids[first : first + 1]) or "the end" for ids in (answer.token_ids, expected.token_ids))
                reasons.append(f"rank {result.rank}, prompt {answer.prompt}: token {first} is {got}, alone it is {want}")
            differences.append(logit_difference(answer, expected, first))
    reasons += [f"prompt {prompt}: no rank answered it" for prompt in by_prompt]
    known = [value for value in differences if value == value]
    return Comparison(
        reasons=tuple(reasons),
        num_equal=num_equal,
        num_prompts=len(reference),
        num_equal_tokens=num_equal_tokens,
        num_tokens=num_tokens,
        largest_logit_difference=max(known, default=float("nan")),
    )


def first_difference(got: Sequence[int], want: Sequence[int]) -> int | None:
    """Where two sequences part, or None if they are equal. A sequence that ends early parts at its end."""
    index = next((index for index, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
    if index is None and len(got) != len(want):
        return min(len(got), len(want))
    return index


def logit_difference(got: Answer, want: Answer, first: int | None) -> float:
    """Largest absolute difference up to where the tokens part: behind that the contexts differ."""
    if got.logits is None or want.logits is None:
        return float("nan")
    rows = min(len(got.logits), len(want.logits)) if first is None else min(first + 1, len(got.logits), len(want.logits))
    return float((got.logits[:rows] - want.logits[:rows]).abs().max()) if rows else float("nan")
