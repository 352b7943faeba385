"""Whether moving experts would pay: a model's step as it is, with experts rearranged, and with replicas, by `StepModel`.

One placement serves all steps, but steps differ: a decode step has few rows and is bound by reading weights, a prefill has many
and is bound by products. The mean of the two is a step that never happens, so that each kind of steps is judged by itself too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from tokenferry.errors import ConfigError
from tokenferry.placement.algorithm import place
from tokenferry.placement.layout import Placement, checked_loads
from tokenferry.placement.options import KindVerdict, Option, StepKind, Verdict
from tokenferry.placement.sentences import LEAST_GAIN, by_kind, sentence_of
from tokenferry.placement.step_model import StepModel, most_with_a_row

EVERY_STEP: Final = "every step"


def judge(
    loads: Sequence[Sequence[float]] | torch.Tensor,
    num_ranks: int,
    model: StepModel,
    *,
    num_steps: float = 1.0,
    rounds: Sequence[float] | None = None,
    kinds: Sequence[StepKind] = (),
    replicas: Sequence[int] = (),
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Verdict:
    """Compares the step as it is with rearranged experts, and with each number of `replicas`.

    Args:
        loads: [L, E] the rows that each expert got in `num_steps` steps.
        num_ranks: that share the experts, in contiguous blocks today.
        model: what a step is made of.
        num_steps: over which the loads were counted.
        rounds: [L] how often each layer ran in these steps. Default: once in each of them.
        kinds: the steps by their rows, all of them or a sample. The experts' shares of a layer's rows are taken to be the same in
            all kinds, since loads are counted over all of them. Default: all steps are alike.
        replicas: numbers of further places to try. Default: one for each rank, if there are ranks to share.
        num_groups, num_nodes: see `place`.

    Raises:
        ConfigError: sizes that do not fit one another.
    """
    table = checked_loads(loads)
    num_layers, num_experts = table.shape
    ran_L = _rounds(rounds, num_layers, num_steps)
    rows_LE, shares_L = table / ran_L.clamp_min(1.0)[:, None], ran_L / num_steps
    tried = [("as is", Placement.as_is(num_layers, num_experts, num_ranks))]
    for number in (0, *(replicas or ((num_ranks,) if num_ranks > 1 else ()))):
        name = f"rearranged + {number} replicas" if number else "rearranged"
        tried.append((name, place(table, num_ranks, num_replicas=number, num_groups=num_groups, num_nodes=num_nodes)))

    given = bool(kinds)  # otherwise nothing is known of how many tokens have these rows
    kinds = kinds or (StepKind(name=EVERY_STEP, num_steps=num_steps, rows=max(1e-300, float(table.sum()))),)
    weights = torch.tensor([kind.num_steps for kind in kinds], dtype=torch.float64, device="cpu")
    mean_rows = max(1e-300, sum(kind.num_steps * kind.rows for kind in kinds) / float(weights.sum()))
    scaled = [rows_LE * (kind.rows / mean_rows) for kind in kinds]
    tokens = [kind.rows if kind.rows and given else None for kind in kinds]
    times = [
        [model.step_s(placement, rows, shares_L, num_tokens) for rows, num_tokens in zip(scaled, tokens, strict=True)]
        for _, placement in tried
    ]
    times_s = torch.tensor(times, dtype=torch.float64, device="cpu")
    means_s = ((times_s * weights).sum(1) / weights.sum()).tolist()

    options = []
    for (name, placement), step_s in zip(tried, means_s, strict=True):
        imbalance = float(placement.imbalance(table).max()) if num_layers else 1.0
        extra_bytes = (placement.num_physical - num_experts) / num_ranks * model.weight_bytes * num_layers
        options.append(Option(name, placement, step_s, _gain(step_s, means_s[0]), imbalance, extra_bytes))
    best = options[_fastest(means_s)]
    found = []
    as_is = tried[0][1]
    for kind, rows, num_tokens, column in zip(kinds, scaled, tokens, times_s.T.tolist(), strict=True):
        fastest = _fastest(column)
        gain = _gain(column[fastest], column[0])
        bound = model.share_bound_by_weights(as_is, rows, num_tokens) if num_layers else 0.0
        touched = most_with_a_row(as_is, rows, num_tokens) if num_layers else 0.0
        found.append(KindVerdict(kind, tuple(column), tried[fastest][0], gain, gain >= LEAST_GAIN, bound, touched))
    with_rows = [each for each in found if each.kind.rows]  # a step without rows reads no weights: it would dilute the share
    num_with_rows = sum(each.kind.num_steps for each in with_rows)
    bound = sum(each.kind.num_steps * each.bound_by_weights for each in with_rows) / num_with_rows if with_rows else 0.0
    touched = sum(each.kind.num_steps * each.touched for each in with_rows) / num_with_rows if with_rows else 0.0
    sentence = sentence_of(options, best, bound, touched, num_rows=float(table.sum()))
    if len(with_rows) > 1 and num_ranks > 1 and float(table.sum()):
        sentence = f"{sentence} {by_kind(with_rows, as_is)}"
    return Verdict(tuple(options), best.gain >= LEAST_GAIN, best, sentence, tuple(found))


def _fastest(times_s: Sequence[float]) -> int:
    """Of equals the first, which changes least; sums of floats that mean the same differ by less than this."""
    least_s = min(times_s) * (1 + 1e-9)
    return next(number for number, time_s in enumerate(times_s) if time_s <= least_s)


def _gain(step_s: float, as_is_s: float) -> float:
    return 1 - step_s / as_is_s if as_is_s else 0.0


def _rounds(rounds: Sequence[float] | None, num_layers: int, num_steps: float) -> torch.Tensor:
    """[L] float64, checked."""
    if not num_steps > 0:
        raise ConfigError(f"num_steps is {num_steps}; give the number of steps that the loads were counted over")
    if rounds is None:
        return torch.full((num_layers,), num_steps, dtype=torch.float64, device="cpu")
    if len(rounds) != num_layers:
        raise ConfigError(f"rounds are of {len(rounds)} layers but loads are of {num_layers}; give one number a layer")
    if not all(number >= 0 for number in rounds):
        raise ConfigError(f"rounds hold {min(rounds)}; give how often each layer ran, 0 or more")
    return torch.tensor(rounds, dtype=torch.float64, device="cpu")
