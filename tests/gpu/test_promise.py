"""Promises on GPUs: captured steps of experts with and without `max_tokens`, where it is kept and where it is broken."""

import pytest
import torch

import tokenferry as tf
from promise_work import BROKEN, CAPACITY, KEPT, KINDS, E, H, K, rows_of
from rank_pool import RankPools
from tokenferry.recording import Recorder
from tokenferry.testing import same_bits

two_gpus = pytest.mark.gpu(count=2)
REPLAYS = 3


def captured(group: tf.EPGroup, name: str, transport: str) -> dict[str, float]:
    """For each case the largest difference between the graph of a step that promises and that of one that does not, as a part of
    the largest number; 0.0 stands for the same bits."""
    kind, errors = KINDS[name], {}
    config = tf.MoEConfig(hidden_size=H, num_experts=E, topk=K, dtype=kind.dtype)
    settings = {"counts": "uneven"} if transport == "p2p" else {"counts": "equal"}
    with tf.Workspace(config, group, max_tokens_per_rank=CAPACITY, transport=transport, **settings) as ws:
        layer, experts, recorder = ws.dispatcher(), kind.experts(group), Recorder(ws)
        experts.prepare(ws)
        for case, counts in (("kept", KEPT), ("broken", BROKEN)):
            count = counts[group.rank] if transport == "p2p" else max(KEPT)
            rows, outputs = rows_of(group, count, kind.dtype), []
            for max_tokens in (None, max(KEPT) if count <= max(KEPT) else None):

                def call(rows=rows, count=count, max_tokens=max_tokens):
                    ws.begin_step(count, max_tokens=max_tokens)
                    got = layer.dispatch(*rows)
                    return layer.combine(experts(got, out=layer.combine_input()), got)

                with torch.cuda.stream(recorder.stream):
                    call()
                recorder.stream.synchronize()
                recorded = recorder.record(call)
                for _ in range(REPLAYS):
                    with ws.replaying(recorded.num_steps):
                        recorded.replay()
                torch.cuda.synchronize()
                outputs.append(recorded.result.double())
                if not ws._settings.debug:
                    ws.check()
            plain, promised = outputs
            assert bool(promised.isfinite().all()) and float(plain.abs().max()) > 0
            is_same = same_bits(promised, plain)
            errors[case] = 0.0 if is_same else float((promised - plain).abs().max() / plain.abs().max())
    return errors


@two_gpus
@pytest.mark.parametrize("name", KINDS)
def test_captured_steps_give_the_same_rows_with_a_promise(on_ranks: RankPools, name: str) -> None:
    for errors in on_ranks(captured, 2, name, "p2p", backend="nccl", timeout_s=120):
        assert errors["kept"] == 0.0, "at most 32 rows an expert have the same tiles in both"
        assert errors["broken"] < 2e-2
        assert errors["broken"] == 0.0 or not KINDS[name].batch_invariant


@two_gpus
def test_the_collective_transport_takes_a_promise_too(on_ranks: RankPools) -> None:
    for errors in on_ranks(captured, 2, "bfloat16", "collective", backend="nccl", timeout_s=120):
        assert errors == {"kept": 0.0, "broken": 0.0}
