"""Models with random weights: what a rank makes is what one process makes of the same seed."""

import traceback

import pytest
import torch

import tokenferry as tf
from tokenferry.testing import run_ranks
from tokenferry.testing.tiny_models import tiny_config
from transformers_work import CAPACITY, Work, generate, quiet

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4")
WORK = (Work((5, 9), 6), Work((7,), 8))


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[bool, str]]]:
    by_rank = run_ranks(run_all, 2, timeout_s=240)
    return {family: [rank[family] for rank in by_rank] for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_generate_the_tokens_of_one_process(family: str, found: dict[str, list[tuple[bool, str]]]) -> None:
    for equal, error in found[family]:
        assert not error, error
        assert equal


def run_all(group: tf.EPGroup) -> dict[str, tuple[bool, str]]:
    quiet()
    found = {}
    for family in FAMILIES:
        try:
            found[family] = (_tokens_are_equal(group, family), "")
        except Exception:
            found[family] = (False, traceback.format_exc())
    return found


def _tokens_are_equal(group: tf.EPGroup, family: str) -> bool:
    from transformers import AutoModelForCausalLM

    from tokenferry.integrations.transformers import from_config, random_state

    config = tiny_config(family)
    config._attn_implementation = "eager"
    model = from_config(config, group=group, max_tokens_per_rank=CAPACITY, dtype=torch.float32, seed=4)
    assert model.expert_parallel.num_local_experts * 2 == model.expert_parallel.shape.num_experts
    tokens, _ = generate(model, WORK[group.rank], group.rank)
    model.expert_parallel.finish()
    model.expert_parallel.close()
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    state = random_state(model_class, config, torch.float32, group.device, seed=4)
    alone = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    return tokens == generate(alone, WORK[group.rank], group.rank)[0]
