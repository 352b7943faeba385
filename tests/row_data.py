"""Rows for each dispatch format, made from a test's hidden rows."""

from typing import Any

import torch

import tokenferry as tf
from tokenferry.dispatched import QuantizedRows

AWKWARD = [0xFF] * 8 + [0xFE, 0xFF, 0xFF, 0xFF] + [0xFE] * 12
"""Bytes that make up an empty slot's words, what stands for these words where they are sent, and float8's -448."""


def handed_rows(hidden: torch.Tensor, ws: tf.Workspace, *, quantized: bool) -> torch.Tensor | QuantizedRows:
    """A rank's rows as its format takes them. Bytes, and rows that are quantized already, have any bits."""
    row_format, config, count = ws.dispatch_format, ws.config, hidden.shape[0]
    if row_format.is_same or (row_format.is_quantized and not quantized):
        return hidden
    columns = row_format.columns(config)
    num_bytes = config.hidden_size * config.dtype.itemsize
    # Flat first: [0, 1] may have strides that a view as bytes refuses.
    as_bytes = hidden.reshape(-1).view(torch.uint8).reshape(count, num_bytes)
    rows = as_bytes.repeat(1, -(-columns // num_bytes))
    rows = rows[:, :columns].contiguous()
    rows[:, : len(AWKWARD)] = torch.tensor(AWKWARD, dtype=torch.uint8)[:columns]
    if not row_format.is_quantized:
        return rows
    scales = torch.rand(count, -(-columns // 128), generator=torch.Generator().manual_seed(count))
    scales[1::3, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    return QuantizedRows(rows.view(torch.float8_e4m3fn), scales)


def on(device: torch.device, rows: Any) -> Any:
    """Rows of any format on a device."""
    return QuantizedRows(rows.values.to(device), rows.scales.to(device)) if isinstance(rows, QuantizedRows) else rows.to(device)


def handed_terms(partial: torch.Tensor, *, quantized: bool) -> torch.Tensor | QuantizedRows:
    """A rank's partial rows as a combine of float8 terms takes them, quantized already with any bits, or as they are."""
    if not quantized:
        return partial
    rows = tf.reference.quantize(partial)
    rows.values.view(torch.uint8)[:1, : len(AWKWARD)] = torch.tensor(AWKWARD, dtype=torch.uint8)[: partial.shape[1]]
    rows.scales[1::3, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    return rows


def terms_to_combine(dispatcher: tf.Dispatcher, terms: Any, num_rows: int, *, own_buffer: bool) -> Any:
    """The partial rows of all `num_rows` gathered ones, NaNs behind the ranks' tokens. `own_buffer`: in `combine_input()`, as far
    as that has rows of this kind."""
    if isinstance(terms, QuantizedRows):
        parts = [_continued(part, num_rows) for part in (terms.values.view(torch.uint8), terms.scales)]
        partial: Any = QuantizedRows(parts[0].view(torch.float8_e4m3fn), parts[1])
    else:
        partial = _continued(terms, num_rows)
    place = dispatcher.combine_input()
    if not own_buffer or (isinstance(place, QuantizedRows) and not isinstance(terms, QuantizedRows)):
        return partial
    if not isinstance(place, QuantizedRows):
        return place.copy_(partial)
    place.values.view(torch.uint8).copy_(partial.values.view(torch.uint8))
    place.scales.copy_(partial.scales)
    return place


def _continued(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    fill = 0xFF if rows.dtype == torch.uint8 else torch.nan
    whole = torch.full((num_rows, rows.shape[1]), fill, dtype=rows.dtype, device=rows.device)
    whole[: rows.shape[0]] = rows
    return whole
