"""A layer made with batch_invariant=True on real GPUs: a token's bits do not depend on what else is in the step, on any rank."""

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.fixed_linear import FixedLinear
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.testing import same_bits

H, LATENT, E, K, CAPACITY = 1024, 512, 16, 4, 512
COUNTS = (1, 2, 7, 16, 17, 64, 65, 200, 512)
RULES = {"softmax": {"float32_logits": False, "renormalize": True}, "sigmoid-fp32-logits": {"score_function": "sigmoid"}}


def layer_on(ws: tf.Workspace, rules: dict[str, object]) -> MoELayer:
    """The same on every rank, but for its experts, and with `batch_invariant` in every part."""
    torch.manual_seed(1)
    parts = {"dtype": torch.bfloat16, "device": ws.device}
    router = Router(RouterConfig(hidden_size=H, num_experts=E, topk=K, **rules), **parts, batch_invariant=True)
    shared = SharedExperts(
        SharedExpertsConfig(hidden_size=H, intermediate_size=768, output_gate=True), **parts, batch_invariant=True
    )
    down, up = FixedLinear(H, LATENT, bias=False, **parts), FixedLinear(LATENT, H, **parts)
    torch.manual_seed(2 + ws.group.rank)
    sizes = ExpertsConfig(hidden_size=LATENT, intermediate_size=384, num_experts=E)
    experts = Experts(sizes, ws.group.expert_range(E), **parts, batch_invariant=True)
    return MoELayer(
        ws, router, experts, shared_experts=shared, latent_down=down, latent_up=up, shared_overlap="stream", batch_invariant=True
    )


def differing(group: tf.EPGroup, rules: dict[str, object], others: tuple[int, ...]) -> list[tuple[int, int]]:
    """Steps (T of rank 0, T of the others) in which a row of rank 0 has other bits than among the most rows."""
    config = tf.MoEConfig(hidden_size=LATENT, num_experts=E, topk=K, dtype=torch.bfloat16)
    rows = torch.randn(CAPACITY, H, generator=torch.Generator().manual_seed(3)).bfloat16().to(group.device)
    wrong, expected = [], None
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport="p2p") as ws:
        layer = layer_on(ws, rules)
        for other in others:
            for count in reversed(COUNTS):
                mine = count if group.rank == 0 else other
                ws.begin_step(mine)
                output = layer(rows[:mine])
                torch.cuda.synchronize()
                ws.check()
                if group.rank == 0:
                    expected = output if expected is None else expected
                    if not same_bits(output, expected[:count]):
                        wrong.append((count, other))
    return wrong


@pytest.mark.gpu(count=1)
@pytest.mark.parametrize("rules", RULES)
def test_a_token_has_the_same_bits_alone_and_among_others(on_ranks: RankPools, rules: str) -> None:
    assert on_ranks(differing, 1, RULES[rules], (0,), backend="nccl", timeout_s=120) == [[]]


@pytest.mark.gpu(count=2)
def test_a_token_has_the_same_bits_whatever_other_ranks_bring(on_ranks: RankPools) -> None:
    assert on_ranks(differing, 2, RULES["softmax"], (0, 1, 300), backend="nccl", timeout_s=120)[0] == []
