"""A gpt-oss checkpoint as released, between rank processes on gloo: packed experts write the tokens of the dequantised model."""

from pathlib import Path

import pytest

import tokenferry as tf
from packed_checkpoint import dequantized, make_released
from tokenferry.testing import run_ranks
from transformers_work import Work, generate, generate_batch, load, quiet

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

WORK = (Work((5, 17, 9), 8), Work((21,), 12), Work())


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.long)], ids=["EP1", "EP2", "EP3-uneven-one-idle"])
def test_tokens_of_the_dequantised_model(size: int, tmp_path: Path) -> None:
    path = make_released(tmp_path)
    for ways, packed in run_ranks(both_ways, size, path, timeout_s=240):
        assert ways == {"generate": True, "generate_batch": True}
        assert packed


def both_ways(group: tf.EPGroup, path: Path) -> tuple[dict[str, bool], bool]:
    """Whether the tokens are the same, and whether all layers are packed."""
    quiet()
    model, whole, work = load(path, group), dequantized(path), WORK[group.rank]
    same = {}
    for way in (generate, generate_batch):
        same[way.__name__] = not work.prompt_lengths or way(model, work, group.rank)[0] == way(whole, work, group.rank)[0]
        model.expert_parallel.finish()
    packed = all(layer.packed is not None for layer in model.expert_parallel.layers)
    model.expert_parallel.close()
    return same, packed
