"""What is to be measured of whole models, and how long each part of it may take."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from tokenferry.errors import ConfigError
from tokenferry.testing.model_configs import config_values, model_config
from tokenferry.testing.tiny_models import FAMILIES

ALL_WAYS: Final = ("plain", "p2p", "transformers", "collective")
ALL_MODES: Final = (
    "eager", "graph", "graph-compiled", "batching", "compile", "eager-batched", "graph-batched", "compile-batched",
)  # fmt: skip
"""Which way has which of them stands in `model_ways.WAYS`, and what they do in `model_modes.MODES`."""
REFERENCE: Final = ("plain", "graph")
"""The way and mode whose tokens the others are held against: the plain model's own forward, one step after another. Where that
cannot be captured, its next mode takes the place."""
TINY_FAMILIES: Final = ("qwen3_moe", "gpt_oss", "mixtral")
TINY_SIZES: Final = {
    "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "moe_intermediate_size": 32, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}  # fmt: skip
"""What a rehearsal makes of a configuration. The wide range keeps logits apart, as in `testing.tiny_models`."""


@dataclasses.dataclass(frozen=True)
class ModelPoint:
    """What is decoded.

    Attributes:
        config: see `testing.model_configs.config_values`.
        batch: prompts of each rank. transformers' own expert parallelism works on all ranks' prompts on every rank.
        prompt: tokens of each of them.
    """

    config: str
    batch: int
    prompt: int


MODEL_POINTS: Final = (
    *(ModelPoint("qwen3-30b-a3b:8", batch, 128) for batch in (1, 8, 32)),
    ModelPoint("gpt-oss-20b:8", 8, 128),
    ModelPoint("mixtral-8x7b:8", 8, 128),
    *(ModelPoint("qwen3-30b-a3b:8", batch, 512) for batch in (1, 8, 32)),
)
"""What `tokenferry bench model` measures if it is not told."""
REHEARSED_POINTS: Final = (ModelPoint("qwen3-30b-a3b:2", 1, 16), ModelPoint("gpt-oss-20b:2", 8, 16))
REHEARSED_NEW_TOKENS: Final = 8
"""Small enough for CPUs, with `rehearse=True`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What `run_model` measures.

    Attributes:
        points: configurations, batches a rank and lengths of prompts; those of a configuration share its loaded models.
        ways: of `ALL_WAYS`, in this order. Without "plain" no tokens are compared.
        modes: those to measure, of `ALL_MODES`; none: all. The plain model's tokens are always made.
        new_tokens: of each prompt.
        capacity: `max_tokens_per_rank`; longer prefills go in pieces.
        transport: of the way "p2p".
        families: tiny models whose tokens are compared in float32 first.
        budget_s: nothing begins later than this after the start; what is left out gets a record that says so. See
            `model_plan` for the order.
        rehearse: tiny sizes in float32, for CPUs.
        commit: of the code that is measured, for the records.
    """

    points: tuple[ModelPoint, ...] = MODEL_POINTS
    ways: tuple[str, ...] = ALL_WAYS
    modes: tuple[str, ...] = ()
    new_tokens: int = 64
    capacity: int = 4096
    transport: str = "p2p"
    families: tuple[str, ...] = TINY_FAMILIES
    budget_s: float = 280.0
    rehearse: bool = False
    commit: str = "unknown"

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in FAMILIES:
                raise ConfigError(f"no tiny model of family {family!r}; there are: {', '.join(sorted(FAMILIES))}")
        unknown = [way for way in self.ways if way not in ALL_WAYS]
        if unknown:
            raise ConfigError(f"ways must be of {', '.join(ALL_WAYS)}; got {', '.join(unknown)}")
        unknown = [mode for mode in self.modes if mode not in ALL_MODES]
        if unknown:
            raise ConfigError(f"modes must be of {', '.join(ALL_MODES)}; got {', '.join(unknown)}")
        for point in self.points:
            config_values(point.config)
            if point.batch > self.capacity:
                raise ConfigError(f"a batch of {point.batch} is more than the capacity, {self.capacity}; give a larger capacity")

    def wants(self, way: str, mode: str) -> bool:
        """Whether a mode is to be measured. The others are held against the plain model's tokens."""
        return not self.modes or mode in self.modes or (way, mode) == REFERENCE


def configured(config: str, rehearse: bool) -> Any:
    """The configuration of transformers, small where it is a rehearsal."""
    values = model_config(config)
    if rehearse:
        values.update({name: value for name, value in TINY_SIZES.items() if hasattr(values, name)})
    return values
