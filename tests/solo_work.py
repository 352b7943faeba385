"""What one rank does alone while the others look at their memory, on interpreted ranks and on GPUs alike."""

from dataclasses import dataclass

import torch

import tokenferry as tf
from cases import BULK_ROWS, Case, same, settle
from tokenferry.testing.data import make_inputs
from tokenferry.transports.base import TransportFactory


@dataclass(frozen=True)
class Solo:
    """Rank `who` of `ranks` makes a step of `tokens` rows alone; BULK_ROWS are more than a slot holds."""

    transport: str
    ranks: int
    who: int
    tokens: int
    switch_sum: bool = False
    """`combine_order="any"` over float32: among peers the switch would sum bulk rows."""

    def __str__(self) -> str:
        return f"{self.transport}-rank{self.who}of{self.ranks}-T{self.tokens}{'-switch-sum' * self.switch_sum}"


def alone(group: tf.EPGroup, case: Solo, transport: str | TransportFactory | None = None) -> bool:
    """On the other ranks: whether every byte of the buffer is as it was."""
    config = Case(dtype=torch.float32 if case.switch_sum else torch.bfloat16).config
    with tf.Workspace(
        config,
        group,
        max_tokens_per_rank=1025 if case.tokens >= BULK_ROWS else 8,
        transport=transport or case.transport,
        combine_order="any" if case.switch_sum else "rank",
        timeout_s=10,
    ) as ws:
        before = ws.active_transport.memory.buffer.clone()
        settle(ws)
        group.channel.barrier("copied", 30)
        if group.rank == case.who:
            step_alone(ws, case.tokens)
        group.channel.barrier("ran alone", 30)
        return group.rank == case.who or torch.equal(before, ws.active_transport.memory.buffer)


def step_alone(ws: tf.Workspace, num_tokens: int) -> None:
    layer, own = ws.dispatcher(), make_inputs(ws.config, (num_tokens,), seed=1)[0]
    with ws.solo():
        ws.begin_step(num_tokens)
        got = layer.dispatch(*(tensor.to(ws.device) for tensor in (own.hidden, own.topk_idx, own.topk_weights)))
        settle(ws)
        same("hidden", got.hidden[:num_tokens], own.hidden)
        same("topk_idx", got.topk_idx[:num_tokens], own.topk_idx.int())
        same("topk_weights", got.topk_weights[:num_tokens], own.topk_weights)
        partial = torch.full((len(got.hidden), ws.config.hidden_size), torch.nan, dtype=ws.config.dtype, device=ws.device)
        partial[:num_tokens] = own.partial.to(ws.device)
        combined = layer.combine(partial, got)
        settle(ws)
        same("combined", combined, own.partial)
