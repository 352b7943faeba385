"""How decode steps run: eagerly, by a CUDA graph, compiled by transformers, or within continuous batching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import torch

from tokenferry.benchmarking.model_batching import time_batching
from tokenferry.benchmarking.model_request import ModelPoint, ModelRequest
from tokenferry.benchmarking.model_times import Decoder, Replays, time_generate
from tokenferry.benchmarking.model_ways import EAGERLY, NOT_COMPILED, graphs_wanted
from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.groups import EPGroup

EAGER_STEPS: Final = 8
EAGER_TOKENS: Final = 16
"""Eager steps take five to ten times as long as replays, and their times vary little."""
BATCHING_BATCH: Final = 8
MAX_WEIGHT_COPY_BYTES: Final = 8 << 30
MAX_COMPILED_COPY_BYTES: Final = 512 << 20
"""batched_mm copies an expert's weights for each choice of each row; beyond these it is left out, eager or compiled. On 2 x H200
(2026-11-26, Qwen3-30B-A3B) 1.2 GB a layer took 2.5 times as long as grouped_mm, and compiling takes a quarter of a minute."""


@dataclass(frozen=True)
class Scene:
    """A model, and what a mode needs to measure it."""

    timer: GroupTimer
    model: Any
    config: Any
    request: ModelRequest
    replicates: bool
    """Whether every rank works on all ranks' prompts."""

    @property
    def is_ours(self) -> bool:
        """Whether tokenferry has spread its experts."""
        return hasattr(self.model, "expert_parallel")

    def prompts(self, point: ModelPoint, rank: int) -> torch.Tensor:
        """[batch, prompt]: what a rank is asked, the same in every way."""
        generator = torch.Generator(device="cpu").manual_seed(1000 * point.batch + rank)
        shape = (point.batch, point.prompt)
        ids = torch.randint(3, self.config.vocab_size - 1, shape, generator=generator, dtype=torch.int64, device="cpu")
        return ids.to(self.timer.group.device)

    def own_prompts(self, point: ModelPoint) -> torch.Tensor:
        """What this rank's forwards are given."""
        group = self.timer.group
        if not self.replicates:
            return self.prompts(point, group.rank)
        return torch.cat([self.prompts(point, rank) for rank in range(group.size)])

    def own_tokens(self, point: ModelPoint, tokens: list[list[int]]) -> list[list[int]]:
        """Of the tokens that the forwards made, those of this rank's prompts."""
        if not self.replicates:
            return tokens
        start = self.timer.group.rank * point.batch
        return tokens[start : start + point.batch]

    def chunk(self, point: ModelPoint) -> int | None:
        """How many tokens of each prompt a forward may have, where a whole prompt is too many for ours."""
        return (
            self.request.capacity // point.batch if self.is_ours and point.batch * point.prompt > self.request.capacity else None
        )


@dataclass(frozen=True)
class Measured:
    """The figures of a record, and the tokens of this rank's prompts."""

    figures: dict[str, Any]
    tokens: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """How a point is measured.

    Attributes:
        serves: whether it is for a configuration and a point at all.
    """

    measure: Callable[[Scene, ModelPoint], Measured]
    serves: Callable[[Any, ModelPoint, EPGroup], bool] = lambda *_: True


def _eager(scene: Scene, point: ModelPoint) -> Measured:
    ids = scene.own_prompts(point)
    decoder = Decoder(scene.timer, scene.model, ids, 2 * EAGER_STEPS, scene.chunk(point))
    decoder.prefill()
    figures = decoder.time_steps(EAGER_STEPS)
    new_tokens = min(scene.request.new_tokens, EAGER_TOKENS)
    settings = dict(EAGERLY) if scene.is_ours and graphs_wanted() else {}
    settings |= _chunked(scene, point)
    first, _ = time_generate(scene.timer, scene.model, ids, new_tokens, **settings)  # cuDNN plans for each length of a cache
    times, tokens = time_generate(scene.timer, scene.model, ids, new_tokens, **settings)
    added = {"first_call_s": first["call_s"]}
    return Measured(figures | _per_rank(times, point) | added, scene.own_tokens(point, tokens))


def _graph(scene: Scene, point: ModelPoint) -> Measured:
    """A replay of a step; and `generate()`, where it decodes by graphs, which the plain library's does not."""
    ids = scene.own_prompts(point)
    decoder = Decoder(scene.timer, scene.model, ids, 2 * scene.request.new_tokens, scene.chunk(point))
    decoder.prefill()
    decoder.capture()
    figures = decoder.time_steps(scene.request.new_tokens)
    if not (scene.is_ours and graphs_wanted()):
        tokens = [made[: scene.request.new_tokens] for made in decoder.tokens()]
        return Measured(figures, scene.own_tokens(point, tokens))
    del decoder
    settings = {**_chunked(scene, point), **NOT_COMPILED}
    first, _ = time_generate(scene.timer, scene.model, ids, scene.request.new_tokens, **settings)
    times, tokens = time_generate(scene.timer, scene.model, ids, scene.request.new_tokens, **settings)
    return Measured(_with_around(figures | _per_rank(times, point) | {"first_call_s": first["call_s"]}), tokens)


def _graph_compiled(scene: Scene, point: ModelPoint) -> Measured:
    """`generate()` of ours by default: the compiler's code for a step, and a graph of it. Steps are timed in the second call."""
    ids = scene.own_prompts(point)
    torch._dynamo.reset()
    settings = _chunked(scene, point)
    if scene.timer.group.device.type != "cuda":
        settings |= {"cache_implementation": "static", "compile_config": _rehearsed_compilation()}
    first, _ = time_generate(scene.timer, scene.model, ids, scene.request.new_tokens, **settings)
    with Replays(scene.timer, scene.model.expert_parallel.workspace) as replays:
        times, tokens = time_generate(scene.timer, scene.model, ids, scene.request.new_tokens, **settings)
    figures = replays.figures() | _per_rank(times, point) | {"first_call_s": first["call_s"]}
    return Measured(_with_around(figures), tokens)


def _with_around(figures: dict[str, Any]) -> dict[str, Any]:
    """With what a token takes in `generate()` beyond its step."""
    if "step_ms" not in figures:
        return figures
    return figures | {"around_ms": round(figures["token_ms"] - figures["step_ms"], 3)}


def _rehearsed_compilation() -> Any:
    from transformers import CompileConfig

    config = CompileConfig(backend="eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def _compile(scene: Scene, point: ModelPoint) -> Measured:
    """transformers' own compilation of decode steps, with one static cache for all calls, as its pages advise."""
    from transformers import StaticCache

    ids = scene.own_prompts(point)
    torch._dynamo.reset()  # sizes of their own for each point: with sizes as inputs the code would be slower
    cache = StaticCache(config=scene.model.config, max_cache_len=point.prompt + scene.request.new_tokens)
    settings: dict[str, Any] = {"past_key_values": cache}
    if scene.timer.group.device.type != "cuda":
        settings["compile_config"] = _rehearsed_compilation()
    first, _ = time_generate(scene.timer, scene.model, ids, scene.request.new_tokens, **settings)
    cache.reset()
    times, tokens = time_generate(scene.timer, scene.model, ids, scene.request.new_tokens, **settings)
    torch._dynamo.reset()
    return Measured(_per_rank(times, point) | {"first_call_s": first["call_s"]}, scene.own_tokens(point, tokens))


def _batched(measure: Callable[[Scene, ModelPoint], Measured]) -> Callable[[Scene, ModelPoint], Measured]:
    """With the experts function that `generate()` takes by itself: grouped_mm for the prompt, batched_mm behind it."""

    @functools.wraps(measure)
    def with_batched(scene: Scene, point: ModelPoint) -> Measured:
        before = scene.model.get_experts_implementation()
        scene.model.set_experts_implementation("grouped_mm")
        try:
            return measure(scene, point)
        finally:
            scene.model.set_experts_implementation(before)

    return with_batched


def _fits_batched(config: Any, point: ModelPoint, group: EPGroup) -> bool:
    return _copied_bytes(config, point, group) <= MAX_WEIGHT_COPY_BYTES


def _fits_compiled(config: Any, point: ModelPoint, group: EPGroup) -> bool:
    return _copied_bytes(config, point, group) <= MAX_COMPILED_COPY_BYTES


def _copied_bytes(config: Any, point: ModelPoint, group: EPGroup) -> int:
    """That batched_mm gathers in a decode step of a layer."""
    intermediate = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return int(point.batch * group.size * 6 * config.hidden_size * intermediate * config.num_experts_per_tok)


def _batching(scene: Scene, point: ModelPoint) -> Measured:
    ids = scene.own_prompts(point).tolist()
    figures, tokens = time_batching(scene.timer, scene.model, ids, scene.request.new_tokens)
    return Measured(figures, tokens)


def _chunked(scene: Scene, point: ModelPoint) -> dict[str, Any]:
    chunk = scene.chunk(point)
    return {} if chunk is None else {"prefill_chunk_size": chunk}


def _per_rank(times: dict[str, float], point: ModelPoint) -> dict[str, float]:
    return times | {"tokens_per_s": round(1e3 * point.batch / times["token_ms"], 1)}


MODES: Final = MappingProxyType({
    "eager": Mode(_eager),
    "graph": Mode(_graph),
    "graph-compiled": Mode(_graph_compiled, lambda config, point, group: bool(graphs_wanted())),
    "compile": Mode(_compile),
    "batching": Mode(_batching, lambda config, point, group: point.batch == BATCHING_BATCH),
    "eager-batched": Mode(_batched(_eager), _fits_batched),
    "graph-batched": Mode(_batched(_graph), _fits_batched),
    "compile-batched": Mode(_batched(_compile), _fits_compiled),
})  # fmt: skip
