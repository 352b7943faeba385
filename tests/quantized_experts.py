"""Experts on rows that came quantized, beside the same experts on the rows that these stand for: equal to the bit."""

import dataclasses

import torch

import tokenferry as tf
from test_experts import Case
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched, QuantizedRows
from tokenferry.experts import Experts
from tokenferry.testing.numeric import first_difference

CASES = {
    "swiglu": Case(dtype=torch.bfloat16, hidden_size=272, intermediate_size=144),
    "swiglu-in-blocks": Case(dtype=torch.bfloat16, hidden_size=272, intermediate_size=256),
    "swiglu-bias-in-blocks": Case(bias=True, dtype=torch.bfloat16, hidden_size=144, intermediate_size=128),
    "interleaved-bias": Case(Activation("clamped_swiglu", interleaved=True), True, torch.bfloat16, 256, 128),
    "no-gate-float16": Case(Activation("relu"), dtype=torch.float16, hidden_size=144, intermediate_size=160),
}


def with_gaps(rows: QuantizedRows) -> QuantizedRows:
    """The same rows, whose scales lie in whole packets, as symmetric transports have them."""
    num_rows, num_scales = rows.scales.shape
    apart = torch.full((num_rows, -(-num_scales // 4) * 4), torch.nan, device=rows.device)
    apart[:, :num_scales] = rows.scales
    return QuantizedRows(rows.values, apart[:, :num_scales])


def pair(
    case: Case, *, float8: bool, device: str = "cpu", num_valid: int | None = None
) -> tuple[Experts, Dispatched, Dispatched]:
    """Experts, the gathered rows as they came, and those that the experts must make of them: for float8 weights rows that the
    experts' own quantiser turns into the same float8, for others the rows that the quantized ones stand for."""
    experts, rows = case.build()
    experts = experts.to(device)
    if float8:
        experts.quantize()
    valid = len(rows.hidden) if num_valid is None else num_valid
    plain = dataclasses.replace(
        rows,
        hidden=rows.hidden.to(device),
        topk_idx=rows.topk_idx.to(device),
        topk_weights=rows.topk_weights.to(device),
        valid_tokens=torch.tensor([valid], dtype=torch.int32, device=device),
    )
    quantized = with_gaps(tf.reference.quantize(plain.hidden))
    if not float8:
        plain = dataclasses.replace(plain, hidden=quantized.dequantize(case.dtype))
    quantized.values.view(torch.uint8)[valid:] = 0x7F
    quantized.scales[valid:] = torch.nan
    return experts, dataclasses.replace(plain, hidden=quantized), plain


def quantized_terms(experts: Experts, rows: Dispatched, num_valid: int) -> tuple[QuantizedRows, QuantizedRows]:
    """The valid partial rows as the experts' sum quantizes them, and the specification's quantiser on the unrounded sums."""
    num_rows, size = rows.hidden.shape
    device = rows.topk_idx.device
    apart = torch.full((num_rows, -(-size // 512) * 4), 7.0, device=device)
    out = QuantizedRows(
        torch.zeros(num_rows, size, dtype=torch.float8_e4m3fn, device=device), apart[:, : tf.dispatched.num_scales(size)]
    )
    assert experts(rows, out=out) is out
    sums = experts(rows, out=torch.empty(num_rows, size, device=device))
    return out[:num_valid], tf.reference.quantize(sums[:num_valid])


def differing_terms(got: QuantizedRows, wanted: QuantizedRows) -> str:
    """What differs, in bits; nothing if nothing does."""
    scales = first_difference(got.scales.cpu().contiguous().view(torch.int32), wanted.scales.cpu().view(torch.int32))
    return scales or first_difference(got.values.cpu().view(torch.uint8), wanted.values.cpu().view(torch.uint8))
