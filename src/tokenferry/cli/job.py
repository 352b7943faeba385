"""What every rank is told, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks are to do. Every rank gets the same job.

    Attributes:
        model: a folder, `tiny:FAMILY`, or `random:` and a configuration.
        prompts: those of all ranks. Each rank finds its own among them (see `spread`).
        dtype: a torch dtype's name, or "auto" (see `work.torch_dtype`).
        device: "cpu" or "cuda".
        seed: for random weights. Decoding is greedy and needs none.
        exact: whether experts are called once for each rank that the rows come from; see `from_pretrained`.
        dispatch_format: of the rows on their way to the experts; see `from_pretrained`.
        combine_dtype: name of the torch dtype of partial rows on their way back; see `from_pretrained`.
        keep_logits: whether answers carry the logits of every new token.
        telemetry: whether ranks count what they wait for, and tell it.
    """

    model: str
    prompts: tuple[str, ...]
    max_new_tokens: int
    dtype: str = "auto"
    device: str = "cpu"
    transport: str = "auto"
    seed: int = 0
    exact: bool = False
    dispatch_format: str = "same"
    combine_dtype: str = "float32"
    keep_logits: bool = False
    timeout_s: float = 120.0
    telemetry: bool = False

    @property
    def is_lossy(self) -> bool:
        """Whether rows are rounded on their way, so that tokens may differ from the unmodified model's."""
        return self.dispatch_format != "same" or self.combine_dtype != "float32"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one prompt.

    Attributes:
        complete: whether it ended by itself or has all `max_new_tokens` tokens.
        logits: [new tokens, vocabulary] float32 on the CPU, if the job keeps them.
    """

    prompt: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    complete: bool
    logits: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """What a rank did.

    Attributes:
        generate_s: how long this rank worked on its own prompts.
        total_s: `generate_s`, and how long it then only took part in the others' steps.
        communication_s: how much of `total_s` was spent in exchanges, waiting for late peers included.
        num_layers: MoE layers under expert parallelism.
        experts: the first expert of each layer that this rank holds, and the one after the last.
        num_threads: torch's CPU threads. The last bits of results can depend on their number.
        peak_memory_bytes: the most GPU memory that was held, or on CPUs the most memory of the whole process.
        telemetry: if the job asks for it: the workspace's "snapshot", and what an "expert" is, see `expert_facts`.
    """

    rank: int
    device: str
    transport: str
    dtype: str
    answers: tuple[Answer, ...]
    generate_s: float
    total_s: float
    communication_s: float
    num_layers: int
    experts: tuple[int, int]
    num_experts: int
    num_threads: int
    peak_memory_bytes: int
    telemetry: dict[str, Any] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of this rank's prompts, without padding."""
        return sum(answer.num_prompt_tokens for answer in self.answers)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that this rank generated."""
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second of `generate_s`."""
        return self.num_new_tokens / self.generate_s if self.answers else 0.0

    @property
    def communication_share(self) -> float:
        """The share of `total_s` that was spent in communication, from 0 to 1."""
        return self.communication_s / self.total_s if self.total_s > 0 else 0.0
