"""The experts' kernels on quantized rows on a GPU: to the bit as on the rows that these stand for, and whole layers in graphs."""

import pytest
import torch

import tokenferry as tf
from quantized_experts import CASES, pair
from rank_pool import RankPools
from test_quantized_experts import H, layer_of
from tokenferry.testing.numeric import first_difference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
@pytest.mark.parametrize("name", CASES)
def test_quantized_rows_are_not_quantized_again(name: str, float8: bool) -> None:
    experts, came, plain = pair(CASES[name], float8=float8, device="cuda", num_valid=17)
    got, wanted = experts(came), experts(plain)
    assert not first_difference(got[:17].cpu(), wanted[:17].cpu())


def in_a_graph(group: tf.EPGroup, float8: bool) -> list[str]:
    """A layer of quantized rows, eager and captured, at other counts of the other rank."""
    config, found = tf.MoEConfig(hidden_size=H, num_experts=6, topk=2), []
    settings = {"transport": "p2p", "dispatch_format": "fp8_block128", "timeout_s": 20}
    with tf.Workspace(config, group, max_tokens_per_rank=64, **settings) as ws:
        layer = layer_of(ws, float8=float8)
        hidden = torch.randn(7, H, device=group.device).bfloat16()

        def forward(count: int) -> torch.Tensor:
            ws.begin_step(count)
            return layer(hidden[:count])

        with ws.solo():
            forward(7)
        graph = torch.cuda.CUDAGraph()
        with ws.capturing(), torch.cuda.graph(graph):
            captured = forward(7)
        for count in (7, 1, 0, 7):
            if group.rank == 0:
                graph.replay()
                replayed = captured.clone()
            else:
                forward(count)
            eager = forward(7 if group.rank == 0 else count)
            if group.rank == 0:
                found.append(first_difference(replayed, eager))
        ws.check()
    return [difference for difference in found if difference]


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("float8", [False, True], ids=["plain-weights", "float8-weights"])
def test_a_captured_layer_of_quantized_rows_gives_the_bits_of_an_eager_one(on_ranks: RankPools, float8: bool) -> None:
    assert on_ranks(in_a_graph, 2, float8, backend="nccl", timeout_s=200) == [[], []]
