"""`torch.compile(fullgraph=True)` by inductor on GPUs: symmetric memory on one and two GPUs, local and collective beside it."""

from typing import Any

import pytest
import torch

import tokenferry as tf
from rank_pool import RankPools
from tokenferry.dispatched import QuantizedRows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
CONFIG = tf.MoEConfig(hidden_size=64, num_experts=8, topk=2)
CAPACITY = 16
NUM_LAYERS = 2


def inputs(rows: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 64, generator=generator).to(torch.bfloat16)
    topk_idx = torch.randint(-1, 8, (rows, 2), generator=generator)
    return hidden.to(device), topk_idx.to(device), torch.rand(rows, 2, generator=generator).to(device)


def in_eighths(rows: torch.Tensor) -> QuantizedRows:
    """Float8 terms of which eager and compiled code make the same bits: but for one rounding all is exact."""
    scales = torch.full((rows.shape[0], 1), 0.125, dtype=torch.float32, device=rows.device)
    return QuantizedRows((rows.float() * 8).clamp(-448, 448).to(torch.float8_e4m3fn), scales)


def compiled_as_eager(
    group: tf.EPGroup, transport: str, counts: str, formats: dict[str, Any] | None = None, quantized_terms: bool = False
) -> int:
    """Compares compiled with eager calls; returns how many comparisons there were."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True  # for the collective transport with uneven counts alone
    settings = {"max_tokens_per_rank": CAPACITY, "transport": transport, "counts": counts, **(formats or {})}
    with tf.Workspace(CONFIG, group, **settings) as ws, torch.no_grad():
        layers, is_quantized = [ws.dispatcher() for _ in range(NUM_LAYERS)], ws.dispatch_format.is_quantized

        def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            ws.begin_step(hidden.shape[0])
            for layer in layers:
                got = layer.dispatch(hidden, topk_idx, topk_weights)
                routed = (got.topk_idx >= 0).sum(dim=1, keepdim=True)
                rows = got.hidden.dequantize(torch.bfloat16) if is_quantized else got.hidden
                rows = torch.where(routed == 0, 0, torch.relu(rows))  # rows beyond the valid ones hold anything
                hidden = layer.combine(in_eighths(rows) if quantized_terms else rows * routed.to(torch.bfloat16), got)
            return hidden

        compiled = torch.compile(forward, fullgraph=True)
        compiled_rows = (7, 7, 5, 7)
        for seed, rows in enumerate(compiled_rows):
            given = inputs(rows, 10 * seed + group.rank, group.device)
            wanted = forward(*given)
            got = compiled(*given)
            torch.cuda.synchronize()
            ws.check()
            assert torch.equal(got.view(torch.int16), wanted.view(torch.int16)), (seed, rows)
            # Compiling takes seconds, and one rank's takes longer than another's: nobody may wait inside a kernel meanwhile.
            group.channel.barrier(group.unique_name("test/compared"), 120.0)
        return len(compiled_rows)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize(("transport", "counts"), [("p2p", "uneven"), ("collective", "equal"), ("collective", "uneven")])
def test_two_gpus(on_ranks: RankPools, transport: str, counts: str) -> None:
    assert on_ranks(compiled_as_eager, 2, transport, counts, backend="nccl", timeout_s=250) == [4, 4]


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize(
    "formats", [{"dispatch_format": "fp8_block128"}, {"combine_dtype": torch.float8_e4m3fn}], ids=["rows", "terms"]
)
def test_two_gpus_in_other_formats(on_ranks: RankPools, formats: dict[str, Any]) -> None:
    assert on_ranks(compiled_as_eager, 2, "p2p", "uneven", formats, backend="nccl", timeout_s=250) == [4, 4]


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize(("transport", "counts"), [("p2p", "uneven"), ("collective", "equal")])
def test_two_gpus_that_combine_quantized_terms(on_ranks: RankPools, transport: str, counts: str) -> None:
    given = transport, counts, {"combine_dtype": torch.float8_e4m3fn}, True
    assert on_ranks(compiled_as_eager, 2, *given, backend="nccl", timeout_s=250) == [4, 4]


@pytest.mark.gpu(count=1)
@pytest.mark.parametrize("transport", ["local", "p2p"])
def test_one_gpu(on_ranks: RankPools, transport: str) -> None:
    assert on_ranks(compiled_as_eager, 1, transport, "uneven", backend="nccl", timeout_s=200) == [4]


def relu_of_gathered(group: tf.EPGroup) -> bool:
    """relu(got.hidden), compiled: whether the workspace's buffer still holds what was dispatched, negative values and all."""
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=CAPACITY, transport="p2p") as ws, torch.no_grad():
        layer = ws.dispatcher()

        def forward(hidden: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            return torch.relu(layer.dispatch(hidden, topk_idx, topk_weights).hidden)

        given = inputs(7, group.rank, group.device)
        everyone = torch.cat([inputs(7, rank, group.device)[0] for rank in range(group.size)])
        ws.begin_step(7)
        got = torch.compile(forward, fullgraph=True)(*given)
        buffer = ws.active_transport.fixed_rows.hidden_RH[: len(everyone)]
        assert torch.equal(got[: len(everyone)], torch.relu(everyone))
        untouched = torch.equal(buffer, everyone) and bool((everyone < 0).any())
        layer.combine(got)
        torch.cuda.synchronize()
        ws.check()
        return untouched


@pytest.mark.gpu(count=1)
def test_the_compiler_does_not_write_over_the_buffers(on_ranks: RankPools) -> None:
    assert on_ranks(relu_of_gathered, 1, backend="nccl", timeout_s=150) == [True]


@pytest.mark.gpu(count=2)
def test_the_compiler_does_not_write_over_the_buffers_that_peers_fill(on_ranks: RankPools) -> None:
    assert on_ranks(relu_of_gathered, 2, backend="nccl", timeout_s=150) == [True, True]
