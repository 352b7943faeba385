"""The worked examples in the docstrings of the experts' kernels, interpreted."""

import pytest
import torch
import triton
import triton.language as tl

import tokenferry as tf
from tokenferry.kernels import expert_gemm, expert_math, expert_quantize, expert_scaled, expert_sum, expert_table
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.interpreter

INTERPRETER = {"TRITON_INTERPRET": "1"}


def table_example(group: tf.EPGroup) -> list[list[list[int]]]:
    idx = torch.tensor([[3, 0], [2, 3], [-1, 2], [2, 2]], dtype=torch.int32)
    valid, found = torch.tensor([3], dtype=torch.int32), []
    for few, many in ((8, 16), (4, 4)):  # at once, and in two blocks
        counts, offsets, pairs = (torch.full((size,), -7, dtype=torch.int32) for size in (2, 2, 5))
        expert_table.expert_table_kernel[(2,)](
            idx, valid, counts, offsets, pairs, 0, 4, 2, K=2, FEW=few, MIDDLE=few, MANY=many, PDL=0, **expert_table.NO_LOADS
        )
        found.append([counts.tolist(), offsets.tolist(), pairs.tolist()])
    return found


def test_table_kernel() -> None:
    assert run_ranks(table_example, 1, env=INTERPRETER) == [[[[2, 2], [0, 2], [2, 5, 0, 3, -7]]] * 2]


def quantize_example(group: tf.EPGroup) -> list[list[float]]:
    rows = torch.zeros(1, 130, dtype=torch.bfloat16)
    rows[0, :3] = torch.tensor([224.0, -448.0, 1.0])
    counts, valid = torch.tensor([1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    found = []
    for min_rows in (1, 2):
        out, scales = torch.full((1, 130), 2.0).to(torch.float8_e4m3fn), torch.full((1, 2), 7.0)
        expert_quantize.quantize_rows_kernel[(2,)](
            rows, counts, valid, out, scales, 0, 1, L=1, X=130, IS_FIRST_PRODUCT=True, MIN_ROWS=min_rows, LANES=1, PDL=0
        )
        found.append([*out.float()[0, [0, 1, 2, 3, 129]].tolist(), *scales[0].tolist()])
    return found


def test_quantize_rows_kernel() -> None:
    done, left = run_ranks(quantize_example, 1, env=INTERPRETER)[0]
    assert done == [224.0, -448.0, 1.0, 0.0, 0.0, 1.0, pytest.approx(1e-4 / 448)]
    assert left == [2.0, 2.0, 2.0, 2.0, 2.0, 7.0, 7.0]


def sum_example(group: tf.EPGroup) -> list[list[float]]:
    outputs = torch.tensor([[1.0], [torch.nan], [2.0**-9], [5.0], [5.0], [5.0]])
    idx = torch.tensor([[0, 9, 1], [9, 9, -1], [0, 0, 0]], dtype=torch.int32)
    weights = torch.tensor([[2.0, torch.nan, 512.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    out = torch.full((3, 1), 7.0)
    valid = torch.tensor([2], dtype=torch.int32)
    scale = torch.tensor([2.0])
    constants = {"L": 2, "H": 1, "BLOCK": 2, "QUANTIZES": False, "PDL": 0}
    unread = (valid, 0)
    expert_sum.expert_sum_kernel[(2,)](
        outputs, idx, weights, valid, out, *unread, 0, 3, 0, scale, 0.0, K=3, NORM=False, **constants
    )
    one, seven, normed = torch.tensor([[2.0]]), torch.tensor([[7.0]]), torch.zeros(1, 1)
    first = idx[:1, :1].contiguous()
    expert_sum.expert_sum_kernel[(1,)](
        one, first, seven, valid, normed, *unread, 0, 1, 0, scale, 48.0, K=1, NORM=True, **constants
    )
    return out.tolist() + normed.tolist()


def test_sum_kernel() -> None:
    assert run_ranks(sum_example, 1, env=INTERPRETER) == [[[3.0], [0.0], [7.0], [3.5]]]


def quantized_sum_example(group: tf.EPGroup) -> tuple[list[float], list[list[float]]]:
    outputs, out = torch.zeros(2, 130), torch.full((2, 130), 2.0).to(torch.float8_e4m3fn)
    outputs[0, :2] = torch.tensor([224.0, -448.0])
    idx, weights = torch.zeros(2, 1, dtype=torch.int32), torch.full((2, 1), 2.0)
    valid, scales = torch.tensor([1], dtype=torch.int32), torch.full((2, 4), 7.0)
    expert_sum.expert_sum_kernel[(1,)](
        outputs, idx, weights, valid, out, scales, 4, 0, 2, 0, valid, 0.0, L=1, K=1, H=130, BLOCK=128, NORM=False,
        QUANTIZES=True, PDL=0,
    )  # fmt: skip
    return out.float()[:, [0, 1, 2, 129]].flatten().tolist(), scales.tolist()


def test_sum_kernel_that_quantizes() -> None:
    values, scales = run_ranks(quantized_sum_example, 1, env=INTERPRETER)[0]
    assert values == [224.0, -448.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0], "row 1 is beyond V"
    assert scales == [[2.0, pytest.approx(1e-4 / 448), 7.0, 7.0], [7.0] * 4]


def gemm_example(group: tf.EPGroup) -> list[list[list[float]]]:
    rows, weights = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[[1.0, 0], [0, 1]], [[0, 2], [2, 0]]])
    counts, offsets, pairs = (torch.tensor(values, dtype=torch.int32) for values in ([1, 1], [0, 1], [1, 0]))
    results = []
    source = rows
    for first in (True, False):
        out = torch.full((2, 2), -7.0)
        expert_gemm.expert_gemm_kernel[(1,)](
            source, counts, 0, weights, counts, counts, out, counts, counts, offsets, pairs, 0, 0.0, 0.0, L=2, K=1, DEPTH=2,
            WIDTH=2, STRIDE_E=4, STRIDE_N=2, STRIDE_D=1, IS_FIRST_PRODUCT=first, GATED=False, INTERLEAVED=False,
            ACTIVATION="none", BIAS=False, SCALED=False, QUANTIZED=False, GATHERED=False, IN_BLOCKS=False, SWAPPED=False,
            TENSOR_MAP=False, MIN_ROWS=1, MAX_ROWS=0, BM_FEW=16, BM=16, BN=16, BD=16, LANES=2, UPCAST=True, OVERLAPS=False, PDL=0,
        )  # fmt: skip
        results.append(out.tolist())
        source = torch.tensor([[3.0, 4], [4, 2]])
    return results


def test_gemm_kernel() -> None:
    first, second = run_ranks(gemm_example, 1, env=INTERPRETER)[0]
    assert first == [[3.0, 4.0], [4.0, 2.0]]  # row 1 by expert 0, row 0 by expert 1
    assert second == [[4.0, 8.0], [3.0, 4.0]]  # back at their own places


@triton.jit
def scaled(out, quantized, scales, SWAPPED: tl.constexpr):
    lanes = tl.arange(0, 16)
    first = lanes[None, :] == 0
    x = tl.where(first, tl.where(lanes[:, None] == 0, 1.0, 2.0), 0.0)  # rows of 1 and 2, of depth 1
    w = tl.where(lanes[:, None] == 0, 3.0, 0.0) + tl.zeros([16, 16], tl.float32)
    scale = tl.where(lanes == 0, 10.0, 100.0)
    total = expert_scaled.scaled_sum(tl.full([16, 16], 0.5, tl.float32), x, w, scale, SWAPPED)
    if SWAPPED:
        total = tl.trans(total)
    tl.store(out + lanes[:, None] * 16 + lanes[None, :], total)
    rows = tl.arange(0, 2)
    column = tl.arange(0, 128)
    value = tl.where(column[None, :] == 0, 224.0, tl.where(column[None, :] == 1, -448.0, 0.0)) + tl.zeros([2, 128], tl.float32)
    expert_scaled.store_quantized(value, quantized, scales, (3 + rows).to(tl.int64), rows < 1, 128, 200)


def scaled_example(group: tf.EPGroup, swapped: bool) -> list[list[float]]:
    out, quantized, scales = torch.zeros(16, 16), torch.full((5, 200), 2.0).to(torch.float8_e4m3fn), torch.full((5, 2), 7.0)
    scaled[(1,)](out, quantized, scales, SWAPPED=swapped)
    assert (out[:, :1] == out).all(), "every column has the same weights"
    left = quantized.float()
    return [
        out[:2, 0].tolist(),
        left[3, 127:131].tolist(),
        [left[3, 199].item(), left[4, 128].item()],
        scales[3:].flatten().tolist(),
    ]


@pytest.mark.parametrize("swapped", [False, True], ids=["rows-first", "swapped"])
def test_scaled_sums_and_quantized_stores(swapped: bool) -> None:
    sums, written, beside, scales = run_ranks(scaled_example, 1, swapped, env=INTERPRETER)[0]
    assert sums == [30.5, 600.5]
    assert written == [2.0, 224.0, -448.0, 0.0] and beside == [0.0, 2.0], "row 4 is none of the tile's"
    assert scales == [7.0, 1.0, 7.0, 7.0]


@triton.jit
def small(out, scales, columns, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    lanes = tl.arange(0, 4)
    x = tl.where(lanes == 0, -1.0, tl.where(lanes == 2, 3.0, 0.0))
    tl.store(out + lanes, expert_math.activate(x, "squared_relu"))
    gate = tl.full([4], 9.0, tl.float32)
    up = tl.full([4], -5.0, tl.float32)
    tl.store(out + 4 + lanes, expert_math.activate_gated(gate, up, 0.0, 2.0, "clamped_swiglu"))
    number = tl.where(lanes == 0, -3.0, tl.where(lanes == 1, 1.0, tl.where(lanes == 2, 9.0, float("nan"))))
    tl.store(out + 8 + lanes, expert_math.clamp(number, -2.0, 2.0))
    rows = tl.arange(0, 4)[:, None]
    values = tl.where(rows == 0, 224.0, tl.where(rows == 1, 112.0, 0.0)) + tl.zeros([4, 128], tl.float32)
    values = tl.where((lanes[:, None] < 2) & (tl.arange(0, 128)[None, :] == 1), values * -2.0, values)
    quantized, scale = expert_math.quantize(values)
    tl.store(scales + lanes, scale)
    tl.store(scales + 4 + lanes, tl.max(quantized.to(tl.float32), 1))
    WIDE: tl.constexpr = 4 if GATED else 2
    tl.store(columns + tl.arange(0, WIDE), expert_gemm.columns_of(4, 6, GATED, INTERLEAVED, True, 2))


def helpers_example(group: tf.EPGroup) -> list[list[float]]:
    out, scales, found = torch.zeros(12), torch.zeros(8), []
    for gated, interleaved in ((False, False), (True, False), (True, True)):
        columns = torch.zeros(4 if gated else 2, dtype=torch.int32)
        small[(1,)](out, scales, columns, GATED=gated, INTERLEAVED=interleaved)
        found.append(columns.tolist())
    return [out[:4].tolist(), out[4:5].tolist(), out[8:].tolist(), scales.tolist(), *found]


def test_activations_scales_and_columns() -> None:
    plain_ones, gated, clamped, scales, *columns = run_ranks(helpers_example, 1, env=INTERPRETER)[0]
    assert plain_ones == [0.0, 0.0, 9.0, 0.0]
    assert gated == [-1.0]
    assert clamped[:3] == [-2.0, 1.0, 2.0] and clamped[3] != clamped[3]
    of_zeros = pytest.approx(1e-4 / 448)
    assert scales == [1.0, 0.5, of_zeros, of_zeros, 224.0, 224.0, 0.0, 0.0]
    assert columns == [[4, 5], [4, 5, 10, 11], [8, 9, 10, 11]]
