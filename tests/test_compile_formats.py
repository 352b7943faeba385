"""`torch.compile(fullgraph=True)` passes through dispatches of other formats: the bits of eager code."""

import shutil
from collections.abc import Iterator

import pytest
import torch

import tokenferry as tf
from tokenferry.dispatched import FLOAT8, QuantizedRows
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


def quantized_in_powers_of_two(partial: torch.Tensor) -> QuantizedRows:
    """Float8 terms of which each compiler makes the same bits: all is exact, but for the one rounding to float8.

    Of float32, since inductor leaves out a rounding to bfloat16 on the way to float8."""
    scales = torch.tensor([0.25, 0.5]).repeat(partial.shape[0], 1)
    columns = torch.cat([torch.full((128,), 4.0), torch.full((H - 128,), 2.0)])
    return QuantizedRows((partial * columns).clamp(-448, 448).to(FLOAT8), scales)


def compiled_as_eager(
    group: tf.EPGroup,
    transport: str,
    backend: str,
    dispatch_format: str,
    quantized: bool,
    combine_dtype: torch.dtype | None = None,
    quantized_terms: bool = False,
) -> int:
    """A model that reads all that a dispatch gives, compiled and eager, on several inputs."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    settings = {"transport": transport, "dispatch_format": dispatch_format, "combine_dtype": combine_dtype}
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
                partial = torch.where(weight == 0, 0, torch.relu(hidden) * weight)
                terms = quantized_in_powers_of_two(partial) if quantized_terms else partial.to(torch.bfloat16)
                total = layer.combine(terms, got) + total
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
@FORMATS
def test_over_symmetric_memory_compiled_by_inductor(dispatch_format: str, quantized: bool) -> None:
    """Of quantized rows compiled code gets copies; the others are read where they lie."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for CPU code")
    given = ("p2p", "inductor", dispatch_format, quantized)
    assert run_ranks(compiled_as_eager, 2, *given, timeout_s=300, env={"TRITON_INTERPRET": "1"}) == [3, 3]


@pytest.mark.parametrize("dispatch_format", ["same", "fp8_block128"])
def test_terms_become_float8_behind_compiled_code(dispatch_format: str) -> None:
    group = tf.EPGroup(device="cpu")
    assert compiled_as_eager(group, "local", "aot_eager", dispatch_format, False, FLOAT8) == 3


QUANTIZED_TERMS = FLOAT8, True


@pytest.mark.parametrize("dispatch_format", ["same", "fp8_block128"])
def test_a_combine_of_quantized_terms_in_compiled_code(dispatch_format: str) -> None:
    group = tf.EPGroup(device="cpu")
    assert compiled_as_eager(group, "local", "aot_eager", dispatch_format, False, *QUANTIZED_TERMS) == 3


@pytest.mark.long
@pytest.mark.ranks
def test_a_combine_of_quantized_terms_on_two_ranks() -> None:
    given = ("collective", "aot_eager", "same", False, *QUANTIZED_TERMS)
    assert run_ranks(compiled_as_eager, 2, *given, timeout_s=120) == [3, 3]


@pytest.mark.interpreter
@pytest.mark.parametrize("dispatch_format", ["same", pytest.param("fp8_block128", marks=pytest.mark.long)])
def test_a_combine_of_quantized_terms_over_symmetric_memory(dispatch_format: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler for CPU code")
    given = ("p2p", "inductor", dispatch_format, False, *QUANTIZED_TERMS)
    assert run_ranks(compiled_as_eager, 2, *given, timeout_s=300, env={"TRITON_INTERPRET": "1"}) == [3, 3]


def closed(group: tf.EPGroup) -> str:
    with tf.Workspace(CONFIG, group, max_tokens_per_rank=8, transport="p2p", dispatch_format="fp8_block128") as ws:
        layer = ws.dispatcher()
        compiled = torch.compile(lambda *given: layer.dispatch(*given).topk_idx + 0, fullgraph=True, backend="eager")
        ws.begin_step(5)
        assert compiled(*inputs(5, 0)).shape == (8, 2)
    with pytest.raises(tf.StateError) as caught:
        compiled(*inputs(5, 0))
    return str(caught.value)


@pytest.mark.interpreter
def test_compiled_code_of_a_closed_workspace_is_told_so() -> None:
    assert "closed" in run_ranks(closed, 1, timeout_s=100, env={"TRITON_INTERPRET": "1"})[0]
