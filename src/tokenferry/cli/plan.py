"""`tokenferry doctor --plan`: the bytes of a workspace for a model, and how long its steps may take. Nothing is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from tokenferry.benchmarking.presets import PRESETS
from tokenferry.config import MoEConfig
from tokenferry.errors import ConfigError
from tokenferry.testing.model_configs import MODEL_CONFIGS, config_values
from tokenferry.transports.opening import required_bytes
from tokenferry.transports.symmetric import layout

DTYPE: Final = torch.bfloat16
NUM_EXPERTS_NAMES: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOPK_NAMES: Final = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "top_k_experts", "moe_k")
EXPERT_SIZE_NAMES: Final = ("moe_intermediate_size", "expert_intermediate_size", "intermediate_size")
MXFP4_BITS: Final = 4.25
TOKENS: Final = (1, 8, 32, 128, 512, 4096)

READ_GB_PER_S: Final = 2960.5
GEMM_TFLOPS: Final = 775.1
"""Measured on H100 80GB HBM3, 2026-11-23: benchmarks/results/2xH100-2026-11-23-layer.jsonl."""


@dataclass(frozen=True)
class ExchangeModel:
    """A dispatch and its combine take `latency_us` + bytes that a rank sends / `gb_per_s`.

    Fitted to the 12 rows of equal counts in benchmarks/results/2xH100-2026-11-22.jsonl (2 x H100 80GB HBM3, NVLink 4, CUDA
    graphs), of which the worst is off by `tolerance`.
    """

    latency_us: float
    gb_per_s: float
    tolerance: float

    def time_us(self, num_bytes: float) -> float:
        """For that many bytes."""
        return self.latency_us + num_bytes / self.gb_per_s / 1e3

    def __str__(self) -> str:
        off = f"off by {self.tolerance:.0%} at most where it was measured"
        return f"{self.latency_us:g} µs + bytes sent / {self.gb_per_s:g} GB/s ({off})"


EXCHANGES: Final[Mapping[str, ExchangeModel]] = {
    "p2p": ExchangeModel(4.7, 330.0, 0.06),
    "collective": ExchangeModel(36.0, 152.0, 0.14),  # NCCL, the faster of the two orders of summation
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The MoE layers of a model. `num_layers` is None where only one layer is known; `weight_bits`: of an expert's weight."""

    name: str
    hidden_size: int
    num_experts: int
    topk: int
    expert_size: int
    num_layers: int | None
    weight_bits: float = 8 * DTYPE.itemsize

    @property
    def config(self) -> MoEConfig:
        """As a workspace takes it."""
        return MoEConfig(hidden_size=self.hidden_size, num_experts=self.num_experts, topk=self.topk, dtype=DTYPE)

    @property
    def expert_bytes(self) -> int:
        """Of one gated expert: its gate, up and down projections."""
        return round(3 * self.hidden_size * self.expert_size * self.weight_bits / 8)


def shape_of(spec: str) -> Shape:
    """The shape of a preset, or of a configuration: the name of one, or the path of a `config.json`.

    Raises:
        ConfigError: there is no such preset or file, or it does not say a size under a name that is known here.
    """
    preset = next((each for each in PRESETS if each.name == spec), None)
    if preset is not None and spec not in MODEL_CONFIGS:
        sizes = {"hidden_size": preset.hidden_size, "num_experts": preset.num_experts, "topk": preset.topk}
        return Shape(name=spec, **sizes, expert_size=preset.intermediate_size, num_layers=None)
    try:
        values = config_values(spec)
    except ConfigError as error:
        names = ", ".join(dict.fromkeys([*MODEL_CONFIGS, *(each.name for each in PRESETS)]))
        raise ConfigError(f"--plan takes {names}, or the path of a config.json: {error}") from error
    values = {**values, **(values.get("text_config") or {})}
    return Shape(
        name=spec,
        hidden_size=_positive(values, spec, "hidden_size"),
        num_experts=_positive(values, spec, *NUM_EXPERTS_NAMES),
        topk=_positive(values, spec, *TOPK_NAMES),
        expert_size=_positive(values, spec, *EXPERT_SIZE_NAMES),
        num_layers=num_moe_layers(values),
        weight_bits=MXFP4_BITS if (values.get("quantization_config") or {}).get("quant_method") == "mxfp4" else Shape.weight_bits,
    )


def num_moe_layers(values: Mapping[str, Any]) -> int | None:
    """Layers that have experts, where the configuration tells."""
    if isinstance(values.get("layers_block_type"), list):
        return int(values["layers_block_type"].count("moe"))
    if isinstance(values.get("hybrid_override_pattern"), str):
        return int(values["hybrid_override_pattern"].count("E"))
    num_layers = values.get("num_hidden_layers")
    if not isinstance(num_layers, int):
        return None
    return num_layers - int(values.get("first_k_dense_replace") or 0) - len(values.get("mlp_only_layers") or ())


def _positive(values: Mapping[str, Any], spec: str, *names: str) -> int:
    """The first of these that the configuration has."""
    for name in names:
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ConfigError(f"the configuration {spec} has none of {', '.join(names)} as a positive int: is it one with experts?")


def plan(shape: Shape, ep_size: int, max_tokens_per_rank: int) -> dict[str, Any]:
    """The plan as a document for JSON; `cli.doctor_tables` prints it.

    Raises:
        ConfigError: there are fewer experts than ranks, or sizes that no workspace takes.
    """
    if ep_size < 1 or max_tokens_per_rank < 1:
        raise ConfigError(f"--ep and --max-tokens must be at least 1, got {ep_size} and {max_tokens_per_rank}")
    config = shape.config
    if shape.num_experts < ep_size:
        few = f"{shape.name} has {shape.num_experts} experts, too few for {ep_size} ranks"
        raise ConfigError(f"{few}; give --ep {shape.num_experts} at most")
    tokens = sorted({*(count for count in TOKENS if count < max_tokens_per_rank), max_tokens_per_rank})
    return {
        "model": shape.name,
        "hidden_size": shape.hidden_size,
        "num_experts": shape.num_experts,
        "topk": shape.topk,
        "num_moe_layers": shape.num_layers,
        "ep_size": ep_size,
        "max_tokens_per_rank": max_tokens_per_rank,
        "dtype": str(DTYPE).removeprefix("torch."),
        "expert_weight_bytes_per_layer": -(-shape.num_experts // ep_size) * shape.expert_bytes,
        "workspace_bytes": workspace_bytes(config, ep_size, max_tokens_per_rank),
        "rows_of_a_call_bytes": rows_of_a_call(config, ep_size * max_tokens_per_rank),
        "steps": [step_times(shape, ep_size, count) for count in tokens],
        "assumptions": assumptions(ep_size),
    }


def workspace_bytes(config: MoEConfig, ep_size: int, max_tokens_per_rank: int) -> dict[str, dict[str, int]]:
    """For each transport that could serve, its buffers by name and `total`: what `Workspace.nbytes` would be on a rank."""
    found = {}
    for name in ("local",) if ep_size == 1 else ():
        found[name] = {"total": required_bytes(name, config, ep_size, max_tokens_per_rank, DTYPE)}
    for name in ("p2p", "nvls"):
        regions = layout.plan(config, ep_size, max_tokens_per_rank, DTYPE, multicast=name == "nvls").regions
        buffers = {region: where.num_bytes for region, where in regions.items() if where.num_bytes}
        total = required_bytes(name, config, ep_size, max_tokens_per_rank, DTYPE)
        found[name] = {**buffers, "control block, padding and counts": total - sum(buffers.values()), "total": total}
    found["collective"] = {"total": required_bytes("collective", config, ep_size, max_tokens_per_rank, DTYPE)}
    return found


def rows_of_a_call(config: MoEConfig, num_rows: int) -> int:
    """Bytes of the gathered rows and of the partial rows beside them, which `local` and `collective` allocate in each call."""
    row_bytes = config.hidden_size * config.dtype.itemsize
    return num_rows * (2 * row_bytes + config.topk * (torch.int32.itemsize + torch.float32.itemsize))


def step_times(shape: Shape, ep_size: int, num_tokens: int) -> dict[str, Any]:
    """Of a step in which every rank brings that many tokens."""
    row_bytes = shape.hidden_size * DTYPE.itemsize
    sent_bytes = num_tokens * (ep_size - 1) * (2 * row_bytes + shape.topk * 8)
    experts_us = experts_floor_us(shape, ep_size, num_tokens)
    exchanges = {name: model.time_us(sent_bytes) if ep_size > 1 else 0.0 for name, model in EXCHANGES.items()}
    layers = 1 if shape.num_layers is None else shape.num_layers
    return {
        "tokens_per_rank": num_tokens,
        "bytes_sent_per_layer": sent_bytes,
        "experts_floor_us": round(experts_us, 1),
        **{f"{name}_round_trip_us": round(time_us, 1) for name, time_us in exchanges.items()},
        **{f"{name}_step_ms": round(layers * (experts_us + time_us) / 1e3, 3) for name, time_us in exchanges.items()},
    }


def experts_floor_us(shape: Shape, ep_size: int, num_tokens: int) -> float:
    """Reading the weights of the experts that rows are expected to reach, or multiplying by them, whichever takes longer."""
    num_rows, num_local = num_tokens * ep_size, -(-shape.num_experts // ep_size)
    touched = num_local * (1 - (1 - shape.topk / shape.num_experts) ** num_rows)
    flop = 2 * num_rows * shape.topk * (num_local / shape.num_experts) * 3 * shape.hidden_size * shape.expert_size
    return max(touched * shape.expert_bytes / READ_GB_PER_S / 1e3, flop / GEMM_TFLOPS / 1e6)


def assumptions(ep_size: int) -> list[str]:
    """What the times stand on, in sentences."""
    told = [
        "All ranks bring the same number of tokens, and their routing spreads them evenly over the experts.",
        f"p2p: {EXCHANGES['p2p']} a layer, fitted on 2 x H100 80GB HBM3 with NVLink 4, CUDA graphs, 2026-11-22.",
        f"collective: {EXCHANGES['collective']}, NCCL on the same machine.",
        f"Experts: a floor, the larger of their weights read at {READ_GB_PER_S:g} GB/s and their products at {GEMM_TFLOPS:g} "
        "TFLOP/s, measured on H100, 2026-11-23. Real kernels take longer; docs/layer.md has whole layers.",
        "Attention, routers, shared experts and sampling are not in it. A step is the sum over the model's MoE layers.",
    ]
    if ep_size > 2:
        extrapolated = f"More than 2 GPUs have not been measured: for {ep_size} ranks both are extrapolated, and p2p takes an "
        told.insert(3, f"{extrapolated}NVLink domain for granted in which all of them are connected.")
    return told
