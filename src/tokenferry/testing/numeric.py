"""Comparison of tensors bit by bit."""

from __future__ import annotations

import torch

_INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether both have the same shape, dtype and bits; any NaN equals any NaN, and -0.0 differs from 0.0."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach().cpu(), right.detach().cpu()
    bits = _INT_OF_SIZE[left.element_size()]
    equal = left.contiguous().view(bits) == right.contiguous().view(bits)
    if left.is_floating_point():
        equal |= left.isnan() & right.isnan()
    return bool(equal.all())


def first_difference(left: torch.Tensor, right: torch.Tensor) -> str:
    """Where and how two tensors differ, for a test's message; empty if they do not."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return f"{list(left.shape)} {left.dtype} against {list(right.shape)} {right.dtype}"
    if same_bits(left, right):  # the search below takes microseconds for each element
        return ""
    for index, (a, b) in enumerate(zip(left.detach().cpu().flatten(), right.detach().cpu().flatten(), strict=True)):
        if not same_bits(a.reshape(1), b.reshape(1)):
            return f"element {index} of {left.numel()}: {a.item()!r} against {b.item()!r}"
    return ""
