"""Whole layers, with shared experts and latent projections, in every format of rows and terms: near a float64 oracle, and the
same bits however the layer is called."""

import dataclasses

import pytest
import torch

import switch
import tokenferry as tf
from graph_work import Forward, Setup, open_workspace
from rank_pool import RankPools
from tokenferry.testing import same_bits

PLAIN = Setup(dtype=torch.bfloat16, shared=True, latent=True, capacity=8)
TERMS = dataclasses.replace(PLAIN, float8_terms=True)
BOTH = dataclasses.replace(TERMS, dispatch_format="fp8_block128")
FORMATS = {
    "rows": dataclasses.replace(PLAIN, dispatch_format="fp8_block128"),
    "terms": TERMS,
    "rows-and-terms": BOTH,
    "rows-and-terms-float8-weights": dataclasses.replace(BOTH, float8=True),
}


def outputs_of(group: tf.EPGroup, setup: Setup, num_rows: int, num_real: int, padding: float) -> tuple[torch.Tensor, float]:
    """The layer's real rows in a step of 7 tokens of which fewer come, and in a step alone; and how far the worst is off."""
    with open_workspace(group, setup) as ws:
        forward = Forward(setup, ws)
        chosen = forward.rows(group.rank, 1, num_real)
        rows = torch.full((num_rows, forward.pool.shape[1]), padding, dtype=setup.dtype, device=ws.device)
        rows[:num_real] = forward.pool[chosen.to(ws.device)]
        with ws.solo():
            ws.begin_step(num_real)
            alone = forward(rows[:num_real])
        ws.begin_step(7, num_real)
        together = forward(rows)[:num_real]
        ws.check()
        return torch.cat([alone, together]), max(forward.error(alone, chosen), forward.error(together, chosen))


def layer_in(group: tf.EPGroup, transport: str, setup: Setup, overlaps: tuple[str, ...]) -> list[str]:
    """What is wrong with a layer of this setup, in words."""
    found, first = [], None
    setup = dataclasses.replace(setup, transport=switch.transport(transport) if transport in ("p2p", "nvls") else transport)
    for overlap in overlaps:
        for padding in (0.0, torch.nan):
            outputs, worst = outputs_of(
                group, dataclasses.replace(setup, overlap=overlap), 6 - group.rank, 4 - group.rank, padding
            )
            first = outputs if first is None else first
            if not worst < setup.tolerance:
                found.append(f"{overlap}, padding {padding}: off by {worst}")
            if not same_bits(outputs, first):
                found.append(f"{overlap}, padding {padding}: other bits")
    return found


OVERLAPS = ("off", "between", "stream")


@pytest.mark.parametrize("name", FORMATS)
def test_one_rank(name: str) -> None:
    assert layer_in(tf.EPGroup(device="cpu"), "local", FORMATS[name], OVERLAPS) == []


@pytest.mark.ranks
@pytest.mark.parametrize("name", FORMATS)
def test_two_ranks_over_messages(on_ranks: RankPools, name: str) -> None:
    assert on_ranks(layer_in, 2, "collective", FORMATS[name], OVERLAPS, timeout_s=100) == [[], []]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("transport", "name"),
    [("p2p", "terms"), ("p2p", "rows-and-terms-float8-weights"), ("nvls", "rows-and-terms")],
    ids=["p2p-terms", "p2p-all-float8", "nvls-rows-and-terms"],
)
def test_two_ranks_over_symmetric_memory(on_ranks: RankPools, transport: str, name: str) -> None:
    given = (transport, FORMATS[name], ("off", "between"))
    assert on_ranks(layer_in, 2, *given, env={"TRITON_INTERPRET": "1"}, timeout_s=200) == [[], []]


def after_a_reset(group: tf.EPGroup, transport: str, setup: Setup) -> bool:
    """Whether a layer gives the bits that it gave before the workspace was opened anew."""
    with open_workspace(group, dataclasses.replace(setup, transport=transport)) as ws:
        forward, outputs = Forward(setup, ws), []
        for turn in range(2):
            if turn:
                ws.reset()
            ws.begin_step(3 + group.rank)
            outputs.append(forward(forward.pool[: 3 + group.rank]))
        return same_bits(*outputs)


@pytest.mark.ranks
@pytest.mark.parametrize("transport", ["collective", pytest.param("p2p", marks=pytest.mark.interpreter)])
def test_a_reset_keeps_the_formats(on_ranks: RankPools, transport: str) -> None:
    env = {"TRITON_INTERPRET": "1"} if transport == "p2p" else {}
    assert on_ranks(after_a_reset, 2, transport, BOTH, env=env, timeout_s=100) == [True, True]
