"""What the calls of a dispatcher ask of their tensors."""

from __future__ import annotations

import torch

from tokenferry.config import HIDDEN_DTYPES
from tokenferry.dispatched import FLOAT8, HiddenRows, PartialRows, QuantizedRows, num_scales
from tokenferry.errors import DeviceError, DtypeError, LayoutError, ShapeError, UsageError


def fitting_rows(
    tensor: torch.Tensor, columns: int, dtypes: tuple[torch.dtype, ...], device: torch.device, *, spread: bool = False
) -> int:
    """The rows of a tensor in which `check_tensor` finds nothing wrong; -1 if it must look."""
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.dim() != 2:
        return -1
    num_rows, num_columns = tensor.shape
    if num_columns != columns or tensor.dtype not in dtypes or tensor.device != device:
        return -1
    lies_well = tensor.is_contiguous() or (spread and _is_spread(tensor))
    return num_rows if lies_well and not tensor.is_neg() else -1


def _is_spread(tensor: torch.Tensor) -> bool:
    """Whether each row is contiguous and none begins before the last one's end."""
    return tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def fitting_quantized(rows: QuantizedRows, columns: int, device: torch.device, *, spread: bool = False) -> int:
    """The rows of quantized rows in which `check_quantized` finds nothing wrong; -1 if it must look."""
    num_rows = fitting_rows(rows.values, columns, (FLOAT8,), device)
    scaled_rows = fitting_rows(rows.scales, num_scales(columns), (torch.float32,), device, spread=spread)
    return num_rows if num_rows == scaled_rows else -1


def fitting_partial(partial: PartialRows, columns: int, combine_dtype: torch.dtype, device: torch.device) -> int:
    """The rows of partial rows in which `check_partial` finds nothing wrong; -1 if it must look."""
    if type(partial) is not QuantizedRows:
        return fitting_rows(partial, columns, HIDDEN_DTYPES, device)  # type: ignore[arg-type]
    return fitting_quantized(partial, columns, device, spread=True) if combine_dtype == FLOAT8 else -1


def made_contiguous(weights: torch.Tensor) -> torch.Tensor:
    """The same values in order. What is no dense tensor is left to the checks."""
    if not isinstance(weights, torch.Tensor) or weights.layout is not torch.strided or weights.is_contiguous():
        return weights
    return weights.contiguous()


def overlap(tensor: torch.Tensor, rows: HiddenRows) -> bool:
    """Whether a contiguous tensor has memory in common with rows, which may lie apart: what is between them counts too."""
    begin = tensor.data_ptr()
    end = begin + tensor.nbytes
    return any(
        tensor.device == each.device and begin < each.data_ptr() + _bytes_spanned(each) and each.data_ptr() < end
        for each in ((rows.values, rows.scales) if isinstance(rows, QuantizedRows) else (rows,))
    )


def _bytes_spanned(tensor: torch.Tensor) -> int:
    """From the first byte of a tensor's rows to the last one's end."""
    if not tensor.numel():
        return 0
    return (sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.itemsize


def ids_out_of_range(topk_idx: torch.Tensor, num_experts: int) -> int | None:
    """An expert number that there is not, if any. Waits for the device."""
    low, high = int(topk_idx.min()), int(topk_idx.max())
    if low < -1:
        return low
    return high if high >= num_experts else None


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    columns: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    spread: bool = False,
) -> None:
    """`spread`: rows may lie apart in memory."""
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    wanted = " or ".join(map(str, dtypes))
    if tensor.dim() != 2 or tensor.shape[1] != columns:
        # Both are told: bfloat16 rows in a workspace for bytes have another number of columns because they have another dtype.
        also = "" if tensor.dtype in dtypes else f" of {tensor.dtype} instead of {wanted}"
        raise ShapeError(f"{name} must have shape [rows, {columns}], got {list(tensor.shape)}{also}")
    if tensor.dtype not in dtypes:
        raise DtypeError(f"{name} must be {wanted}, got {tensor.dtype}; {_how_to_convert(tensor.dtype, dtypes)}")
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device} but the workspace is on {device}; move it there")
    if tensor.layout is not torch.strided:
        raise LayoutError(f"{name} must be a dense tensor, got {tensor.layout}; call .to_dense()")
    if tensor.is_neg():  # its memory holds the values with the other sign
        raise LayoutError(f"{name} is a negated view; call .resolve_neg()")
    if not tensor.is_contiguous() and not (spread and _is_spread(tensor)):
        raise LayoutError(f"{name} must be contiguous, got strides {list(tensor.stride())}; call .contiguous()")


def _how_to_convert(dtype: torch.dtype, dtypes: tuple[torch.dtype, ...]) -> str:
    """Converted to uint8, numbers lose their bits; converted from float8, they lack their scales."""
    if dtypes == (torch.uint8,):
        return "give its bytes, .view(torch.uint8)"
    if dtype == FLOAT8:
        return "convert it with .to() if it stands for itself, or give QuantizedRows if it has scales"
    return "convert it with .to()"


def check_quantized(name: str, rows: QuantizedRows, columns: int, device: torch.device, *, spread: bool = False) -> None:
    """`spread`: rows of scales may lie apart in memory, as those of `combine_input()` do."""
    check_tensor(f"{name}.values", rows.values, columns, (FLOAT8,), device)
    check_tensor(f"{name}.scales", rows.scales, num_scales(columns), (torch.float32,), device, spread=spread)
    if rows.scales.shape[0] != rows.shape[0]:
        raise ShapeError(
            f"{name}.scales has {rows.scales.shape[0]} rows but {name}.values has {rows.shape[0]}; they must be equal"
        )


def check_partial(partial: PartialRows, columns: int, combine_dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(partial, QuantizedRows):
        check_tensor("partial", partial, columns, HIDDEN_DTYPES, device)
    elif combine_dtype == FLOAT8:
        check_quantized("partial", partial, columns, device, spread=True)
    else:
        raise UsageError(
            f"partial is QuantizedRows but the workspace was opened with combine_dtype={combine_dtype}; open it with {FLOAT8}, "
            "or give partial.dequantize()"
        )
