"""Whether a model's steps are CUDA graphs, from what it was loaded with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from tokenferry.errors import ConfigError
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.capturable import Loaded, why_not_captured
from tokenferry.integrations.transformers.decode_graphs import DecodeGraphs
from tokenferry.integrations.transformers.idle_graph import IdleGraph
from tokenferry.integrations.transformers.layer import ExpertLayer
from tokenferry.integrations.transformers.model_facts import experts_facts, is_served
from tokenferry.integrations.transformers.settings import Options
from tokenferry.step import Step

_log = logging.getLogger(__name__)

_BY_THE_LIBRARY: Final = (
    "generate() runs decode steps eagerly: transformers' own function runs the experts of %d of %d MoE layers, and in a CUDA "
    "graph it would work on max_tokens_per_rank rows of each rank; cuda_graphs=True makes graphs all the same"
)


def check_asked_for(group: EPGroup, options: Options) -> None:
    """What is known before anything is loaded.

    Raises:
        ConfigError: CUDA graphs were asked for, and there can be none; or neither they nor the contrary.
    """
    if options.cuda_graphs not in (True, False, "auto"):
        raise ConfigError(f'cuda_graphs must be True, False or "auto", got {options.cuda_graphs!r}')
    if options.cuda_graphs is not True:
        return
    if group.device.type != "cuda":
        raise ConfigError(f"cuda_graphs=True, but the group's device is {group.device}; leave cuda_graphs out")
    if options.exact:
        raise ConfigError("cuda_graphs=True and exact=True exclude one another: exact reads the ranks' counts on the host")


class StepGraphs:
    """The graphs of one model.

    Attributes:
        decode: of decode steps of `generate()`.
        idle: of steps without tokens.
        left_out: whether steps run eagerly for now, since layers that our kernels served are the library's.

    Args:
        layers: the model's. Graphs that were recorded with other experts than they have now are let go of.
        stays: graphs are made whoever runs the experts.
    """

    def __init__(self, decode: DecodeGraphs, idle: IdleGraph, layers: Sequence[ExpertLayer] = (), *, stays: bool = True) -> None:
        self.decode, self.idle, self.left_out = decode, idle, False
        self._layers, self._stays = layers, stays
        self._experts_facts: Hashable = experts_facts(layers)

    def look_over(self) -> None:
        """Before steps, wherever the experts may have been changed: a replay would go on with those that were recorded."""
        facts = experts_facts(self._layers)
        if facts == self._experts_facts:
            return
        self.drop()
        self._experts_facts = facts
        num_by_the_library = sum(not is_served(layer) for layer in self._layers)
        left_out = bool(num_by_the_library) and not self._stays
        if left_out and not self.left_out:
            _log.warning(_BY_THE_LIBRARY, num_by_the_library, len(self._layers))
        self.left_out = left_out

    def drop(self) -> None:
        """Lets go of all graphs; they are recorded anew when they are needed.

        Where the device has failed this raises its error, and they are gone all the same.
        """
        try:
            self.decode.drop()
        finally:
            self.idle.drop()

    def close(self) -> None:
        """Lets go of all that is kept, for good. Raises as `drop`."""
        try:
            self.idle.drop()
        finally:
            self.decode.close()


def make_graphs(
    parallel: Loaded, run_without_tokens: Callable[[bool], Step], forget_step: Callable[[], None]
) -> StepGraphs | None:
    """The graphs of a model whose workspace is open; None: its steps run eagerly. The log says why where one would ask.

    Args:
        run_without_tokens, forget_step: see `IdleGraph`.

    Raises:
        ConfigError: they were asked for and cannot be.
    """
    asked, workspace, layers = parallel.options.cuda_graphs, parallel.workspace, parallel.layers
    if workspace.device.type != "cuda" or asked is False:
        return None
    reason = why_not_captured(parallel)
    if reason is not None and asked is True:
        raise ConfigError(f"cuda_graphs=True, but {reason}")
    num_by_the_library = sum(layer.kernels is None for layer in layers)
    if parallel.options.exact or workspace.active_transport.counts_pass_through_hosts:
        return None
    if num_by_the_library and asked == "auto":
        _log.warning(_BY_THE_LIBRARY, num_by_the_library, len(layers))
        return None
    decode, idle = DecodeGraphs(workspace, forget_step), IdleGraph(workspace, run_without_tokens, forget_step)
    return StepGraphs(decode, idle, layers, stays=asked is True)
