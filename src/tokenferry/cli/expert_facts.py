"""What one expert of a loaded model is made of, for predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch

from tokenferry.cli.job import Job
from tokenferry.cli.plan import shape_of

SUBSTITUTE: Final = torch.float32
"""What `--dtype auto` loads on CPUs, most of which compute slowly in 16 bits."""


def expert_facts(parallel: Any, config: Path, job: Job) -> dict[str, float]:
    """`num_bytes` and `num_weights` of one expert of the first MoE layer, 0 for a model without any, and what its rows are:
    `hidden_size` and `topk`.

    Bytes are those that this rank holds, so that float8 and packed experts count as what they are, scales and biases included;
    where float32 stands in for 16 bits on a CPU, those of the 16 bits, in which the model would be served.

    Raises:
        ConfigError: the configuration does not tell the sizes.
    """
    shape = shape_of(str(config))
    rows = {"hidden_size": shape.hidden_size, "topk": shape.topk}
    if not parallel.layers:
        return {"num_bytes": 0.0, "num_weights": 0.0, **rows}
    module, num_local = parallel.layers[0].module, len(parallel.group.expert_range(parallel.layers[0].num_experts))
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    stands_in = job.dtype == "auto" and job.device == "cpu" and _stored_dtype(config) != "float32"
    num_bytes = 0.0
    for tensor in held:
        if tensor.dim() and tensor.shape[0] == num_local:
            num_bytes += tensor.nbytes / (2 if stands_in and tensor.dtype == SUBSTITUTE else 1)
    num_matrices = 3 if getattr(module, "has_gate", True) else 2
    return {"num_bytes": num_bytes / num_local, "num_weights": num_matrices * shape.hidden_size * shape.expert_size, **rows}


def _stored_dtype(config: Path) -> str:
    """As the configuration names it; of one that does not, 16 bits are what a model is stored in."""
    values = json.loads(config.read_text())
    values = {**(values.get("text_config") or {}), **values}
    return str(values.get("dtype") or values.get("torch_dtype") or "bfloat16").removeprefix("torch.")
