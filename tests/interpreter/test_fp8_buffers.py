"""Every buffer of float8 rows and terms is poisoned before it is written, empty again after it was read, and fenced in."""

import pytest
import torch

import tokenferry as tf
from formats import FLOAT8
from rank_pool import RankPools
from tokenferry.dispatched import QuantizedRows

from .test_formats import INTERPRETER, SmallSlots

pytestmark = pytest.mark.interpreter

DEBUG = {**INTERPRETER, "TOKENFERRY_DEBUG": "1"}
CONFIG = tf.MoEConfig(hidden_size=272, num_experts=4, topk=2)


def are_nan(rows: QuantizedRows) -> bool:
    return bool(rows.values.to(torch.float32).isnan().all()) and bool(rows.scales.isnan().all())


def states(group: tf.EPGroup, num_tokens: int) -> dict[str, bool]:
    """What holds of each buffer at its time, on this rank, in the second of two round trips."""
    held = {}
    with tf.Workspace(
        CONFIG, group, max_tokens_per_rank=7, transport=SmallSlots(), dispatch_format="fp8_block128", combine_dtype=FLOAT8
    ) as ws:
        layer, rows = ws.dispatcher(), torch.ones(num_tokens, 272, dtype=torch.bfloat16)
        gathered, memory = ws._transport.fixed_rows.hidden_RH, ws._transport.memory
        held["gathered rows before the first step"] = are_nan(gathered)
        for _ in range(2):
            ws.begin_step(num_tokens)
            got = layer.dispatch(rows, torch.zeros(num_tokens, 2, dtype=torch.int32), torch.ones(num_tokens, 2))
            valid = group.size * num_tokens
            held["gathered rows"] = bool((got.hidden.dequantize(torch.float32)[:valid] == 1).all())
            held["gathered rows behind the last one"] = are_nan(QuantizedRows(gathered.values[valid:], gathered.scales[valid:]))
            terms = layer.combine_input()
            held["terms before the experts"] = are_nan(terms)
            terms.values[:valid].copy_(got.hidden.values[:valid])
            terms.scales[:valid].copy_(got.hidden.scales[:valid])
            held["sums"] = bool((layer.combine(terms, got) == group.size).all())
            held["terms behind the last one"] = are_nan(QuantizedRows(terms.values[valid:], terms.scales[valid:]))
            held["gathered rows after the combine"] = are_nan(gathered)
            for name in ("dispatch_slots", "combine_slots"):
                region = memory.layout.regions[name]
                held[f"{name} are empty"] = bool((memory.buffer[region.offset : region.end] == 0xFF).all())
        ws.check()
    return held


@pytest.mark.parametrize("num_tokens", [3, 6], ids=["slots", "bulk"])
def test_buffers_are_poisoned_and_emptied(on_ranks: RankPools, num_tokens: int) -> None:
    for held in on_ranks(states, 2, num_tokens, env=DEBUG):
        assert [name for name, is_so in held.items() if not is_so] == []
        assert len(held) == 9


def fenced(group: tf.EPGroup) -> dict[str, str]:
    said = {}
    with tf.Workspace(
        CONFIG, group, max_tokens_per_rank=4, transport="p2p", dispatch_format="fp8_block128", combine_dtype=FLOAT8
    ) as ws:
        memory = ws._transport.memory
        for name in ("hidden", "scales", "terms", "term_scales"):
            ws.begin_step(0)
            memory.buffer[memory.layout.regions[name].end] = 0
            with pytest.raises(tf.StateError) as caught:
                ws.check()
            said[name] = str(caught.value)
    return said


FENCES = [("hidden", "scales"), ("scales", "topk_idx"), ("terms", "term_scales"), ("term_scales", "end")]


def test_bytes_behind_each_region_are_watched(on_ranks: RankPools) -> None:
    [said] = on_ranks(fenced, 1, env=DEBUG)
    for name, following in FENCES:
        assert f"behind '{name}' and before '{following}', was written" in said[name]
