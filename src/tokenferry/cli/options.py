"""The options that `generate` and `verify` share. Nothing here may import torch, for which `--help` would wait."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from tokenferry.cli.names import MODEL_CONFIGS, TRANSPORTS

DEFAULT_RANKS: Final = 2


class Dtype(StrEnum):
    """Choices of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Choices of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help=f"Rank processes to start.  [default: {DEFAULT_RANKS}, or torchrun's]")
]
Model = Annotated[str, typer.Option("--model", help="demo, tiny:FAMILY (random weights) or a checkpoint's folder.")]
RandomInit = Annotated[
    str | None,
    typer.Option(
        "--random-init",
        metavar="CONFIG.json|NAME[:LAYERS]",
        help=f"Random weights for a configuration, in the place of --model: a file, or {', '.join(MODEL_CONFIGS)}.",
    ),
]
RandomInits = Annotated[
    list[str] | None,
    typer.Option(
        "--random-init",
        metavar="CONFIG.json|NAME[:LAYERS]",
        help=f"Measure this configuration with random weights: a file, or {', '.join(MODEL_CONFIGS)}. May be repeated.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help='One prompt on each line; in *.jsonl files objects like {"prompt": "..."}.  [default: five of ours]'
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of the weights. auto: as stored on GPUs, float32 on CPUs.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: GPUs if there is one for each rank.")]
Transport = Annotated[str, typer.Option("--transport", help=f"auto, {', '.join(TRANSPORTS)}; see `tokenferry doctor`.")]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights. Decoding is greedy.")]
Exact = Annotated[bool, typer.Option("--exact", help="One expert call for each rank that rows come from: equal in every dtype.")]
DispatchFormat = Annotated[
    str, typer.Option("--dispatch-format", help="same, or fp8_block128: rows quantized on their way. Then tokens may differ.")
]
CombineDtype = Annotated[
    str,
    typer.Option(
        "--combine-dtype", help="Of partial sums: float32, bfloat16, float16 or float8_e4m3fn. Below float32 tokens may differ."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of texts and tables.")]
