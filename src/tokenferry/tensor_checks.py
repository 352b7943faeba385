"""What the calls of a dispatcher ask of their tensors."""

from __future__ import annotations

import torch

from tokenferry.dispatched import HiddenRows, QuantizedRows
from tokenferry.errors import DeviceError, DtypeError, LayoutError, ShapeError, UsageError


def fitting_rows(tensor: torch.Tensor, columns: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> int:
    """The rows of a tensor in which `check_tensor` finds nothing wrong; -1 if it must look."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.dim() != 2:
        return -1
    num_rows, num_columns = tensor.shape
    if num_columns != columns or tensor.dtype not in dtypes or tensor.device != device:
        return -1
    return num_rows if tensor.is_contiguous() and not tensor.is_neg() else -1


def made_contiguous(weights: torch.Tensor) -> torch.Tensor:
    """The same values in order. What is no dense tensor is left to the checks."""
    if not isinstance(weights, torch.Tensor) or weights.layout is not torch.strided or weights.is_contiguous():
        return weights
    return weights.contiguous()


def overlap(tensor: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether a contiguous tensor has memory in common with contiguous rows."""
    return tensor.device == rows.device and _meet(tensor, rows.data_ptr(), rows.nbytes)


def lies_beside(tensor: torch.Tensor, rows: HiddenRows) -> bool:
    """Whether a contiguous tensor has memory in common with the storage that rows are views of: a transport's whole buffer, where
    they lie at fixed addresses."""
    values = rows.values if isinstance(rows, QuantizedRows) else rows
    storage = values.untyped_storage()
    return tensor.device == values.device and _meet(tensor, storage.data_ptr(), storage.nbytes())


def _meet(tensor: torch.Tensor, address: int, num_bytes: int) -> bool:
    begin = tensor.data_ptr()
    return begin < address + num_bytes and address < begin + tensor.nbytes


def ids_out_of_range(topk_idx: torch.Tensor, num_experts: int) -> int | None:
    """An expert number that there is not, if any. Waits for the device."""
    low, high = int(topk_idx.min()), int(topk_idx.max())
    if low < -1:
        return low
    return high if high >= num_experts else None


def check_tensor(name: str, tensor: torch.Tensor, columns: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2 or tensor.shape[1] != columns:
        raise ShapeError(f"{name} must have shape [rows, {columns}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}; convert it with .to()")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device} but the workspace is on {device}; move it there")
    if tensor.layout is not torch.strided:
        raise LayoutError(f"{name} must be a dense tensor, got {tensor.layout}; call .to_dense()")
    if tensor.is_neg():  # its memory holds the values with the other sign
        raise LayoutError(f"{name} is a negated view; call .resolve_neg()")
    if not tensor.is_contiguous():
        raise LayoutError(f"{name} must be contiguous, got strides {list(tensor.stride())}; call .contiguous()")
