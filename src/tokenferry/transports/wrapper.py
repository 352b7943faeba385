"""A transport around another one."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from tokenferry.dispatched import HiddenRows, LoadsToCount, PartialRows
from tokenferry.step import Announced, StepRequest
from tokenferry.transports.base import Gathered, SymmetricMemory, Transport


class TransportWrapper(Transport):
    """Hands every call on to `inner`. To be derived from, with the methods overridden that shall do more.

    Whole calls and their halves are apart: a dispatcher's `dispatch` comes as `dispatch`, never as `dispatch_begin` and
    `dispatch_end`, and goes on to the inner one's `dispatch`. So it is with `combine`.
    """

    def __init__(self, inner: Transport) -> None:
        self.inner, self.name = inner, inner.name

    @property
    def launched(self) -> bool:
        return self.inner.launched

    @launched.setter
    def launched(self, launched: bool) -> None:
        self.inner.launched = launched

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def fixed_rows(self) -> Gathered | None:
        return self.inner.fixed_rows

    @property
    def rows_per_token(self) -> int | None:
        return self.inner.rows_per_token

    @property
    def counts_pass_through_hosts(self) -> bool:
        return self.inner.counts_pass_through_hosts

    @property
    def tokens_per_rank(self) -> tuple[int, ...] | None:
        return self.inner.tokens_per_rank

    @property
    def memory(self) -> SymmetricMemory | None:
        return self.inner.memory

    @property
    def innermost(self) -> Transport:
        return self.inner.innermost

    def announce(self, request: StepRequest) -> Announced | None:
        return self.inner.announce(request)

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self.inner.begin_step(request, layer)

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self.inner.dispatch_begin(layer, hidden, topk_idx, topk_weights)

    def dispatch_end(self) -> Gathered:
        return self.inner.dispatch_end()

    def combine_input(self) -> PartialRows:
        return self.inner.combine_input()

    def combine_begin(self, partial: PartialRows) -> None:
        self.inner.combine_begin(partial)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.combine_end(out)

    def dispatch(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> Gathered:
        return self.inner.dispatch(layer, hidden, topk_idx, topk_weights)

    def combine(self, partial: PartialRows, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.combine(partial, out)

    def counts_in_combine(self, loads: LoadsToCount) -> bool:
        return self.inner.counts_in_combine(loads)

    def watching_replay(self) -> AbstractContextManager[None]:
        return self.inner.watching_replay()

    def watching_step(self) -> AbstractContextManager[None]:
        return self.inner.watching_step()

    def solo(self) -> Transport:
        return self.inner.solo()

    def give_sign_of_life(self) -> None:
        self.inner.give_sign_of_life()

    def set_timeout(self, timeout_s: float) -> None:
        self.inner.set_timeout(timeout_s)

    def check(self) -> None:
        self.inner.check()

    def check_known(self) -> None:
        self.inner.check_known()

    def fail(self, reason: str) -> None:
        self.inner.fail(reason)

    def abort(self) -> None:
        self.inner.abort()

    def close(self) -> None:
        self.inner.close()
