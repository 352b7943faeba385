"""The places at which transformers' `generate()` asks a model for a cache and for its decode forward, and gets ours.

They are those of its own compilation with a static cache. transformers 5.17 and 5.23 have them alike.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers import CompileConfig, StaticCache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode
from transformers.masking_utils import create_masks_for_generate

from tokenferry.integrations.transformers.cache_state import is_plain
from tokenferry.integrations.transformers.decode_graphs import DecodeGraphs, Forward
from tokenferry.integrations.transformers.decode_masks import masks_of_windows
from tokenferry.integrations.transformers.graph_choice import StepGraphs
from tokenferry.integrations.transformers.static_caches import expected_bytes, growing

_ASKED_FOR: Final = (
    "generate() runs decode steps eagerly: the cache {!r} that was asked for cannot be part of a CUDA graph; leave it out, or "
    "ask for a static one"
)
_ONE_AT_A_TIME: Final = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_MASKED: Final = ("sdpa", "eager")
_SHARE_OF_FREE_MEMORY: Final = 0.5
"""A static cache that would take more of what is free is left alone: its length is a bound, and few answers come near it."""
_GIB: Final = 1 << 30


class GraphedGeneration:
    """What a model class gains, mixed in before it, for decode steps as CUDA graphs.

    `expert_parallel.graphs` has them; None: all is as transformers has it.
    """

    expert_parallel: Any

    @property
    def _decode_graphs(self) -> DecodeGraphs | None:
        graphs: StepGraphs | None = self.expert_parallel.graphs
        return None if graphs is None or graphs.left_out else graphs.decode

    def _call_with_graphs(self) -> contextlib.AbstractContextManager[None]:
        """Around a `generate()`."""
        self.expert_parallel.look_over()
        graphs = self._decode_graphs
        return contextlib.nullcontext() if graphs is None else graphs.call(self)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        prepare = super()._prepare_cache_for_generation  # type: ignore[misc]
        graphs, named = self._decode_graphs, generation_config.cache_implementation
        if graphs is not None and not graphs.stopped:
            given, returns = model_kwargs.get("past_key_values"), bool(generation_config.return_dict_in_generate)
            graphs.lends_caches = not returns
            if given is not None or named is not None:
                kind = named if given is None else type(given).__name__
                if not (named in ALL_STATIC_CACHE_IMPLEMENTATIONS if given is None else isinstance(given, StaticCache)):
                    graphs.say_once(_ASKED_FOR.format(kind))
            elif _takes_a_cache(generation_config, generation_mode):
                num_sequences = batch_size * generation_config.num_return_sequences
                reason = self._why_no_static_cache(num_sequences, max_cache_length, returns)
                if reason is None:
                    graphs.say_once("generate() takes a static cache, so that decode steps are CUDA graphs", level=logging.INFO)
                    generation_config.cache_implementation, graphs.lends_caches = "static", True
                else:
                    graphs.say_once(f"generate() takes a growing cache and runs decode steps eagerly: {reason}")
        try:
            return prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        finally:
            generation_config.cache_implementation = named

    def _prepare_static_cache(
        self: Any,
        cache_implementation: str,
        batch_size: int,
        max_cache_len: int,
        prefill_chunk_size: int | None,
        model_kwargs: Any,
    ) -> Any:
        graphs = self._decode_graphs
        is_own = graphs is not None and not graphs.stopped and graphs.lends_caches
        if not is_own or "offloaded" in cache_implementation or self.config.is_encoder_decoder:
            return super()._prepare_static_cache(  # type: ignore[misc]
                cache_implementation, batch_size, max_cache_len, prefill_chunk_size, model_kwargs
            )
        config = self.config.get_text_config(decoder=True)
        kind = batch_size, self.dtype, torch.is_inference_mode_enabled()
        return graphs.caches.lend(kind, max_cache_len, lambda length: StaticCache(config=config, max_cache_len=length))

    def create_masks_for_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's own, or transformers' for all models. Where a decode step is a graph, the mask is part of it if it can
        be, or made in few launches: transformers' way are a dozen that the device would wait for."""
        graphs, own = self._decode_graphs, getattr(super(), "create_masks_for_generate", None)
        cache: Any = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        if own is not None or graphs is None or embeds is None or embeds.shape[1] != 1 or not graphs.takes(cache):
            return (own or create_masks_for_generate)(*args, **kwargs)
        mask, config = kwargs.get("attention_mask"), self.config.get_text_config()
        is_whole = mask is not None and mask.dim() != 2  # says itself who sees whom
        if is_whole or config._attn_implementation not in _MASKED or not cache.is_initialized:
            return create_masks_for_generate(*args, **kwargs)
        if is_plain(cache):
            # As long as the cache, so that it keeps its shape from step to step; what lies ahead is masked by causality.
            return None if mask is None else pad(mask, (0, cache.layers[0].max_cache_len - mask.shape[1]))
        masks = None if mask is None else masks_of_windows(config, cache, mask, embeds.dtype)
        return create_masks_for_generate(*args, **kwargs) if masks is None else masks

    def _valid_auto_compile_criteria(self: Any, model_kwargs: Any, generation_config: Any) -> bool:
        graphs, cache = self._decode_graphs, model_kwargs.get("past_key_values")
        may_compile = bool(super()._valid_auto_compile_criteria(model_kwargs, generation_config))  # type: ignore[misc]
        if graphs is None or type(cache) is not StaticCache:
            return may_compile
        graphs.wants_compiled = may_compile and (self._can_compile_fullgraph or generation_config.compile_config is not None)
        return graphs.takes(cache) or generation_config.compile_config is not None

    def get_compiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
        """As the model's own; where decode steps are CUDA graphs, what records and replays them: the compiled forward, for which
        the compiler makes no graphs of its own, and the forward as it is where that is not to be."""
        compiled = super().get_compiled_call  # type: ignore[misc]
        graphs = self._decode_graphs
        if graphs is None or graphs.stopped:
            return compiled(compile_config)  # type: ignore[no-any-return]
        forwards, otherwise = [Forward("eager", self.__call__)], self.__call__
        if compile_config is not None and graphs.wants_compiled:
            config = without_graphs(compile_config)
            otherwise = compiled(config)
            forwards.insert(0, Forward("specially compiled", otherwise, is_one_graph=config.fullgraph))
        elif graphs.wants_compiled and "llama4" not in self.config.model_type:  # transformers does not compile that one either
            forwards.insert(0, graphs.compiled(self))
        return functools.partial(graphs.run, forwards, otherwise)

    def _with_growing_cache(self, generated: Any) -> Any:
        """What `generate()` has made, for the caller: with a growing cache, which can be continued, in the place of one that we
        keep."""
        graphs = self._decode_graphs
        cache: Any = getattr(generated, "past_key_values", None)
        if graphs is not None and graphs.caches.holds(cache):
            generated.past_key_values = growing(cache, self.config.get_text_config(decoder=True))  # type: ignore[attr-defined]
        return generated

    def _why_no_static_cache(self: Any, batch_size: int, num_tokens: int, returns: bool) -> str | None:
        config = self.config.get_text_config(decoder=True)
        if self.config.is_encoder_decoder or not self._supports_default_dynamic_cache():
            return f"{type(self).__name__} makes a cache of its own"
        if "flash" in str(self.config._attn_implementation):
            return f"{self.config._attn_implementation} asks the device for lengths in each step"
        if returns and not is_plain(StaticCache(config=config, max_cache_len=1)):
            return "the call returns its cache, and one with sliding windows or linear attention cannot be made a growing one"
        if self.device.type != "cuda":
            return None
        needed = expected_bytes(config, batch_size, num_tokens, self.dtype)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + unused
        if needed > _SHARE_OF_FREE_MEMORY * free:
            return (
                f"a static one of {num_tokens} tokens for {batch_size} sequences would take {needed / _GIB:.1f} of the "
                f"{free / _GIB:.1f} GiB that are free; lower max_new_tokens"
            )
        return None


def _takes_a_cache(generation_config: Any, mode: Any) -> bool:
    """Whether a static cache will do: beams put their sequences in another order, and assistants take tokens back."""
    is_assistant = getattr(generation_config, "is_assistant", False)
    return generation_config.use_cache is not False and mode in _ONE_AT_A_TIME and not is_assistant


def without_graphs(compile_config: Any) -> Any:
    """The same compilation without CUDA graphs of the compiler's own."""
    config: Any = CompileConfig(**compile_config.to_dict())
    if config.options:
        config.mode, config.options = None, {**config.options, "triton.cudagraphs": False}
    elif config.mode == "max-autotune":
        config.mode = "max-autotune-no-cudagraphs"
    elif config.mode == "reduce-overhead":
        config.mode = "default"
    return config
