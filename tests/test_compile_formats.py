"""`torch.compile(fullgraph=True)` passes through dispatches of other formats: the bits of eager code."""

import shutil
from collections.abc import Iterator

import pytest
import torch

import tokenferry as tf
from tokenferry.dispatched import QuantizedRows
from tokenferry.testing import run_ranks

H = 144
CONFIG = tf.MoEConfig(hidden_size=H, num_experts=4, topk=2)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, H, generator=generator).to(torch.bfloat16),
        torch.randint(-1, 4, (rows, 2), generator=generator),
        torch.rand(rows, 2, generator=generator),
    )


def compiled_as_eager(group: tf.EPGroup, transport: str, backend: str, dispatch_format: str, quantized: bool) -> int:
    """A model that reads all that a dispatch gives, compiled and eager, on several inputs."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    settings = {"transport": transport, "dispatch_format": dispatch_format}
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, **settings) as ws, torch.no_grad():
        layers = [ws.dispatcher() for _ in range(2)]

        def forward(rows: torch.Tensor, scales: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
            ws.begin_step(rows.shape[0])
            total = torch.zeros(rows.shape[0], H, dtype=torch.bfloat16)
            for layer in layers:
                got = layer.dispatch(QuantizedRows(rows, scales) if quantized else rows, topk_idx, topk_weights)
                hidden = got.hidden
                hidden = hidden.dequantize() if dispatch_format == "fp8_block128" else hidden[:, :H].float()
                weight = torch.where(got.topk_idx >= 0, got.topk_weights, 0).sum(dim=1, keepdim=True)
                partial = torch.where(weight == 0, 0, torch.relu(hidden) * weight).to(torch.bfloat16)
                total = layer.combine(partial, got) + total
            return total

        compiled = torch.compile(forward, fullgraph=True, backend=backend)
        for seed, count in enumerate((5, 5, 3)):
            hidden, *routing = inputs(count, seed * 10 + group.rank)
            rows, scales = hidden.view(torch.uint8) if dispatch_format == "bytes" else hidden, torch.empty(0)
            if quantized:
                rows, scales = tf.reference.quantize(hidden).values, tf.reference.quantize(hidden).scales
            wanted = forward(rows, scales, *routing)
            assert torch.equal(compiled(rows, scales, *routing), wanted), (seed, count)
    return 3


FORMATS = pytest.mark.parametrize(
    ("dispatch_format", "quantized"),
    [("fp8_block128", False), ("fp8_block128", True), ("bytes", False)],
    ids=["fp8", "fp8-quantized", "bytes"],
)


@FORMATS
def test_local_on_a_backend_that_works_on_copies(dispatch_format: str, quantized: bool) -> None:
    assert compiled_as_eager(tf.EPGroup(device="cpu"), "local", "aot_eager", dispatch_format, quantized) == 3


@pytest.mark.ranks
@FORMATS
def test_collective_on_two_ranks(dispatch_format: str, quantized: bool) -> None:
    given = ("collective", "aot_eager", dispatch_format, quantized)
    assert run_ranks(compiled_as_eager, 2, *given, timeout_s=120) == [3, 3]


@pytest.mark.interpreter
def test_bytes_over_symmetric_memory_compiled_by_inductor() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for CPU code")
    given = ("p2p", "inductor", "bytes", False)
    assert run_ranks(compiled_as_eager, 2, *given, timeout_s=150, env={"TRITON_INTERPRET": "1"}) == [3, 3]


def refused(group: tf.EPGroup) -> str:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p", dispatch_format="fp8_block128") as ws:
        layer = ws.dispatcher()
        ws.begin_step(5)
        with pytest.raises(Exception, match="does not pass through 'fp8_block128' rows of a symmetric transport") as caught:
            torch.compile(lambda *given: layer.dispatch(*given).topk_idx, fullgraph=True, backend="eager")(*inputs(5, 0))
    return type(caught.value).__name__


@pytest.mark.interpreter
def test_quantized_rows_over_symmetric_memory_are_refused_with_the_reason() -> None:
    assert run_ranks(refused, 1, timeout_s=100, env={"TRITON_INTERPRET": "1"})
