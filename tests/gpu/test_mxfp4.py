"""Packed MXFP4 experts on a GPU: the numbers of the unpacked ones, in graphs at other counts, with garbage beyond them."""

import dataclasses

import pytest
import torch

import tokenferry as tf
from mxfp4_experts import CASES, LIMITS, checkpoint, moved, of_one_expert, pair
from rank_pool import RankPools
from test_mxfp4 import layer_of
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.experts import ExpertScratch, ExpertWeights, apply_experts, mxfp4
from tokenferry.testing.numeric import first_difference, same_bits

pytestmark = pytest.mark.gpu

TOLERANCE = 1.5e-2
"""As for bfloat16 experts: see tests/test_experts.py."""


def rows_of(experts, valid: int, capacity: int = 700, seed: int = 5) -> Dispatched:
    """Of `capacity` rows the first `valid` count; the others are NaN with ids of a local expert."""
    generator, hidden = torch.Generator("cuda").manual_seed(seed), experts.config.hidden_size
    idx = torch.rand(capacity, 7, device="cuda", generator=generator).argsort(1)[:, :3].int()
    rows = Dispatched(
        hidden=torch.randn(capacity, hidden, device="cuda", generator=generator).bfloat16(),
        topk_idx=idx,
        topk_weights=torch.rand(capacity, 3, device="cuda", generator=generator),
        valid_tokens=torch.tensor([valid], dtype=torch.int32, device="cuda"),
    )
    rows.hidden[valid:] = torch.nan
    rows.topk_idx[valid:] = 2
    return rows


def cut(rows: Dispatched, count: int) -> Dispatched:
    parts = {name: getattr(rows, name)[:count].cpu() for name in ("hidden", "topk_idx", "topk_weights")}
    return Dispatched(**parts, valid_tokens=torch.tensor([count], dtype=torch.int32))


@pytest.mark.parametrize("valid", [1, 20, 700], ids="{} rows".format)
@pytest.mark.parametrize("name", CASES)
def test_packed_experts_are_near_those_of_unpacked_weights(name: str, valid: int) -> None:
    """On the CPU these are equal to the bit to plain ones. Experts with few rows and with many take part."""
    packed, _, _ = pair(CASES[name], device="cuda")
    whole, _, _ = pair(CASES[name])
    rows = rows_of(packed, valid)
    out = torch.full_like(rows.hidden, torch.nan)
    packed(rows, out=out)
    expected = whole(cut(rows, valid)).double()
    error = (out[:valid].cpu().double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"{error:.1e}"
    assert bool(out[valid:].isnan().all()), "rows beyond the valid ones stay as they are"


@pytest.mark.parametrize("valid", [3, 400], ids="{} rows".format)
def test_sums_of_whole_numbers_are_exact(valid: int) -> None:
    """Every sum is a whole number below 256 but for a power of two, so that no order of sums and no tile may show."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.zeros(4, 256, 8, 16, dtype=torch.uint8)
    where = torch.randint(0, 256, (4, 256, 3), generator=generator)  # three weights of a row are 1, -2 or 4
    codes = torch.zeros(4, 256, 256, dtype=torch.uint8)
    codes.scatter_(2, where, torch.tensor([2, 12, 6], dtype=torch.uint8)[torch.randint(0, 3, where.shape, generator=generator)])
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).view(4, 256, 8, 16)
    scales = torch.full((4, 256, 8), 127, dtype=torch.uint8)
    activation = Activation("relu")
    weights = ExpertWeights.from_mxfp4(blocks.cuda(), scales.cuda(), blocks.cuda(), scales.cuda(), activation)
    rows = Dispatched(
        hidden=torch.randint(-2, 3, (valid, 256), generator=generator).bfloat16(),
        topk_idx=torch.randint(0, 4, (valid, 1), generator=generator, dtype=torch.int32),
        topk_weights=torch.ones(valid, 1),
        valid_tokens=torch.tensor([valid], dtype=torch.int32),
    )
    matrices = mxfp4.dequantize(blocks, scales).float()
    chosen = matrices[rows.topk_idx[:, 0].long()]
    activated = (chosen @ rows.hidden.float().unsqueeze(-1)).relu()
    expected = (chosen @ activated).squeeze(-1).bfloat16()
    got = apply_experts(moved(rows, "cuda"), weights, 0, activation, scratch=ExpertScratch("cuda"))
    assert not first_difference(got.cpu(), expected)


def test_a_graph_serves_any_number_of_rows() -> None:
    packed, _, _ = pair(CASES["gpt-oss"], device="cuda")
    rows = rows_of(packed, 700)
    out = torch.empty_like(rows.hidden)
    packed(rows, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed(rows, out=out)
    for valid in (700, 1, 0, 65, 300):
        fresh = rows_of(packed, valid, seed=valid)
        for name in ("hidden", "topk_idx", "topk_weights", "valid_tokens"):
            getattr(rows, name).copy_(getattr(fresh, name))
        graph.replay()
        assert same_bits(packed(fresh)[:valid], out[:valid]), valid


def test_batch_invariant_rows_do_not_depend_on_how_many_there_are() -> None:
    packed, _, _ = pair(CASES["gpt-oss"], device="cuda", batch_invariant=True)
    rows = rows_of(packed, 700)
    whole = packed(rows)
    for count in (1, 17, 100, 500):
        alone = dataclasses.replace(rows, valid_tokens=torch.tensor([count], dtype=torch.int32, device="cuda"))
        assert same_bits(packed(alone)[:count], whole[:count]), count


@pytest.mark.parametrize("valid", [1, 20, 120, 700], ids="{} rows".format)
@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_the_same_bits(name: str, valid: int) -> None:
    """Tiles for few rows, which a warp multiplies alone, for many and for the most, beside the one of batch-invariant experts."""
    chosen, _, _ = pair(CASES[name], device="cuda")
    one, _, _ = pair(CASES[name], device="cuda", batch_invariant=True)
    rows = rows_of(chosen, valid)
    assert same_bits(chosen(rows)[:valid], one(rows)[:valid])


@pytest.mark.parametrize("count", LIMITS, ids="{} rows".format)
def test_launches_on_both_sides_of_a_limit_give_the_same_bits(count: int) -> None:
    """All rows choose one expert, so that their number alone says which launch computes them."""
    chosen, _, _ = pair(CASES["gpt-oss"], device="cuda")
    one, _, _ = pair(CASES["gpt-oss"], device="cuda", batch_invariant=True)
    rows = of_one_expert(rows_of(chosen, count))
    assert same_bits(chosen(rows)[:count], one(rows)[:count])


def test_float8_rows_become_bfloat16_on_their_way_in() -> None:
    packed, _, _ = pair(CASES["gpt-oss"], device="cuda")
    rows = rows_of(packed, 700)
    came = dataclasses.replace(rows, hidden=tf.reference.quantize(rows.hidden))
    meant = dataclasses.replace(rows, hidden=came.hidden.dequantize(torch.bfloat16))
    assert same_bits(packed(came), packed(meant))


def test_experts_whose_words_no_32_bits_count() -> None:
    """280 experts of 4096 x 4096: 2**31 bytes of words lie before the 257th, and more than 2**31 of their weights."""
    num_experts, size = 280, 4096
    activation = Activation("relu")
    one = checkpoint(1, size, size)
    whole = ExpertWeights.from_mxfp4(*(part.cuda() for part in (*one, *one)), activation)
    many = dataclasses.replace(
        whole,
        **{
            name: torch.zeros(num_experts, *getattr(whole, name).shape[1:], dtype=torch.int32, device="cuda")
            for name in ("up_proj", "down_proj", "up_scale", "down_scale")
        },
    )
    for name in ("up_proj", "down_proj", "up_scale", "down_scale"):
        getattr(many, name)[num_experts - 1] = getattr(whole, name)[0]
    rows = Dispatched(
        hidden=torch.randn(5, size, device="cuda").bfloat16(),
        topk_idx=torch.full((5, 1), num_experts - 1, dtype=torch.int32, device="cuda"),
        topk_weights=torch.ones(5, 1, device="cuda"),
        valid_tokens=torch.tensor([5], dtype=torch.int32, device="cuda"),
    )
    scratch = ExpertScratch("cuda")
    far = apply_experts(rows, many, 0, activation, scratch=scratch)
    near = apply_experts(dataclasses.replace(rows, topk_idx=rows.topk_idx * 0), whole, 0, activation, scratch=scratch)
    assert same_bits(far, near) and bool(far.isfinite().all()) and float(far.abs().max()) > 0


def in_a_graph(group: tf.EPGroup) -> list[str]:
    """A whole layer, eager and captured, at other counts of the other rank."""
    config, found = tf.MoEConfig(hidden_size=64, num_experts=6, topk=2), []
    with tf.Workspace(config, group, max_tokens_per_rank=64, transport="p2p", timeout_s=20) as ws:
        layer = layer_of(ws, packed=True)
        hidden = torch.randn(7, 64, device=group.device).bfloat16()

        def forward(count: int) -> torch.Tensor:
            ws.begin_step(count)
            return layer(hidden[:count])

        with ws.solo():
            forward(7)
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph):
            captured = forward(7)
        for count in (7, 1, 0, 7):
            if group.rank == 0:
                graph.replay()
                replayed = captured.clone()
            else:
                forward(count)
            eager = forward(7 if group.rank == 0 else count)
            if group.rank == 0:
                found.append(first_difference(replayed, eager))
        ws.check()
    return [difference for difference in found if difference]


@pytest.mark.gpu(count=2)
def test_a_captured_layer_gives_the_bits_of_an_eager_one(on_ranks: RankPools) -> None:
    assert on_ranks(in_a_graph, 2, backend="nccl", timeout_s=200) == [[], []]
