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
