"""EP = 1: nothing travels, the contract is the same. Also what `solo()` runs on transports with dynamic shapes."""

from __future__ import annotations

import torch

from tokenferry.dispatched import HiddenRows, PartialRows, empty_terms
from tokenferry.reference import in_combine_dtype, in_format, pad_rows, sum_in_rank_order
from tokenferry.step import StepRequest, StepTensors
from tokenferry.transports.base import Gathered, Transport, TransportSettings, mask_padding


class LocalTransport(Transport):
    """See `Transport`. R = T. `Dispatched.hidden` may be the caller's own tensor; a combined result never is."""

    name = "local"

    def __init__(self, settings: TransportSettings, step_tensors: StepTensors) -> None:
        self._settings, self._step_tensors = settings, step_tensors
        self._request = StepRequest(0, 0, 0)
        self._num_supplied = 0
        self._gathered: Gathered | None = None
        self._combine_input: PartialRows | None = None
        self._combined: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._step_tensors.nbytes

    @property
    def rows_per_token(self) -> int:
        return 1

    @staticmethod
    def required_bytes(ep_size: int) -> int:
        """Only the step's counts are kept; rows live in tensors of the step."""
        return (3 + 2 * ep_size) * 4

    def begin_step(self, request: StepRequest, layer: int) -> None:
        self._request = request
        self._combine_input = None
        rank, size = self._settings.group.rank, self._settings.group.size
        if size > 1 or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
            counts, flags = [0] * size, [0] * size
            counts[rank], flags[rank] = request.num_tokens, request.flags
            self._step_tensors.publish(counts, flags)
        else:
            self._step_tensors.publish_equal(request.num_tokens, request.flags)

    def dispatch_begin(self, layer: int, hidden: HiddenRows, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        self._num_supplied = hidden.shape[0]
        hidden = in_format(hidden, self._settings.dispatch_format)
        if self._num_supplied < self._request.num_tokens:
            hidden, topk_idx, topk_weights = pad_rows(hidden, topk_idx, topk_weights, self._request.num_tokens)
        masked = mask_padding(topk_idx, self._request.num_real_tokens)
        if self._settings.debug:  # a write to what a dispatch returns would reach the caller's rows
            hidden, topk_weights = hidden.clone(), topk_weights.clone()
        self._gathered = Gathered(hidden, masked.to(self._settings.index_dtype), topk_weights.to(torch.float32))

    def dispatch_end(self) -> Gathered:
        self.launched = True
        gathered, self._gathered = self._gathered, None
        assert gathered is not None, "the workspace orders the halves"
        return gathered

    def combine_input(self) -> PartialRows:
        if self._combine_input is None:
            settings = self._settings
            with torch.inference_mode(False):  # a later layer of the step may fill it outside of the mode
                self._combine_input = empty_terms(
                    self._request.num_tokens, settings.config.hidden_size, settings.combine_dtype, settings.group.device
                )
        return self._combine_input

    def combine_begin(self, partial: PartialRows) -> None:
        term = in_combine_dtype(partial[: self._num_supplied], self._settings.combine_dtype)
        self._combined = sum_in_rank_order([term]).to(self._settings.result_dtype)

    def combine_end(self, out: torch.Tensor | None = None) -> torch.Tensor:
        self.launched = True
        combined, self._combined = self._combined, None
        assert combined is not None, "the workspace orders the halves"
        return combined if out is None else out.copy_(combined)

    def check(self) -> None:
        return

    def solo(self) -> LocalTransport:
        return self

    def fail(self, reason: str) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        self._gathered = self._combined = self._combine_input = None
