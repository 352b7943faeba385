"""Which MoE layers transformers' own expert function runs in the place of our kernels, and why. The log says it once a reason.

Packed experts have no such function: where our kernels cannot run them, it is an error."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

import torch

from tokenferry.errors import ConfigError, StateError
from tokenferry.experts import ExpertScratch
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.kernel_experts import NotServed, prepare_together
from tokenferry.integrations.transformers.layer import ExpertLayer
from tokenferry.integrations.transformers.packed_experts import UNPACK
from tokenferry.integrations.transformers.settings import LayerShape, Options
from tokenferry.lifecycle import PROGRESS

_log = logging.getLogger(__name__)

_BY_THE_LIBRARY: Final = (
    "%d of %d MoE layers run by transformers' own expert function: %s. It takes more time, and in a CUDA graph it works on "
    "max_tokens_per_rank rows of each rank"
)
_LEFT: Final = (
    "MoE layer %d of %d (the first is 0), and perhaps others, from now on run by transformers' own expert function: %s. It takes "
    "more time; CUDA graphs that were captured before go on as they were captured"
)


class Fallbacks:
    """The layers of one model that our kernels do not run."""

    def __init__(self) -> None:
        self._from_the_start: dict[ExpertLayer, str] = {}
        self._said_later: set[str] = set()

    def prepare(
        self, layers: Sequence[ExpertLayer], *, group: EPGroup, options: Options, shape: LayerShape
    ) -> ExpertScratch | None:
        """Loads what our own kernels need, before any rank waits for another in a step, and says which layers they do not run.

        Returns:
            What they work in; None: they run no layer, or packed ones on a CPU, where the library's operators stand in.

        Raises:
            ConfigError: the kernels of packed experts could not be loaded.
        """
        on_operators = not ExpertScratch.serves(group.device)
        kernels = [layer.kernels for layer in layers if layer.kernels is not None and not (layer.packed and on_operators)]
        scratch: ExpertScratch | None = None
        if kernels:
            logging.getLogger(PROGRESS).info("loading the experts' kernels")
            scratch, failed = prepare_together(kernels, group, options, shape)
            for layer in layers:
                if layer.kernels in failed:
                    self.refuse(layer, failed[layer.kernels])
            if len(failed) == len(set(kernels)):
                scratch = None
        self._log_refused(len(layers))
        return scratch

    def take_kernels(self, layer: ExpertLayer, *, device: torch.device, options: Options, shape: LayerShape) -> None:
        """Has our own kernels run a layer wherever they run at all, which on CPUs is the interpreter alone.

        Raises:
            ConfigError: it is packed, and they cannot.
        """
        if layer.packed is None and not (options.own_kernels and ExpertScratch.serves(device)):
            return
        try:
            layer.take_kernels(shape.hidden_dtype)
        except NotServed as reason:
            self.refuse(layer, str(reason))

    def refuse(self, layer: ExpertLayer, reason: str) -> None:
        """Notes while loading that our kernels do not run the layer. Raises ConfigError if nothing else can."""
        if layer.packed is not None:
            raise ConfigError(f"packed experts run by tokenferry's kernels alone, and {reason}; {UNPACK}")
        layer.kernels = None
        self._from_the_start[layer] = reason

    def _log_refused(self, num_layers: int) -> None:
        """Says what was noted while loading."""
        for reason, count in Counter(self._from_the_start.values()).items():
            _log.warning(_BY_THE_LIBRARY, count, num_layers, reason)

    def log_change(self, layer: ExpertLayer, number: int, num_layers: int, reason: str) -> None:
        """Says that a layer no longer runs by our kernels, at the first layer for which there is this reason.

        Raises:
            StateError: its experts are packed, so that nothing else runs them.
        """
        if layer.packed is not None:
            raise StateError(
                f"MoE layer {number} of {num_layers} has packed experts, which tokenferry's kernels alone can run, but {reason}; "
                f"undo that, or {UNPACK}"
            )
        if reason not in self._said_later:
            self._said_later.add(reason)
            _log.warning(_LEFT, number, num_layers, reason)
