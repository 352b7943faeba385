"""How Megatron's engine goes on after a peer was late or failed."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tokenferry.integrations.megatron.base import InferenceAllGatherDispatcherBase
from tokenferry.integrations.megatron.engine_agreement import drop_words
from tokenferry.integrations.megatron.nvls import NVLSAllGatherVDispatcher

_GRAPHS = "megatron.core.transformer.cuda_graphs"


def delete_graphs() -> None:
    """Megatron's `delete_cuda_graphs()`, where its module of graphs was imported."""
    graphs = sys.modules.get(_GRAPHS)
    if graphs is not None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a graph that still runs must not lose its memory
        graphs.delete_cuda_graphs()


def restart_engine(engine: Any, timeout_s: float | None = None) -> None:
    """Lets an engine go on whose step was ended by a peer's failure. Every rank calls it, when all of them are there again.

    The connections and buffers start anew (`reset`), the CUDA graphs are captured again, and every request that was under way
    is computed anew from its prompt and the tokens that it has, as Megatron's `resume()` does: the failed step has added none.
    Futures of requests stay. What the prefix cache held is forgotten.

    Where a peer was missed in Megatron's own agreement on the batch, which the error says, and that agreement went over the GPU
    (the context has no ZMQ communicator), the expert-parallel group was aborted, and the processes have to be started again.

    Args:
        engine: Megatron's `DynamicInferenceEngine`.
        timeout_s: how long to wait for the others in `reset`.

    Raises:
        PeerTimeoutError: a rank did not come. Call it again when it can.
    """
    delete_graphs()
    NVLSAllGatherVDispatcher._reset(timeout_s)
    drop_words(getattr(engine.context, "_ep_zmq_communicator", None))
    _meet(timeout_s)
    waiting = list(engine.waiting_request_ids)
    under_way = [number for number in engine.requests if number not in (*waiting, *engine.failed_request_ids)]
    for number in under_way:
        engine.requests[number].record.checkpoint()
    for number in waiting:
        request = engine.get_request(number)
        if request.finished_chunk_token_count > 0:  # a part of the prompt had been computed
            request.remaining_prompt_tokens, request.finished_chunk_token_count = request.prompt_tokens, 0
    engine.waiting_request_ids.clear()
    engine.controller._async_sched_logits.clear()
    engine.context.reset()
    engine.create_cuda_graphs()
    for number in (*under_way, *waiting):
        engine._add_request(engine.get_request(number))


def _meet(timeout_s: float | None) -> None:
    """Returns when all ranks have dropped the old words of Megatron's agreement: a new word that a fast rank sent before a slow
    one dropped its own would be lost with them, and the slow one would wait for it."""
    for workspace in InferenceAllGatherDispatcherBase._registry.workspaces()[:1]:
        name = f"megatron/restarted/{workspace.number}/{workspace.generation}"
        limit_s = workspace.timeout_s if timeout_s is None else timeout_s
        workspace.group.channel.barrier(name, limit_s, phase="reset")
