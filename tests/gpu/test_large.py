"""Offsets past 2**31 elements, in one GPU's memory."""

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

ROWS, HIDDEN = 302_000, 7168
"""2.16e9 elements, 4.3 GB of hidden rows; four such tensors at most."""


def far_end(group: tf.EPGroup) -> int:
    config = tf.MoEConfig(hidden_size=HIDDEN, num_experts=8, topk=2)
    with tf.Workspace(config, group, max_tokens_per_rank=ROWS, transport="p2p", timeout_s=30) as ws:
        hidden = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16, device=ws.device)
        mark = torch.arange(1, 1 + 64 * HIDDEN, device=ws.device).remainder(251).to(torch.bfloat16).view(64, HIDDEN)
        hidden[-64:] = mark
        ids = torch.arange(ROWS, device=ws.device)[:, None].remainder(8).expand(-1, 2).contiguous()
        layer = ws.dispatcher()
        ws.begin_step(ROWS)
        got = layer.dispatch(hidden, ids, torch.ones(ROWS, 2, device=ws.device))
        assert torch.equal(got.hidden[-64:], mark)
        assert torch.equal(got.hidden[:64], hidden[:64])
        assert torch.equal(got.topk_idx, ids.int())
        del ids
        out = layer.combine(hidden, got)
        ws.check()
        assert torch.equal(out[-64:], mark)
        assert not bool(out[:64].any())
        return out.numel()


@pytest.mark.gpu(count=1)
@pytest.mark.timeout(150)
def test_rows_beyond_two_to_the_31_elements_arrive() -> None:
    assert run_ranks(far_end, 1, backend="nccl", timeout_s=140)[0] > 2**31
