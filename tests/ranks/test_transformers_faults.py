"""What a user of transformers may do wrong, and ranks that fail in mid-step: the right exception on every rank, in time."""

import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from patience import PATIENT_S, SLACK_S
from tokenferry.errors import CapacityError, ConfigError
from tokenferry.testing import run_ranks
from tokenferry.testing.tiny_models import make_tiny
from transformers_work import CAPACITY, Work, generate, generate_batch, load, prompts, quiet, unmodified

pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]  # transformers warns of its own affairs

WORK = (Work((7, 4), 6), Work((11,), 9))
LONG = Work((11,), 40)


class Broken(RuntimeError):
    """What a rank's own code raises."""


# --- scenarios: each runs on two ranks and returns what a rank saw --------------------------------------------------


def too_long_prompt(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """Rank 0 asks for too much, catches the error and goes on; rank 1 notices nothing."""
    message = ""
    if group.rank == 0:
        with pytest.raises(CapacityError) as caught:
            generate(model, Work((CAPACITY + 1,), 2), group.rank)
        message = str(caught.value)
    return message, same_tokens(model, group, path)


def split_prompt(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """As the message says: a prompt of 90 tokens in chunks of 40."""
    ids = torch.tensor(prompts((90,), group.rank))
    model.generation_config.prefill_chunk_size = 40
    tokens = model.generate(ids, max_new_tokens=4).tolist()
    model.expert_parallel.finish()
    return tokens == unmodified(path).generate(ids, max_new_tokens=4).tolist()


def generate_after_finish(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """Three turns; in the second rank 0 has nothing to do, in the third rank 1."""
    equal = [same_tokens(model, group, path)]
    for idle in (0, 1):
        work = tuple(Work() if rank == idle else Work((5,), 7) for rank in range(group.size))
        equal.append(same_tokens(model, group, path, work))
    return equal


def raising_between_layers(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """Rank 0 raises in the attention after the first MoE layer; then both start anew."""
    if group.rank == 0:
        break_attention(model, at_call=4)
    seen = observed(lambda: generate(model, LONG, group.rank))
    again = observed(model.expert_parallel.finish)
    mend_attention(model)
    model.expert_parallel.reset()
    return seen, again, same_tokens(model, group, path)


def raising_while_the_other_is_idle(model: Any, group: tf.EPGroup, path: Path) -> Any:
    if group.rank == 0:
        break_attention(model, at_call=4)
        return observed(lambda: generate(model, LONG, group.rank))
    return observed(model.expert_parallel.finish)


def raising_in_continuous_batching(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """transformers catches the exception and gives the requests up; we raise it, and the other rank is told."""
    if group.rank == 0:
        break_attention(model, at_call=4)
    return observed(lambda: generate_batch(model, LONG, group.rank))


def late_in_mid_step(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """Rank 0 comes to the second layer when rank 1 has given it up."""

    def until_given_up(*_: object) -> None:
        group.channel.barrier("rank 1 has given up", PATIENT_S)

    if group.rank == 0:
        model.model.layers[1].self_attn.register_forward_pre_hook(until_given_up)
    seen = observed(lambda: generate(model, LONG, group.rank))
    if group.rank == 1:
        group.channel.barrier("rank 1 has given up", PATIENT_S)
    return seen


def layers_left_out(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """A forward that ends before its last MoE layer, as an early exit does."""
    if group.rank == 0:
        model.model.layers = model.model.layers[:1]
    return observed(lambda: generate(model, LONG, group.rank))


def other_order(model: Any, group: tf.EPGroup, path: Path) -> Any:
    if group.rank == 0:
        model.model.layers = model.model.layers[1:]
    return observed(lambda: generate(model, LONG, group.rank))


def second_thread(model: Any, group: tf.EPGroup, path: Path) -> Any:
    """On rank 0 another thread asks for something between two MoE layers of the first forward."""
    said, threads = [], []

    def ask(*_: object) -> None:
        if not threads:
            threads.append(threading.Thread(target=lambda: said.append(observed(lambda: generate(model, WORK[1], 1)))))
            threads[0].start()
            threads[0].join(PATIENT_S)

    if group.rank == 0:
        model.model.layers[-1].register_forward_pre_hook(ask)
    return same_tokens(model, group, path), said


def batches_beyond_capacity(model: Any, group: tf.EPGroup, path: Path) -> Any:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = ContinuousBatchingConfig(max_batch_tokens=CAPACITY + 1)
    seen = observed(lambda: model.generate_batch(prompts((3,), 0), GenerationConfig(max_new_tokens=1), config))
    model.expert_parallel.finish()
    return seen


def saving(model: Any, group: tf.EPGroup, path: Path) -> Any:
    model.expert_parallel.finish()
    return observed(lambda: model.save_pretrained(str(path) + "-copy"))


SCENARIOS: dict[str, tuple[Callable[..., Any], float]] = {
    function.__name__: (function, 2.0 if function is late_in_mid_step else PATIENT_S)
    for function in (
        too_long_prompt,
        split_prompt,
        generate_after_finish,
        raising_between_layers,
        raising_while_the_other_is_idle,
        raising_in_continuous_batching,
        late_in_mid_step,
        layers_left_out,
        other_order,
        second_thread,
        batches_beyond_capacity,
        saving,
    )
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")


@pytest.fixture(scope="module")
def seen(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank saw in each scenario; a traceback where a scenario broke."""
    broken = tmp_path_factory.mktemp("broken")
    unmodified(path).config.save_pretrained(broken)
    (broken / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])
    by_rank = run_ranks(run_scenarios, 2, path, broken, timeout_s=240)
    return {name: [rank[name] for rank in by_rank] for name in by_rank[0]}


def test_a_long_prompt_is_refused_with_both_numbers_and_the_remedy(seen: dict[str, list[Any]]) -> None:
    (message, equal), other = seen["too_long_prompt"]
    assert f"{CAPACITY + 1} tokens" in message
    assert f"max_tokens_per_rank is {CAPACITY}" in message
    assert "prefill_chunk_size" in message
    assert equal
    assert other == ("", True)


def test_a_long_prompt_in_chunks(seen: dict[str, list[Any]]) -> None:
    assert seen["split_prompt"] == [True, True]


def test_generate_after_finish(seen: dict[str, list[Any]]) -> None:
    assert seen["generate_after_finish"] == [[True] * 3] * 2


def test_the_others_learn_at_once_that_a_rank_raised(seen: dict[str, list[Any]]) -> None:
    (own, own_again, own_equal), (other, other_again, other_equal) = seen["raising_between_layers"]
    assert own[:2] == ("Broken", "the attention is broken")
    assert own_again[0] == "PeerFailedError"
    for kind, message, waited_s in (other, other_again):
        assert kind == "PeerFailedError"
        assert "rank 0 failed" in message
        assert "Broken: the attention is broken" in message
        assert waited_s < SLACK_S
    assert (own_equal, other_equal) == (True, True), "after reset()"


@pytest.mark.parametrize("scenario", ["raising_while_the_other_is_idle", "raising_in_continuous_batching"])
def test_whatever_the_others_do_when_a_rank_raises(scenario: str, seen: dict[str, list[Any]]) -> None:
    own, (kind, message, waited_s) = seen[scenario]
    assert own[:2] == ("Broken", "the attention is broken")
    assert kind == "PeerFailedError"
    assert "Broken: the attention is broken" in message
    assert waited_s < SLACK_S


def test_a_late_rank_is_named_before_it_comes(seen: dict[str, list[Any]]) -> None:
    own, (kind, message, _) = seen["late_in_mid_step"]
    assert kind == "PeerTimeoutError"
    assert "rank 0 is late" in message
    assert own[0] == "PeerFailedError"


@pytest.mark.parametrize("scenario", ["layers_left_out", "other_order"])
def test_a_forward_with_other_layers_is_an_error(scenario: str, seen: dict[str, list[Any]]) -> None:
    own, other = seen[scenario]
    assert own[0] == "StateError"
    assert "MoE layer" in own[1]
    assert other[0] == "PeerFailedError"
    assert "rank 0 failed" in other[1]


def test_a_second_thread_alone_is_refused(seen: dict[str, list[Any]]) -> None:
    (own_equal, ((kind, message, _),)), other = seen["second_thread"]
    assert (own_equal, other) == (True, (True, []))
    assert kind == "StateError"
    assert "another thread (MainThread) is in the middle of a call on this model" in message


def test_batches_beyond_the_capacity_are_refused(seen: dict[str, list[Any]]) -> None:
    for kind, message, _ in seen["batches_beyond_capacity"]:
        assert kind == "CapacityError"
        assert f"max_batch_tokens is {CAPACITY + 1} but max_tokens_per_rank is {CAPACITY}" in message


def test_a_part_of_the_experts_is_not_saved(seen: dict[str, list[Any]]) -> None:
    assert [kind for kind, *_ in seen["saving"]] == ["StateError"] * 2


# --- loading --------------------------------------------------------------------------------------------------------


def test_more_ranks_than_experts(path: Path) -> None:
    with pytest.raises(ConfigError, match="8 experts cannot be spread over 9 ranks"):
        load(path, alone_of(9))


def test_a_model_without_moe_layers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**DENSE)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no MoE layer"):
        load(tmp_path, alone_of(2))


def test_a_checkpoint_without_safetensors(path: Path, tmp_path: Path) -> None:
    model = unmodified(path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="holds no safetensors"):
        load(tmp_path, alone_of(2))


def test_a_checkpoint_that_lacks_experts(path: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    unmodified(path).config.save_pretrained(tmp_path)
    tensors = {key: tensor for key, tensor in load_file(path / "model.safetensors").items() if "layers.1.mlp.experts" not in key}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 2 of the model's parameters, such as model\.layers\.1\.mlp\.experts"):
        load(tmp_path, alone_of(2))


def test_a_rank_that_cannot_load_is_no_time_out_for_the_others(seen: dict[str, list[Any]]) -> None:
    (others_kind, told, waited_s), own = seen["one_cannot_load"]
    assert own[0] == "ConfigError"
    assert others_kind == "PeerFailedError"
    assert told.startswith("rank 1 failed before its workspace was open: ConfigError: checkpoint file")
    assert waited_s < SLACK_S


def test_experts_that_cannot_leave_out_those_of_other_ranks(tmp_path: Path) -> None:
    """The eager forward of gpt_oss has no class for "none of mine": torch's own text is shown, and no cause guessed."""
    with pytest.raises(ConfigError, match=r"GptOssExperts failed on one row, with 4 of 8 experts .* RuntimeError: Class values"):
        load(make_tiny("gpt_oss", tmp_path), alone_of(2), experts_implementation="eager")


@pytest.mark.parametrize("name", ["device_map", "distributed_config", "tp_plan"])
def test_arguments_that_place_the_model_otherwise(name: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=f"leave {name} out"):
        load(path, alone_of(2), **{name: "auto"})


def test_capacity_must_be_positive(path: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_rank must be at least 1, got 0"):
        load(path, alone_of(2), max_tokens_per_rank=0)


def test_what_is_no_group_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match="group must be an EPGroup, got str; make one with EPGroup"):
        load(path, "WORLD")


DENSE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def alone_of(size: int) -> tf.EPGroup:
    """Rank 0 of a group whose other ranks never come: what it raises, it raises before it waits for anybody."""
    return tf.EPGroup.from_store(dist.HashStore(), 0, size)


# --- workers --------------------------------------------------------------------------------------------------------


def run_scenarios(group: tf.EPGroup, path: Path, broken: Path) -> dict[str, Any]:
    quiet()
    # Before the others, since both ranks must be able to open workspaces afterwards.
    cannot_load = observed(lambda: load(broken if group.rank == 1 else path, group, open_timeout_s=PATIENT_S))
    return {"one_cannot_load": cannot_load} | {
        name: _run(group, path, function, timeout_s) for name, (function, timeout_s) in SCENARIOS.items()
    }


def _run(group: tf.EPGroup, path: Path, scenario: Callable[..., Any], timeout_s: float) -> Any:
    model = load(path, group, timeout_s=timeout_s, open_timeout_s=PATIENT_S)
    try:
        return scenario(model, group, path)
    except Exception:
        return traceback.format_exc()
    finally:
        model.expert_parallel.close()


def observed(call: Callable[[], object]) -> tuple[str, str, float]:
    """The exception that `call` raises, its text, and how long it took."""
    start_s = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start_s
    return "nothing", "", time.monotonic() - start_s


def same_tokens(model: Any, group: tf.EPGroup, path: Path, work: tuple[Work, ...] = WORK) -> bool:
    tokens, _ = generate(model, work[group.rank], group.rank)
    model.expert_parallel.finish()
    return tokens == generate(unmodified(path), work[group.rank], group.rank)[0]


def break_attention(model: Any, at_call: int) -> None:
    calls = []

    def count(*_: object) -> None:
        calls.append(None)
        if len(calls) == at_call:
            raise Broken("the attention is broken")

    model.model.layers[1].self_attn.register_forward_pre_hook(count)


def mend_attention(model: Any) -> None:
    model.model.layers[1].self_attn._forward_pre_hooks.clear()
