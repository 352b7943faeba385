"""Offsets past 2**31 elements: gathered rows of one and of two ranks, experts' weights, experts' rows.

Values are small whole numbers that follow from row and column, so that sums are exact in bfloat16 and a wrapped offset meets
another value: 2**31 and 2**32, in elements and in bytes, are no multiples of 61 rows.
"""

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.dispatched import Dispatched
from tokenferry.experts import Experts, ExpertsConfig, ExpertScratch, ExpertWeights, apply_experts
from tokenferry.testing.numeric import same_bits

HIDDEN = 7168
ROWS = 302_000
"""2.16e9 elements, 4.3 GB of gathered rows."""
CHUNK = 16_384
LIMIT = 2**31


def pattern(first_row: int, num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A column and a row whose sum is the value of each element: 0 to 62."""
    rows = torch.arange(first_row, first_row + num_rows, device=device).remainder(61).bfloat16()
    return rows[:, None], torch.arange(HIDDEN, device=device).remainder(3).bfloat16()


def assert_pattern(name: str, tensor: torch.Tensor, first_row: int = 0, factor: int = 1) -> None:
    """Every element, the far end first; `tensor` row i holds the pattern of row first_row + i."""
    for begin in reversed(range(0, tensor.shape[0], CHUNK)):
        part = tensor[begin : begin + CHUNK]
        rows, columns = pattern(first_row + begin, part.shape[0], tensor.device)
        wrong = (part != (rows + columns) * factor).any(1).nonzero().flatten()
        if wrong.numel():
            row = begin + int(wrong[-1])
            raise AssertionError(f"{name}: row {row} of {tensor.shape[0]} differs, {tensor[row, :4].tolist()} ...")


def counted(begin: int, end: int, device: torch.device) -> torch.Tensor:
    return torch.arange(begin, end, device=device)


def steps(group: tf.EPGroup, capacity: int, tokens: tuple[tuple[int, ...], ...]) -> int:
    """A round trip a step. Rank r's partial rows are (r + 1) times the pattern: in place in even steps, the caller's in odd ones.
    Each step's pattern begins 7 rows later: what the last one left behind is wrong."""
    config = tf.MoEConfig(hidden_size=HIDDEN, num_experts=8, topk=2)
    factor = sum(rank + 1 for rank in range(group.size))
    assert 62 * factor <= 256, "exact in bfloat16"
    largest = 0
    with tf.Workspace(config, group, max_tokens_per_rank=capacity, transport="p2p", timeout_s=60) as ws:
        layer = ws.dispatcher()
        for number, counts in enumerate(tokens):
            own, valid, start = counts[group.rank], sum(counts), 7 * number
            first = start + sum(counts[: group.rank])
            hidden = torch.add(*pattern(first, own, ws.device))
            ids = counted(first, first + own, ws.device)[:, None].remainder(8).expand(-1, 2).contiguous()
            weights = counted(first, first + own, ws.device)[:, None].float().expand(-1, 2).contiguous()
            ws.begin_step(own)
            got = layer.dispatch(hidden, ids, weights)
            assert got.hidden.numel() > LIMIT
            del hidden, ids, weights
            assert_pattern(f"step {number}, gathered rows", got.hidden[:valid], start)
            everybody = counted(start, start + valid, ws.device)[:, None].expand(-1, 2)
            assert torch.equal(got.topk_idx[:valid], everybody.remainder(8).int()), f"step {number}"
            assert torch.equal(got.topk_weights[:valid], everybody.float()), f"step {number}"
            assert bool((got.topk_idx[valid:] == -1).all()), f"step {number}: rows beyond the valid ones have no expert"
            partial = layer.combine_input() if number % 2 == 0 else torch.empty_like(got.hidden)
            torch.add(*pattern(start, valid, ws.device), out=partial[:valid])
            partial[:valid] *= group.rank + 1
            out = layer.combine(partial, got)
            ws.check()
            assert_pattern(f"step {number}, combined rows", out, first, factor)
            largest = max(largest, valid * HIDDEN)
            del partial, out, got
    return largest


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(150)
def test_rows_of_two_ranks_beyond_two_to_the_31_elements(on_ranks: RankPools) -> None:
    """About 22 GB a GPU. The first steps are full, in place and with the caller's rows; then one rank has most, the other few."""
    half = ROWS // 2
    tokens = ((half, half), (half - 77, half), (half, half - 123), (5, half))
    assert min(on_ranks(steps, 2, half, tokens, backend="nccl", timeout_s=140)) > LIMIT


@pytest.mark.gpu(count=1)
@pytest.mark.timeout(150)
def test_rows_of_one_rank_beyond_two_to_the_31_elements(on_ranks: RankPools) -> None:
    assert on_ranks(steps, 1, ROWS, ((ROWS,), (ROWS - 77,)), backend="nccl", timeout_s=140)[0] > LIMIT


# --- experts --------------------------------------------------------------------------------------------------------------

NUM_EXPERTS, INTERMEDIATE = 152, 2048
"""up_proj has 4.46e9 elements, down_proj 2.23e9: 13.4 GB of bfloat16."""


def routed(num_rows: int, experts: tuple[int, ...]) -> Dispatched:
    """Rows that go round these experts, one each."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(num_rows)
    return Dispatched(
        hidden=torch.randn(num_rows, HIDDEN, device=device, generator=generator).bfloat16(),
        topk_idx=torch.tensor(experts, dtype=torch.int32, device=device)[counted(0, num_rows, device) % len(experts)][:, None],
        topk_weights=torch.rand(num_rows, 1, device=device, generator=generator),
        valid_tokens=torch.tensor([num_rows], dtype=torch.int32, device=device),
    )


def by_torch(weights: ExpertWeights, rows: Dispatched) -> torch.Tensor:
    out = torch.zeros(rows.hidden.shape, device=rows.hidden.device)
    for expert in rows.topk_idx.unique().tolist():
        chosen = (rows.topk_idx == expert).any(1)
        gate, up = (rows.hidden[chosen].float() @ weights.up_proj[expert].float().T).chunk(2, 1)
        activated = (gate * gate.sigmoid() * up).bfloat16().float()
        out[chosen] = activated @ weights.down_proj[expert].float().T * rows.topk_weights[chosen]
    return out


def last_alone(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(**{name: value[-1:].clone() for name, value in vars(weights).items() if isinstance(value, torch.Tensor)})


@pytest.mark.gpu(count=1)
@pytest.mark.timeout(150)
def test_weights_of_experts_beyond_two_to_the_31_elements() -> None:
    """Few rows an expert, many (by tensor maps on Hopper), one cut for both, and float8: beside a product of the library's, and
    to the bit as the last expert alone, whose offsets are small."""
    torch.manual_seed(5)
    shape = ExpertsConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_experts=NUM_EXPERTS)
    experts = Experts(shape, range(NUM_EXPERTS), device="cuda")
    assert min(experts.up_proj.numel(), experts.down_proj.numel()) > LIMIT
    activation, last = shape.activation, NUM_EXPERTS - 1
    scratch = ExpertScratch("cuda")
    for float8 in (False, True):
        if float8:
            experts.quantize()
        weights, alone = experts.weights, last_alone(experts.weights)
        for num_rows in (5, 300):
            for batch_invariant in (False, True):
                settings = {"scratch": scratch, "batch_invariant": batch_invariant}
                rows = routed(num_rows, (last,))
                got = apply_experts(rows, weights, 0, activation, **settings)
                name = f"{num_rows} rows, batch_invariant={batch_invariant}, {weights.up_proj.dtype}"
                assert same_bits(got.cpu(), apply_experts(rows, alone, last, activation, **settings).cpu()), name
                if not float8:  # float8 alone is compared in test_experts.py
                    spread = routed(num_rows, (0, NUM_EXPERTS // 2, last))
                    for given, result in ((rows, got), (spread, apply_experts(spread, weights, 0, activation, **settings))):
                        expected = by_torch(weights, given)
                        error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
                        assert error <= 1.5e-2, f"{name}: {error:.1e}"
    del experts, weights, alone
    torch.cuda.empty_cache()


@pytest.mark.gpu(count=1)
@pytest.mark.timeout(150)
def test_rows_of_experts_beyond_two_to_the_31_elements() -> None:
    """All rows in one chunk, so that its products pass 2**31 too: every row against the same rows, 64 at a time. About 13 GB."""
    torch.manual_seed(6)
    experts = Experts(
        ExpertsConfig(hidden_size=HIDDEN, intermediate_size=64, num_experts=2), range(2), device="cuda", batch_invariant=True
    )
    experts.scratch = ExpertScratch("cuda", max_bytes=8 << 30)
    some = routed(64, (0, 1))
    repeats = -(-ROWS // 64)
    rows = Dispatched(
        hidden=some.hidden.repeat(repeats, 1),
        topk_idx=some.topk_idx.repeat(repeats, 1),
        topk_weights=some.topk_weights.repeat(repeats, 1),
        valid_tokens=some.valid_tokens * repeats,
    )
    got = experts(rows)
    assert got.numel() > LIMIT
    assert experts.scratch.nbytes > 2 * LIMIT, "one chunk"
    small = experts(some)
    for begin in reversed(range(0, got.shape[0], 64 * 256)):
        part = got[begin : begin + 64 * 256]
        assert torch.equal(part.view(-1, 64, HIDDEN), small.expand(part.shape[0] // 64, -1, -1)), f"rows from {begin} on"
    assert bool(small.any())
    del rows, got, experts
    torch.cuda.empty_cache()
