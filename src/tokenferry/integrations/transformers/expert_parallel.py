"""Keeps the steps of a model's MoE layers together: one step for each forward, every layer once and in order.

T this rank's rows, R gathered rows, H hidden size, K top-k.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import nn

from tokenferry.dispatcher import Dispatcher
from tokenferry.errors import ConfigError, StateError
from tokenferry.experts import ExpertScratch
from tokenferry.experts.module import SCRATCH_NAME
from tokenferry.groups import EPGroup
from tokenferry.integrations.transformers.exchange import Rows, exchange_choices, exchange_partials, exchange_sums
from tokenferry.integrations.transformers.fallbacks import Fallbacks
from tokenferry.integrations.transformers.graph_choice import StepGraphs, make_graphs
from tokenferry.integrations.transformers.layer import ExpertLayer
from tokenferry.integrations.transformers.loading import Shard
from tokenferry.integrations.transformers.one_thread import OneThread
from tokenferry.integrations.transformers.settings import LayerShape, Options, open_workspace, over_capacity
from tokenferry.integrations.transformers.stopwatch import Stopwatch
from tokenferry.layer_operator import moe, serve_layers
from tokenferry.step import Step
from tokenferry.workspace import Workspace

IN_TURN: Final = -1
"""In the place of a layer's number."""
_FAILED: Final = (
    "{} failed on one row, with {} of {} experts on this rank: {}; leave experts_implementation out, or choose another"
)
_CUT_SHORT: Final = "a forward ended before its last MoE layer; under expert parallelism each one runs all, on all ranks alike"


class ExpertParallel:
    """A model's expert parallelism: `model.expert_parallel`.

    Attributes:
        group: the `EPGroup`.
        layers: the MoE layers that were installed, in the order of a forward.
        workspace: the `Workspace` that all layers share.
        thread: which thread uses the model now.
        num_local_experts: experts of each layer that this rank holds.
        keeps_packed: packed experts of the checkpoint are to stay so.
        graphs: its steps as CUDA graphs, or None.
        num_real_tokens: int32[1] on the device, or None: of the forwards to come, rows from there on are padding.
        calls_in_turn: code that is compiled now calls the layer whose turn it is, not one by number: all layers share it.
    """

    def __init__(self, group: EPGroup, options: Options) -> None:
        self.group = group
        self.options = options
        self.layers: tuple[ExpertLayer, ...] = ()
        self.num_local_experts = 0
        self.keeps_packed = False
        self.num_real_tokens: torch.Tensor | None = None
        self.thread = OneThread(waits=options.serialize)
        self._installed: list[ExpertLayer] = []
        self._probed: list[tuple[ExpertLayer, LayerShape]] | None = None
        self._fallbacks = Fallbacks()
        self._scratch: ExpertScratch | None = None
        self._workspace: Workspace | None = None
        self._dispatchers: tuple[Dispatcher, ...] = ()
        self._layer_shape: LayerShape | None = None
        self._step: Step | None = None
        """The step under way: from the first layer of a forward to its last."""
        self._next_layer = 0
        self._num_valid_rows: int | None = None
        self._knows_valid_rows = False
        self._last_error: BaseException | None = None
        self._stopwatch = Stopwatch(group.device)
        self.graphs: StepGraphs | None = None
        self.calls_in_turn = False

    # Loading

    def owned_experts(self, num_experts: int) -> range:
        """This rank's experts of a layer. Raises ConfigError if there are fewer experts than ranks."""
        return self.group.expert_range(num_experts)

    def add_layer(self, layer: ExpertLayer) -> int:
        """Called by each layer as it is installed. Returns its number."""
        self._installed.append(layer)
        return len(self._installed) - 1

    def shards(self, model: nn.Module) -> dict[str, Shard]:
        """The parameters that were cut to this rank's experts, by their names in the model."""
        names = {module: name for name, module in model.named_modules()}
        return {f"{names[layer.module]}.{key}": shard for layer in self._installed for key, shard in layer.shards.items()}

    @property
    def installed(self) -> tuple[ExpertLayer, ...]:
        """The layers found in the model, in the order of its modules."""
        return tuple(self._installed)

    def probe(self, model: Any) -> None:
        """Learns from one forward of one token what the layers are called with, without communication. All ranks hold the same
        model, so they learn the same.

        Raises:
            ConfigError: layers that are not called, that differ in shape, or whose experts fail.
        """
        self._probed = []
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.group.device), use_cache=False)
        probed, self._probed = self._probed, None
        self.layers = tuple(layer for layer, _ in probed)
        idle = len(self._installed) - len(set(map(id, self.layers)))
        if idle:
            raise ConfigError(
                f"{idle} of {len(self._installed)} MoE layers are not part of a plain forward of {type(model).__name__}; "
                "ranks without requests could not take part in them. Load the text model alone"
            )
        shapes = {shape for _, shape in probed}
        if len(shapes) > 1:
            raise ConfigError(f"the MoE layers of {type(model).__name__} differ, and one workspace serves them all: {shapes}")
        shape = self._layer_shape = shapes.pop()
        self.num_local_experts = len(self.owned_experts(shape.num_experts))
        self._scratch = self._fallbacks.prepare(self.layers, group=self.group, options=self.options, shape=shape)

    def open(self, model: Any) -> None:
        """Opens the workspace for what `probe` has learnt, collectively.

        Raises:
            As `Workspace`.
        """
        self._workspace = open_workspace(self.group, self.options, self.shape)
        if self._scratch is not None:
            self._workspace.attached.setdefault(SCRATCH_NAME, self._scratch)
        self._dispatchers = tuple(self._workspace.dispatcher() for _ in self.layers)
        serve_layers(self._workspace, self._run_compiled)
        model.base_model.register_forward_hook(self._after_forward, always_call=True)
        try:
            self.graphs = make_graphs(self, self._run_without_tokens, self._end_step)
        except ConfigError:
            self._workspace.close()
            raise

    # Running

    @property
    def is_open(self) -> bool:
        """Whether the workspace has been opened."""
        return self._workspace is not None

    @property
    def workspace(self) -> Workspace:
        """The workspace that all layers share."""
        if self._workspace is None:
            raise StateError("the workspace is opened after loading; wait for from_pretrained() to return")
        return self._workspace

    @property
    def shape(self) -> LayerShape:
        """What the layers are called with."""
        assert self._layer_shape is not None, "probe() comes first"
        return self._layer_shape

    @property
    def communication_s(self) -> float:
        """Seconds that this rank has spent in `begin_step`, dispatch and combine, waiting for late peers included.
        On CUDA it waits for what was launched, and leaves replayed graphs out."""
        return self._stopwatch.total_s

    def run_layer(
        self, layer: ExpertLayer, hidden_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """A layer's forward: gather, this rank's experts, sum. The first layer of a forward begins the step.
        In code that is being compiled all of this is one operator.

        Raises:
            CapacityError: more rows than `max_tokens_per_rank`; nothing was sent, and the other ranks wait.
            PeerTimeoutError, PeerFailedError: another rank is the cause.
            StateError: the layers are called in another order than in the first forward; or another thread is in the middle of a
                call on the model, which then goes on as if nothing had happened.
        """
        if torch.compiler.is_compiling():
            number = IN_TURN if self.calls_in_turn else layer.number
            return moe(self.workspace.number, number, hidden_TH, topk_idx_TK, topk_weights_TK)
        return self._run_eagerly(layer, hidden_TH, topk_idx_TK, topk_weights_TK)  # type: ignore[no-any-return]

    def _run_compiled(self, number: int, *rows: torch.Tensor) -> torch.Tensor:
        layer = self.layers[self._next_layer] if number == IN_TURN else self._installed[number]
        return self._run_eagerly(layer, *rows)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where the compiler gave up on a caller, it would try this
    @torch.no_grad()
    def _run_eagerly(
        self, layer: ExpertLayer, hidden_TH: torch.Tensor, topk_idx_TK: torch.Tensor, topk_weights_TK: torch.Tensor
    ) -> torch.Tensor:
        rows = Rows(hidden_TH.contiguous(), topk_idx_TK.contiguous(), topk_weights_TK.contiguous())
        if self._probed is not None:
            return self._probe(self._probed, layer, rows)
        step = self._step if self.thread.is_mine() else None
        if step is None:
            step = self._begin_step(hidden_TH.shape[0])
        try:
            summed_TH = self._run_next(layer, rows, step)
        except BaseException as error:
            self._abandon_step(error)
            raise
        self._next_layer += 1
        if self._next_layer == len(self.layers):
            self._end_step()
        return summed_TH

    @torch.no_grad()
    def finish(self) -> None:
        """Takes part with zero tokens in the other ranks' steps, until every rank has called `finish()`.
        Call it on every rank after its last forward, and on a rank without requests instead of one. More forwards may follow,
        on every rank or on some; each rank then calls `finish()` again.

        Raises:
            PeerTimeoutError, PeerFailedError: another rank is the cause.
            StateError: another thread is in the middle of a call on the model.
        """
        with self.thread.inside("finish"):
            self.look_over()
            while not self.take_part(done=True)[0]:
                pass
            self.check()

    @torch.no_grad()
    def take_part(self, *, done: bool) -> tuple[bool, int]:
        """One step without tokens, all layers of it, in the last one too: a rank whose step is a graph cannot leave them out, and
        all ranks must do the same. Returns whether every rank said done, and V. Raises as `finish`. `look_over` comes before the
        first of a row of them."""
        if self.graphs is not None and not self.graphs.left_out:
            return self.graphs.idle.step(done=done)
        step = self._run_without_tokens(done)
        return step.all_done(), int(step.valid_tokens.item())

    def look_over(self) -> None:
        """Lets go of graphs if the experts are no longer those that they were recorded with."""
        if self.graphs is not None:
            self.graphs.look_over()

    def _run_without_tokens(self, done: bool) -> Step:
        nothing, step = self.shape.empty_rows(self.group.device), self._begin_step(0, done=done)
        for layer in self.layers:
            self.run_layer(layer, nothing.hidden_TH, nothing.topk_idx_TK, nothing.topk_weights_TK)
        return step

    def check(self) -> None:
        """Raises the error that another rank caused, if there is one that no call has raised yet."""
        self.workspace.check()

    def reset(self) -> None:
        """Starts anew after a failure, collectively over the same ranks. See `Workspace.reset`."""
        with self.thread.inside("reset"):
            if self.graphs is not None:
                self.graphs.drop()
            self.workspace.reset()
            self._end_step()
            self._last_error = None

    def settle_forward(self, error: BaseException | None) -> None:
        """Called when the calling thread's forwards are over, by `error` or because all are done. A compiled one may have stopped
        between two layers: the other ranks are told.

        Raises:
            StateError: one has, and `error` is None.
        """
        if self._step is not None and self.thread.is_mine():
            self._abandon_step(error or StateError(_CUT_SHORT))
            if error is None:
                raise StateError(_CUT_SHORT)

    def note_swallowed(self, error: BaseException | None) -> None:
        """`raise_swallowed` raises this; None: nothing."""
        self._last_error = error

    def raise_swallowed(self) -> None:
        """Raises the last error of a forward, once: continuous batching catches it, and hands out fewer tokens instead."""
        error, self._last_error = self._last_error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Closes the workspace, and lets go of what our kernels work in. The model cannot run any more."""
        try:
            if self.graphs is not None:
                self.graphs.close()
        finally:  # a device that has failed says so to whoever frees memory
            self.workspace.close()
            self._scratch = None
            for layer in self._installed:
                layer.kernels = None

    def _run_next(self, layer: ExpertLayer, rows: Rows, step: Step) -> torch.Tensor:
        number = self._next_layer
        if layer is not self.layers[number]:
            raise StateError(
                f"a forward called its MoE layers in another order than the first one (layer {number} of {len(self.layers)} "
                "came next); with expert parallelism each forward runs all layers in order, on all ranks alike"
            )
        if self.options.exact:
            tokens_per_rank = step.tokens_per_rank.tolist()
            return exchange_choices(self._dispatchers[number], layer.experts, rows, tokens_per_rank, self._stopwatch)
        if layer.kernels is not None:
            reason = layer.kernels.what_changed()
            if reason is None:
                return exchange_partials(self._dispatchers[number], layer.kernels, rows, self._stopwatch)
            self._fallbacks.log_change(layer, number, len(self.layers), reason)
        num_valid_rows = self._valid_rows(step)
        return exchange_sums(self._dispatchers[number], layer.experts, rows, num_valid_rows, self._partial_dtype, self._stopwatch)

    @property
    def _partial_dtype(self) -> torch.dtype:
        return torch.float32 if self.options.combine_dtype == torch.float32 else self.shape.hidden_dtype

    def _begin_step(self, num_tokens: int, *, done: bool = False) -> Step:
        """Begins a step; from here to `_end_step` it belongs to the calling thread."""
        self.thread.enter("forward", as_guest=True)
        try:
            step = self._begin_own_step(num_tokens, done)
        except BaseException:
            self.thread.leave()
            raise
        self._step, self._next_layer = step, 0
        return step

    def _begin_own_step(self, num_tokens: int, done: bool) -> Step:
        capacity = self.options.max_tokens_per_rank
        if self._step is not None:
            error = StateError(_CUT_SHORT)
            self._abandon_step(error)
            raise error
        if num_tokens > capacity:
            self._last_error = over_capacity(num_tokens, capacity)
            raise self._last_error
        if self.graphs is not None:
            self.graphs.decode.step_begins()
        with self._stopwatch.running():
            step = self.workspace.begin_step(num_tokens, self.num_real_tokens, done=done)
        self._knows_valid_rows = False
        return step

    def _valid_rows(self, step: Step) -> int | None:
        """V as `_read_valid_rows` knows it, read when the first layer of a step needs it. Our kernels never do."""
        if not self._knows_valid_rows:
            self._num_valid_rows, self._knows_valid_rows = self._read_valid_rows(step), True
        return self._num_valid_rows

    def _read_valid_rows(self, step: Step) -> int | None:
        """V, where the gathered tensors are longer than that: it costs one wait for the device a step, and saves experts that
        would look at C * EP rows. A graph cannot wait, and there they do."""
        captured = self.group.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if captured or self.workspace.active_transport.fixed_rows is None:
            return None
        return int(step.valid_tokens.item())

    def _end_step(self) -> None:
        if self._step is not None:
            self._step, self._next_layer = None, 0
            self.thread.leave()

    def _abandon_step(self, error: BaseException) -> None:
        """Tells the other ranks that this one will not come, so that they need not wait for the time-out."""
        self._last_error = error
        self._end_step()
        self.workspace.tell_peers(error)

    def _after_forward(self, _module: nn.Module, _args: object, output: object) -> None:
        """Runs after every forward of the model; after one that raised, with no output and within its `except`. Not in compiled
        code, which cannot ask what was raised: `settle_forward` looks after that."""
        if torch.compiler.is_compiling():
            return
        error = sys.exc_info()[1] if output is None else None
        if error is not None:
            self._last_error = error
        self.settle_forward(error)

    def _probe(self, probed: list[tuple[ExpertLayer, LayerShape]], layer: ExpertLayer, rows: Rows) -> torch.Tensor:
        """Notes what the layer is called with, and runs this rank's experts on it, so that a forward that cannot leave out the
        other ranks' experts shows itself here."""
        shape = LayerShape.of(rows, layer.num_experts)
        probed.append((layer, shape))
        self._fallbacks.take_kernels(layer, device=self.group.device, options=self.options, shape=shape)
        if layer.kernels is not None:
            return torch.zeros_like(rows.hidden_TH)
        try:
            return layer.experts.partial(rows.hidden_TH, rows.topk_idx_TK, rows.topk_weights_TK, rows.hidden_TH.dtype)
        except RuntimeError as error:
            name, num_owned = type(layer.module).__name__, len(layer.experts.owned)
            raise ConfigError(_FAILED.format(name, num_owned, layer.num_experts, f"{type(error).__name__}: {error}")) from error
