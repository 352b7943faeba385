"""Whose dispatcher and whose experts the engine runs on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenferry.integrations import megatron


@dataclass(frozen=True)
class Variant:
    """`dispatcher` is Megatron's type, "nccl" or "nvls"; `ours` puts our classes in the place of Megatron's own.

    `hook` False takes the hook out of Megatron's engine again, to see what it costs: failures of peers do not reach the engine.
    """

    dispatcher: str = "nccl"
    ours: bool = True
    experts: bool = False
    combine_order: str = "rank"
    hook: bool = True


MEGATRON = Variant(ours=False)
"""What the others are compared with: Megatron's own `NCCLAllGatherDispatcher`, which runs everywhere."""


@contextlib.contextmanager
def installed(variant: Variant, **settings: Any) -> Iterator[None]:
    """Puts what is ours in place until left, with these settings over the defaults. Engines are made and closed inside."""
    if not variant.ours:
        yield
        return
    order = {} if variant.combine_order == "rank" else {"combine_order": variant.combine_order}
    megatron.configure(**{**dataclasses.asdict(megatron.Settings()), **settings, **order})
    with megatron.install(experts=variant.experts) as installation:
        if not variant.hook:
            installation._engine_hook()
        yield
        megatron.close()
