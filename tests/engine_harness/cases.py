"""Cases of engine and load, run one after another in one start of rank processes, and compared afterwards."""

from __future__ import annotations

import faulthandler
import pickle
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenferry as tf
from engine_harness.engine import Engine, EngineOptions
from engine_harness.ranks import Ranks
from engine_harness.requests import Load, Outcome, first_differences, other_choices
from engine_harness.variants import Variant, installed
from tokenferry.errors import RankFailedError
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks


@dataclass(frozen=True)
class EngineCase:
    """One engine, the loads that run on it one after another, and the variants that it is built for.

    Attributes:
        suspends: the first load runs once more, as "resumed", after the engine was suspended and resumed.
        equal_graphs: all ranks take the graph of the rank with the most rows, as Megatron's type "nccl" does.
        settings: of `megatron.configure`.
    """

    options: EngineOptions
    loads: Mapping[str, Load]
    variants: Mapping[str, Variant]
    suspends: bool = False
    equal_graphs: bool = False

    @property
    def load_names(self) -> list[str]:
        return [*self.loads, *(["resumed"] if self.suspends else [])]


STALL_S = 90.0
"""For one engine, all that it loads and compiles included."""
END_S = 20.0
"""From the last engine until the process has ended."""

Results = Mapping[tuple[str, str], Mapping[str, Outcome]]
"""By the names of the engine and the variant, then of the load."""


def run_cases(group: tf.EPGroup, cases: Mapping[str, EngineCase], folder: str, settings: Mapping[str, Any]) -> None:
    """Writes what comes out to `folder` after every engine: a failure or a hang leaves the results of those before.

    A rank that stands still is ended, with its stacks in `folder`: Megatron's own collective calls wait for ever.
    """
    done: dict[tuple[str, str], dict[str, Outcome]] = {}
    stacks = open(Path(folder, f"stacks{group.rank}"), "w")  # noqa: SIM115 - open until the process has ended
    faulthandler.dump_traceback_later(STALL_S, exit=True, file=stacks)
    with Ranks(group) as ranks:
        for case_name, case in cases.items():
            for variant_name, variant in case.variants.items():
                start_s = time.monotonic()
                done[case_name, variant_name] = run_case(ranks, case, variant, settings)
                partial = Path(folder, f"rank{group.rank}.partial")
                partial.write_bytes(pickle.dumps(done))
                partial.rename(Path(folder, f"rank{group.rank}"))
                if group.rank == 0:
                    print(f"{case_name} on {variant_name}: {time.monotonic() - start_s:.1f} s", flush=True)
                faulthandler.dump_traceback_later(STALL_S, exit=True, file=stacks)
        faulthandler.dump_traceback_later(END_S, exit=True, file=stacks)


def run_case(ranks: Ranks, case: EngineCase, variant: Variant, settings: Mapping[str, Any]) -> dict[str, Outcome]:
    with installed(variant, **settings), ranks.engine(case.options, dispatcher=variant.dispatcher) as engine:
        is_ours = type(engine.dispatchers[0]).__module__.startswith("tokenferry")
        assert is_ours == variant.ours, type(engine.dispatchers[0])
        if case.equal_graphs:
            engine.context._nccl_ep_dispatcher = True  # read when a step looks for its graph, and for nothing else by then
        outcomes = {name: engine.run(load) for name, load in case.loads.items()}
        if case.suspends:
            outcomes["resumed"] = resumed(engine, next(iter(case.loads.values())))
        if variant.ours:
            megatron.check()
        return outcomes


def resumed(engine: Engine, load: Load) -> Outcome:
    engine.engine.suspend()
    engine.engine.resume()
    return engine.run(load)


@dataclass(frozen=True)
class Run:
    """What `run_on_ranks` gives: each rank's results, and how the run ended if not well."""

    ranks: Sequence[Results]
    error: str

    def outcomes(self, case: str, variant: str, load: str) -> list[Outcome]:
        """Each rank's. An engine that was not run fails the test with the run's error."""
        found = [results.get((case, variant), {}).get(load) for results in self.ranks]
        if not found or None in found:
            raise AssertionError(f"{case} on {variant} was not run: {self.error or 'no results'}")
        return [outcome for outcome in found if outcome is not None]

    def differences(self, case: str, variant: str, load: str, wanted: tuple[str, str]) -> dict[str, int]:
        """Requests whose tokens are not those of the same load on `wanted`, an engine and variant: the first other place."""
        pairs = zip(self.outcomes(*wanted, load), self.outcomes(case, variant, load), strict=True)
        return {
            f"rank {rank}, request {number}": place
            for rank, (a, b) in enumerate(pairs)
            for number, place in first_differences(a.tokens, b.tokens).items()
        }

    def share_of_other_choices(self, case: str, variant: str, load: str, wanted: tuple[str, str]) -> float:
        """See `other_choices`, of both ranks."""
        pairs = zip(self.outcomes(*wanted, load), self.outcomes(case, variant, load), strict=True)
        parted, alike = map(sum, zip(*(other_choices(a.tokens, b.tokens) for a, b in pairs), strict=True))
        return parted / max(alike, 1)


def run_on_ranks(
    cases: Mapping[str, EngineCase],
    folder: Path,
    *,
    backend: str,
    environment: Mapping[str, str],
    timeout_s: float,
    settings: Mapping[str, Any],
) -> Run:
    """Runs all cases on two ranks; never raises for what a rank did."""
    error = ""
    try:
        run_ranks(run_cases, 2, cases, str(folder), settings, backend=backend, timeout_s=timeout_s, env=environment)
    except RankFailedError:
        error = traceback.format_exc()
        error += "".join(f"\n{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("stacks*")))
    files = [folder / f"rank{rank}" for rank in range(2)]
    return Run([pickle.loads(file.read_bytes()) if file.exists() else {} for file in files], error)
