"""`tokenferry bench model`: its options become a request to `tokenferry.benchmarking`, and the records a table on stdout."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

from tokenferry import benchmarking, env
from tokenferry.cli.bench import gpus, say, token_counts
from tokenferry.cli.start import torchrun_place
from tokenferry.errors import ConfigError, DeviceError

DEFAULT_RANKS = 2


def model_command(
    ranks: int | None,
    configs: Sequence[str],
    batches: str,
    prompts: str,
    ways: str,
    budget_s: float,
    output: Path | None,
    *,
    modes: str = "",
    families: str = ",".join(benchmarking.TINY_FAMILIES),
    new_tokens: int = 64,
    capacity: int = 4096,
    transport: str = "p2p",
    commit: str = "unknown",
    rehearse: bool = False,
) -> int:
    """The exit code: 1 if tokens differed in float32, or something failed. Runs under torchrun too, on each of its ranks.

    Args:
        configs: as `generate --random-init` takes them; none: `benchmarking.MODEL_POINTS`.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "bench model needs the package transformers; run, in tokenferry's folder: pip install '.[transformers]'"
        )
    place = torchrun_place(ranks)
    check_devices(place, ranks or DEFAULT_RANKS, rehearse)
    request = benchmarking.ModelRequest(
        points=points(configs, batches, prompts, rehearse),
        ways=benchmarking.ALL_WAYS if ways == "all" else tuple(ways.split(",")),
        modes=tuple(filter(None, modes.split(","))),
        families=tuple(filter(None, families.split(","))),
        new_tokens=benchmarking.REHEARSED_NEW_TOKENS if rehearse else new_tokens,
        capacity=capacity,
        transport="collective" if rehearse else transport,
        budget_s=budget_s,
        rehearse=rehearse,
        commit=commit,
    )
    benchmarking.check_output(output)
    device: benchmarking.Device = "cpu" if rehearse else "cuda"
    if place is not None:
        records = benchmarking.run_model_as_rank(request, device=device, output=output, progress=say)
        if place.rank != 0:
            return 0
    else:
        records = benchmarking.run_model(request, ranks or DEFAULT_RANKS, device=device, output=output, progress=say)
    typer.echo(benchmarking.model_table(records))
    return int(not all(benchmarking.is_right(record) for record in records))


def check_devices(place: env.TorchrunSettings | None, num_ranks: int, rehearse: bool) -> None:
    """Raises DeviceError if this machine has fewer GPUs than ranks of this run, which is no rehearsal."""
    num_local = num_ranks if place is None else place.local_world_size or 1
    found = torch.cuda.device_count()
    if not rehearse and found < num_local:
        raise DeviceError(f"bench model needs {gpus(num_local)}, found {found}; give --rehearse to try it on CPUs, without times")


def points(configs: Sequence[str], batches: str, prompts: str, rehearse: bool) -> tuple[benchmarking.ModelPoint, ...]:
    """Every configuration with every batch and length of prompts; without configurations those of the published table."""
    if not configs:
        return benchmarking.REHEARSED_POINTS if rehearse else benchmarking.MODEL_POINTS
    sizes = itertools.product(configs, token_counts(prompts), token_counts(batches))
    return tuple(benchmarking.ModelPoint(config, batch, prompt) for config, prompt, batch in sizes)
