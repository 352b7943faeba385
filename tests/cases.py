"""Cases of dispatch and combine that every transport runs, on every kind of rank, and the worker that runs them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import tokenferry as tf
from row_data import handed_rows, handed_terms, on, terms_to_combine
from tokenferry.dispatched import FLOAT8, SAME, QuantizedRows, RowFormat
from tokenferry.testing.data import RankInputs, make_inputs
from tokenferry.testing.numeric import first_difference
from tokenferry.transports.symmetric.layout import SLOT_ROWS

ON_GPUS = pytest.mark.parametrize(
    "world_size", [pytest.param(size, id=f"EP{size}", marks=pytest.mark.gpu(count=size)) for size in (2, 4, 8)]
)
"""On as many GPUs as there are; the others say how many they need."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BULK_ROWS = SLOT_ROWS + 8
"""More than a slot ever holds: in a workspace for so many, a step to which a rank brings them goes the bulk way."""


@dataclass(frozen=True)
class StepCase:
    """One step of a few layers. `real` and `supplied` are None for 'all rows'.

    Attributes:
        spare: partial rows beyond the ranks' tokens; None for a partial row for each gathered one.
        into_out: combine writes into memory of the caller's.
        own_buffer: partial rows lie in `combine_input()`.
    """

    tokens: tuple[int, ...]
    real: tuple[int, ...] | None = None
    supplied: tuple[int, ...] | None = None
    real_as_tensor: bool = False
    routing: str = "uniform"
    payload: str = "hostile"
    index_dtype: torch.dtype = torch.int64
    weight_dtype: torch.dtype = torch.float32
    partial_dtype: torch.dtype | None = None
    layers: int = 1
    halves: bool = False
    own_buffer: bool = False
    spare: int | None = None
    into_out: bool = False
    quantized: bool = False
    """Whether rows of format fp8_block128 are handed over quantized already."""
    quantized_terms: bool = False
    """Whether partial rows of a float8 combine are."""
    seed: int = 0


@dataclass(frozen=True)
class Case:
    """A workspace and what happens in it."""

    hidden_size: int = 16
    num_experts: int = 8
    topk: int = 2
    dtype: torch.dtype = torch.bfloat16
    combine_dtype: torch.dtype | None = None
    combine_order: str = "rank"
    counts: str = "uneven"
    capacity: int = 8
    transport: str = "collective"
    dispatch_format: str | RowFormat = "same"
    steps: tuple[StepCase, ...] = field(default=())

    @property
    def config(self) -> tf.MoEConfig:
        return tf.MoEConfig(hidden_size=self.hidden_size, num_experts=self.num_experts, topk=self.topk, dtype=self.dtype)


def same(name: str, got: Any, want: Any) -> None:
    if isinstance(want, QuantizedRows):
        same(f"{name}.values", got.values, want.values)
        same(f"{name}.scales", got.scales, want.scales)
        return
    difference = first_difference(got, want)
    assert not difference, f"{name}: {difference}"


def run_case(group: tf.EPGroup, case: Case) -> int:
    """The worker: returns how many layers it compared."""
    compared = 0
    with tf.Workspace(
        case.config,
        group,
        max_tokens_per_rank=case.capacity,
        transport=case.transport,
        combine_dtype=case.combine_dtype,
        combine_order=case.combine_order,
        counts=case.counts,
        dispatch_format=case.dispatch_format,
        timeout_s=20,
    ) as ws:
        dispatchers = [ws.dispatcher() for _ in range(max((step.layers for step in case.steps), default=0))]
        for step in case.steps:
            begin(ws, step)
            for layer, dispatcher in enumerate(dispatchers[: step.layers]):
                run_layer(ws, dispatcher, step, layer)
                compared += 1
    return compared


def settle(ws: tf.Workspace) -> None:
    """Waits for this rank's stream. A copy between host and device behind a waiting kernel holds a lock of the driver: virtual
    ranks, which share the driver, would keep one another from launching."""
    if ws.device.type == "cuda":
        torch.cuda.current_stream(ws.device).synchronize()


def begin(ws: tf.Workspace, step: StepCase) -> None:
    rank = ws.group.rank
    real: int | torch.Tensor | None = None if step.real is None else step.real[rank]
    if step.real_as_tensor and real is not None:
        real = torch.tensor([real], dtype=torch.int32, device=ws.device)
    published = ws.begin_step(step.tokens[rank], real)
    settle(ws)
    assert published.tokens_per_rank.tolist() == list(step.tokens)
    assert published.valid_tokens.item() == sum(step.tokens)
    assert published.rank_token_offset.item() == sum(step.tokens[:rank])
    assert published.max_tokens.item() == max(step.tokens)


def run_layer(ws: tf.Workspace, dispatcher: tf.Dispatcher, step: StepCase, layer: int) -> None:
    rank = ws.group.rank
    inputs = make_inputs(
        ws.config,
        step.tokens,
        seed=step.seed * 100 + layer,
        routing=step.routing,
        payload=step.payload,
        index_dtype=step.index_dtype,
        weight_dtype=step.weight_dtype,
        partial_dtype=step.partial_dtype,
        supplied=step.supplied,
    )
    own, handed = inputs[rank], [handed_rows(each.hidden, ws, quantized=step.quantized) for each in inputs]
    given = [on(ws.device, rows) for rows in (handed[rank], own.topk_idx, own.topk_weights)]
    if step.halves:
        dispatcher.dispatch_begin(*given)
        got = dispatcher.dispatch_end()
    else:
        got = dispatcher.dispatch(*given)
    settle(ws)
    expected = expected_dispatch(inputs, step, handed, ws.dispatch_format)
    num_valid = sum(step.tokens)
    same("hidden", got.hidden[:num_valid], expected.hidden)
    same("topk_idx", got.topk_idx[:num_valid], expected.topk_idx)
    same("topk_weights", got.topk_weights[:num_valid], expected.topk_weights)
    same("valid_tokens", got.valid_tokens, expected.valid_tokens)
    assert bool((got.topk_idx[num_valid:] == -1).all()), "rows beyond the valid ones have no expert"

    are_quantized = step.quantized_terms and ws.combine_dtype == FLOAT8
    terms = [handed_terms(each.partial, quantized=are_quantized) for each in inputs]
    partial = terms_to_combine(dispatcher, on(ws.device, terms[rank]), got.hidden.shape[0], own_buffer=step.own_buffer)
    if step.spare is not None:
        partial = partial[: num_valid + step.spare]
    out = None
    if step.into_out:
        memory = torch.full((own.hidden.shape[0] + 2, ws.config.hidden_size), 7, dtype=ws.result_dtype, device=ws.device)
        out = memory[1:-1]
    if step.halves:
        dispatcher.combine_begin(partial, got)
        combined = dispatcher.combine_end(out)
    else:
        combined = dispatcher.combine(partial, got, out)
    settle(ws)
    wanted = tf.reference.combine(terms, step.tokens, ws.combine_dtype, ws.config.dtype)[rank]
    same("combined", combined, wanted[: own.hidden.shape[0]])
    if step.into_out:
        assert combined is out
        assert bool((memory[[0, -1]] == 7).all()), "no row is written before and behind out"


def expected_dispatch(
    inputs: list[RankInputs], step: StepCase, handed: list[Any] | None = None, row_format: RowFormat = SAME
) -> tf.Dispatched:
    """`handed`: the rows that the ranks hand over, where they are not those of `inputs`."""
    handed = [each.hidden for each in inputs] if handed is None else handed
    padded = [
        tf.reference.pad_rows(tf.reference.in_format(rows, row_format), i.topk_idx, i.topk_weights, count)
        for i, rows, count in zip(inputs, handed, step.tokens, strict=True)
    ]
    columns = [list(column) for column in zip(*padded, strict=True)]
    return tf.reference.dispatch(*columns, num_real_tokens=step.real, dispatch_format=row_format)


# --- named cases ----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[int, Case]] = {
    "EP1-T5-K2": (1, Case(steps=(StepCase((5,)), StepCase((0,)), StepCase((8,))))),
    "EP2-T7+0-K3-odd": (2, Case(topk=3, steps=(StepCase((7, 0), layers=3), StepCase((0, 7)), StepCase((8, 8))))),
    "EP3-V0": (3, Case(steps=(StepCase((0, 0, 0), layers=2), StepCase((1, 0, 0)), StepCase((0, 0, 0))))),
    "EP4-K1-E5-uneven-experts": (4, Case(topk=1, num_experts=5, steps=(StepCase((1, 2, 3, 4), layers=2),))),
    "EP5-all-on-one-rank": (5, Case(num_experts=9, steps=(StepCase((0, 0, 8, 0, 0), routing="skewed"),))),
    "EP2-padding-int": (2, Case(steps=(StepCase((4, 6), real=(2, 0)), StepCase((4, 6), real=(4, 6))))),
    "EP2-padding-tensor": (2, Case(steps=(StepCase((4, 6), real=(2, 0), real_as_tensor=True),))),
    "EP2-fewer-rows-than-announced": (2, Case(steps=(StepCase((6, 3), supplied=(2, 0), layers=2), StepCase((1, 1))))),
    "EP3-halves-own-buffer": (3, Case(steps=(StepCase((2, 5, 1), halves=True, own_buffer=True, layers=3),))),
    "EP2-fewer-partial-rows": (2, Case(steps=(
        StepCase((3, 1), spare=0, layers=2), StepCase((0, 2), spare=0, halves=True), StepCase((5, 0), spare=2, own_buffer=True),
    ))),
    "EP3-into-memory-of-the-callers": (3, Case(steps=(
        StepCase((2, 0, 3), into_out=True, layers=2), StepCase((1, 4, 1), into_out=True, halves=True, supplied=(0, 2, 1)),
    ))),
    "EP2-equal-counts-into-memory-of-the-callers": (2, Case(counts="equal", steps=(StepCase((4, 4), into_out=True, layers=2),))),
    "EP2-fp32-partials-bf16-wire": (2, Case(steps=(StepCase((3, 3), partial_dtype=torch.float32),))),
    "EP2-bf16-partials-fp32-wire": (2, Case(combine_dtype=torch.float32, steps=(StepCase((3, 3)),))),
    "EP3-fp16-to-bf16-wire": (3, Case(dtype=torch.float16, combine_dtype=torch.bfloat16, steps=(StepCase((3, 1, 2)),))),
    "EP2-equal-counts": (2, Case(counts="equal", steps=(StepCase((4, 4), layers=2), StepCase((0, 0)), StepCase((7, 7))))),
    "EP2-order-any-on-gloo": (2, Case(combine_order="any", steps=(StepCase((4, 4)), StepCase((1, 3))))),
}  # fmt: skip
