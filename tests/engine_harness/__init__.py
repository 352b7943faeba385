"""Megatron-Core's own inference engine in rank processes of tests: a model, an engine, requests, and the tokens that come out.

    with Ranks(group) as ranks:
        with ranks.engine(dispatcher="nccl") as engine:
            wanted = engine.run(even(1))
        with megatron.install(), ranks.engine(dispatcher="nvls") as engine:
            got = engine.run(even(1))
            megatron.close()
    assert first_differences(wanted.tokens, got.tokens) == {}

The worker that holds this runs in a process of its own (`run_ranks`), with the environment `ENVIRONMENT` or
`GPU_ENVIRONMENT`, since Megatron keeps
its groups and modes in its modules, and cpu.py changes torch.cuda where there are no GPUs. Nothing here imports Megatron before
`Ranks` is made, since attention.py must come first; a worker keeps to that too. `missing()` says why it cannot run.
"""

import importlib.util
from types import MappingProxyType
from typing import Final

from engine_harness.engine import Engine, EngineOptions
from engine_harness.ranks import Ranks
from engine_harness.requests import Load, Outcome, Request, Step, even, first_differences, other_choices

ENVIRONMENT: Final = MappingProxyType({"NO_VCS_VERSION": "1", "TRITON_INTERPRET": "1"})
"""For rank processes on CPUs, where the transport p2p interprets its kernels."""

GPU_ENVIRONMENT: Final = MappingProxyType({"NO_VCS_VERSION": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"})
"""For rank processes on GPUs. The router's compiler starts no processes of its own, which could outlive a rank."""

NEEDED: Final = ("megatron", "einops")


def missing() -> str:
    """What the engine needs and is not installed, as the reason of a skip; empty if nothing is missing."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (`make megatron` unpacks megatron-core and einops for tests)" if absent else ""


__all__ = [
    "ENVIRONMENT",
    "GPU_ENVIRONMENT",
    "Engine",
    "EngineOptions",
    "Load",
    "Outcome",
    "Ranks",
    "Request",
    "Step",
    "even",
    "first_differences",
    "missing",
    "other_choices",
]
