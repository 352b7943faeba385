"""Expert numbers and weights on their way: device functions of the dispatch kernel, and no kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.kernels import wire


@triton.jit
def load_routing(word, topk_idx_ptr, topk_weights_ptr, num_supplied, K: tl.constexpr, IDX: tl.constexpr, WEIGHTS: tl.constexpr):
    """Words of the routing message, [rows][K numbers, then K float32 weights]. A number that is negative, or needs more than 32
    bits, travels as -1: cut off, 2**32 + 3 would be expert 3.

    Example:
        K = 2, one row with numbers (3, 5) and weights (0.5, 0.25): words 3, 5, 0x3F000000, 0x3E800000.
    """
    row = word // (2 * K)
    column = word - row * (2 * K)
    present = row < num_supplied
    place = row.to(tl.int64) * K + column
    idx = tl.load(topk_idx_ptr.to(tl.pointer_type(IDX)) + place, mask=present & (column < K), other=-1)
    idx = tl.where(idx == idx.to(tl.int32), idx, -1).to(tl.int32)
    weight = tl.load(topk_weights_ptr.to(tl.pointer_type(WEIGHTS)) + place - K, mask=present & (column >= K), other=0.0)
    bits = weight.to(tl.float32).to(tl.uint32, bitcast=True)
    return tl.where(column < K, tl.maximum(idx, -1).to(tl.uint32, bitcast=True), bits)


@triton.jit
def mask_routing(word, bits, num_words, num_supplied, num_real, K: tl.constexpr):
    """The words as they travel: the number -1 in rows of padding or not supplied, escaped, and 0 behind the message's end."""
    row = word // (2 * K)
    is_idx = word - row * (2 * K) < K
    minus_one = tl.full(bits.shape, 0xFFFFFFFF, tl.uint32)
    bits = tl.where(is_idx & (row >= tl.minimum(num_supplied, num_real)), minus_one, bits)
    return tl.where(word < num_words, wire.escape(bits), 0)


@triton.jit
def store_routing(word, bits, live, idx_ptr, weights_ptr, first_row, K: tl.constexpr, OUT_IDX: tl.constexpr):
    """The inverse of `load_routing`, into the gathered tensors from row `first_row` on."""
    row = word // (2 * K)
    column = word - row * (2 * K)
    place = (row + first_row).to(tl.int64) * K + column
    idx = tl.maximum(bits.to(tl.int32, bitcast=True), -1)
    tl.store(idx_ptr.to(tl.pointer_type(OUT_IDX)) + place, idx.to(OUT_IDX), mask=live & (column < K))
    weight = bits.to(tl.float32, bitcast=True)
    tl.store(weights_ptr.to(tl.pointer_type(tl.float32)) + place - K, weight, mask=live & (column >= K))


@triton.jit
def store_routing_packet(
    word, r0, r1, r2, r3, num_words, idx_ptr, weights_ptr, first_row, K: tl.constexpr, OUT_IDX: tl.constexpr
):
    """`store_routing` for the four words of a packet that begins at `word`, as far as the message goes."""
    store_routing(word, r0, word < num_words, idx_ptr, weights_ptr, first_row, K, OUT_IDX)
    store_routing(word + 1, r1, word + 1 < num_words, idx_ptr, weights_ptr, first_row, K, OUT_IDX)
    store_routing(word + 2, r2, word + 2 < num_words, idx_ptr, weights_ptr, first_row, K, OUT_IDX)
    store_routing(word + 3, r3, word + 3 < num_words, idx_ptr, weights_ptr, first_row, K, OUT_IDX)
