"""MoELayer on 1, 2 and 3 ranks that hold different numbers of tokens, against one plain layer in one process, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from plain_moe import plain_moe
from tokenferry import MoEConfig
from tokenferry.activations import Activation
from tokenferry.errors import ConfigError
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.shared_experts import SharedExperts, SharedExpertsConfig
from tokenferry.testing import run_ranks, same_bits
from tokenferry.workspace import Workspace

pytestmark = pytest.mark.ranks

H, LATENT, E, K, NUM_STEPS = 32, 16, 7, 3, 2
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Of the largest expected number. bfloat16: products, activation, and each rank's partial row are rounded to 8 bits."""


@dataclass(frozen=True)
class Case:
    """A layer and how many tokens each rank brings. 7 experts divide neither by 2 nor by 3."""

    tokens_per_rank: tuple[int, ...]
    shared: bool = False
    latent: bool = False
    dtype: torch.dtype = torch.float32
    overlap: str = "off"
    gpt_oss: bool = False
    transport: str = "auto"

    def __str__(self):
        parts = [f"EP{len(self.tokens_per_rank)}-T{'.'.join(map(str, self.tokens_per_rank))}"]
        parts += [name for name in ("shared", "latent", "gpt_oss") if getattr(self, name)]
        parts += [self.overlap] * (self.overlap != "off") + [self.transport] * (self.transport != "auto")
        return "-".join([*parts, "bf16" if self.dtype == torch.bfloat16 else "fp32"])


@dataclass(frozen=True)
class Model:
    """All parameters of a case, the same on every rank, and every rank's rows."""

    router: Router
    experts: Experts
    shared: SharedExperts | None
    latent: tuple[nn.Linear, nn.Linear] | None
    hiddens: list[torch.Tensor]

    @staticmethod
    def make(case: Case) -> Model:
        torch.manual_seed(6)
        dtype = case.dtype
        rules = {"topk_before_score": True, "linear_bias": True} if case.gpt_oss else {"renormalize": True}
        activation = Activation("clamped_swiglu", interleaved=True, limit=1.0) if case.gpt_oss else Activation()
        shape = ExpertsConfig(
            hidden_size=LATENT if case.latent else H,
            intermediate_size=24,
            num_experts=E,
            activation=activation,
            bias=case.gpt_oss,
        )
        experts = Experts(shape, range(E), dtype=dtype)
        if case.gpt_oss:
            experts.up_bias.normal_()
            experts.down_bias.normal_()
        shared = SharedExperts(SharedExpertsConfig(hidden_size=H, intermediate_size=40, output_gate=True), dtype=dtype)
        projections = [nn.Linear(*sizes, bias=False, dtype=dtype) for sizes in ((H, LATENT), (LATENT, H))]
        return Model(
            router=Router(RouterConfig(hidden_size=H, num_experts=E, topk=K, **rules), dtype=dtype),
            experts=experts,
            shared=shared if case.shared else None,
            latent=tuple(projections) if case.latent else None,
            hiddens=[torch.randn(T, H).to(dtype) for T in case.tokens_per_rank],
        )

    def layer(self, case: Case, workspace: Workspace) -> MoELayer:
        """This rank's part of it."""
        group = workspace.group
        experts = Experts(self.experts.config, group.expert_range(E), dtype=case.dtype)
        experts.load(self.experts.up_proj, self.experts.down_proj, self.experts.up_bias, self.experts.down_bias)
        down, up = self.latent or (None, None)
        return MoELayer(
            workspace,
            self.router,
            experts,
            shared_experts=self.shared,
            latent_down=down,
            latent_up=up,
            shared_overlap=case.overlap,
        )


def open_workspace(case, group, **settings):
    config = MoEConfig(hidden_size=LATENT if case.latent else H, num_experts=E, topk=K, dtype=case.dtype)
    return Workspace(
        config, group, max_tokens_per_rank=max(*case.tokens_per_rank, 1), transport=case.transport, timeout_s=20, **settings
    )


def run_layer(group, case):
    """This rank's output, the same in every step."""
    model = Model.make(case)
    with open_workspace(case, group) as workspace:
        layer, outputs = model.layer(case, workspace), []
        for _ in range(NUM_STEPS):
            workspace.begin_step(case.tokens_per_rank[group.rank])
            outputs.append(layer(model.hiddens[group.rank]))
        assert all(same_bits(output, outputs[0]) for output in outputs)
        return outputs[0]


CASES = [
    Case((9,)),
    Case((9,), shared=True, latent=True, transport="collective"),
    Case((5, 8)),
    Case((0, 7), shared=True, latent=True, overlap="between"),
    Case((5, 0), shared=True, gpt_oss=True),
    Case((5, 8), shared=True, latent=True, dtype=torch.bfloat16, overlap="stream"),
    Case((0, 0), shared=True),
    Case((4, 0, 9), shared=True, latent=True),
    Case((1, 6, 2), gpt_oss=True, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_together_equal_the_plain_layer(case):
    outputs = run_ranks(run_layer, len(case.tokens_per_rank), case)
    model = Model.make(case)
    down, up = model.latent or (None, None)
    hidden, output = torch.cat(model.hiddens), torch.cat(outputs)
    assert [len(rows) for rows in outputs] == list(case.tokens_per_rank)
    expected = plain_moe(hidden, model.router, model.experts, model.shared, down, up)
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=TOLERANCE[case.dtype] * scale)


# --- every rank's part of a layer is due again after a reset to fewer ranks -----------------------------------------------

SMALLER = Case((4, 3, 2))


def go_on_without_rank_2(group, case):
    model = Model.make(case)
    with open_workspace(case, group) as workspace:
        layer = model.layer(case, workspace)
        workspace.begin_step(case.tokens_per_rank[group.rank])
        layer(model.hiddens[group.rank])
        if group.rank == 2:
            return None
        workspace.reset(workspace.group.subset([0, 1]))
        workspace.begin_step(case.tokens_per_rank[group.rank])
        with pytest.raises(ConfigError, match=r"but rank \d of 2 holds range") as refused:
            layer(model.hiddens[group.rank])
        output = model.layer(case, workspace)(model.hiddens[group.rank])
        return str(refused.value), output


def test_a_layer_of_a_larger_group_is_refused_after_a_reset():
    results = run_ranks(go_on_without_rank_2, 3, SMALLER)
    assert "range(0, 3) but rank 0 of 2 holds range(0, 4)" in results[0][0]
    model = Model.make(SMALLER)
    expected = plain_moe(torch.cat(model.hiddens[:2]), model.router, model.experts)
    output = torch.cat([results[0][1], results[1][1]])
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
