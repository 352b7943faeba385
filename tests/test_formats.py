"""Rows of other formats: wrong use, debug mode, and what they need."""

import math
import re
from pathlib import Path

import pytest
import torch

import tokenferry as tf
from tokenferry.dispatched import QuantizedRows, RowFormat
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing import run_ranks
from tokenferry.transports.symmetric.layout import plan

H, T, C = 272, 3, 4
S = 3
CONFIG = tf.MoEConfig(hidden_size=H, num_experts=4, topk=2)
FLOAT8 = torch.float8_e4m3fn


def opened(dispatch_format: str | RowFormat, transport: str = "local", **changed: object) -> tf.Workspace:
    settings = {"config": CONFIG, "group": tf.EPGroup(device="cpu"), "max_tokens_per_rank": C, **changed}
    return tf.Workspace(transport=transport, dispatch_format=dispatch_format, **settings)


def routing() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(T, 2, dtype=torch.int32), torch.ones(T, 2)


def quantized(values: torch.Tensor | None = None, scales: torch.Tensor | None = None) -> QuantizedRows:
    return QuantizedRows(
        torch.zeros(T, H, dtype=FLOAT8) if values is None else values, torch.ones(T, S) if scales is None else scales
    )


# --- wrong use --------------------------------------------------------------------------------------------------------

WRONG = {
    "quantized-rows-for-same": ("same", quantized(), tf.UsageError, "opened with dispatch_format='same'; open it with 'fp8"),
    "quantized-rows-for-bytes": ("bytes", quantized(), tf.UsageError, "opened with dispatch_format='bytes'"),
    "float8-without-scales": ("fp8_block128", quantized().values, tf.DtypeError, "got torch.float8.*or give QuantizedRows if"),
    "float32-rows": ("fp8_block128", torch.zeros(T, H), tf.DtypeError, "must be torch.bfloat16, got torch.float32"),
    "values-of-bfloat16": (
        "fp8_block128",
        quantized(torch.zeros(T, H, dtype=torch.bfloat16)),
        tf.DtypeError,
        "hidden.values must be torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "values-too-short": (
        "fp8_block128",
        quantized(torch.zeros(T, H - 16, dtype=FLOAT8)),
        tf.ShapeError,
        r"hidden.values must have shape \[rows, 272\], got \[3, 256\]",
    ),
    "values-transposed": (
        "fp8_block128",
        quantized(torch.zeros(H, T, dtype=FLOAT8).t()),
        tf.LayoutError,
        "hidden.values must be contiguous",
    ),
    "values-are-no-tensor": ("fp8_block128", QuantizedRows([0.0], torch.ones(T, S)), tf.UsageError, "hidden.values must be a"),
    "scales-too-few": (
        "fp8_block128",
        quantized(scales=torch.ones(T, 2)),
        tf.ShapeError,
        r"hidden.scales must have shape \[rows, 3\], got \[3, 2\]",
    ),
    "scales-of-bfloat16": (
        "fp8_block128",
        quantized(scales=torch.ones(T, S, dtype=torch.bfloat16)),
        tf.DtypeError,
        "hidden.scales must be torch.float32",
    ),
    "scales-column-major": (
        "fp8_block128",
        quantized(scales=torch.ones(S, T).t()),
        tf.LayoutError,
        "hidden.scales must be contig",
    ),
    "a-scale-row-too-many": (
        "fp8_block128",
        quantized(scales=torch.ones(T + 1, S)),
        tf.ShapeError,
        "hidden.scales has 4 rows but hidden.values has 3",
    ),
    "bfloat16-for-bytes": (
        "bytes",
        torch.zeros(T, 544, dtype=torch.bfloat16),
        tf.DtypeError,
        r"must be torch.uint8, got torch.bfloat16; give its bytes, \.view\(torch\.uint8\)",
    ),
    "hidden-rows-for-bytes": (
        "bytes",
        torch.zeros(T, H, dtype=torch.bfloat16),
        tf.ShapeError,
        r"\[rows, 544\], got \[3, 272\] of torch.bfloat16 instead of torch.uint8",
    ),
    "columns-for-bytes": ("bytes", torch.zeros(T, H, dtype=torch.uint8), tf.ShapeError, r"must have shape \[rows, 544\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_the_format_does_not_take(name: str) -> None:
    dispatch_format, hidden, error, said = WRONG[name]
    with opened(dispatch_format) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(T)
        with pytest.raises(error, match=said):
            dispatcher.dispatch(hidden, *routing())
        with pytest.raises(error, match=said):
            dispatcher.dispatch_begin(hidden, *routing())


def test_wrong_values_name_the_dtype_that_came() -> None:
    with opened("fp8_block128") as ws, pytest.raises(tf.UsageError, match=r"hidden must be a torch\.Tensor, got list"):
        dispatcher = ws.dispatcher()
        ws.begin_step(T)
        dispatcher.dispatch([[0.0]], *routing())


@pytest.mark.parametrize(
    ("given", "said"),
    [("fp8", "one of same, fp8_block128, bytes, got 'fp8'"), (None, "got None"), (torch.float8_e4m3fn, "got torch.float8")],
    ids=["unknown", "None", "a-dtype"],
)
def test_formats_that_there_are_not(given: object, said: str) -> None:
    with pytest.raises(tf.ConfigError, match=said):
        opened(given)
    with pytest.raises(tf.ConfigError, match=said):
        tf.Workspace.required_bytes(CONFIG, 1, C, transport="local", dispatch_format=given)


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_quantized_rows_need_a_hidden_size_that_is_a_multiple_of_16(transport: str) -> None:
    config = tf.MoEConfig(hidden_size=24, num_experts=2, topk=1)
    with pytest.raises(tf.ConfigError, match="'fp8_block128' needs hidden_size to be a multiple of 16, got 24"):
        opened("fp8_block128", transport, config=config)


def test_rows_of_bytes_that_are_no_whole_packets_are_refused_by_symmetric_transports() -> None:
    odd = RowFormat("bytes", row_bytes=44)
    with pytest.raises(tf.ConfigError, match=r"hidden rows have 44 bytes .*, not a multiple of 8; pad them"):
        tf.Workspace.required_bytes(CONFIG, 2, C, transport="p2p", dispatch_format=odd)


@pytest.mark.parametrize(
    ("dispatch_format", "row_bytes"),
    [("same", 2 * H), ("fp8_block128", H + 4 * 4), ("bytes", 2 * H), (RowFormat("bytes", row_bytes=64), 64)],
    ids=["same", "fp8", "bytes", "bytes-64"],
)
def test_gathered_rows_take_the_bytes_of_their_format(dispatch_format: str | RowFormat, row_bytes: int) -> None:
    layout = plan(CONFIG, 2, 1000, torch.bfloat16, dispatch_format=RowFormat.of(dispatch_format))
    assert layout.hidden.num_bytes + layout.scales.num_bytes == 2000 * row_bytes
    assert (layout.dispatch_slot_rows, layout.slot_rows) == (0 if str(dispatch_format).startswith("bytes") else 512, 512)


def test_a_layer_refuses_rows_of_bytes() -> None:
    shape = ExpertsConfig(hidden_size=H, intermediate_size=16, num_experts=4)
    router = Router(RouterConfig(hidden_size=H, num_experts=4, topk=2))
    with (
        opened("bytes") as ws,
        pytest.raises(tf.ConfigError, match="moves hidden rows, but the workspace has"),
    ):
        MoELayer(ws, router, Experts(shape, range(4)))


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["local", "collective"])
@pytest.mark.parametrize("dispatch_format", ["fp8_block128", "bytes"])
def test_required_bytes_are_those_of_the_open_workspace(transport: str, dispatch_format: str) -> None:
    with opened(dispatch_format, transport) as ws:
        required = tf.Workspace.required_bytes(CONFIG, 1, C, transport=transport, dispatch_format=dispatch_format)
        assert required == ws.nbytes
        assert ws.dispatch_format == RowFormat(dispatch_format)


def test_solo_carries_the_format_too() -> None:
    with opened("fp8_block128", "collective") as ws, ws.solo():
        dispatcher = ws.dispatcher()
        ws.begin_step(T)
        got = dispatcher.dispatch(torch.ones(T, H, dtype=torch.bfloat16), *routing())
        assert got.hidden.dequantize().unique().tolist() == [1.0]
        assert dispatcher.combine(torch.ones(T, H), got).shape == (T, H)


# --- debug mode -------------------------------------------------------------------------------------------------------


def with_scale(group: tf.EPGroup, scale: float) -> str:
    hidden = quantized(scales=torch.full((T, S), scale))
    with opened("fp8_block128", group=group) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(T)
        got = dispatcher.dispatch(hidden, *routing())
        dispatcher.combine(torch.zeros(T, H), got)
        try:
            ws.check()
        except tf.UsageError as error:
            return str(error)
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("scale", "is_wrong"),
    [(-1.0, True), (math.inf, True), (math.nan, False), (0.0, False)],
    ids=["negative", "inf", "nan", "zero"],
)
def test_debug_mode_looks_at_scales(scale: float, is_wrong: bool) -> None:
    [said] = run_ranks(with_scale, 1, scale, env={"TOKENFERRY_DEBUG": "1"})
    assert said.startswith("hidden held a scale below zero, or an infinite one") == is_wrong


def changed_between(group: tf.EPGroup) -> str:
    hidden = quantized()
    with opened("fp8_block128", group=group) as ws:
        dispatcher = ws.dispatcher()
        ws.begin_step(T)
        dispatcher.dispatch_begin(hidden, *routing())
        hidden.scales[1, 2] = 4.0
        with pytest.raises(tf.StateError) as caught:
            dispatcher.dispatch_end()
    return str(caught.value)


@pytest.mark.ranks
def test_debug_mode_notices_that_scales_were_changed_between_the_halves() -> None:
    assert "hidden was changed between the two halves" in run_ranks(changed_between, 1, env={"TOKENFERRY_DEBUG": "1"})[0]


# --- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1], ids=["dispatch", "combine"])
def test_the_examples_of_the_page_run_as_they_stand(number: int) -> None:
    page = Path(__file__).parent.parent / "docs" / "formats.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(examples) == 2
    exec(compile(examples[number], str(page), "exec"), {})
