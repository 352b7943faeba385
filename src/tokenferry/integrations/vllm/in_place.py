"""Sums that go into vLLM's output where vLLM asks for a tensor of their own and copies it, as releases before 0.32 do: one launch
a layer less."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

from tokenferry.integrations.vllm.exchange import Exchange

FINALIZE: Final = "vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep"
CLASS: Final = "MoEPrepareAndFinalizeNaiveDPEPModular"

_MARK: Final = "tells_the_output_to_tokenferry"
"""Attribute of the `finalize` that is ours."""


def write_sums_in_place() -> None:
    """Wraps `finalize` of vLLM's class, once. Where a vLLM has no such class, it copies the sums as ever."""
    try:
        found = getattr(importlib.import_module(FINALIZE), CLASS)
    except (ImportError, AttributeError):
        return
    original = found.finalize
    if not hasattr(original, _MARK):
        found.finalize = with_output_known(original)


def with_output_known(original: Callable[..., None]) -> Callable[..., None]:
    """`finalize` whose combine knows where the sums are to go, puts them there, and returns that tensor: what vLLM then copies to
    itself, torch leaves alone."""

    @functools.wraps(original)
    def finalize(self: Any, output: Any, *args: Any, **kwargs: Any) -> None:
        exchange = current_exchange()
        if exchange is None:
            original(self, output, *args, **kwargs)
            return
        exchange.output = output
        try:
            original(self, output, *args, **kwargs)
        finally:
            exchange.output = None

    setattr(finalize, _MARK, True)
    return finalize


def current_exchange() -> Exchange | None:
    """That of the expert-parallel group as it is now, which elastic scaling replaces; None where tokenferry is off."""
    from vllm.distributed.parallel_state import get_ep_group

    try:
        communicator = get_ep_group().device_communicator
    except AssertionError:  # a model without experts has no such group
        return None
    exchange = getattr(getattr(communicator, "all2all_manager", None), "exchange", None)
    return exchange if isinstance(exchange, Exchange) else None
