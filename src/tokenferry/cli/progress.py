"""How far the ranks are: bars on a terminal, plain lines where standard error is a file or a pipe."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokenferry.cli.start import OnMessage

EVERY_S: Final = 10.0
"""How often a line tells where all ranks stand. What fails sooner shows the line of its error alone."""


def progress(console: Console, names: Sequence[str]) -> AbstractContextManager[OnMessage]:
    """Yields a function that takes the ranks' messages (see `answer_as_rank`) and shows them under `names`."""
    return progress_bars(console, names) if console.is_terminal else progress_lines(console, names)


@contextmanager
def progress_bars(console: Console, names: Sequence[str]) -> Iterator[OnMessage]:
    """One bar for each name. After an error the bars are gone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks = [bars.add_task(f"{name}: loading", total=None) for name in names]

        def on_message(rank: int, message: dict[str, Any]) -> None:
            if "total" in message:
                description = f"{names[rank]}: {_prompts(message['prompts'])}"
                bars.update(tasks[rank], total=message["total"], description=description)
            elif "phase" in message:
                bars.update(tasks[rank], description=f"{names[rank]}: {message['phase']}")
            elif "new" in message:
                bars.advance(tasks[rank], message["new"])
            elif "done" in message:  # answers may be shorter than allowed
                bars.update(tasks[rank], total=bars.tasks[tasks[rank]].completed)

        try:
            yield on_message
        except BaseException:
            bars.live.transient = True  # the error's line is to stand alone
            raise


@dataclass
class _Rank:
    """What one rank has told so far."""

    name: str
    prompts: int | None = None
    total: int = 0
    new: int = 0
    done: bool = False
    phases: list[tuple[str, float]] = field(default_factory=list)
    """What it has told that it does, and since when, by the clock."""

    def __str__(self) -> str:
        if self.prompts is None:
            if not self.phases:
                return f"{self.name}: loading"
            phase, since_s = self.phases[-1]
            return f"{self.name}: {phase} ({time.monotonic() - since_s:.0f} s)"
        return f"{self.name}: " + (f"done, {self.new} tokens" if self.done else f"{self.new} of at most {self.total} tokens")

    def loading(self) -> str:
        """What it did until now, and how long each took."""
        ends_s = [since_s for _, since_s in self.phases[1:]] + [time.monotonic()]
        spans = [f"{phase} {end_s - since_s:.1f} s" for (phase, since_s), end_s in zip(self.phases, ends_s, strict=True)]
        return f"{self.name}: {', '.join(spans)}"


@contextmanager
def progress_lines(console: Console, names: Sequence[str], every_s: float = EVERY_S) -> Iterator[OnMessage]:
    """A line when a rank has loaded, with what that took, one when it has answered, and every `every_s` seconds one with all."""
    ranks = [_Rank(name) for name in names]
    start_s, ended, lock = time.monotonic(), threading.Event(), threading.Lock()

    def say(text: object) -> None:
        console.print(f"{text}, {time.monotonic() - start_s:.0f} s", soft_wrap=True, markup=False, highlight=False)

    def on_message(number: int, message: dict[str, Any]) -> None:
        rank = ranks[number]
        with lock:
            if "phase" in message:
                rank.phases.append((message["phase"], time.monotonic()))
            elif "total" in message:
                if rank.phases:
                    say(rank.loading())
                rank.prompts, rank.total = message["prompts"], message["total"]
                say(f"{rank.name}: {_prompts(message['prompts'])} to answer, at most {rank.total} tokens")
            elif "new" in message:
                rank.new += message["new"]
            elif "done" in message:
                rank.done = True
                say(rank)

    def repeat() -> None:
        while not ended.wait(every_s):
            with lock:
                if not ended.is_set():
                    say("; ".join(map(str, ranks)))

    speaker = threading.Thread(target=repeat, daemon=True)
    speaker.start()
    try:
        yield on_message
    finally:
        with lock:  # nothing of it may stand behind an error's line
            ended.set()
        speaker.join()


def _prompts(number: int) -> str:
    return f"{number} prompt{'' if number == 1 else 's'}"
