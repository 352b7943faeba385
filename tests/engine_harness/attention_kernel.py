"""Attention over a paged cache in Triton, for the two entries of attention.py."""

import torch
import triton
import triton.language as tl


@triton.jit
def paged_attention(
    query, key, value, out, query_ends, key_counts, pages, scale, num_requests,
    query_stride_token, query_stride_head, page_stride, slot_stride, head_stride, out_stride_token, out_stride_head, pages_stride,
    KEYS_CUMULATIVE: tl.constexpr, QUERIES_PER_REQUEST: tl.constexpr, REQUESTS: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one query token's heads that share a key head. Tokens behind the last request's become zeros.

    A token's bits do not depend on the other tokens of the call: Megatron pads a batch to a graph's size. GROUP query heads are
    padded to HEADS, a block that `tl.dot` takes; REQUESTS covers num_requests.

    Example: with query_ends [0, 3, 4] token 3 is request 1's only one; with key_counts [0, 3, 8], cumulative, it sees 5 keys, in
    the first 5 slots of pages[1, 0].
    """
    token = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    if QUERIES_PER_REQUEST > 0:
        request = (token // QUERIES_PER_REQUEST).to(tl.int32)
        start = request * QUERIES_PER_REQUEST
        num_queries = QUERIES_PER_REQUEST
    else:
        lanes = tl.arange(0, REQUESTS)
        ends = tl.load(query_ends + 1 + lanes, mask=lanes < num_requests, other=2147483647)
        request = tl.sum((ends <= token).to(tl.int32), axis=0)
        known = request < num_requests
        start = tl.load(query_ends + request, mask=known, other=0)
        num_queries = tl.load(query_ends + request + 1, mask=known, other=0) - start
    num_keys = 0
    if num_queries > 0:
        if KEYS_CUMULATIVE:
            count = tl.load(key_counts + request + 1) - tl.load(key_counts + request)
        else:
            count = tl.load(key_counts + request)
        num_keys = (count - num_queries + token - start + 1).to(tl.int32)
    heads, width = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    in_group = heads[:, None] < GROUP
    all_heads = key_head * GROUP + heads[:, None]
    q = tl.load(query + token * query_stride_token + all_heads * query_stride_head + width[None, :], mask=in_group, other=0.0)
    largest = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, WIDTH], tl.float32)
    for first in range(0, num_keys, BLOCK):
        page = tl.load(pages + request.to(tl.int64) * pages_stride + first // PAGE).to(tl.int64)
        slots = first % PAGE + tl.arange(0, BLOCK)
        places = page * page_stride + slots[:, None].to(tl.int64) * slot_stride + key_head * head_stride + width[None, :]
        seen = first + tl.arange(0, BLOCK) < num_keys
        k = tl.load(key + places, mask=seen[:, None], other=0.0)
        v = tl.load(value + places, mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp(scores - larger[:, None]), 0.0)
        shrink = tl.exp(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = larger
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    places = out + token * out_stride_token + all_heads * out_stride_head + width[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=in_group)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_ends: torch.Tensor | None,
    key_counts: torch.Tensor,
    pages: torch.Tensor,
    scale: float,
    queries_per_request: int,
) -> torch.Tensor:
    """q [tokens, heads, width], k and v [pages, slots, key heads, width], pages [requests, most pages] -> as q.

    Args:
        query_ends: [requests + 1] cumulative, or None where every request has `queries_per_request`.
        key_counts: [requests + 1] cumulative with `query_ends`, else [requests].
    """
    tokens, num_heads, width = q.shape
    _, page, key_heads, _ = k.shape
    if k.stride() != v.stride() or k.stride(3) != 1 or q.stride(2) != 1:
        raise ValueError(f"paged attention wants equal strides of k and v, and dense heads; got {k.stride()}, {v.stride()}")
    if width & (width - 1) or page & (page - 1):
        raise ValueError(f"paged attention wants powers of two, got head width {width} and pages of {page} tokens")
    out, requests, group = torch.empty_like(q, memory_format=torch.contiguous_format), pages.shape[0], num_heads // key_heads
    if tokens == 0:
        return out
    paged_attention[(tokens, key_heads)](
        q, k, v, out, key_counts if query_ends is None else query_ends, key_counts, pages, scale, requests,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), out.stride(0), out.stride(1), pages.stride(0),
        KEYS_CUMULATIVE=query_ends is not None, QUERIES_PER_REQUEST=queries_per_request,
        REQUESTS=max(16, triton.next_power_of_2(requests)), GROUP=group, HEADS=max(16, triton.next_power_of_2(group)),
        WIDTH=width, PAGE=page, BLOCK=min(64, page),
    )  # fmt: skip
    return out
