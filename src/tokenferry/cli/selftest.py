"""The self-test of `tokenferry doctor`: every transport moves rows here, their bits are compared, and a round trip is timed."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Literal

from tokenferry.errors import RankFailedError
from tokenferry.supervisor import run_processes

TIMEOUT_S: Final = {"cpu": 60.0, "cuda": 120.0}
"""Of one run of ranks, which takes a few seconds on an idle machine. On GPUs without a warm cache of compiled kernels the first
one compiles for about half a minute."""

Outcome = Literal["passed", "wrong bits", "failed"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Ranks that are started once, and the transports that they try one after another.

    Attributes:
        interpreted: whether kernels run in Triton's interpreter, on CPU tensors.
    """

    device: Literal["cpu", "cuda"]
    num_ranks: int
    transports: tuple[str, ...]
    interpreted: bool = False

    @property
    def environment(self) -> Mapping[str, str]:
        """Of the rank processes, on top of this one's."""
        return {"TRITON_INTERPRET": "1" if self.interpreted else "0"}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of one transport.

    Attributes:
        num_ranks: of the group; `local` was tried by each rank for itself, and has one.
        detail: what was wrong; empty if it passed.
        round_trip_us: dispatch + combine of 8 rows a rank, the slowest rank; where kernels are interpreted, of the last step
            that was compared. None unless it passed.
        hidden_size: of these rows.
        took_s: from making the group to the answer, the slowest rank: what it takes to open the transport, above all.
    """

    device: str
    num_ranks: int
    transport: str
    interpreted: bool
    outcome: Outcome
    detail: str = ""
    round_trip_us: float | None = None
    hidden_size: int = 0
    took_s: float | None = None


def can_interpret(versions: Mapping[str, str]) -> bool:
    """Whether Triton's interpreter runs with these packages: it needs numpy, and before Triton 3.9 one older than 2.4."""
    triton, numpy = (_series(versions.get(name, "")) for name in ("triton", "numpy"))
    return triton is not None and numpy is not None and (triton >= (3, 9) or numpy < (2, 4))


def _series(version: str) -> tuple[int, int] | None:
    parts = version.split(".")[:2]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


def runs_for(num_gpus: int, versions: Mapping[str, str], *, with_nvls: bool = False) -> list[Run]:
    """What is tried on a machine with that many GPUs, and these packages.

    Kernels are interpreted for tests alone, so that it is no fault where they cannot be.
    `nvls` is tried on GPUs alone, which have the multicast memory that it needs, and only if asked for: it has never run there.
    """
    runs = [Run(device="cpu", num_ranks=2, transports=("local", "collective"))]
    if can_interpret(versions):
        runs.append(Run(device="cpu", num_ranks=2, transports=("p2p",), interpreted=True))
    if num_gpus:
        symmetric = (("p2p", "nvls") if with_nvls else ("p2p",)) if _series(versions.get("triton", "")) else ()
        runs.append(Run(device="cuda", num_ranks=num_gpus, transports=("local", "collective", *symmetric)))
    return runs


def try_all(runs: Sequence[Run], num_cpus: int, progress: Callable[[str], None]) -> list[Trial]:
    """`try_transports` of every run: all at once where each rank has two of the `num_cpus` cores, since most of the time goes
    into importing torch, compiling and opening. Else one after another: ranks that wait for one another would take turns."""
    calls = [functools.partial(try_transports, run, progress) for run in runs]
    if num_cpus < 2 * sum(run.num_ranks for run in runs):
        return [trial for call in calls for trial in call()]
    return [trial for future in [_in_background(call) for call in calls] for trial in future.result()]


def _in_background(call: Callable[[], list[Trial]]) -> Future[list[Trial]]:
    """On a daemon thread: whoever is interrupted must not wait for it. Rank processes end with this one."""
    future: Future[list[Trial]] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def try_transports(run: Run, progress: Callable[[str], None]) -> list[Trial]:
    """Start the ranks, let them try each transport, and say what came of it. Nothing that fails in a rank is raised here."""
    from tokenferry.cli.selftest_rank import try_as_rank

    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    progress(f"self-test: {run.num_ranks} ranks on {run.device}{', interpreted kernels' if run.interpreted else ''}")
    ended = "it was not reached"
    # The fork server imports torch alone beforehand: kernels see as they are imported whether they are interpreted, and it does
    # not have the ranks' environment.
    try:
        run_processes(
            try_as_rank,
            run.num_ranks,
            (run.device, run.transports, run.interpreted),
            timeout_s=TIMEOUT_S[run.device],
            env=run.environment,
            on_message=lambda _, message: answers[message["transport"]].append(message),
        )
    except RankFailedError as error:
        lines = error.traceback.strip().splitlines()  # of an exception the last line says it, of a stuck or killed rank the first
        ended = f"rank {error.rank}: {lines[-1 if lines[0].startswith('Traceback') else 0]}"
    return [trial_of(run, transport, answers[transport], ended) for transport in run.transports]


def trial_of(run: Run, transport: str, answers: Sequence[Mapping[str, Any]], ended: str) -> Trial:
    """The ranks' answers as one; `ended` is why some did not answer, if so."""
    wrong = [answer["wrong"] for answer in answers if answer["wrong"]]
    errors = [answer["error"] for answer in answers if answer["error"]]
    outcome: Outcome = "passed"
    if wrong:
        outcome = "wrong bits"
    elif errors or len(answers) < run.num_ranks:
        outcome = "failed"
    return Trial(
        device=run.device,
        num_ranks=1 if transport == "local" else run.num_ranks,
        transport=transport,
        interpreted=run.interpreted,
        outcome=outcome,
        detail="" if outcome == "passed" else [*wrong, *errors, ended][0],
        round_trip_us=max(answer["round_trip_us"] for answer in answers) if outcome == "passed" else None,
        hidden_size=max((answer["hidden_size"] for answer in answers), default=0),
        took_s=max((answer["took_s"] for answer in answers), default=None),
    )
