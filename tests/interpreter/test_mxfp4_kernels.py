"""The product of packed weights in the interpreter: to the bit that of the weights that they stand for."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

import tokenferry as tf
from mxfp4_experts import CASES, LIMITS, moved, of_one_expert, pair
from test_experts import LOCAL
from thinned import crossed
from tokenferry.experts import ExpertScratch, mxfp4, triton_path
from tokenferry.experts.plan import Plan, Tiles, WarpTiles
from tokenferry.kernels import expert_mxfp4, expert_mxfp4_tiles
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import first_difference, same_bits

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


@triton.jit
def store_tile(words, scales, out, D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    DEPTH_BLOCKS: tl.constexpr = (D + expert_mxfp4_tiles.BLOCK - 1) // expert_mxfp4_tiles.BLOCK
    block = tl.arange(0, N // 64)[:, None, None] * DEPTH_BLOCKS
    word = words + block * 512 + tl.arange(0, 512)[None, None, :]
    scale = scales + block * 32 + tl.arange(0, 32)[None, None, :]
    depth = tl.arange(0, BD)
    for d in range(0, D, BD):
        tile = expert_mxfp4_tiles.unpacked_tile(word, scale, d, DEPTH_BLOCKS, N, BD)
        tl.store(out + tl.arange(0, N)[:, None] * 256 + d + depth[None, :], tile.to(tl.float32))


def tiles_of(group: tf.EPGroup) -> dict[str, str]:
    """Every byte, at the smallest and the largest scale; a last step along the depth that is half beyond the end is zeros."""
    found = {}
    for columns, depth, scale in ((128, 128, 0), (64, 128, 128), (64, 192, 127)):
        blocks = torch.arange(columns * depth // 2).remainder(256).to(torch.uint8).view(1, columns, depth // 32, 16)
        scales = torch.full(blocks.shape[:3], scale, dtype=torch.uint8)
        words, factors = mxfp4.pack(blocks, scales, gated=False, interleaved=False)
        out = torch.full((columns, 256), 7.0)
        store_tile[(1,)](words, factors, out, D=depth, N=columns, BD=128)
        expected = torch.full((columns, 256), 7.0)
        expected[:, : -(-depth // 128) * 128] = 0.0
        expected[:, :depth] = mxfp4.dequantize(blocks[0], scales[0]).float()
        found[f"{columns}x{depth}"] = first_difference(out, expected)
    return found


def test_unpacked_tile() -> None:
    assert set(run_ranks(tiles_of, 1, env=INTERPRETER, timeout_s=240)[0].values()) == {""}


def tiles(**changes) -> Tiles:
    common = {"rows": 16, "rows_few": 4, "columns": 64, "depth": 64, "num_warps": 4, "num_stages": 2, "programs_per_sm": 1}
    return Tiles(**{**common, **changes})


def with_warps(max_pairs: int = 10**6, columns: int = 32, **changes) -> Tiles:
    return tiles(by_warp=WarpTiles(max_pairs=max_pairs, columns=columns, steps=2), **changes)


LARGE = tiles(min_rows=7)
REST = tiles(max_rows=6, after=16)
PLANS = {
    "default": None,
    "large tiles, and what they leave": Plan(up=(LARGE, REST), down=(REST, LARGE)),
    "wide tiles first": Plan(up=(tiles(rows=8, rows_wide=32),), down=(tiles(rows_wide=32),)),
    "by warps": Plan(up=(with_warps(columns=16),), down=(with_warps(columns=32),)),
    "by warps, second of a product": Plan(
        up=(LARGE, with_warps(20, max_rows=6, after=16)), down=(LARGE, with_warps(99, columns=64, max_rows=6, after=16))
    ),
    "wide and deep": Plan(up=(tiles(columns=128, depth=128),), down=(tiles(columns=128, depth=128),)),
}


def by_kernels(experts, rows, plan=None, scratch=None) -> torch.Tensor:
    out = torch.full((*rows.topk_weights.shape[:1], experts.config.hidden_size), torch.nan, dtype=torch.bfloat16)
    scratch = scratch or ExpertScratch("cpu")
    settings = {"plan": plan, "dtype": torch.bfloat16, "batch_invariant": experts.batch_invariant}
    return triton_path.run(rows, experts.weights, LOCAL.start, experts.config.activation, out, scratch, **settings)


def all_cases(group: tf.EPGroup, asked: list[tuple[str, str]]) -> dict[str, str]:
    found = {}
    for name in dict.fromkeys(name for name, _ in asked):
        packed, plain, rows = pair(CASES[name])
        expected = by_kernels(plain, rows)
        for plan in (plan for case, plan in asked if case == name):
            found[f"{name}, {plan}"] = first_difference(by_kernels(packed, rows, PLANS[plan]), expected)
    return found


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> dict[str, str]:
    """Of the pairs that the selected tests ask for."""
    given = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = [(params["name"], params["plan"]) for params in given if "plan" in params]
    return run_ranks(all_cases, 1, asked, env=INTERPRETER, timeout_s=240)[0]


@pytest.mark.parametrize(("name", "plan"), crossed(CASES, PLANS))
def test_packed_experts_equal_those_of_unpacked_weights(differences, name: str, plan: str) -> None:
    assert not differences[f"{name}, {plan}"]


def both_sides_of_limits(group: tf.EPGroup) -> dict[int, str]:
    found = {}
    for count in LIMITS:
        packed, plain, _ = pair(CASES["gpt-oss"])
        rows = of_one_expert(dataclasses.replace(CASES["gpt-oss"], num_rows=count).rows())
        found[count] = first_difference(by_kernels(packed, rows), by_kernels(plain, rows))
    return found


def test_launches_on_both_sides_of_a_limit_serve_all_rows() -> None:
    assert run_ranks(both_sides_of_limits, 1, env=INTERPRETER, timeout_s=240)[0] == dict.fromkeys(LIMITS, "")


def properties(group: tf.EPGroup) -> dict[str, bool]:
    packed, plain, rows = pair(CASES["gpt-oss"])
    clean, valid = by_kernels(packed, rows), 13
    beyond = moved(dataclasses.replace(rows, hidden=rows.hidden.clone()), "cpu")
    beyond.hidden[valid:] = torch.nan
    beyond.topk_idx[valid:] = LOCAL.start  # a row that does not count may name an expert of ours
    beyond.valid_tokens.fill_(valid)
    scratch = ExpertScratch("cpu")
    scratch._memory = torch.full((1 << 21,), 0xFF, dtype=torch.uint8)
    poisoned = by_kernels(packed, beyond, scratch=scratch)
    came = dataclasses.replace(rows, hidden=tf.reference.quantize(rows.hidden))
    meant = dataclasses.replace(rows, hidden=came.hidden.dequantize(torch.bfloat16))
    packed.batch_invariant = True
    one = dataclasses.replace(rows, hidden=rows.hidden[:1], topk_idx=rows.topk_idx[:1], topk_weights=rows.topk_weights[:1])
    one.valid_tokens.fill_(1)
    return {
        "garbage beyond the valid rows": same_bits(poisoned[:valid], clean[:valid]),
        "rows beyond the valid ones stay": bool(poisoned[valid:].isnan().all()),
        "float8 rows": same_bits(by_kernels(packed, came), by_kernels(plain, meant)),
        "one row alone": same_bits(by_kernels(packed, one), clean[:1]),
    }


def test_properties() -> None:
    held = run_ranks(properties, 1, env=INTERPRETER, timeout_s=240)[0]
    assert all(held.values()), held


def gemm_example(group: tf.EPGroup) -> list[list[float]]:
    """The example of `expert_gemm_kernel`, packed: experts [[1, 0], [0, 1]] and [[0, 2], [2, 0]]."""
    blocks, scales = torch.zeros(2, 2, 1, 16, dtype=torch.uint8), torch.full((2, 2, 1), 127, dtype=torch.uint8)
    blocks[0, :, 0, 0] = torch.tensor([0x02, 0x20])
    blocks[1, :, 0, 0] = torch.tensor([0x40, 0x04])
    words, factors = mxfp4.pack(blocks, scales, gated=False, interleaved=False)
    rows = torch.tensor([[1.0, 2], [3, 4]], dtype=torch.bfloat16)
    counts, offsets, pairs = (torch.tensor(values, dtype=torch.int32) for values in ([1, 1], [0, 1], [1, 0]))
    results, source = [], rows
    for first in (True, False):
        out = torch.full((2, 2), -7.0, dtype=torch.bfloat16)
        expert_mxfp4.expert_mxfp4_kernel[(1,)](
            source, counts, 0, words, factors, counts, out, counts, counts, offsets, pairs, 0, 0.0, 0.0, L=2, K=1, DEPTH=2,
            WIDTH=2, IS_FIRST_PRODUCT=first, GATED=False, INTERLEAVED=False, ACTIVATION="none", BIAS=False, GATHERED=False,
            LARGE_ROWS=0, MAX_REST=0, IS_REST=False, BM_FEW=16, BM=16, BM_WIDE=16, BN=64, BD=64, WARP_PAIRS=0, WARP_BM=0,
            WARP_BN=0, UNROLL=0, LANES=2, UPCAST=True, OVERLAPS=False, PDL=0,
        )  # fmt: skip
        results.append(out.tolist())
        source = out
    return results


def test_mxfp4_kernel() -> None:
    assert run_ranks(gemm_example, 1, env=INTERPRETER, timeout_s=240)[0] == [[[3.0, 4.0], [4.0, 2.0]], [[4.0, 8.0], [3.0, 4.0]]]
