"""What ranks do to have the numbers of somebody else's experts counted, in slots and in bulk rounds."""

from typing import Any

import torch

import switch
import tokenferry as tf
from patience import PATIENT_S
from telemetry_work import settle
from tokenferry.testing.data import RankInputs, make_inputs


def on_device(inputs: RankInputs, ws: tf.Workspace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a dispatch is given. Copied before the first step: of virtual ranks a copy would wait for those that spin."""
    hidden = inputs.hidden.to(ws.device)
    if ws.dispatch_format.name == "bytes":
        hidden = hidden.view(torch.uint8)
    return hidden, inputs.topk_idx.to(ws.device), inputs.topk_weights.to(ws.device)


def loads_of_random_numbers(
    group: tf.EPGroup, transport: Any, steps: tuple[tuple[int, ...], ...], config: tf.MoEConfig, settings: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """A round a step, to which each rank brings so many rows; some pass their terms on where they lie, and some call both halves.
    What was counted for each expert, and what should have been. Nothing is while it is stopped, nor in `solo`."""
    sizes = {"max_tokens_per_rank": max(max(tokens) for tokens in steps), "telemetry": True, **settings}
    wanted, own = torch.zeros(config.num_experts, dtype=torch.int64), group.expert_range(config.num_experts)
    with tf.Workspace(config, group, transport=switch.transport(transport), **sizes) as ws:
        dispatcher, rank = ws.dispatcher(), group.rank
        drawn = [make_inputs(config, tokens, seed=step) for step, tokens in enumerate(steps)]
        own_rows = [on_device(inputs[rank], ws) for inputs in drawn]
        settle(ws)

        def round_of(number: int, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            got = dispatcher.dispatch(*rows)
            partial = dispatcher.combine_input()
            if number % 2:
                partial = torch.ones(got.topk_idx.shape[0], config.hidden_size, dtype=config.dtype, device=ws.device)
            if number % 3:
                dispatcher.combine(partial, got)
            else:
                dispatcher.combine_begin(partial, got)
                dispatcher.combine_end()

        for step, (tokens, inputs) in enumerate(zip(steps, drawn, strict=True)):
            ws.begin_step(tokens[rank])
            round_of(step, own_rows[step])
            round_of(step + 1, own_rows[step])
            for each in inputs:
                named = each.topk_idx.flatten().to(torch.int64)
                wanted += 2 * torch.bincount(named[named >= 0], minlength=config.num_experts)
        settle(ws)
        ws.telemetry.stop()
        group.channel.barrier("all have stopped", PATIENT_S)  # virtual ranks share a GPU, whose copies wait for those that spin
        ws.begin_step(steps[-1][rank])
        round_of(0, own_rows[-1])
        round_of(1, own_rows[-1])
        settle(ws)
        group.channel.barrier("the last round has ended", PATIENT_S)
        ws.telemetry.start()
        with ws.solo():
            ws.begin_step(steps[-1][rank])
            round_of(1, own_rows[-1])
        ws.check()
        settle(ws)
        told = ws.telemetry.snapshot().loads
    assert len(told) == 1
    return list(told[0]), [int(count) * (expert in own) for expert, count in enumerate(wanted)]


def check_loads_of_random_numbers(seen: list[tuple[list[int], list[int]]]) -> None:
    for told, wanted in seen:
        assert told == wanted
        assert sum(wanted) > 0
