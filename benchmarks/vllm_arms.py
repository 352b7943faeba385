"""What carries the rows of vLLM's MoE layers, to be changed within one running engine: its own manager, ours, with and without
padding rows for the experts, and none at all.

`Arms` keeps the managers and their graphs side by side: in one process, with one set of weights, the exchange alone differs.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenferry.integrations.vllm.known_versions import ORIGINAL


@dataclass
class Remembered:
    """What exchanges have brought, by the ranks' counts and the layer: rows, weights, expert numbers, and these without padding.

    Attributes:
        num_real: of each rank, the rows that are no padding, while exchanges are to be remembered; else None.
    """

    num_real: tuple[int, ...] | None = None
    rows: dict[tuple[tuple[int, ...], int], tuple[torch.Tensor, ...]] = field(default_factory=dict)


def silent_class(base: type) -> type:
    """A manager that sends nothing: each layer gets the rows that a remembered exchange of these counts brought it, and keeps of
    the experts' rows its own. A step takes with it what it takes without its exchange; its tokens are nonsense.

    It launches no kernel, and waits for no rank. Rows of other counts it exchanges as `base` does.

    Args:
        base: vLLM's `AgRsAll2AllManager`.
    """
    parent: Any = base

    class Silent(parent):  # type: ignore[misc]
        def __init__(self, cpu_group: Any, num_layers: int, remembered: Remembered, *, masks_padding: bool) -> None:
            super().__init__(cpu_group)
            self._num_layers, self._remembered, self._masks_padding = num_layers, remembered, masks_padding
            self._layer, self._own, self._is_silent = 0, slice(0, 0), False

        def dispatch(
            self, hidden: Any, weights: Any, ids: Any, is_sequence_parallel: bool = False, extra_tensors: Any = None
        ) -> Any:
            counts = tuple(self._get_sizes(hidden.shape[0], self._get_comm_group(is_sequence_parallel)))
            place, self._layer = (counts, self._layer), (self._layer + 1) % self._num_layers
            start = sum(counts[: self.rank])
            self._own = slice(start, start + counts[self.rank])
            kept, num_real = self._remembered.rows.get(place), self._remembered.num_real
            self._is_silent = kept is not None and num_real is None
            if kept is not None and num_real is None:
                return kept[0], kept[1], kept[3 if self._masks_padding else 2]
            got = super().dispatch(hidden, weights, ids, is_sequence_parallel, extra_tensors)
            if num_real is not None:
                self._remembered.rows[place] = (*(each.clone() for each in got), without_padding(got[2], counts, num_real))
            return got

        def combine(self, hidden: Any, is_sequence_parallel: bool = False) -> Any:
            return hidden[self._own] if self._is_silent else super().combine(hidden, is_sequence_parallel)

        def combine_into_output(self, hidden: Any, output: Any, is_sequence_parallel: bool = False) -> Any:
            return output.copy_(self.combine(hidden, is_sequence_parallel))

        def allocate_combine_input(self, *args: Any, **kwargs: Any) -> None:
            return None

    return Silent


def without_padding(ids: torch.Tensor, counts: tuple[int, ...], num_real: tuple[int, ...]) -> torch.Tensor:
    """The expert numbers with -1 in each rank's rows from `num_real` on."""
    masked = ids.clone()
    for rank, (count, real) in enumerate(zip(counts, num_real, strict=True)):
        start = sum(counts[:rank])
        masked[start + min(real, count) : start + count] = -1
    return masked


def ids_in_turn(runner: Any, rank: int, size: int) -> torch.Tensor:
    """Expert numbers of this rank's rows such that the ranks' experts get equally many rows, and equally many experts get any.

    Example:
        64 experts, top-8: token 3 of all ranks' goes to the experts 3, 11, 19, ..., 59.
    """
    config = runner.model_config.hf_config
    num_experts, topk = config.num_experts, config.num_experts_per_tok
    rows = torch.arange(runner.max_num_tokens, device=runner.device) * size + rank
    choices = torch.arange(topk, device=runner.device) * (num_experts // topk)
    return ((rows[:, None] + choices) % num_experts).to(torch.int32)


class TimedGraph:
    """A graph whose replays are timed on the device."""

    def __init__(self, graph: Any, times: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self._graph, self._times = graph, times

    def replay(self) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._graph.replay()
        end.record()
        self._times.append((begin, end))


class Arms:
    """The managers of one engine, each with graphs of its own.

    Args:
        runner: vLLM's model runner, whose engine runs in this process.
        num_layers: MoE layers of the model.
    """

    def __init__(self, runner: Any, num_layers: int) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import get_ep_group

        self.runner, self._communicator = runner, get_ep_group().device_communicator
        ours = self._communicator.all2all_manager
        base = vars(type(ours))[ORIGINAL]
        silent, self._remembered = silent_class(base), Remembered()
        with set_current_vllm_config(runner.vllm_config):
            self.managers = {
                "stock": base(ours.cpu_group),
                "ours": ours,
                "ours, no padding": ours,
                "none": silent(ours.cpu_group, num_layers, self._remembered, masks_padding=False),
                "none, no padding": silent(ours.cpu_group, num_layers, self._remembered, masks_padding=True),
            }
        self.is_balanced = False
        """Whether rows go to experts in turn, as many to each rank's, instead of where the model sends them."""
        self._ids_in_turn = ids_in_turn(runner, ours.rank, ours.world_size)
        self._exchange = ours.exchange
        for manager in {id(manager): manager for manager in self.managers.values()}.values():
            manager.dispatch = self._routed(manager.dispatch)
        self._graphs: dict[str, dict[int, dict[Any, Any]]] = {}
        self.replays: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _routed(self, dispatch: Callable[..., Any]) -> Callable[..., Any]:
        def routed(hidden: Any, weights: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = self._ids_in_turn[: ids.shape[0]] if self.is_balanced else ids
            return dispatch(hidden, weights, chosen, *args, **kwargs)

        return routed

    @contextlib.contextmanager
    def using(self, name: str, *, graphs: bool) -> Iterator[None]:
        """Within it, the rows go through the manager `name`, in its graphs or without any."""
        before = self._communicator.all2all_manager
        self._communicator.all2all_manager = self.managers[name]
        self._exchange.masks = name == "ours, no padding"
        dispatcher = self.runner.cudagraph_dispatcher if torch.cuda.is_available() else None
        if dispatcher is not None:
            had_keys, dispatcher.keys_initialized = dispatcher.keys_initialized, graphs
            self._give_graphs(name)
        try:
            yield
        finally:
            self._communicator.all2all_manager = before
            if dispatcher is not None:
                dispatcher.keys_initialized = had_keys

    @contextlib.contextmanager
    def remembering(self, num_real: tuple[int, ...]) -> Iterator[None]:
        """Within it, without graphs, "none" exchanges as vLLM's own does, and remembers what comes, from now on."""
        self._remembered.num_real = num_real
        try:
            with self.using("none", graphs=False):
                yield
        finally:
            self._remembered.num_real = None

    def capture(self, name: str) -> None:
        """Captures all graphs with this manager. Collective."""
        self._graphs[name] = {}
        with self.using(name, graphs=True):
            self.runner.capture_model()
        self.keep_graphs(name)

    def keep_graphs(self, name: str) -> None:
        """The graphs that vLLM has captured belong to this manager from now on, and are timed."""
        kept = self._graphs[name] = {id(wrapper): wrapper.concrete_cudagraph_entries for wrapper in self._wrappers()}
        for entries in kept.values():
            for entry in entries.values():
                if entry.cudagraph is not None and not isinstance(entry.cudagraph, TimedGraph):
                    entry.cudagraph = TimedGraph(entry.cudagraph, self.replays)

    def _give_graphs(self, name: str) -> None:
        kept = self._graphs.get(name, {})
        for wrapper in self._wrappers():
            wrapper.concrete_cudagraph_entries = kept.setdefault(id(wrapper), {})

    @staticmethod
    def _wrappers() -> list[Any]:
        from vllm.compilation.cuda_graph import CUDAGraphWrapper

        return list(CUDAGraphWrapper._all_instances)
