"""Wrong routers, experts and layers, and wrong rows for them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import tokenferry as tf
from bad_calls.scene import (
    CONFIG,
    C,
    CapacityError,
    ConfigError,
    DeviceError,
    DtypeError,
    E,
    H,
    K,
    LayoutError,
    Scene,
    ShapeError,
    T,
    Table,
    UsageError,
)
from tokenferry.dispatched import FLOAT8, QuantizedRows
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig, route
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig

TABLE = Table()
add = TABLE.add

# --- the parts of a layer -----------------------------------------------------------------------------------------------

ROUTER = Router(RouterConfig(hidden_size=H, num_experts=E, topk=K), dtype=torch.float32)
EXPERTS = Experts(ExpertsConfig(hidden_size=H, intermediate_size=16, num_experts=E), range(E), dtype=torch.float32)
SHARED = SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=16), dtype=torch.float32)
PART_SIZES = {"a-string": "8", "None": None, "a-float": 8.0, "a-bool": True, "zero": 0}


ON_GATHERED = (
    "experts-on-quantized-rows-without-scales",
    "experts-on-values-alone",
    "experts-on-bytes",
    "experts-into-float8-without-scales",
    "experts-into-rows-of-too-many-scales",
)
"""Wrong calls that come when a dispatch has returned."""


def layer_on(config: tf.MoEConfig = CONFIG, **settings: Any) -> MoELayer:
    """On a workspace of its own."""
    with tf.Workspace(config, tf.EPGroup(device="cpu"), max_tokens_per_rank=C, transport="local", **settings) as ws:
        return MoELayer(ws, ROUTER, EXPERTS)


def layer(scene: Scene, **changed: Any) -> MoELayer:
    parts = {"workspace": scene.ws, "router": ROUTER, "experts": EXPERTS, **changed}
    return MoELayer(parts.pop("workspace"), parts.pop("router"), parts.pop("experts"), **parts)


for label, value in PART_SIZES.items():
    add(
        f"router-topk-is-{label}",
        "stepped",
        ConfigError,
        "topk must be at least 1, got .*; give an int",
        lambda s, v=value: RouterConfig(hidden_size=H, num_experts=E, topk=v),
    )
    add(
        f"experts-intermediate_size-is-{label}",
        "stepped",
        ConfigError,
        "intermediate_size must be at least 1, got .*; give an int",
        lambda s, v=value: ExpertsConfig(hidden_size=H, intermediate_size=v, num_experts=E),
    )
    add(
        f"shared-hidden_size-is-{label}",
        "stepped",
        ConfigError,
        "hidden_size must be at least 1, got .*; give an int",
        lambda s, v=value: SharedExpertsConfig(hidden_size=v, intermediate_size=16),
    )
PARTS: dict[str, tuple[Callable[[Scene], Any], type[Exception], str]] = {
    "experts-activation-is-a-string": (
        lambda s: ExpertsConfig(hidden_size=H, intermediate_size=16, num_experts=E, activation="silu"),
        UsageError, "activation must be of type Activation, got str"),
    "experts-range-is-a-list": (lambda s: Experts(EXPERTS.config, [0, 1]), UsageError, "expert_range must be of type range"),
    "experts-range-too-long": (lambda s: Experts(EXPERTS.config, range(7)), ConfigError, r"a part of range\(0, 6\) without gaps"),
    "experts-range-with-gaps": (lambda s: Experts(EXPERTS.config, range(0, 6, 2)), ConfigError, "without gaps"),
    "experts-config-of-a-router": (lambda s: Experts(ROUTER.config, range(E)), UsageError, "must be of type ExpertsConfig"),
    "experts-dtype-int8": (lambda s: Experts(EXPERTS.config, range(E), dtype=torch.int8), DtypeError, "got torch.int8"),
    "experts-on-rows": (lambda s: EXPERTS(s.inputs.hidden), UsageError, "dispatched must be of type Dispatched, got Tensor"),
    "experts-load-a-list": (lambda s: EXPERTS.load([[1.0]], EXPERTS.down_proj), UsageError, "up_proj must be of type Tensor"),
    "experts-load-nothing": (lambda s: EXPERTS.load(None, None), ShapeError, "up_proj is missing"),
    "experts-load-one-matrix": (lambda s: EXPERTS.load(torch.zeros(H, H), EXPERTS.down_proj), ShapeError, r"up_proj is \[8, 8\]"),
    "router-on-None": (lambda s: ROUTER(None), UsageError, "hidden must be of type Tensor, got NoneType"),
    "router-on-one-row": (lambda s: ROUTER(torch.zeros(H)), ShapeError, r"hidden must be \[T, 8\]"),
    "route-integers": (lambda s: route(torch.zeros(T, E, dtype=torch.int32), ROUTER.config), DtypeError, "floating dtype"),
    "route-without-rules": (lambda s: route(torch.zeros(T, E), None), UsageError, "config must be of type RouterConfig"),
    "shared-experts-on-None": (lambda s: SHARED(None), UsageError, "hidden must be of type Tensor, got NoneType"),
    "layer-without-a-workspace": (lambda s: layer(s, workspace=None), UsageError, "workspace must be of type Workspace"),
    "layer-parts-swapped": (lambda s: layer(s, router=EXPERTS, experts=ROUTER), UsageError, "router must be of type Router"),
    "layer-unknown-overlap": (lambda s: layer(s, shared_overlap="always"), ConfigError, "off, between, stream; got 'always'"),
    "layer-half-a-latent": (lambda s: layer(s, latent_down=torch.nn.Identity()), ConfigError, "belong together; give both"),
    "layer-on-None": (lambda s: layer(s)(None), UsageError, "hidden must be of type Tensor, got NoneType"),
    "layer-on-a-list": (lambda s: layer(s)([[1.0]]), UsageError, "hidden must be of type Tensor, got list"),
    "layer-on-a-number": (lambda s: layer(s)(torch.tensor(1.0)), ShapeError, r"hidden must be \[..., 8\]"),
    "layer-on-meta": (lambda s: layer(s)(torch.zeros(T, H, device="meta")), DeviceError, "hidden is on meta but the work"),
    "layer-on-sparse-rows": (lambda s: layer(s)(torch.zeros(T, H).to_sparse()), LayoutError, r"call .to_dense\(\)"),
    "layer-on-bfloat16": (lambda s: layer(s)(torch.zeros(T, H).bfloat16()), DtypeError, "the workspace moves torch.float32"),
    "layer-on-quantized-rows": (
        lambda s: layer(s)(QuantizedRows(torch.zeros(T, H).to(FLOAT8), torch.ones(T, 1))), UsageError, "got QuantizedRows"),
    "layer-of-bytes": (lambda s: layer_on(dispatch_format="bytes"), ConfigError, "has dispatch_format 'bytes'; call the"),
    "layer-of-bfloat16-rows": (
        lambda s: layer_on(replace(CONFIG, dtype=torch.bfloat16)), ConfigError, "experts dtype is torch.float32 but work"),
    "experts-on-quantized-rows-without-scales": (
        lambda s: EXPERTS(replace(s.got, hidden=QuantizedRows(torch.zeros(T, H).to(FLOAT8), torch.ones(T, 0)))),
        ShapeError, r"hidden.scales must be \[3, 1\]"),
    "experts-on-values-alone": (
        lambda s: EXPERTS(replace(s.got, hidden=torch.zeros(T, H).to(FLOAT8))), DtypeError, "hidden is torch.float8_e4m3fn but"),
    "experts-on-bytes": (
        lambda s: EXPERTS(replace(s.got, hidden=torch.zeros(T, H, dtype=torch.uint8))), DtypeError, "hidden is torch.uint8 but"),
    "experts-into-float8-without-scales": (
        lambda s: EXPERTS(s.got, torch.zeros(T, H).to(FLOAT8)), DtypeError, "out must be .*, or QuantizedRows, got torch.float8"),
    "experts-into-rows-of-too-many-scales": (
        lambda s: EXPERTS(s.got, QuantizedRows(torch.zeros(T, H).to(FLOAT8), torch.ones(T, 2))),
        ShapeError, r"out.scales must be \[3, 1\] for values \[3, 8\], got \[3, 2\]"),
    "experts-quantized-in-float32": (lambda s: EXPERTS.quantize(), DtypeError, "quantize takes bfloat16 or float16 experts once"),
    "layer-on-too-many-rows": (lambda s: layer(s)(torch.zeros(T + 1, H)), CapacityError, "4 rows but begin_step announced 3"),
}  # fmt: skip
for label, (call, error, said) in PARTS.items():
    add(label, "dispatched" if label in ON_GATHERED else "stepped", error, said, call)
