"""Prompts of the command line: how a file is read, which rank answers which prompt, and whether they fit the model's context."""

import json

import pytest

from tokenferry.cli.context import check_prompts, context_length
from tokenferry.cli.prompts import DEFAULT_PROMPTS, read_prompts
from tokenferry.cli.spread import TOKENS_PER_BATCH, batches, capacity, spread
from tokenferry.cli.tokens import load_tokenizer
from tokenferry.errors import ConfigError


def test_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("Wer da?\r\n\n  ¿Qué?  \n{not json}\n".encode())
    assert read_prompts(path) == ("Wer da?", "¿Qué?", "{not json}")


def test_jsonl_file_has_an_object_a_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "three"}')
    assert read_prompts(path) == ("one\ntwo", "three")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "line 2: each line must be an object"),
        ("a.jsonl", b'{"prompt": "a", "seed": 1}', "line 1: each line must be an object"),
        ("a.jsonl", b'\n\n{"prompt": "a}', r"line 3: not JSON \(.* at column 12\)"),
        ("a.jsonl", b'{"prompt": " "}', "line 1: the prompt is empty"),
        ("a.txt", b"fine\nbad \xff", r"line 2: not UTF-8 \(byte 0xff at column 5\)"),
        ("a.txt", b"\0\0", "line 1: a NUL byte"),
        ("a.txt", b" \n\n", "holds no prompt"),
    ],
)
def test_malformed_prompts_file_is_named_with_its_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_prompts(path)


def test_prompts_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")


def test_default_prompts_differ_in_length():
    assert len({len(prompt) for prompt in DEFAULT_PROMPTS}) == 5


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "expected"),
    [
        ((10, 4, 3, 2, 1), 2, [[0], [1, 2, 3, 4]]),
        ((1, 2, 3, 4, 10), 2, [[4], [3, 2, 1, 0]]),
        ((5, 5, 5, 5), 2, [[0, 1], [2, 3]]),
        ((7,), 3, [[], [0], []]),
        ((9, 1), 1, [[0, 1]]),
    ],
    ids=["longest-first", "any-order", "equal", "fewer-prompts-than-ranks", "one-rank"],
)
def test_spread(lengths, num_ranks, expected):
    assert spread(lengths, num_ranks) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_prompt_is_spread_once(num_ranks):
    lengths = [(37 * i) % 101 + 1 for i in range(23)]
    assert sorted(prompt for own in spread(lengths, num_ranks) for prompt in own) == list(range(23))


def test_batches_stay_within_the_limit_and_capacity_covers_them():
    lengths = [TOKENS_PER_BATCH + 500, 900, 800, 700, 10]
    assert batches([0, 1, 2, 3, 4], lengths) == [[0], [1, 2], [3, 4]]
    assert capacity(lengths, 1) == TOKENS_PER_BATCH + 500
    assert capacity([3, 5], 1) == 10


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"model_type": "mamba"}, None),
        ({"text_config": {"max_position_embeddings": 256, "rope_scaling": None}}, 256),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        (
            {"max_position_embeddings": 131072, "rope_parameters": {"factor": 32.0, "original_max_position_embeddings": 4096}},
            131072,
        ),
        ({"max_position_embeddings": 100, "rope_parameters": {"full_attention": {"factor": 8.0}, "other": {}}}, 800),
    ],
    ids=["plain", "gpt2", "none", "nested", "stretched", "stretched-already", "by-layer-type"],
)
def test_context_length_as_the_configuration_tells(config, length):
    assert context_length(config) == length


def test_a_prompt_that_fills_the_context_to_the_last_token_passes(tmp_path):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 100}')
    check_prompts(tmp_path, [3, 90], 10)
    check_prompts(tmp_path, [], 10)


@pytest.mark.parametrize(
    ("lengths", "new", "remedy"),
    [
        (
            (3, 91),
            10,
            "prompt 1 has 91 tokens .* holds 100 tokens; .* to 90 tokens, or give --max-new-tokens 9 at most",
        ),
        ((400, 5), 10, "prompt 0 has 400 tokens .* shorten the prompt to 90 tokens at most"),
    ],
    ids=["together", "alone"],
)
def test_a_prompt_beyond_the_context_is_named_with_the_remedy(tmp_path, lengths, new, remedy):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 100}')
    with pytest.raises(ConfigError, match=remedy):
        check_prompts(tmp_path, lengths, new)


def test_a_model_without_a_tokenizer_is_named_with_the_remedy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds no tokenizer; fetch its files"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"the tokenizer in {tmp_path} cannot be loaded: .*; fetch its files"):
        load_tokenizer(tmp_path)
