"""The specification against numbers worked by hand."""

import math

import torch

from tokenferry import reference
from tokenferry.testing import same_bits


def test_dispatch_concatenates_in_rank_order_and_masks_padding() -> None:
    got = reference.dispatch(
        [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])],
        [torch.tensor([[3], [1]]), torch.tensor([[0]])],
        [torch.tensor([[0.5], [0.25]]), torch.tensor([[1.0]])],
        num_real_tokens=[1, 1],
    )
    assert got.hidden.tolist() == [[1.0], [2.0], [3.0]]
    assert got.topk_idx.tolist() == [[3], [-1], [0]] and got.topk_idx.dtype == torch.int32
    assert got.topk_weights.tolist() == [[0.5], [0.25], [1.0]] and got.topk_weights.dtype == torch.float32
    assert got.valid_tokens.tolist() == [3]


def test_dispatch_leaves_the_callers_ids_alone() -> None:
    ids = torch.tensor([[3], [1]], dtype=torch.int32)
    reference.dispatch([torch.zeros(2, 1)], [ids], [torch.zeros(2, 1)], num_real_tokens=[0])
    assert ids.tolist() == [[3], [1]]


def test_combine_sums_and_splits() -> None:
    first, second = reference.combine(
        [torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]])], [1, 1], torch.float32, torch.float32
    )
    assert first.tolist() == [[11.0]] and second.tolist() == [[22.0]]


def test_combine_never_reads_rows_beyond_the_valid_ones() -> None:
    partial = torch.tensor([[1.0], [math.nan]])
    assert reference.combine([partial], [1], torch.float32, torch.float32)[0].tolist() == [[1.0]]


def test_the_sum_keeps_negative_zero() -> None:
    (total,) = reference.combine([torch.tensor([[-0.0]])] * 2, [1, 0], torch.float32, torch.float32)[:1]
    assert same_bits(total, torch.tensor([[-0.0]]))


def test_every_term_is_rounded_before_the_sum() -> None:
    """1 + 2^-9 rounds to 1 in bfloat16, to even; so do two of them, where the unrounded sum would be 2 + 2^-8."""
    partial = torch.tensor([[1.0 + 2**-9]])
    (total, _) = reference.combine([partial, partial], [1, 0], torch.bfloat16, torch.float32)
    assert total.item() == 2.0


def test_the_order_is_the_ranks() -> None:
    """(2^24 + 1) - 2^24 is 0 in float32; with the second and the third term in another order it would be 1."""
    big, one = torch.tensor([[2.0**24]]), torch.tensor([[1.0]])
    (total, *_) = reference.combine([big, one, -big], [1, 0, 0], torch.float32, torch.float32)
    assert total.item() == 0.0


def test_same_bits_tells_zeros_apart_and_any_nan_equal() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)
    assert same_bits(quiet, other)
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
