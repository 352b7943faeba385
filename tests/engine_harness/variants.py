"""Whose dispatcher and whose experts the engine runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry.experts import ExpertScratch
from tokenferry.integrations import megatron

EXPERTS_MODULE = "megatron.core.transformer.moe.experts"


@dataclass(frozen=True)
class Variant:
    """`dispatcher` is Megatron's type, "nccl" or "nvls"; `ours` puts our classes in the place of Megatron's own."""

    dispatcher: str = "nccl"
    ours: bool = True
    experts: bool = False
    combine_order: str = "rank"

    def __str__(self) -> str:
        order = "" if self.combine_order == "rank" else f", order {self.combine_order}"
        return f"{'tokenferry' if self.ours else 'megatron'} {self.dispatcher}{' + experts' if self.experts else ''}{order}"

    @property
    def is_there(self) -> bool:
        """Whether this version of the library has the setting that it needs."""
        return self.combine_order == "rank" or "combine_order" in {f.name for f in dataclasses.fields(megatron.Settings)}


MEGATRON = Variant(ours=False)
"""What the others are compared with: Megatron's own `NCCLAllGatherDispatcher`, which runs everywhere."""


@contextlib.contextmanager
def installed(variant: Variant, device: torch.device, **settings: Any) -> Iterator[None]:
    """Puts what is ours in place until left, with these settings over the defaults. Engines are made and closed inside."""
    if not variant.ours:
        yield
        return
    order = {} if variant.combine_order == "rank" else {"combine_order": variant.combine_order}
    megatron.configure(**{**dataclasses.asdict(megatron.Settings()), **settings, **order})
    if not variant.experts:
        installation = megatron.install()
    elif "experts" in inspect.signature(megatron.install).parameters:
        installation = megatron.install(experts=True)
    else:
        installation = megatron.install()
    with contextlib.ExitStack() as undo:
        undo.callback(installation)
        if variant.experts and "experts" not in inspect.signature(megatron.install).parameters:
            experts = importlib.import_module(EXPERTS_MODULE)
            undo.callback(setattr, experts, "vllm_fused_moe", experts.vllm_fused_moe)
            scratch = ExpertScratch(device) if device.type == "cuda" else None
            experts.vllm_fused_moe = functools.partial(megatron.fused_moe, scratch=scratch)
        yield
        megatron.close()
