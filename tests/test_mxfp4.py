"""MXFP4 weights: what the bits stand for, that packing loses none, and what is refused. Experts by the library's operators."""

import dataclasses
import io

import pytest
import torch

import tokenferry as tf
from mxfp4_experts import CASES, checkpoint, pair
from rank_pool import RankPools
from test_experts import LOCAL, NUM_EXPERTS
from tokenferry.activations import Activation
from tokenferry.dispatched import QuantizedRows
from tokenferry.experts import Experts, ExpertsConfig, ExpertWeights, apply_experts, mxfp4
from tokenferry.experts.plan import Tiles, plan
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing.numeric import first_difference, same_bits

EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)


def test_what_bits_stand_for() -> None:
    blocks = torch.tensor([[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] + [0] * 8]], dtype=torch.uint8)
    values = mxfp4.dequantize(blocks, torch.tensor([[128]], dtype=torch.uint8))[0, :16].tolist()
    assert values == [0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12]
    assert str(values[8]) == "-0.0"


def test_a_scale_of_255_is_no_number() -> None:
    values = mxfp4.dequantize(EVERY_BYTE[0], torch.tensor([[254, 255, 0, 255]] * 4, dtype=torch.uint8))
    assert values.isnan().view(4, 4, 32).all(2).tolist() == [[False, True, False, True]] * 4
    assert not values.view(4, 4, 32)[:, ::2].isnan().any()


def test_transformers_reads_the_same_numbers() -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, _ = checkpoint(2, 8, 64)
    scales = torch.randint(0, 255, blocks.shape[:3], dtype=torch.uint8)
    expected = theirs.convert_moe_packed_tensors(blocks, scales).transpose(1, 2)
    assert not first_difference(mxfp4.dequantize(blocks, scales), expected.contiguous())


@pytest.mark.parametrize("scale", [0, 1, 127, 128])
@pytest.mark.parametrize("layout", ["plain", "halves", "interleaved"])
def test_packing_loses_no_bit_of_any_byte(layout: str, scale: int) -> None:
    settings = {"gated": layout != "plain", "interleaved": layout == "interleaved"}
    scales = torch.full(EVERY_BYTE.shape[:3], scale, dtype=torch.uint8)
    words, factors = mxfp4.pack(EVERY_BYTE, scales, **settings)
    unpacked = mxfp4.unpack(words[0], factors[0], 4, 128, **settings)
    assert not first_difference(unpacked, mxfp4.dequantize(EVERY_BYTE[0], scales[0]))


@pytest.mark.parametrize("layout", ["plain", "halves", "interleaved"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (8, 32), (96, 160), (200, 224)], ids=str)
def test_packing_keeps_rows_and_columns_in_their_places(layout: str, rows: int, columns: int) -> None:
    settings = {"gated": layout != "plain", "interleaved": layout == "interleaved"}
    blocks, scales = checkpoint(2, rows, columns)
    words, factors = mxfp4.pack(blocks, scales, **settings)
    for expert in range(2):
        unpacked = mxfp4.unpack(words[expert], factors[expert], rows, columns, **settings)
        assert not first_difference(unpacked, mxfp4.dequantize(blocks[expert], scales[expert]))


def test_packed_weights_take_4_and_a_quarter_bits() -> None:
    words, factors = mxfp4.pack(*checkpoint(3, 128, 192), gated=True, interleaved=True)
    assert 8 * (words.nbytes + factors.nbytes) == 4.25 * 3 * 128 * 192


@pytest.mark.parametrize("name", CASES)
def test_packed_experts_equal_those_of_unpacked_weights(name: str) -> None:
    packed, plain, rows = pair(CASES[name])
    assert packed.up_proj.dtype == torch.int32 and packed.dtype == torch.bfloat16
    assert not first_difference(packed(rows), plain(rows))


def test_experts_take_this_ranks_part_or_all() -> None:
    case = CASES["halves"]
    whole, _, rows = pair(case)
    shape = dataclasses.replace(whole.config)
    part = Experts(shape, LOCAL)
    up, down = checkpoint(NUM_EXPERTS, 192, 64), checkpoint(NUM_EXPERTS, 64, 96, seed=1)
    part.load_mxfp4(*(tensor[LOCAL.start : LOCAL.stop] for tensor in (*up, *down)))
    assert same_bits(part(rows), whole(rows))


def test_experts_on_the_meta_device_take_packed_weights_without_any_others() -> None:
    case = CASES["gpt-oss"]
    whole, _, rows = pair(case)
    empty = Experts(whole.config, LOCAL, device="meta")
    columns = case.activation.num_columns(case.intermediate_size)
    up = checkpoint(NUM_EXPERTS, columns, case.hidden_size)
    down = checkpoint(NUM_EXPERTS, case.hidden_size, case.intermediate_size, seed=1)
    empty.load_mxfp4(*up, *down, whole.up_bias, whole.down_bias)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"cpu"}
    assert same_bits(empty(rows), whole(rows))


def test_float8_rows_become_bfloat16_on_their_way_in() -> None:
    packed, plain, rows = pair(CASES["gpt-oss"])
    came = dataclasses.replace(rows, hidden=tf.reference.quantize(rows.hidden))
    assert isinstance(came.hidden, QuantizedRows)
    assert same_bits(packed(came), plain(came))


def test_casts_and_a_copy_keep_the_bits() -> None:
    packed, _, rows = pair(CASES["halves"])
    before, kept = packed.up_proj.clone(), packed(rows)
    packed.half().float().to(torch.bfloat16)
    assert same_bits(packed.up_proj, before) and packed.up_scale.dtype == torch.int32
    stored = io.BytesIO()
    torch.save(packed.state_dict(), stored)
    other, _, _ = pair(CASES["halves"])
    other.up_proj.zero_()
    other.load_state_dict(torch.load(io.BytesIO(stored.getvalue())))
    assert same_bits(other(rows), kept)


# --- what is refused ------------------------------------------------------------------------------------------------------

SHAPE = ExpertsConfig(hidden_size=64, intermediate_size=96, num_experts=NUM_EXPERTS)
UP, DOWN = checkpoint(3, 192, 64), checkpoint(3, 64, 96)
WRONG_LOADS = {
    "a block less": ((UP[0][:, :, :1], *UP[1:], *DOWN), tf.ShapeError, r"up_blocks is \[3, 192, 1, 16\]"),
    "rows swapped": ((*UP, DOWN[0], UP[1]), tf.ShapeError, r"down_scales is \[3, 192, 2\]"),
    "int8 blocks": ((UP[0].to(torch.int8), UP[1], *DOWN), tf.DtypeError, r"up_blocks must be uint8, .* got torch\.int8"),
    "a large scale": ((*UP, DOWN[0], DOWN[1] + 6), tf.ShapeError, r"down_scales has a scale byte of 130, .* up to 128"),
    "a bias too many": ((*UP, *DOWN, torch.zeros(3, 192)), tf.ShapeError, "up_bias is given but config.bias is False"),
    "no tensor": ((None, UP[1], *DOWN), tf.UsageError, "up_blocks"),
}


@pytest.mark.parametrize("name", WRONG_LOADS)
def test_a_checkpoint_that_does_not_fit_changes_nothing(name: str) -> None:
    arguments, error, said = WRONG_LOADS[name]
    experts = Experts(SHAPE, LOCAL)
    before = experts.up_proj.clone()
    with pytest.raises(error, match=said):
        experts.load_mxfp4(*arguments)
    assert same_bits(experts.up_proj, before) and experts.weights.packed_sizes is None


def test_sizes_that_are_no_multiples_of_32() -> None:
    experts = Experts(ExpertsConfig(hidden_size=72, intermediate_size=96, num_experts=NUM_EXPERTS), LOCAL)
    with pytest.raises(tf.ShapeError, match="multiples of 32, got hidden 72, intermediate 96"):
        experts.load_mxfp4(*UP, *checkpoint(3, 72, 96))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_of_another_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(tf.DtypeError, match=r"load_mxfp4 takes bfloat16 experts once; these are torch\.float"):
        Experts(SHAPE, LOCAL, dtype=dtype).load_mxfp4(*UP, *DOWN)
    packed, _, rows = pair(CASES["halves"])
    with pytest.raises(tf.DtypeError, match=r"hidden is torch\.float\d\d but MXFP4 experts take bfloat16"):
        packed(dataclasses.replace(rows, hidden=rows.hidden.to(dtype)))
    quantized = dataclasses.replace(rows, hidden=tf.reference.quantize(rows.hidden))
    with pytest.raises(tf.DtypeError, match=r"dtype is torch\.float\d\d but MXFP4 experts take rows as bfloat16"):
        apply_experts(quantized, packed.weights, LOCAL.start, packed.config.activation, dtype=dtype)


def test_packed_experts_are_loaded_once() -> None:
    packed, plain, _ = pair(CASES["halves"])
    with pytest.raises(tf.DtypeError, match="takes bfloat16 experts once"):
        packed.load_mxfp4(*UP, *DOWN)
    with pytest.raises(tf.DtypeError, match="these experts are MXFP4 already"):
        packed.load(plain.up_proj, plain.down_proj)
    with pytest.raises(tf.DtypeError, match="quantize takes bfloat16 or float16 experts once"):
        packed.quantize()


def test_parts_that_no_packing_made() -> None:
    packed, _, rows = pair(CASES["halves"])
    for changes in ({"up_proj": packed.up_proj[:, :, :, :256]}, {"down_scale": None}, {"packed_sizes": (64, 32)}):
        with pytest.raises(tf.ShapeError, match=r"use ExpertWeights\.from_mxfp4"):
            tf.experts.apply_experts(rows, dataclasses.replace(packed.weights, **changes), 2, packed.config.activation)
    with pytest.raises(tf.ShapeError, match="do not fit one another"):
        ExpertWeights.from_mxfp4(*UP, *DOWN, Activation("relu"))


# --- whole layers ---------------------------------------------------------------------------------------------------------


def layer_of(ws: tf.Workspace, *, packed: bool) -> MoELayer:
    torch.manual_seed(1)
    shape = ExpertsConfig(hidden_size=64, intermediate_size=96, num_experts=6)
    router = Router(RouterConfig(hidden_size=64, num_experts=6, topk=2), device=ws.device)
    experts = Experts(shape, ws.group.expert_range(6), device=ws.device)
    up, down = checkpoint(6, 192, 64), checkpoint(6, 64, 96, seed=1)
    if packed:
        experts.load_mxfp4(*up, *down)
    else:
        experts.load(mxfp4.dequantize(*up), mxfp4.dequantize(*down))
    return MoELayer(ws, router, experts)


def layers(group: tf.EPGroup, transport: str, dispatch_format: str) -> str:
    """How a layer of packed experts differs from one of the same numbers in bfloat16."""
    config, outputs = tf.MoEConfig(hidden_size=64, num_experts=6, topk=2), []
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(group.rank)).bfloat16().to(group.device)
    for packed in (True, False):
        settings = {"transport": transport, "dispatch_format": dispatch_format, "timeout_s": 20}
        with tf.Workspace(config, group, max_tokens_per_rank=8, **settings) as ws:
            layer = layer_of(ws, packed=packed)
            if packed:
                with pytest.raises(tf.StateError, match="load before MoELayer is made"):
                    layer.experts.load_mxfp4(*checkpoint(6, 192, 64), *checkpoint(6, 64, 96))
            ws.begin_step(5 - group.rank)
            outputs.append(layer(hidden[: 5 - group.rank]))
    return first_difference(*outputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("dispatch_format", ["same", "fp8_block128"])
def test_a_layer_of_packed_experts_over_symmetric_memory(on_ranks: RankPools, dispatch_format: str) -> None:
    assert on_ranks(layers, 2, "p2p", dispatch_format, env={"TRITON_INTERPRET": "1"}, timeout_s=120) == ["", ""]


def rows_served(tiles: Tiles, count: int) -> range:
    """Which of an expert's rows a launch computes, by the words of `Tiles`."""
    step = tiles.after or (tiles.rows if tiles.min_rows > 1 else 0)
    if not step:
        return range(count)
    rest = count % step
    large = count - rest if rest < (tiles.max_rows + 1 if tiles.after else tiles.min_rows) else count
    return range(large, count) if tiles.after else range(large)


@pytest.mark.parametrize("max_rows", [None, 1, 16, 17, 64, 65, 256, 257, 8192], ids="C·EP {}".format)
def test_each_row_is_served_by_one_launch_of_each_product(max_rows: int | None) -> None:
    chosen = plan(torch.bfloat16, 2880, 2880, packed=True, max_rows=max_rows)
    assert len(chosen.up) == len(chosen.down) == (1 if max_rows is not None and max_rows <= 64 else 2)
    for launches in (chosen.up, chosen.down):
        for count in range(1, 601):  # more than max_rows too: a promise may be broken
            served = [row for tiles in launches for row in rows_served(tiles, count)]
            assert sorted(served) == list(range(count)), count


def test_few_rows_are_left_to_the_launch_of_small_tiles() -> None:
    """At 130 rows an expert has one tile of 128 and one of 16, not two of 128."""
    few, large = plan(torch.bfloat16, 2880, 2880, packed=True).up
    found = {count: (len(rows_served(large, count)), len(rows_served(few, count))) for count in (1, 64, 65, 130, 193, 600)}
    assert found == {1: (0, 1), 64: (0, 64), 65: (65, 0), 130: (128, 2), 193: (193, 0), 600: (600, 0)}
