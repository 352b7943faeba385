"""What a person sees at the end of a run: the answers, and tables of figures."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenferry.cli.job import RankResult
from tokenferry.cli.reference import Comparison


def print_answers(console: Console, prompts: Sequence[str], results: Sequence[RankResult]) -> None:
    """Each prompt with its text, in the order of the prompts."""
    answers = sorted((answer.prompt, result.rank, answer) for result in results for answer in result.answers)
    for prompt, rank, answer in answers:
        console.rule(f"prompt {prompt}, rank {rank}", align="left", style="dim")
        console.print(printable(prompts[prompt]), style="bold")
        console.print(printable(answer.text.strip()))
    console.print()


def printable(text: str) -> Text:
    """Text without control characters: what a model writes must not steer a terminal."""
    return Text("".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text))


def rank_table(results: Sequence[RankResult]) -> Table:
    """What each rank did, in a row for each. The column "comm." is the share of its time that went into communication."""
    first = results[0]
    ranks = "1 rank" if len(results) == 1 else f"{len(results)} ranks"
    title = f"{ranks}, {first.num_layers} MoE layers, {first.dtype}, transport {first.transport}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("rank", "device", "prompts", "prompt tokens", "new tokens", "tokens/s", "comm.", "experts", "memory"):
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in results:
        start, stop = result.experts
        table.add_row(
            str(result.rank),
            result.device,
            str(len(result.answers)),
            str(result.num_prompt_tokens),
            str(result.num_new_tokens),
            f"{result.tokens_per_s:.1f}",
            f"{result.communication_share:.0%}",
            f"{start}–{stop - 1} of {result.num_experts}",
            f"{result.peak_memory_bytes / 2**20:.0f} MiB",
        )
    return table


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The verdict of `verify` and, if it failed, why."""
    for reason in comparison.reasons:
        console.print(Text(reason, style="red"))
    if not comparison.passed:
        verdict = "NOT equal to one process"
    elif comparison.num_equal == comparison.num_prompts:
        verdict = "equal to one process"
    else:  # `verify` was told to round rows or sums on their way
        verdict = "not equal to one process, as expected of values that are rounded on their way"
    share = ""
    if comparison.num_equal < comparison.num_prompts:
        share = f" ({comparison.num_equal_tokens} of {comparison.num_tokens} tokens are the same)"
    console.print(
        Text(
            f"{comparison.num_equal} of {comparison.num_prompts} prompts have the unmodified model's tokens{share}, "
            f"largest logit difference {comparison.largest_logit_difference:.3g}: {verdict}",
            style="bold green" if comparison.passed else "bold red",
        )
    )
