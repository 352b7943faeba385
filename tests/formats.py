"""Cases of dispatch and combine with rows of other formats, which every transport runs."""

from functools import partial

import torch

import tokenferry as tf
from cases import BULK_ROWS, Case, StepCase
from quantiser import difficult_rows
from tokenferry.dispatched import QuantizedRows, RowFormat
from tokenferry.testing import same_bits

plain = partial(StepCase, payload="normal")
"""A hostile step has a NaN or an infinity in each block: its quantized rows are NaN, and say nothing of scales."""
FP8, POWERS = "fp8_block128", RowFormat("fp8_block128", power_of_two_scales=True)
FORMATS = {
    "EP1-fp8": (1, Case(hidden_size=256, dispatch_format=FP8, steps=(plain((5,)), plain((3,), quantized=True)))),
    "EP2-fp8": (2, Case(hidden_size=256, dispatch_format=FP8, steps=(plain((7, 0), layers=2), plain((3, 8))))),
    "EP3-fp8-H144": (3, Case(hidden_size=144, dispatch_format=FP8, steps=(plain((2, 5, 1), halves=True, own_buffer=True),))),
    "EP4-fp8-fp32-rows": (4, Case(hidden_size=16, dtype=torch.float32, dispatch_format=FP8, steps=(plain((1, 2, 0, 4)),))),
    "EP2-fp8-hostile": (2, Case(hidden_size=144, dispatch_format=FP8, steps=(StepCase((3, 4)), StepCase((0, 2), halves=True)))),
    "EP2-fp8-powers-of-two": (2, Case(hidden_size=128, dtype=torch.float16, dispatch_format=POWERS, steps=(plain((3, 4)),))),
    "EP2-fp8-quantized": (
        2,
        Case(hidden_size=256, dispatch_format=FP8, steps=(plain((4, 6), quantized=True), plain((0, 3), quantized=True))),
    ),
    "EP2-fp8-fewer-rows": (
        2,
        Case(
            hidden_size=256,
            dispatch_format=FP8,
            steps=(plain((6, 3), supplied=(2, 0), layers=2), plain((6, 3), supplied=(1, 3), quantized=True)),
        ),
    ),
    "EP2-fp8-padding": (
        2,
        Case(hidden_size=128, dispatch_format=FP8, steps=(plain((4, 6), real=(2, 0), real_as_tensor=True),)),
    ),
    "EP2-fp8-equal": (2, Case(hidden_size=128, dispatch_format=FP8, counts="equal", steps=(plain((4, 4)), plain((0, 0))))),
    "EP2-bytes": (2, Case(dispatch_format="bytes", steps=(plain((7, 0), layers=2), plain((3, 8), supplied=(2, 5))))),
    "EP3-bytes-B72": (3, Case(dispatch_format=RowFormat("bytes", row_bytes=72), steps=(plain((2, 5, 1), halves=True),))),
}

FLOAT8 = torch.float8_e4m3fn
FP8_COMBINE = {
    "EP1-H256": (1, Case(hidden_size=256, combine_dtype=FLOAT8, steps=(plain((5,)), plain((3,), quantized_terms=True)))),
    "EP2-H272": (2, Case(hidden_size=272, combine_dtype=FLOAT8, steps=(plain((7, 0), layers=2), plain((3, 8))))),
    "EP2-H16-float32": (2, Case(hidden_size=16, combine_dtype=FLOAT8, dtype=torch.float32, steps=(plain((1, 2)),))),
    "EP3-H144-halves": (
        3,
        Case(
            hidden_size=144,
            combine_dtype=FLOAT8,
            steps=(plain((2, 5, 1), halves=True, own_buffer=True, quantized_terms=True), plain((2, 0, 1), halves=True)),
        ),
    ),
    "EP4-H128-fp16-from-float32": (
        4,
        Case(
            hidden_size=128,
            combine_dtype=FLOAT8,
            dtype=torch.float16,
            steps=(
                plain((1, 2, 0, 4), partial_dtype=torch.float32),
                plain((0, 0, 0, 0)),
                plain((3, 3, 3, 3), quantized_terms=True),
            ),
        ),
    ),
    "EP2-H144-hostile": (2, Case(hidden_size=144, combine_dtype=FLOAT8, steps=(StepCase((3, 4)), StepCase((0, 2), halves=True)))),
    "EP2-H256-fp8-dispatch": (
        2,
        Case(
            hidden_size=256,
            combine_dtype=FLOAT8,
            dispatch_format=FP8,
            steps=(plain((4, 6), quantized=True, quantized_terms=True), plain((0, 3), quantized_terms=True, own_buffer=True)),
        ),
    ),
    "EP2-H128-fewer-rows": (
        2,
        Case(
            hidden_size=128,
            combine_dtype=FLOAT8,
            steps=(
                plain((6, 3), supplied=(2, 0), into_out=True, layers=2),
                plain((4, 6), real=(2, 0), real_as_tensor=True, spare=0, quantized_terms=True),
                plain((4, 1), spare=2, quantized_terms=True, own_buffer=True),
            ),
        ),
    ),
    "EP2-H128-equal": (
        2,
        Case(
            hidden_size=128,
            combine_dtype=FLOAT8,
            counts="equal",
            steps=(plain((4, 4), into_out=True), plain((0, 0)), plain((2, 2), quantized_terms=True)),
        ),
    ),
    "EP2-H128-bytes-dispatch": (
        2,
        Case(hidden_size=128, combine_dtype=FLOAT8, dispatch_format="bytes", steps=(plain((3, 2), layers=2), plain((1, 4)))),
    ),
    "EP2-H256-any-order": (2, Case(hidden_size=256, combine_dtype=FLOAT8, combine_order="any", steps=(plain((4, 4)),))),
}
"""The same of a combine of float8 terms."""


def difficult_rows_on_their_way(group: tf.EPGroup, dtype: torch.dtype, dispatch_format: str | RowFormat) -> list[str]:
    """Dispatches of rows that a careless quantiser gets wrong, one by `p2p` in slots and one in bulk; names what differs from the
    specification's bits."""
    config = tf.MoEConfig(hidden_size=272, num_experts=4, topk=1, dtype=dtype)
    rows, row_format = difficult_rows(dtype, config.hidden_size), RowFormat.of(dispatch_format)
    with tf.Workspace(
        config, group, max_tokens_per_rank=BULK_ROWS, transport="p2p", dispatch_format=row_format, combine_dtype=dtype
    ) as ws:
        dispatcher, found = ws.dispatcher(), []
        for count, way in ((len(rows), "slots"), (BULK_ROWS, "bulk")):
            own = rows.repeat(-(-count // len(rows)), 1)[:count]
            hidden = own.to(ws.device)
            ids, weights = torch.zeros(count, 1, dtype=torch.int32), torch.ones(count, 1)
            ws.begin_step(count)
            got = dispatcher.dispatch(hidden, ids.to(ws.device), weights.to(ws.device))
            wanted = tf.reference.quantize(own.repeat(group.size, 1), power_of_two_scales=row_format.power_of_two_scales)
            assert isinstance(got.hidden, QuantizedRows)
            values, scales = (part[: count * group.size].cpu() for part in (got.hidden.values, got.hidden.scales))
            if not torch.equal(values.view(torch.uint8), wanted.values.view(torch.uint8)):
                found.append(f"{way}: values")
            if not same_bits(scales, wanted.scales):
                found.append(f"{way}: scales")
            dispatcher.combine(dispatcher.combine_input(), got)  # after the looks: debug mode poisons gathered rows here
        ws.check()
    return found
