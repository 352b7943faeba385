"""Megatron's engine on a random model, step by step."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from engine_harness.requests import Load, Outcome, Step

if TYPE_CHECKING:
    from engine_harness.ranks import Ranks


@dataclass(frozen=True)
class EngineOptions:
    """A model and how its engine batches. `graph_scope` is "none" (eager), "layer" or "block".

    Attributes:
        mixed_prefill_graphs: prefill steps run in CUDA graphs too, which Megatron allows for the type "nvls" alone.
        model: changed fields of `ModelSize`, in examples/megatron_model.py.
        config: further fields of Megatron's `TransformerConfig`.
    """

    max_requests: int = 8
    max_tokens: int = 256
    page_tokens: int = 16
    buffer_gb: float = 0.01
    graph_scope: str = "none"
    num_graphs: int = 8
    mixed_prefill_graphs: bool = False
    async_scheduling: bool = False
    model: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class Engine:
    """Megatron's `DynamicInferenceEngine` on a random model, with the objects around it in the order that they need."""

    def __init__(self, ranks: Ranks, options: EngineOptions, dispatcher: str) -> None:
        from examples.megatron_model import ModelSize, build_model, model_config
        from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
        from megatron.core.inference.engines import DynamicInferenceEngine
        from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
        from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
        from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

        self.ranks = ranks
        self.size = size = ModelSize(**options.model)
        seed_random_numbers(ranks)
        initialization = {} if ranks.is_gpu else {"use_cpu_initialization": True}
        config = model_config(size, dispatcher=dispatcher, graph_scope=options.graph_scope, **initialization, **options.config)
        self.model = build_model(config, size, ranks.device)
        self.context = DynamicInferenceContext(config, inference_config(size, options))
        wrapper = GPTInferenceWrapper(self.model, self.context)
        wrapper.model_is_pipeline_parallel = False
        tokenizer = SimpleNamespace(vocab_size=size.vocab_size, eod=-1, detokenize=lambda tokens: "")
        self.controller = TextGenerationController(inference_wrapped_model=wrapper, tokenizer=tokenizer)
        delete_cuda_graphs()  # of an engine before, which Megatron keeps by their sizes
        start_s = time.perf_counter()
        self.engine = DynamicInferenceEngine(self.controller, self.context)
        ranks.synchronize()
        self.capture_s = time.perf_counter() - start_s
        self.has_host_messages = self._exchange_sizes_on_the_host()

    @property
    def dispatchers(self) -> list[Any]:
        """Each layer's."""
        return [layer.mlp._inference_token_dispatcher for layer in self.model.decoder.layers]

    def _exchange_sizes_on_the_host(self) -> bool:
        """As under Megatron's coordinator: the ranks agree on a graph by messages of zmq, not by an all-reduce on the GPU."""
        if importlib.util.find_spec("zmq") is None or not self.ranks.is_gpu:
            return False
        import zmq
        from megatron.core import parallel_state
        from megatron.core.inference.engines.async_zmq_communicator import AsyncZMQCommunicator

        group = parallel_state.get_expert_model_parallel_group()
        self.context.set_ep_zmq_communicator(AsyncZMQCommunicator(zmq.Context.instance(), group, hostname="127.0.0.1"))
        return True

    def run(self, load: Load, *, asks_peers: bool = True) -> Outcome:
        """Runs the engine until no rank has work. A rank without work makes dummy steps as long as a peer has some.

        `asks_peers` False leaves out the ranks' question before every step whether one has work, which costs host time: for equal
        loads, where all are at an end together.
        """
        ranks, waiting, tokens = self.ranks, dict(enumerate(load[self.ranks.rank])), {}
        times: list[tuple[str, int, bool, float, Any]] = []
        dist.barrier(group=ranks.host_group)
        start_s = time.perf_counter()
        with torch.inference_mode(), self._forwards_timed() as spans:
            while True:
                for number, request in list(waiting.items()):
                    if request.arrives_at_step <= len(times):
                        self.add(number, request.prompt(ranks.rank, number, self.size.vocab_size), request.new_tokens)
                        del waiting[number]
                has_work = self.engine.has_unfinished_requests()
                if not (ranks.any(has_work or bool(waiting)) if asks_peers else has_work):
                    break
                step_s = time.perf_counter()
                kind = self.step(tokens) if has_work else self.dummy_step()
                rows = self.context.padded_active_token_count if has_work else -1
                in_graph = bool(self.context._using_cuda_graph_this_step) if has_work else False
                times.append(
                    (kind, rows, in_graph, 1e3 * (time.perf_counter() - step_s), spans[-1] if spans and has_work else None)
                )
        ranks.synchronize()
        wall_s = time.perf_counter() - start_s
        steps = [Step(*four, span[0].elapsed_time(span[1]) if span else None) for *four, span in times]
        return Outcome(tokens, steps, wall_s)

    def add(self, number: int, prompt: list[int], new_tokens: int) -> None:
        """One greedy request that ends after `new_tokens`."""
        from megatron.core.inference.sampling_params import SamplingParams

        self.engine.add_request(number, prompt, SamplingParams(num_tokens_to_generate=new_tokens, termination_id=-1, top_k=1))

    def step(self, tokens: dict[int, list[int]]) -> str:
        """One step with work. Puts the tokens of requests that ended into `tokens`; returns "prefill" or "decode"."""
        result = self.engine.step_modern()
        for record in result["finished_request_records"]:
            done = record.merge()
            tokens[done.request_id] = list(done.generated_tokens)
        state = self.engine.decode_only
        return "decode" if (state.consumed if state.launched is None else state.launched) else "prefill"

    def dummy_step(self) -> str:
        """What an idle rank does while a peer has work: it takes part in the layers' collective calls."""
        self.controller.dummy_forward()
        return "dummy"

    @contextlib.contextmanager
    def _forwards_timed(self) -> Iterator[list[tuple[Any, Any]]]:
        """Events around every forward of the controller."""
        spans: list[tuple[Any, Any]] = []
        forward = self.controller._dynamic_step_forward_logits

        def timed(*arguments: Any, **options: Any) -> Any:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            result = forward(*arguments, **options)
            after.record()
            spans.append((before, after))
            return result

        if self.ranks.is_gpu:
            self.controller._dynamic_step_forward_logits = timed
        try:
            yield spans
        finally:
            self.controller._dynamic_step_forward_logits = forward

    def close(self) -> None:
        """Forgets the model, its graphs and what Megatron's modules keep of it. Our dispatchers' buffers: `megatron.close()`."""
        from megatron.core.inference import utils
        from megatron.core.transformer.cuda_graphs import delete_cuda_graphs

        utils.InferenceMode.unset_active()
        utils.moe_layer_cache = None
        utils._moe_metadata_sync_initialized = False
        del self.engine, self.controller, self.context, self.model
        delete_cuda_graphs()
        gc.collect()
        if self.ranks.is_gpu:
            torch.cuda.empty_cache()


def seed_random_numbers(ranks: Ranks) -> None:
    """Megatron's own generators, which its layers ask for by name. The weights are filled by name afterwards."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if ranks.is_gpu:
        model_parallel_cuda_manual_seed(123, inference_rng_tracker=True, use_cudagraphable_rng=False, force_reset_rng=True)


def inference_config(size: Any, options: EngineOptions) -> Any:
    from megatron.core.inference.config import InferenceConfig

    return InferenceConfig(
        max_sequence_length=size.max_sequence_length,
        buffer_size_gb=options.buffer_gb,
        block_size_tokens=options.page_tokens,
        max_requests=options.max_requests,
        max_tokens=options.max_tokens,
        num_cuda_graphs=None if options.graph_scope == "none" else options.num_graphs,
        use_cuda_graphs_for_non_decode_steps=options.mixed_prefill_graphs,
        cuda_graph_mixed_prefill_count=4,
        cuda_graph_max_tokens=512,
        num_speculative_tokens=size.num_mtp_layers,
        async_sched_mode="async" if options.async_scheduling else "legacy",
        unified_memory_level=0,
    )
