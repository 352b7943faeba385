"""A worker for vLLM's `--worker-cls`: failures of peers come out of every step, also where graphs replay without a call of ours.

Imported when vLLM asks for the class: it derives from vLLM's worker of the platform.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput

from tokenferry.errors import PeerError
from tokenferry.integrations.vllm import reasons
from tokenferry.integrations.vllm.exchange import Exchange
from tokenferry.integrations.vllm.in_place import current_exchange
from tokenferry.integrations.vllm.settings import LOGGER, settings_from

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

_log = logging.getLogger(LOGGER)


class Worker(PlatformWorker):  # type: ignore[misc]
    """vLLM's own worker, with `Workspace.engine_step()` around each step, and `Workspace.busy()` around what it compiles, warms
    up and captures before the first one. Where tokenferry is off it does nothing.

    A rank without requests runs dummy forwards to keep the others company, and graphs fill a batch up to their size: such rows
    are masked, so that no expert computes them, on CPUs, and on GPUs where vLLM's VLLM_MOE_SKIP_PADDING is on. Graphs' rows are
    masked without a draft model alone, whose forwards bring other numbers of rows.
    """

    def init_device(self) -> None:
        super().init_device()
        if settings_from(self.vllm_config.additional_config) is not None and current_exchange() is None:
            _log.warning(
                "tokenferry is switched on, but nothing goes through it: it serves --data-parallel-size 2 or more with "
                "--enable-expert-parallel and --all2all-backend allgather_reducescatter, vLLM's default"
            )

    def determine_available_memory(self) -> Any:
        with _busy("vLLM compiles the model and runs it once, to see how much memory is left"):
            memory = super().determine_available_memory()
        exchange = current_exchange()
        if exchange is not None and not current_platform.is_cpu():
            exchange.open_no_more()
        return memory

    def compile_or_warm_up_model(self) -> Any:
        with _busy("vLLM warms up and captures graphs"):
            return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        num_real_tokens = None
        if getattr(self.vllm_config, "speculative_config", None) is None:
            num_real_tokens = getattr(scheduler_output, "total_num_scheduled_tokens", None)
        return _in_a_step(num_real_tokens, super().execute_model, scheduler_output, *args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return _in_a_step(None, super().sample_tokens, *args, **kwargs)

    def execute_dummy_batch(self) -> None:
        _in_a_step(0, super().execute_dummy_batch)


class CheckedOutput(AsyncModelRunnerOutput):  # type: ignore[misc]
    """The output of a step that still ran when vLLM's worker had returned (asynchronous scheduling). Nobody gets its tokens if a
    peer failed in that step, which is known once they are on the host."""

    def __init__(self, output: Any, exchange: Exchange) -> None:
        self._output, self._exchange = output, exchange

    def get_output(self) -> Any:
        """vLLM's own output. Raises PeerTimeoutError or PeerFailedError; vLLM calls it from a thread of its own."""
        output = self._output.get_output()
        try:
            self._exchange.check_known()
        except PeerError as error:
            _tell(error)
            raise
        return output


def _in_a_step(num_real_tokens: int | None, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `call` returns, as a step of the engine. Failures of peers come out of it, or of its output where that comes later.

    Args:
        num_real_tokens: of this rank's rows; None: all, or not known.
    """
    exchange = current_exchange()
    if exchange is None:
        return call(*args, **kwargs)
    try:
        with exchange.engine_step():
            if num_real_tokens is None or not exchange.masks:
                output = call(*args, **kwargs)
            else:
                with exchange.real_rows(num_real_tokens):
                    output = call(*args, **kwargs)
    except PeerError as error:
        _tell(error)
        raise
    # Of another kind of output the tokens are on the host, and the step has looked.
    return CheckedOutput(output, exchange) if isinstance(output, AsyncModelRunnerOutput) else output


def _tell(error: PeerError) -> None:
    """Leaves the error for the API servers."""
    reasons.tell(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _busy(reason: str) -> Iterator[None]:
    exchange = current_exchange()
    with exchange.busy(reason) if exchange is not None else contextlib.nullcontext():
        yield
