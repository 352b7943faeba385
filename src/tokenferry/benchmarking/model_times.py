"""How a decode step is timed by itself, and within `generate()`."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from tokenferry.benchmarking.timing import GroupTimer
from tokenferry.graph_capture import captured

WARM_STEPS: Final = 3


class NotCaptured(Exception):
    """A decode step that cannot be part of a CUDA graph, with the reason; nothing of it has run, on any rank."""


class Decoder:
    """Greedy decoding with a static cache, a step at a time: eagerly, or by replaying one CUDA graph of a step.

    Without CUDA there is no graph, and all steps are eager.

    Args:
        ids: [batch, prompt]
        num_steps: room in the cache for so many steps, beside those of warming up.
        chunk: tokens of each prompt that a forward takes; None: all.
    """

    def __init__(self, timer: GroupTimer, model: Any, ids: torch.Tensor, num_steps: int, chunk: int | None = None) -> None:
        from transformers import StaticCache

        self._timer, self._model, self._ids, self._chunk = timer, model, ids, chunk or ids.shape[1]
        length = ids.shape[1] + num_steps + 2 * WARM_STEPS + 2
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._token = torch.zeros(ids.shape[0], 1, dtype=torch.int64, device=ids.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made: list[torch.Tensor] = []
        self._workspace = model.expert_parallel.workspace if hasattr(model, "expert_parallel") else None

    @torch.no_grad()
    def prefill(self) -> None:
        """Reads the prompts, and finds the first token of each."""
        for ids in self._ids.split(self._chunk, dim=1):
            self._forward(ids)
        self._keep()

    @torch.no_grad()
    def capture(self) -> None:
        """From here on a step is a replay.

        Raises:
            NotCaptured: the model's forward does what no capture allows.
        """
        if self._ids.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._as_in_generate():
            self._forward(self._token)
            self._keep()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        capturing = self._workspace.capturing() if self._workspace is not None else contextlib.nullcontext()
        try:
            with capturing, captured(graph, stream=stream), self._as_in_generate():
                self._forward(self._token)
        except RuntimeError as error:
            raise NotCaptured(f"{type(error).__name__}: {error}") from error
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph

    @torch.no_grad()
    def time_steps(self, count: int) -> dict[str, float]:
        """`step_ms`, and `host_ms`, in which the host has issued a step's work without waiting for it; the slowest rank's."""
        with self._as_in_generate():
            for _ in range(WARM_STEPS):
                self._step()
            self._timer.meet()
            start_s = time.perf_counter()
            for _ in range(count):
                self._step()
            issued_s = time.perf_counter() - start_s
            self._timer.synchronize()
            passed_s = time.perf_counter() - start_s
        if self._workspace is not None:
            self._workspace.check()
        times = {"step_ms": passed_s, "host_ms": issued_s}
        return {name: round(self._timer.slowest(1e3 * seconds / count), 3) for name, seconds in times.items()}

    def tokens(self) -> list[list[int]]:
        """Of each prompt, all that were decoded."""
        return torch.cat(self._made, dim=1).tolist()

    def _step(self) -> None:
        if self._graph is None:
            self._forward(self._token)
        else:
            with self._workspace.replaying() if self._workspace is not None else contextlib.nullcontext():
                self._graph.replay()
        self._keep()

    def _keep(self) -> None:
        """A copy of a few bytes, beside a step."""
        self._made.append(self._token.clone())

    def _forward(self, ids: torch.Tensor) -> None:
        logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._token.copy_(logits[:, -1].float().argmax(-1, keepdim=True))

    def _as_in_generate(self) -> contextlib.AbstractContextManager[Any]:
        """Around decode steps: `generate()` takes another experts function for them, if it is left to transformers."""
        optimize = getattr(self._model, "_optimize_model_for_decode", contextlib.nullcontext)
        entered: contextlib.AbstractContextManager[Any] = optimize()
        return entered


NO_REPLAY_MS: Final = 1e12
"""Longer than any replay."""


class Replays:
    """Within it the GPU's time in each replay of a workspace's graphs is noted; without CUDA, nothing."""

    def __init__(self, timer: GroupTimer, workspace: Any) -> None:
        self._timer, self._workspace = timer, workspace
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Replays:
        self._workspace.replaying = self._timed(self._workspace.replaying)
        return self

    def __exit__(self, *raised: object) -> None:
        del self._workspace.replaying  # the class's own is behind it

    def figures(self) -> dict[str, float]:
        """`step_ms`: the median, of the rank where that is smallest, since the others' replays hold their waiting for it too.

        Nothing if no rank has replayed a graph. Collective: the others waited when a rank without replays returned before it.
        """
        median = statistics.median(start.elapsed_time(end) for start, end in self._spans) if self._spans else NO_REPLAY_MS
        smallest = -self._timer.slowest(-median)
        return {} if smallest == NO_REPLAY_MS else {"step_ms": round(smallest, 3)}

    def _timed(
        self, replaying: Callable[..., contextlib.AbstractContextManager[None]]
    ) -> Callable[..., contextlib.AbstractContextManager[None]]:
        @contextlib.contextmanager
        def timed(*args: Any) -> Iterator[None]:
            with replaying(*args):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                yield
                end.record()
                self._spans.append((start, end))

        return timed


class FirstToken:
    """A logits processor that changes nothing and notes when the first token's logits are there."""

    def __init__(self, timer: GroupTimer) -> None:
        self._timer = timer
        self.time_s: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.time_s is None:
            self._timer.synchronize()
            self.time_s = time.perf_counter()
        return scores


def time_generate(
    timer: GroupTimer, model: Any, ids: torch.Tensor, new_tokens: int, **settings: Any
) -> tuple[dict[str, float], list[list[int]]]:
    """Times one call, on all ranks at once.

    Args:
        ids: [batch, prompt]
        new_tokens: at least 2.
        settings: further arguments of `generate()`.

    Returns:
        `ttft_ms` until the first token, `token_ms` for each further one, `call_s` altogether, of each the slowest rank's; and the
        new tokens of each prompt.
    """
    from transformers import LogitsProcessorList

    first = FirstToken(timer)
    timer.meet()
    start_s = time.perf_counter()
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([first]),
        **settings,
    )
    timer.synchronize()
    end_s = time.perf_counter()
    assert first.time_s is not None, "generate() asks its logits processors for each token"
    times = {
        "ttft_ms": round(timer.slowest(1e3 * (first.time_s - start_s)), 2),
        "token_ms": round(timer.slowest(1e3 * (end_s - first.time_s) / (new_tokens - 1)), 3),
        "call_s": round(timer.slowest(end_s - start_s), 3),
    }
    return times, made[:, ids.shape[1] :].tolist()
