"""What vLLM's rows are on their way: numbers as they are, or quantized ones with their scales.

Shape suffixes: T rows of this rank, V rows of all ranks, H hidden, B bytes of a row.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from tokenferry.config import HIDDEN_DTYPES
from tokenferry.dispatched import FLOAT8, FORMAT_NAMES, HiddenRows, QuantizedRows, RowFormat, num_scales

_SAME, _BLOCKS, _BYTES = FORMAT_NAMES

PACKED_DTYPE: Final = torch.uint8
"""Of rows that hold two numbers of four bits in a byte."""

QUANTIZED_DTYPES: Final = (FLOAT8, torch.float8_e5m2, torch.int8, PACKED_DTYPE)


class Kind(NamedTuple):
    """What a workspace is opened for.

    Attributes:
        hidden_size: numbers of a row that experts return.
        topk: weights, or router logits, of a row.
        dtype: of the experts' rows.
        format_name: of rows on their way to the experts, as of `RowFormat`.
        row_bytes: with "bytes", of a row and its scales; else 0.
    """

    hidden_size: int
    topk: int
    dtype: torch.dtype
    format_name: str = _SAME
    row_bytes: int = 0

    @property
    def row_format(self) -> RowFormat:
        """For `Workspace(dispatch_format=...)`."""
        return RowFormat("bytes", row_bytes=self.row_bytes) if self.row_bytes else RowFormat.of(self.format_name)


def kind_of(hidden: torch.Tensor, routing: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> Kind:
    """Of rows that `refusal` has let pass. `dtype`: of the model, which the experts return for quantized rows."""
    columns, topk = hidden.shape[1], routing.shape[1]
    if hidden.dtype in HIDDEN_DTYPES:
        return Kind(columns, topk, hidden.dtype)
    hidden_size = columns * 2 if hidden.dtype == PACKED_DTYPE else columns
    if _are_block_scaled(hidden, scales):
        return Kind(hidden_size, topk, dtype, _BLOCKS)
    num_bytes = columns + (0 if scales is None else scales.shape[1] * scales.itemsize)
    return Kind(hidden_size, topk, dtype, _BYTES, -(-num_bytes // 8) * 8)


def refusal(hidden: torch.Tensor, extra_tensors: list[torch.Tensor] | None) -> str | None:
    """Why such rows cannot travel; None if they can, provided that each row has scales of its own (see `ScaleForms`)."""
    is_quantized = hidden.dtype in QUANTIZED_DTYPES
    if hidden.dim() != 2 or not (is_quantized or hidden.dtype in HIDDEN_DTYPES):
        return f"hidden rows of {hidden.dtype} with {hidden.dim()} dimensions"
    if extra_tensors is None:
        return None
    if not is_quantized or len(extra_tensors) != 1:
        return "LoRA mappings, or several tensors, travel beside the rows"
    (scales,) = extra_tensors
    if scales.dim() != 2:
        return f"scales of quantized rows have {scales.dim()} dimensions, and are not [rows, scales]"
    return None


def to_wire(kind: Kind, hidden: torch.Tensor, scales: torch.Tensor | None) -> HiddenRows:
    """What `Dispatcher.dispatch` takes: [T, H], `QuantizedRows` of [T, H], or [T, B] bytes, the row's first, then its scales'."""
    if kind.format_name == _SAME:
        return hidden.contiguous()
    if kind.format_name == _BLOCKS:
        assert scales is not None  # the format follows from them
        return QuantizedRows(hidden.contiguous(), scales.contiguous())
    parts = [_bytes_of(hidden)]
    if scales is not None:
        parts.append(_bytes_of(scales))
    missing = kind.row_bytes - sum(part.shape[1] for part in parts)
    if missing:
        parts.append(parts[0].new_zeros(hidden.shape[0], missing))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def from_wire(
    kind: Kind, got: HiddenRows, num_rows: int, hidden: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [V, columns] and their scales, contiguous, of the dtypes and widths of `hidden` and `scales`."""
    if isinstance(got, QuantizedRows):
        return got.values[:num_rows], got.scales[:num_rows].contiguous()
    if kind.format_name == _SAME:
        return got[:num_rows], None
    columns = hidden.shape[1]
    rows = got[:num_rows, :columns].contiguous().view(hidden.dtype)
    if scales is None:
        return rows, None
    end = columns + scales.shape[1] * scales.itemsize
    # A copy even of a single row, which counts as contiguous where it is: its address need not suit the dtype.
    return rows, got[:num_rows, columns:end].clone(memory_format=torch.contiguous_format).view(scales.dtype)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.stride(-1) != 1:  # a tensor without rows, or of one column, counts as contiguous with any stride
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.contiguous().view(torch.uint8)


def _are_block_scaled(hidden: torch.Tensor, scales: torch.Tensor | None) -> bool:
    """Whether they are rows of our own float8 format, which needs no packing, and goes to slots where steps are small."""
    return (
        hidden.dtype == FLOAT8
        and scales is not None
        and scales.dtype == torch.float32
        and hidden.shape[1] % 16 == 0
        and scales.shape[1] == num_scales(hidden.shape[1])
    )
