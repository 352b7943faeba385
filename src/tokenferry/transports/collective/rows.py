"""What a rank does with its own rows before they leave, and with the ranks' terms once they are there.

Legend: T rows of this rank, T' <= T of them wanted, K top-k, H hidden size.
"""

from __future__ import annotations

import logging

import torch

from tokenferry.dispatched import FLOAT8, HiddenRows, PartialRows, QuantizedRows, num_scales, quantized_bytes
from tokenferry.reference import sum_in_rank_order
from tokenferry.transports.base import TransportSettings, mask_padding

_log = logging.getLogger(__name__)

_BLOCK = 1024
_INDEX_DTYPES = (torch.int32, torch.int64)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowWork:
    """By operators of PyTorch, on any device."""

    def __init__(self, settings: TransportSettings) -> None:
        self._rank, self._index_dtype, self._result_dtype = settings.group.rank, settings.index_dtype, settings.result_dtype
        self._is_quantized, self._hidden_size = settings.combine_dtype == FLOAT8, settings.config.hidden_size

    def travels_as_it_is(
        self, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor, num_real_tokens: int | torch.Tensor
    ) -> bool:
        """Whether the caller's own routing can be sent. int64 numbers cannot: some of them no int32 holds."""
        return (
            topk_idx_TK.dtype == self._index_dtype == torch.int32
            and topk_weights_TK.dtype == torch.float32
            and isinstance(num_real_tokens, int)
            and num_real_tokens >= topk_idx_TK.shape[0]
        )

    def write_routing(
        self,
        idx_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        topk_idx_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        num_real_tokens: int | torch.Tensor,
    ) -> None:
        """Writes the routing into `idx_TK` (of the gathered dtype) and `weights_TK` (float32) as it travels: padding rows, and a
        number that no int32 holds, have id -1."""
        idx_TK.copy_(mask_padding(topk_idx_TK, num_real_tokens))
        weights_TK.copy_(topk_weights_TK)

    def sum_terms(
        self, terms_RTH: torch.Tensor, own_TH: torch.Tensor, num_wanted: int, out_TH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T', H] of the result's dtype, in `out_TH` if it is given: the terms of all ranks, in rank order, in float32, rounded
        once. This rank's is `own_TH`; its place in `terms_RTH` is not read. Both as they travel: float8 terms are messages."""
        terms = [own_TH if rank == self._rank else term for rank, term in enumerate(terms_RTH.unbind())]
        total = sum_in_rank_order([self._term_of(term[:num_wanted]) for term in terms])
        return total.to(self._result_dtype) if out_TH is None else out_TH.copy_(total)

    def _term_of(self, message: torch.Tensor) -> PartialRows:
        return _unpacked(message, self._hidden_size) if self._is_quantized else message


class KernelRowWork(RowWork):
    """By one launch each, on CUDA. The kernels are loaded here, once, while nobody waits for a peer."""

    def __init__(self, settings: TransportSettings) -> None:
        super().__init__(settings)
        from tokenferry.kernels import own_routing, term_sum  # imports Triton, which a CPU may do without
        from tokenferry.kernels.launch import POINTER_ALIGNMENT, has_pdl, load, specify

        group, config = settings.group, settings.config
        self._device, self._alignment = group.device, POINTER_ALIGNMENT
        common = {"BLOCK": _BLOCK, "PDL": int(has_pdl(group.device))}
        self._routing, self._sum = {}, {}
        for dtypes in ((idx, weights) for idx in _INDEX_DTYPES for weights in _WEIGHT_DTYPES):
            spec = specify(
                own_routing.own_routing_kernel,
                own_routing.SIGNATURE,
                {"K": config.topk, **common},
                num_warps=4,
                dtypes={"IDX": dtypes[0], "WEIGHTS": dtypes[1], "OUT_IDX": settings.index_dtype},
            )
            self._routing[dtypes] = load(spec, group.device).bind({}, tuple(spec.argument_types))
        for aligned in () if self._is_quantized else (False, True):
            spec = specify(
                term_sum.term_sum_kernel,
                term_sum.SIGNATURE,
                {"SIZE": group.size, "H": config.hidden_size, **common},
                num_warps=4,
                dtypes={"TERM": settings.combine_dtype, "OUT": settings.result_dtype},
                aligned=aligned,
            )
            varying = tuple(name for name in spec.argument_types if name != "rank")
            self._sum[aligned] = load(spec, group.device).bind({"rank": group.rank}, varying)

    def write_routing(
        self,
        idx_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        topk_idx_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        num_real_tokens: int | torch.Tensor,
    ) -> None:
        """See `RowWork`."""
        num_rows = topk_idx_TK.shape[0]
        if not num_rows:
            return
        launch = self._routing[topk_idx_TK.dtype, topk_weights_TK.dtype]
        grid = -(-topk_idx_TK.numel() // _BLOCK)
        if isinstance(num_real_tokens, int):  # the pointer is not followed then
            launch(grid, topk_idx_TK, topk_weights_TK, topk_idx_TK, idx_TK, weights_TK, num_rows, num_real_tokens, 0)
        else:
            launch(grid, topk_idx_TK, topk_weights_TK, num_real_tokens, idx_TK, weights_TK, num_rows, num_rows, 1)

    def sum_terms(
        self, terms_RTH: torch.Tensor, own_TH: torch.Tensor, num_wanted: int, out_TH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `RowWork`."""
        if self._is_quantized:
            return super().sum_terms(terms_RTH, own_TH, num_wanted, out_TH)
        num_rows, hidden_size = own_TH.shape
        out = out_TH
        if out is None:
            out = torch.empty((num_wanted, hidden_size), dtype=self._result_dtype, device=self._device)
        if num_wanted:
            launch = self._sum[not (own_TH.data_ptr() | out.data_ptr()) % self._alignment]
            launch(-(-out.numel() // _BLOCK), terms_RTH, own_TH, out, num_rows, num_wanted)
        return out


def row_work(settings: TransportSettings) -> RowWork:
    """The faster one that can be had here. Both give the same bits, so that ranks need not agree."""
    if settings.group.device.type != "cuda":
        return RowWork(settings)
    try:
        return KernelRowWork(settings)
    except Exception as error:  # noqa: BLE001  # compilers raise anything; this transport serves where there is none
        _log.warning(
            "workspace %s: sums and routing take several launches each, since their kernels could not be loaded: %s: %s",
            settings.name,
            type(error).__name__,
            error,
        )
        return RowWork(settings)


def wire_rows(settings: TransportSettings, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New gathered tensors of `num_rows` rows: hidden as it travels, ids, weights."""
    config, device, row_format = settings.config, settings.group.device, settings.dispatch_format
    if row_format.is_quantized:
        hidden = torch.empty((num_rows, row_format.wire_bytes(config)), dtype=torch.uint8, device=device)
    else:
        hidden = torch.empty((num_rows, row_format.columns(config)), dtype=row_format.dtype(config), device=device)
    return (
        hidden,
        torch.empty((num_rows, config.topk), dtype=settings.index_dtype, device=device),
        torch.empty((num_rows, config.topk), dtype=torch.float32, device=device),
    )


def message_of(hidden: HiddenRows) -> torch.Tensor:
    """Rows, hidden or partial, as they travel, in one message: [T, wire bytes] uint8 of quantized ones, each row's values before
    its scales; others as they are."""
    if not isinstance(hidden, QuantizedRows):
        return hidden
    num_rows, hidden_size = hidden.shape
    num_bytes = quantized_bytes(hidden_size)
    message = torch.zeros((num_rows, num_bytes), dtype=torch.uint8, device=hidden.device)  # zeros: a row is rounded up
    message[:, :hidden_size] = hidden.values.view(torch.uint8)
    message[:, hidden_size : hidden_size + 4 * hidden.scales.shape[1]].view(torch.float32).copy_(hidden.scales)
    return message


def rows_of(message: torch.Tensor, settings: TransportSettings) -> HiddenRows:
    """The inverse of `message_of` for hidden rows: the values and the scales of all rows, each in a tensor of their own."""
    return _unpacked(message, settings.config.hidden_size) if settings.dispatch_format.is_quantized else message


def _unpacked(message: torch.Tensor, hidden_size: int) -> QuantizedRows:
    values = message[:, :hidden_size].contiguous().view(FLOAT8)
    scales = message[:, hidden_size : hidden_size + 4 * num_scales(hidden_size)].view(torch.float32).contiguous()
    return QuantizedRows(values, scales)
