"""Combine of float8 terms: wrong use, debug mode, what it needs, and the specification's own example."""

import math

import pytest
import torch

import quantiser
import tokenferry as tf
from tokenferry.dispatched import FLOAT8, QuantizedRows
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing import run_ranks
from tokenferry.transports.symmetric.layout import plan

H, T, C = 272, 3, 4
S = 3
CONFIG = tf.MoEConfig(hidden_size=H, num_experts=4, topk=2)


def opened(combine_dtype: torch.dtype | None = FLOAT8, transport: str = "local", **changed: object) -> tf.Workspace:
    settings = {"config": CONFIG, "group": tf.EPGroup(device="cpu"), "max_tokens_per_rank": C, **changed}
    return tf.Workspace(transport=transport, combine_dtype=combine_dtype, **settings)


def dispatched(ws: tf.Workspace) -> tuple[tf.Dispatcher, tf.Dispatched]:
    layer = ws.dispatcher()
    ws.begin_step(T)
    return layer, layer.dispatch(torch.zeros(T, H, dtype=torch.bfloat16), torch.zeros(T, 2, dtype=torch.int32), torch.ones(T, 2))


def quantized(values: torch.Tensor | None = None, scales: torch.Tensor | None = None) -> QuantizedRows:
    return QuantizedRows(
        torch.zeros(T, H, dtype=FLOAT8) if values is None else values, torch.ones(T, S) if scales is None else scales
    )


# --- the specification ------------------------------------------------------------------------------------------------


def test_the_example_of_the_specification() -> None:
    first, second = (torch.full((1, 128), number, dtype=torch.bfloat16) for number in (300.0, 1.0))
    [total] = tf.reference.combine([first, second], [1], FLOAT8, torch.float32)
    assert total.unique().tolist() == [301.0]


def test_each_term_has_the_bits_of_an_independent_quantiser() -> None:
    partial = torch.randn(5, H, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    codes, scales = quantiser.quantize_rows(partial)
    [total] = tf.reference.combine([partial], [5], FLOAT8, torch.float32)
    for row in range(5):
        for column in range(H):
            code, scale = int(codes[row, column]), float(scales[row, column // 128])
            number = float(quantiser.POSITIVE[code & 0x7F]) * (-1 if code & 0x80 else 1)
            assert total[row, column].item() == quantiser.float32(number * scale)


def test_a_product_is_rounded_before_it_is_added() -> None:
    """1.125 times this scale takes more than 24 bits. Multiplied and added in one rounding the sum would be another."""
    scale = torch.tensor([[1 + 2.0**-22 + 2.0**-23]])
    values = torch.full((1, 128), 1.125).to(FLOAT8)
    terms = [QuantizedRows(torch.full((1, 128), -1.125).to(FLOAT8), torch.ones(1, 1)), QuantizedRows(values, scale)]
    [total] = tf.reference.combine(terms, [1], FLOAT8, torch.float32)
    exact = 1.125 * float(scale) - 1.125
    assert total[0, 0].item() == float(torch.tensor(1.125) * scale) - 1.125 != exact


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_the_owners_own_term_is_quantized_too(transport: str) -> None:
    partial = torch.randn(T, H, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    with opened(transport=transport, result_dtype=torch.float32) as ws:
        layer, got = dispatched(ws)
        assert torch.equal(layer.combine(partial, got), tf.reference.quantize(partial).dequantize())


# --- wrong use --------------------------------------------------------------------------------------------------------

WRONG = {
    "quantized-rows-for-bfloat16-terms": (
        torch.bfloat16,
        quantized(),
        tf.UsageError,
        "partial is QuantizedRows but the workspace was opened with combine_dtype=torch.bfloat16; open it with torch.float8",
    ),
    "float8-without-scales": (FLOAT8, quantized().values, tf.DtypeError, "partial must be .*, got torch.float8_e4m3fn"),
    "values-of-bfloat16": (
        FLOAT8,
        quantized(torch.zeros(T, H, dtype=torch.bfloat16)),
        tf.DtypeError,
        "partial.values must be torch.float8_e4m3fn, got torch.bfloat16",
    ),
    "values-too-short": (
        FLOAT8,
        quantized(torch.zeros(T, H - 16, dtype=FLOAT8)),
        tf.ShapeError,
        r"partial.values must have shape \[rows, 272\], got \[3, 256\]",
    ),
    "scales-too-few": (
        FLOAT8,
        quantized(scales=torch.ones(T, 2)),
        tf.ShapeError,
        r"partial.scales must have shape \[rows, 3\], got \[3, 2\]",
    ),
    "scales-of-bfloat16": (
        FLOAT8,
        quantized(scales=torch.ones(T, S, dtype=torch.bfloat16)),
        tf.DtypeError,
        "partial.scales must be torch.float32",
    ),
    "scales-column-major": (FLOAT8, quantized(scales=torch.ones(S, T).t()), tf.LayoutError, "partial.scales must be contig"),
    "one-row-of-scales-for-all": (
        FLOAT8,
        quantized(scales=torch.ones(1, S).expand(T, S)),
        tf.LayoutError,
        "partial.scales must be contig",
    ),
    "a-scale-row-too-many": (
        FLOAT8,
        quantized(scales=torch.ones(T + 1, S)),
        tf.ShapeError,
        "partial.scales has 4 rows but partial.values has 3",
    ),
    "rows-too-few": (
        FLOAT8,
        QuantizedRows(torch.zeros(2, H, dtype=FLOAT8), torch.ones(2, S)),
        tf.ShapeError,
        "partial has 2 rows but dispatch returned 3",
    ),
    "values-are-no-tensor": (FLOAT8, QuantizedRows([0.0], torch.ones(T, S)), tf.UsageError, "partial.values must be a"),
}


@pytest.mark.parametrize("name", WRONG)
def test_terms_that_the_combine_does_not_take(name: str) -> None:
    combine_dtype, partial, error, said = WRONG[name]
    with opened(combine_dtype) as ws:
        layer, got = dispatched(ws)
        with pytest.raises(error, match=said):
            layer.combine(partial, got)
        with pytest.raises(error, match=said):
            layer.combine_begin(partial, got)


def test_rows_of_scales_may_lie_apart() -> None:
    """As those of `combine_input()` do on symmetric transports."""
    spread = torch.full((T, 4), 2.0)[:, :S]
    with opened() as ws:
        layer, got = dispatched(ws)
        terms = quantized(torch.ones(T, H).to(FLOAT8), spread)
        assert layer.combine(terms, got).unique().tolist() == [2.0]


def test_results_between_rows_of_scales_are_refused() -> None:
    """Behind the bytes that the scales have together, but before their last row."""
    memory = torch.zeros(T, 2 * H)
    out = memory.view(torch.bfloat16).flatten()[2 * H : 2 * H + T * H].view(T, H)
    with opened() as ws:
        layer, got = dispatched(ws)
        with pytest.raises(tf.LayoutError, match="out overlaps partial"):
            layer.combine(quantized(scales=memory[:, :S]), got, out=out)


@pytest.mark.parametrize("transport", ["local", "collective", "p2p"])
def test_a_hidden_size_that_is_no_multiple_of_16_is_refused(transport: str) -> None:
    config = tf.MoEConfig(hidden_size=24, num_experts=2, topk=1)
    said = "combine_dtype torch.float8_e4m3fn needs hidden_size to be a multiple of 16, got 24"
    with pytest.raises(tf.ConfigError, match=said):
        opened(transport=transport, config=config)
    with pytest.raises(tf.ConfigError, match=said):
        tf.Workspace.required_bytes(config, 2, C, transport=transport, combine_dtype=FLOAT8)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float64, "float8_e4m3fn"], ids=str)
def test_other_dtypes_are_refused(dtype: object) -> None:
    with pytest.raises(tf.ConfigError, match=r"combine_dtype must be one of .*torch.float8_e4m3fn, got"):
        opened(dtype)


def open_with(group: tf.EPGroup) -> str:
    try:
        opened(FLOAT8 if group.rank else torch.bfloat16, "collective", group=group).close()
    except tf.ConfigError as error:
        return str(error)
    return "opened"


@pytest.mark.ranks
def test_ranks_that_disagree_are_refused_on_every_rank() -> None:
    for said in run_ranks(open_with, 2):
        assert "combine_dtype" in said and "torch.float8_e4m3fn" in said and "torch.bfloat16" in said


def test_results_are_never_float8() -> None:
    with pytest.raises(tf.ConfigError, match="result_dtype must be one of"):
        opened(result_dtype=FLOAT8)


# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_required_bytes_are_those_of_the_open_workspace(transport: str) -> None:
    with opened(transport=transport) as ws:
        assert tf.Workspace.required_bytes(CONFIG, 1, C, transport=transport, combine_dtype=FLOAT8) == ws.nbytes
        assert ws.combine_dtype == FLOAT8


@pytest.mark.parametrize("size", [7168, 2880, 2048, 256], ids=lambda size: f"H{size}")
def test_terms_and_slots_take_the_bytes_of_quantized_rows(size: int) -> None:
    config = tf.MoEConfig(hidden_size=size, num_experts=4, topk=2)
    layout = plan(config, 2, 1000, FLOAT8)
    row_bytes = {7168: 7392, 2880: 2976, 2048: 2112, 256: 272}[size]
    assert layout.terms.num_bytes + layout.term_scales.num_bytes == 2000 * row_bytes
    assert layout.combine_slots.num_bytes == 512 * row_bytes


@pytest.mark.parametrize("transport", ["local", "collective"])
def test_combine_input_is_quantized_rows(transport: str) -> None:
    with opened(transport=transport) as ws:
        layer, got = dispatched(ws)
        terms = layer.combine_input()
        assert terms.values.shape == (T, H) and terms.scales.shape == (T, S)
        assert (terms.values.dtype, terms.scales.dtype) == (FLOAT8, torch.float32)
        terms.values.copy_(torch.ones(T, H).to(FLOAT8))
        terms.scales.fill_(3.0)
        assert layer.combine(terms, got).unique().tolist() == [3.0]


def test_solo_quantizes_too() -> None:
    with opened(transport="collective") as ws, ws.solo():
        layer, got = dispatched(ws)
        assert layer.combine(torch.ones(T, H), got).unique().tolist() == [1.0]


def layer_outputs(combine_dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    router = Router(RouterConfig(hidden_size=H, num_experts=4, topk=2))
    experts = Experts(ExpertsConfig(hidden_size=H, intermediate_size=32, num_experts=4), range(4))
    for part in (router, experts):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    with opened(combine_dtype) as ws:
        layer = MoELayer(ws, router, experts)
        ws.begin_step(T)
        return layer(torch.randn(T, H).to(torch.bfloat16))


def test_a_layer_combines_in_float8() -> None:
    plain, float8 = layer_outputs(torch.bfloat16).float(), layer_outputs(FLOAT8).float()
    error = (float8 - plain).norm() / plain.norm()
    assert 0.005 < error < 0.05, "float8 has three bits behind the leading one"


# --- debug mode -------------------------------------------------------------------------------------------------------


def with_scale(group: tf.EPGroup, scale: float) -> str:
    with opened(group=group) as ws:
        layer, got = dispatched(ws)
        layer.combine(quantized(scales=torch.full((T, S), scale)), got)
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
def test_debug_mode_looks_at_the_scales_of_terms(scale: float, is_wrong: bool) -> None:
    [said] = run_ranks(with_scale, 1, scale, env={"TOKENFERRY_DEBUG": "1"})
    assert said.startswith("partial held a scale below zero, or an infinite one") == is_wrong


def changed_between(group: tf.EPGroup) -> str:
    terms = quantized()
    with opened(group=group) as ws:
        layer, got = dispatched(ws)
        layer.combine_begin(terms, got)
        terms.scales[1, 2] = 4.0
        with pytest.raises(tf.StateError) as caught:
            layer.combine_end()
    return str(caught.value)


@pytest.mark.ranks
def test_debug_mode_notices_that_scales_were_changed_between_the_halves() -> None:
    assert "partial was changed between the two halves" in run_ranks(changed_between, 1, env={"TOKENFERRY_DEBUG": "1"})[0]
