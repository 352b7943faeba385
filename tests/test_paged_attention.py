"""The stand-in for flash-attn in plain torch: what Megatron's engine computes with on CPUs."""

import sys
from collections.abc import Iterator

import pytest
import torch

from engine_harness import attention
from engine_harness.attention_cases import EQUAL, MIXED, AttentionCase, check_equal, check_mixed


@pytest.mark.parametrize("case", MIXED.values(), ids=MIXED)
def test_requests_of_several_lengths(case: AttentionCase) -> None:
    check_mixed(case, torch.float32, "cpu", 1e-5)


@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL)
def test_as_many_new_tokens_in_every_request(case: AttentionCase) -> None:
    check_equal(case, torch.float32, "cpu", 1e-5)


def test_bfloat16() -> None:
    check_mixed(MIXED["mixed"], torch.bfloat16, "cpu", 1e-2)


@pytest.mark.parametrize(
    "option",
    [{"causal": False}, {"window_size": (128, 0)}, {"return_attn_probs": True}, {"alibi_slopes": None}],
    ids=lambda option: next(iter(option)),
)
def test_what_it_does_not_do_is_refused(option: dict) -> None:
    made = MIXED["decode"].make(torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match=f"does not take {next(iter(option))}=.*install flash-attn"):
        attention.flash_attn_varlen_func(
            made["q"], made["k"], made["v"], made["new"], made["keys"], 0, 0, block_table=made["pages"], **option
        )


@pytest.fixture
def no_flash_attention() -> Iterator[None]:
    before = sys.modules.pop("flash_attn", None)
    yield
    sys.modules.pop("flash_attn", None)
    if before is not None:
        sys.modules["flash_attn"] = before


@pytest.mark.usefixtures("no_flash_attention")
def test_it_stands_in_only_where_flash_attention_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    assert not attention.stand_in_for_flash_attention()
    assert "flash_attn" not in sys.modules
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    assert attention.stand_in_for_flash_attention()
    assert attention.stand_in_for_flash_attention()
    import flash_attn

    assert flash_attn.flash_attn_varlen_func is attention.flash_attn_varlen_func
