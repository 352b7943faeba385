"""What chance does in steps of few rows: which experts get a row at all, and which rank has the most of them.

Legend: L layers, P physical experts, G ranks, M most experts of one rank.
"""

from __future__ import annotations

import torch

_ROUNDING = 1e-3
"""Of a number of experts: sums of floats that mean the same number differ by less."""


def chances_of_a_row(rows_LP: torch.Tensor, num_tokens: float | None) -> torch.Tensor:
    """[L, P]: how likely it is that a physical expert gets a row in a step.

    Args:
        rows_LP: that it gets in the mean step.
        num_tokens: of the step. Each picks an expert once at most, so that an expert which gets 2 rows of 2 tokens is sure to get
            one. None: many, among which the rows come independently.

    Example:
        0.5 rows, of 2 tokens: 1 - (1 - 0.25)^2 = 0.4375; of many: 1 - exp(-0.5) = 0.393.
    """
    if num_tokens is None:
        return -torch.expm1(-rows_LP)
    left_out = (1 - rows_LP / max(1.0, num_tokens)).clamp_min(0.0)
    return 1 - left_out ** max(1.0, num_tokens)


def numbers_with_a_row(chances_LP: torch.Tensor, rank_of_place: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[L, G, M + 1]: how likely it is that 0, 1, ... M of a rank's experts get a row, if they get theirs independently.

    They do not quite: a token has as many experts on the other ranks as it has fewer here. But the differences between ranks, by
    which the slowest is slow, are hardly changed by that (tests/test_placement_chance.py has simulated steps). They are where the
    experts are few: of one token's 7 of 8 experts on 2 ranks the fuller rank always has 4, and this gives 3.82.
    """
    held = [(rank_of_place == rank).nonzero().flatten() for rank in range(num_ranks)]
    most = max(len(places) for places in held)
    chances = torch.zeros((chances_LP.shape[0], num_ranks, most), dtype=torch.float64, device="cpu")
    for rank, places in enumerate(held):
        chances[:, rank, : len(places)] = chances_LP[:, places]
    likely = torch.zeros((chances_LP.shape[0], num_ranks, most + 1), dtype=torch.float64, device="cpu")
    likely[..., 0] = 1.0
    for place in range(most):
        chance = chances[..., place : place + 1]
        one_more = torch.nn.functional.pad(likely[..., :-1], (1, 0))
        likely = likely * (1 - chance) + one_more * chance
    return likely


def expected_slowest(likely_LGM: torch.Tensor, each: float, beside_LG: torch.Tensor) -> torch.Tensor:
    """[L]: the mean of the slowest rank's time, where each expert with a row takes `each`, and a rank's rows `beside_LG` more.

    Args:
        likely_LGM: see `numbers_with_a_row`.

    Example:
        Two ranks, each with one expert that gets a row in every second step: 0, 1, 1, or 1 `each`, and so 0.75 in the mean,
        although each rank's own mean is 0.5.
    """
    if each == 0.0:
        return beside_LG.amax(1)
    num_layers, num_ranks, width = likely_LGM.shape
    times = beside_LG[..., None] + each * torch.arange(width, dtype=torch.float64, device="cpu")
    times_LT = times.reshape(num_layers, num_ranks * width).sort(1).values
    no_later = likely_LGM.cumsum(2)
    all_no_later = torch.ones_like(times_LT)
    for rank in range(num_ranks):
        number = ((times_LT - beside_LG[:, rank, None]) / each + _ROUNDING).floor().clamp(-1, width - 1).to(torch.int64)
        chance = no_later[:, rank].gather(1, number.clamp_min(0))
        all_no_later *= torch.where(number < 0, torch.zeros_like(chance), chance)
    return (times_LT * torch.diff(all_no_later, dim=1, prepend=torch.zeros_like(all_no_later[:, :1]))).sum(1)
