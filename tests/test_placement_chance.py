"""Steps of few rows: what the model says of which experts get a row, beside steps that are simulated."""

from dataclasses import dataclass

import pytest
import torch

from tokenferry.placement import Placement, StepKind, StepModel, judge, place
from tokenferry.placement.chance import chances_of_a_row, expected_slowest, numbers_with_a_row
from tokenferry.placement.step_model import most_with_a_row

READS_ALONE = StepModel(weight_bytes=1.0, flops_per_row=0.0, memory_bytes_per_s=1.0, flops_per_s=1.0)
"""A second for each expert that gets a row, and nothing else."""
NUM_STEPS = 2000


@dataclass(frozen=True)
class Case:
    """Tokens that pick `topk` different experts each, by Zipf's law with this exponent; 0: all alike."""

    num_experts: int
    topk: int
    num_ranks: int
    num_tokens: int
    exponent: float

    @property
    def popularity(self) -> torch.Tensor:
        """In an order of its own, so that the popular experts lie anywhere."""
        order = torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(1))
        return (torch.arange(1, self.num_experts + 1, dtype=torch.float64) ** -self.exponent)[order]


CASES = {
    "one-token-8-of-256-on-8-ranks-zipf": Case(256, 8, 8, 1, 1.0),
    "one-token-8-of-128-on-2-ranks": Case(128, 8, 2, 1, 0.0),
    "two-tokens-4-of-32-on-2-ranks-zipf": Case(32, 4, 2, 2, 1.0),
    "eight-tokens-8-of-64-on-8-ranks": Case(64, 8, 8, 8, 0.0),
    "eight-tokens-8-of-64-on-8-ranks-zipf": Case(64, 8, 8, 8, 1.0),
    "one-token-8-of-256-on-64-ranks": Case(256, 8, 64, 1, 0.0),
    "many-tokens-4-of-32-on-4-ranks-zipf": Case(32, 4, 4, 64, 1.0),
}


def simulated(case: Case, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    """[E] rows of each expert in the mean step, and [steps, ranks] how many of a rank's experts got one. A token has one copy of
    each expert that it picks, any of them. Picking by the largest of `log(popularity) + Gumbel` is picking one after another."""
    generator = torch.Generator().manual_seed(2)
    shape = (NUM_STEPS, case.num_tokens, case.num_experts)
    noise = -torch.log(-torch.log(torch.rand(shape, generator=generator, dtype=torch.float64)))
    picked = (case.popularity.log() + noise).topk(case.topk, dim=-1).indices.flatten(1)
    rows = picked.flatten().bincount(minlength=case.num_experts) / NUM_STEPS
    copies = placement.num_replicas[0][picked]
    copy = (torch.rand(picked.shape, generator=generator) * copies).long()
    places = placement.log2phy[0][picked, copy]
    got_one = torch.zeros(NUM_STEPS, placement.num_physical).scatter_(1, places, 1.0)
    on_ranks = torch.zeros(NUM_STEPS, case.num_ranks).index_add_(1, placement.rank_of_place, got_one)
    return rows.double(), on_ranks.double()


def placements(case: Case) -> list[Placement]:
    """As is, rearranged, and with replicas."""
    loads = case.popularity[None]
    return [
        Placement.as_is(1, case.num_experts, case.num_ranks),
        place(loads, case.num_ranks),
        place(loads, case.num_ranks, num_replicas=case.num_ranks),
    ]


@pytest.mark.parametrize("layout", [0, 1, 2], ids=["as-is", "rearranged", "replicas"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_experts_that_get_a_row_are_as_many_as_in_simulated_steps(case: Case, layout: int) -> None:
    placement = placements(case)[layout]
    rows, on_ranks = simulated(case, placement)
    chances = chances_of_a_row(placement.loads_of_places(rows[None]), case.num_tokens)
    numbers = numbers_with_a_row(chances, placement.rank_of_place, case.num_ranks)[0]
    means = numbers @ torch.arange(numbers.shape[1], dtype=torch.float64)
    torch.testing.assert_close(means, on_ranks.mean(0), rtol=0.03, atol=0.03)
    slowest = float(on_ranks.amax(1).mean())
    assert most_with_a_row(placement, rows[None], case.num_tokens) == pytest.approx(slowest, rel=0.03)
    assert READS_ALONE.step_s(placement, rows[None], num_tokens=case.num_tokens) == pytest.approx(slowest, rel=0.03)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_predicted_gain_is_that_of_simulated_steps(case: Case) -> None:
    """The rank with the longest mean, which stood for the slowest before, had gains of a third where there were 6 %."""
    steps = [simulated(case, placement) for placement in placements(case)]
    measured = [float(on_ranks.amax(1).mean()) for _, on_ranks in steps]
    kinds = [StepKind(name="decode", num_steps=1, rows=case.num_tokens)]
    verdict = judge(steps[0][0][None], case.num_ranks, READS_ALONE, kinds=kinds, replicas=[case.num_ranks])
    for option, slowest in zip(verdict.options, measured, strict=True):
        assert option.gain == pytest.approx(1 - slowest / measured[0], abs=0.04), option.name


def test_chances_by_hand() -> None:
    rows = torch.tensor([[0.5, 1.0, 2.0, 0.0]], dtype=torch.float64)
    assert chances_of_a_row(rows, 2).tolist() == [pytest.approx([1 - 0.75**2, 0.75, 1.0, 0.0])]
    assert chances_of_a_row(rows, None)[0, 0].item() == pytest.approx(0.393469)


def test_numbers_by_hand() -> None:
    """Rank 0 has two experts and rank 1 one."""
    numbers = numbers_with_a_row(torch.tensor([[0.5, 0.2, 0.1]], dtype=torch.float64), torch.tensor([0, 0, 1]), 2)
    assert numbers[0].tolist() == [pytest.approx([0.4, 0.5, 0.1]), pytest.approx([0.9, 0.1, 0.0])]


@pytest.mark.parametrize(
    ("each", "beside", "wanted"),
    [
        pytest.param(1.0, [0.0, 0.0], 0.75, id="one-coin-each"),
        pytest.param(2.0, [0.0, 0.0], 1.5, id="of-two-seconds"),
        pytest.param(1.0, [0.0, 5.0], 5.5, id="one-is-always-slower"),
        pytest.param(1.0, [0.0, 0.5], 0.25 * 0.5 + 0.25 * 1.0 + 0.5 * 1.5, id="half-a-second-more"),
        pytest.param(0.0, [3.0, 4.0], 4.0, id="nothing-to-read"),
    ],
)
def test_the_slowest_of_two_by_hand(each: float, beside: list[float], wanted: float) -> None:
    """Each rank has one expert, which gets a row in every second step."""
    likely = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    assert expected_slowest(likely, each, torch.tensor([beside], dtype=torch.float64)).tolist() == [pytest.approx(wanted)]


def test_where_few_experts_get_a_row_the_verdict_says_how_many() -> None:
    """One token in each step, 8 of 64 experts on 8 ranks."""
    kinds = [StepKind(name="1 row", num_steps=100, rows=1)]
    verdict = judge(torch.full((4, 64), 12.5), 8, READS_ALONE, num_steps=100, kinds=kinds)
    assert not verdict.pays
    assert "of which it reads those of 2.4 of 8 experts in the mean step" in verdict.sentence
    assert verdict.kinds[0].touched == pytest.approx(2.44, abs=0.02)
