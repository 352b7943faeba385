"""`tokenferry bench`: what was asked for becomes a request to `tokenferry.benchmarking`, and its records a table on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import torch
import typer

from tokenferry import benchmarking
from tokenferry.errors import ConfigError, DeviceError

HIDDEN_SIZES: Final = (7168, 2048)
TOKENS: Final = (1, 8, 32, 128, 512, 4096)
TRANSPORTS: Final = ("p2p", "collective")
REHEARSED_TOKENS: Final = (1, 8)
REHEARSED_HIDDEN_SIZES: Final = (256,)


def round_trip_command(
    ranks: int,
    output: Path | None,
    *,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    tokens: Sequence[int] = TOKENS,
    transports: Sequence[str] = TRANSPORTS,
    capacity: int | None = None,
    exact_too: bool = False,
    formats: Sequence[str] = ("same",),
    combine_formats: Sequence[str] = ("same",),
    commit: str = "unknown",
    rehearse: bool = False,
) -> int:
    """`tokenferry bench roundtrip`: the exit code, 1 if a result was wrong.

    A rehearsal takes the tiny sizes whatever `hidden_sizes` and `tokens` are.
    """
    require_gpus("bench roundtrip", ranks, rehearse)
    benchmarking.check_output(output)
    if rehearse:
        hidden_sizes, tokens = REHEARSED_HIDDEN_SIZES, REHEARSED_TOKENS
    points = benchmarking.round_trip_points(
        hidden_sizes,
        tokens,
        transports,
        ranks,
        capacity=capacity,
        exact_too=exact_too,
        formats=formats,
        combine_formats=combine_formats,
    )
    device: Literal["cpu", "cuda"] = "cpu" if rehearse else "cuda"
    records = benchmarking.run_round_trips(points, ranks, device=device, output=output, commit=commit, progress=say)
    typer.echo(benchmarking.round_trip_table(records))
    return int(not all(record.get("correct", True) for record in records))


def layer_command(
    ranks: int,
    presets: str,
    tokens: str,
    budget_s: float,
    output: Path | None,
    *,
    transport: str = "p2p",
    commit: str = "unknown",
    rehearse: bool = False,
    float8: bool = False,
    float8_too: Sequence[str] = (),
) -> int:
    """`tokenferry bench layer`: the exit code, 1 if a result was wrong or a preset failed."""
    require_gpus("bench layer", ranks, rehearse)
    counts = token_counts(tokens)
    request = benchmarking.LayerRequest(
        presets=named_presets(presets, rehearse),
        tokens=REHEARSED_TOKENS if rehearse else counts,
        transport="collective" if rehearse else transport,
        budget_s=budget_s,
        commit=commit,
        float8=float8,
        float8_too=tuple(preset.name for preset in named_presets(",".join(float8_too), rehearse)) if float8_too else (),
    )
    benchmarking.check_output(output)
    records = benchmarking.run_layer(request, ranks, device="cpu" if rehearse else "cuda", output=output, progress=say)
    typer.echo(benchmarking.layer_table(records))
    return int(any("error" in record or not all(record.get("correct", {}).values()) for record in records))


def say(text: str) -> None:
    """A line of progress, apart from the table on stdout."""
    typer.echo(text, err=True)


def require_gpus(command: str, ranks: int, rehearse: bool) -> None:
    """Asked before any rank is started.

    Raises:
        DeviceError: there are fewer GPUs than ranks, and no rehearsal was asked for.
    """
    found = torch.cuda.device_count()
    if not rehearse and found < ranks:
        fewer = f"--ranks {found} at most, or " if found else ""
        remedy = f"give {fewer}--rehearse to try it on CPUs, without times"
        raise DeviceError(f"{command} needs {gpus(ranks)}, found {found}; {remedy}")


def gpus(count: int) -> str:
    """That many GPUs, in words."""
    return f"{count} CUDA GPU{'s'[: count > 1]}"


def named_presets(names: str, rehearse: bool) -> tuple[benchmarking.Preset, ...]:
    """The presets of a list with commas.

    Raises:
        ConfigError: there is no such preset.
    """
    known = {preset.name: preset for preset in (benchmarking.REHEARSAL if rehearse else benchmarking.PRESETS)}
    wanted = list(known) if names == "all" else names.split(",")
    for name in wanted:
        if name not in known:
            whose = "with --rehearse a preset" if rehearse else "preset"
            raise ConfigError(f"{whose} must be one of {', '.join(known)}, or all of them by 'all'; got {name!r}")
    return tuple(known[name] for name in wanted)


def token_counts(text: str) -> tuple[int, ...]:
    """The numbers of a list with commas, the smallest first.

    Raises:
        ConfigError: something in it is not a positive int.
    """
    if not all(count.isdecimal() and int(count) for count in text.split(",")):
        raise ConfigError(f"tokens must be positive ints with commas between them, got {text!r}")
    return tuple(sorted({int(count) for count in text.split(",")}))
