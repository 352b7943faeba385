"""When the collective transport may let the library sum."""

from __future__ import annotations

import math

import torch

from tokenferry.dispatched import FLOAT8
from tokenferry.transports.base import TransportSettings

REDUCED_BYTES_OF_TWO = 16 * 2**20
"""The most bytes of terms for the other one of two ranks that are reduced by the library. Of more, an exchange and the sum in one
launch take up to a tenth less time than its reduce-scatter and a cast (2x H200, 2026-11-26); the bits are the same."""


def most_reduced_bytes(settings: TransportSettings) -> float:
    """Up to how many bytes of terms for one rank the library's reduce-scatter may stand for the sum in rank order; 0: never.

    Of two ranks it may: a + b has the bits of b + a. It rounds the sum to `combine_dtype`, where the promise is a float32 sum
    that is rounded to the result's dtype. float32 is rounded so afterwards. Where both are one dtype of 16 bits, rounding the
    exact sum once gives the bits of rounding it to float32 first, whose 24 bits are enough for that (2 * 11 + 2).
    """
    if settings.combine_dtype == FLOAT8:  # messages of bytes
        return 0
    has_one_order = settings.group.size == 2
    if settings.combine_order == "rank" and not (
        has_one_order and settings.combine_dtype in (torch.float32, settings.result_dtype)
    ):
        return 0
    return REDUCED_BYTES_OF_TWO if has_one_order else math.inf
