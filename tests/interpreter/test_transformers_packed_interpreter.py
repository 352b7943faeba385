"""A gpt-oss checkpoint as released, over the symmetric transport: its kernels and those of packed experts, interpreted."""

from pathlib import Path

import pytest
import torch

import tokenferry as tf
from packed_checkpoint import dequantized, make_released
from tokenferry.testing import run_ranks
from transformers_work import Work, generate, load, quiet

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

WORK = (Work((5, 3), 3), Work((6,), 4))


def test_tokens_of_the_dequantised_model(tmp_path: Path) -> None:
    """A tiny model with sizes that are no multiples of the 64 rows and columns that are packed together."""
    path = make_released(tmp_path, intermediate_size=32)
    for found in run_ranks(generated, 2, path, timeout_s=240, env={"TRITON_INTERPRET": "1"}):
        assert found == {"tokens": True, "kernels": True, "packed": True, "compiled": True}


def generated(group: tf.EPGroup, path: Path) -> dict[str, bool]:
    quiet()
    model = load(path, group, transport="p2p", max_tokens_per_rank=12)
    parallel = model.expert_parallel
    tokens = generate(model, WORK[group.rank], group.rank)[0]
    parallel.finish()
    ids = torch.arange(5, 5 + 3 * (group.rank + 1)).view(1, -1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    found = {
        "tokens": tokens == generate(dequantized(path), WORK[group.rank], group.rank)[0],
        "kernels": all(layer.kernels.borrowed.scratch is not None for layer in parallel.layers),
        "packed": all(layer.packed is not None for layer in parallel.layers),
        "compiled": torch.equal(compiled, expected),
    }
    parallel.close()
    return found
