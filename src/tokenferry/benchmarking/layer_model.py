"""The MoE layer that is measured: a preset's router, this rank's experts and the shared expert, with random weights."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from tokenferry.benchmarking.presets import Preset
from tokenferry.config import MoEConfig
from tokenferry.experts import Experts, ExpertsConfig, mxfp4
from tokenferry.groups import EPGroup
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.workspace import Workspace

POSITIONS: Final = 4
"""Different rows in a chain of layers. The same rows again would find their experts' weights in the cache."""
DTYPE: Final = torch.bfloat16


class LayerModel:
    """One rank's weights of a preset. The router and the shared expert are the same on all ranks.

    Args:
        capacity: the most tokens that a rank brings in the run.

    Attributes:
        experts: those of the layer, in the preset's form until `quantize`.
        bfloat16_experts: the same, or what those of MXFP4 or float8 weights stand for or were made of.
        float8: whether `quantize` was called.
    """

    def __init__(self, group: EPGroup, preset: Preset, capacity: int) -> None:
        self.group, self.preset, self.device, self._capacity = group, preset, group.device, capacity
        self.float8 = False
        torch.manual_seed(1)
        routing = RouterConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk, **preset.router)
        self.router = Router(routing, dtype=DTYPE, device=self.device)
        torch.manual_seed(2 + group.rank)
        sizes = ExpertsConfig(
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_experts=preset.num_experts,
            activation=preset.activation,
            bias=preset.bias,
        )
        local_range = group.expert_range(preset.num_experts)
        self.experts = self.bfloat16_experts = Experts(sizes, local_range, dtype=DTYPE, device=self.device)
        if preset.mxfp4:
            self.experts = Experts(sizes, local_range, dtype=DTYPE, device=self.device)
            _load_mxfp4(self.experts, self.bfloat16_experts)
        self.shared: SharedExperts | None = None
        if preset.shared_size:
            shared = SharedExpertsConfig(hidden_size=preset.hidden_size, intermediate_size=preset.shared_size)
            torch.manual_seed(1)
            self.shared = SharedExperts(shared, dtype=DTYPE, device=self.device)

    def quantize(self) -> None:
        """From now on the experts' weights are block-scaled float8, made of `bfloat16_experts`, which stay."""
        quantized = Experts(self.experts.config, self.experts.expert_range, dtype=DTYPE, device=self.device)
        quantized.load_state_dict(self.bfloat16_experts.state_dict())
        quantized.quantize()
        self.experts, self.float8 = quantized, True

    @property
    def bytes_per_weight(self) -> float:
        """Of the experts, scales of MXFP4 included."""
        return 4.25 / 8 if self.experts.weights.is_packed else self.experts.up_proj.element_size()

    def open(self, transport: str, dispatch_format: str = "same", combine_dtype: torch.dtype = DTYPE) -> Workspace:
        """A workspace for all numbers of tokens of the run. Collective."""
        preset = self.preset
        config = MoEConfig(hidden_size=preset.hidden_size, num_experts=preset.num_experts, topk=preset.topk, dtype=DTYPE)
        counts: Any = "equal" if transport == "collective" else "uneven"
        settings: dict[str, Any] = {"transport": transport, "counts": counts, "dispatch_format": dispatch_format}
        settings["combine_dtype"] = combine_dtype
        return Workspace(config, self.group, max_tokens_per_rank=self._capacity, **settings)

    def layer(self, ws: Workspace, experts: nn.Module | None = None) -> MoELayer:
        """The layer on a workspace, with other experts if given."""
        layer = MoELayer(ws, self.router, self.experts, shared_experts=self.shared, shared_overlap="stream")
        if experts is not None:
            layer.experts = experts  # type: ignore[assignment]
        return layer

    def rows(self, rank: int, count: int) -> list[torch.Tensor]:
        """Rank `rank`'s [T, H] for each position of the chain, the same on every rank that asks."""
        generator = torch.Generator(self.device).manual_seed(100 + rank)
        shape = (POSITIONS, count, self.preset.hidden_size)
        return list(torch.randn(shape, generator=generator, device=self.device, dtype=DTYPE).unbind())


def _load_mxfp4(packed: Experts, plain: Experts) -> None:
    """Random MXFP4 weights of about the usual size, and what they stand for."""
    config, num_experts, device = packed.config, len(packed.expert_range), packed.up_proj.device

    def random(rows: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_experts, rows, depth // mxfp4.GROUP)
        blocks = torch.randint(0, 256, (*shape, mxfp4.GROUP // 2), dtype=torch.uint8, device=device)
        return blocks, torch.full(shape, 120 if depth > 512 else 122, dtype=torch.uint8, device=device)

    up = random(config.activation.num_columns(config.intermediate_size), config.hidden_size)
    down = random(config.hidden_size, config.intermediate_size)
    packed.load_mxfp4(*up, *down, packed.up_bias, packed.down_bias)
    for matrices, checkpoint in ((plain.up_proj, up), (plain.down_proj, down)):
        for matrix, blocks, scales in zip(matrices, *checkpoint, strict=True):
            matrix.copy_(mxfp4.dequantize(blocks, scales))
