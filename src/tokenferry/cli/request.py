"""How the options of `generate` and `verify` become a job: checked, with their defaults found."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
import typer

from tokenferry import env
from tokenferry.cli.context import check_new_tokens
from tokenferry.cli.job import Job
from tokenferry.cli.options import DEFAULT_RANKS, Device, Dtype
from tokenferry.cli.prompts import DEFAULT_PROMPTS, read_prompts
from tokenferry.cli.run import Request
from tokenferry.cli.start import torchrun_place
from tokenferry.cli.work import RANDOM, TINY
from tokenferry.demo.model import demo_checkpoint
from tokenferry.errors import ConfigError
from tokenferry.testing.model_configs import config_values
from tokenferry.testing.tiny_models import COMMON, FAMILIES
from tokenferry.transports.selection import TRANSPORTS

MODEL_FORMATS: Final = ("same", "fp8_block128")
"""In which hidden rows of a model travel."""
COMBINE_DTYPES: Final = ("float32", "bfloat16", "float16", "float8_e4m3fn")
"""In which partial rows of a model travel."""
EXPERT_COUNTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names under which the configurations of model families hold the number of experts."""


def choose_prompts(path: Path | None) -> tuple[str, ...]:
    """The file's prompts, or ours."""
    return DEFAULT_PROMPTS if path is None else read_prompts(path)


def choose_model(model: str, num_ranks: int, max_new_tokens: int, report: Callable[[str], None]) -> str:
    """The model as ranks take it: a folder, or `tiny:FAMILY`. Makes the demo checkpoint if need be.

    Raises:
        ConfigError: no such model, fewer experts than ranks, or a context too short for `max_new_tokens`; see also
            `demo_checkpoint`.
    """
    if not model.strip():
        raise ConfigError("--model is empty: give demo, tiny:FAMILY or a checkpoint's folder")
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("this command needs the package transformers; run, in tokenferry's folder: pip install '.[demo]'")
    if model.startswith(TINY):
        family = model.removeprefix(TINY)
        if family not in FAMILIES:
            raise ConfigError(f"no tiny model of family {family!r}; there are: {', '.join(sorted(FAMILIES))}")
        check_experts(FAMILIES[family][1], model, num_ranks)
        check_new_tokens({**COMMON, **FAMILIES[family][1]}, max_new_tokens)
        return model
    if model.startswith(RANDOM):
        values = config_values(model.removeprefix(RANDOM))
        check_experts(values, model.removeprefix(RANDOM), num_ranks)
        check_new_tokens(values, max_new_tokens)
        return model
    folder = demo_checkpoint(report) if model == "demo" else Path(model)
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise ConfigError(
            f"no model at {model}: give demo, tiny:FAMILY or a folder with config.json and safetensors; nothing is downloaded"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'} is not JSON: {error}") from error
    check_experts(config, model, num_ranks)
    check_new_tokens(config, max_new_tokens)
    return str(folder)


def check_experts(config: Mapping[str, Any], model: str, num_ranks: int) -> None:
    """Refuse more ranks than experts before processes are started, where the configuration tells; ranks check it anyway."""
    text_config = config.get("text_config") or {}
    for name in EXPERT_COUNTS:
        num_experts = config.get(name, text_config.get(name))
        if isinstance(num_experts, int) and num_experts < num_ranks:
            raise ConfigError(
                f"{model} has {num_experts} experts, too few for {num_ranks} ranks; use at most {num_experts} ranks"
            )


def choose_device(device: Device, num_ranks: int, place: env.TorchrunSettings | None) -> str:
    """ "cuda" if every rank of this machine has a GPU of its own, else "cpu".

    Raises:
        ConfigError: GPUs were asked for and there are fewer than ranks.
    """
    num_local = num_ranks if place is None or place.local_world_size is None else place.local_world_size
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is Device.cuda and num_gpus < num_local:
        raise ConfigError(f"--device is cuda but {num_local} ranks on this machine have {num_gpus} GPUs; use --device cpu")
    return "cpu" if device is Device.cpu or num_gpus < num_local else "cuda"


def request_of(
    command: Literal["generate", "verify", "inspect"],
    ranks: int | None,
    model: str,
    prompts: Path | None,
    max_new_tokens: int,
    dtype: Dtype,
    device: Device,
    transport: str,
    seed: int,
    as_json: bool,
    exact: bool = False,
    random_init: str | None = None,
    dispatch_format: str = "same",
    combine_dtype: str = "float32",
) -> Request:
    """The options, checked, with their defaults found. Makes the demo checkpoint if need be.

    Raises:
        ConfigError: an option that cannot be met; see the functions above.
    """
    if transport not in ("auto", *TRANSPORTS):
        raise ConfigError(f"--transport must be auto or one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if dispatch_format not in MODEL_FORMATS:
        raise ConfigError(f"--dispatch-format must be one of {', '.join(MODEL_FORMATS)}, got {dispatch_format!r}")
    if exact and dispatch_format != "same":
        raise ConfigError(f"--exact and --dispatch-format {dispatch_format} exclude one another; leave one of them out")
    if combine_dtype not in COMBINE_DTYPES:
        raise ConfigError(f"--combine-dtype must be one of {', '.join(COMBINE_DTYPES)}, got {combine_dtype!r}")
    if exact and combine_dtype != "float32":
        raise ConfigError(f"--exact and --combine-dtype {combine_dtype} exclude one another; leave one of them out")
    if random_init is not None:
        if model != "demo":
            raise ConfigError(f"--random-init makes a model of its own, but --model is {model}; leave one of them out")
        model = f"{RANDOM}{random_init}"
    place = torchrun_place(ranks)
    num_ranks = place.world_size if place is not None and place.world_size is not None else ranks or DEFAULT_RANKS
    job = Job(
        prompts=choose_prompts(prompts),
        model=choose_model(model, num_ranks, max_new_tokens, lambda line: typer.echo(line, err=True)),
        max_new_tokens=max_new_tokens,
        dtype=dtype.value,
        device=choose_device(device, num_ranks, place),
        transport=transport,
        seed=seed,
        exact=exact,
        dispatch_format=dispatch_format,
        combine_dtype=combine_dtype,
    )
    return Request(command=command, job=job, num_ranks=num_ranks, place=place, as_json=as_json)
