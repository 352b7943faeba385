"""The workspaces behind vLLM's expert-parallel group, and the step of each forward. Knows nothing of vLLM's classes.

Shape suffixes: T rows of this rank, V rows of all ranks, H hidden, K top-k.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from tokenferry.config import MoEConfig
from tokenferry.dispatched import FLOAT8, Dispatched
from tokenferry.dispatcher import INDEX_DTYPES, WEIGHT_DTYPES, Dispatcher
from tokenferry.errors import StateError
from tokenferry.groups import EPGroup
from tokenferry.integrations.vllm import rows
from tokenferry.integrations.vllm.rows import Kind
from tokenferry.integrations.vllm.scale_forms import ScaleForms
from tokenferry.integrations.vllm.settings import LOGGER, PluginSettings
from tokenferry.workspace import Workspace

_log = logging.getLogger(LOGGER)

MARK: Final = "tokenferry"
"""Key under which a forward's own dict holds how far it is."""

WARM_UP_S: Final = 1800.0
"""How long ranks wait for one another while they open a workspace, or while one says that it is busy: each compiles a model."""


@dataclass
class _Forward:
    """What has happened in one forward: the counts of the step that each workspace has begun, and the layers that have passed."""

    counts: dict[Kind, tuple[int, ...]] = field(default_factory=dict)
    num_layers: dict[Kind, int] = field(default_factory=dict)


class Exchange:
    """Carries rows for all MoE layers of the models that one vLLM worker runs.

    A workspace is opened for each (H, K, dtype, format) when the first rows of that kind come. All ranks come to that together:
    in vLLM's profile run on GPUs, before it counts the memory that is left for the KV cache, and in the first batch on CPUs.

    Args:
        group: the ranks that the experts are spread over.
        settings: how workspaces are opened.
        max_tokens_per_rank: the most rows that vLLM gives to a forward.
        num_experts: of the model with the most, redundant ones included.
        dtype: what experts return for quantized rows; for others it is the rows' own.
        masks: whether rows that are no request's reach no expert. vLLM's experts must skip the expert number -1, then.

    Attributes:
        masks: as above; where it was true at first, it may change between steps.
        output: where the sums of the next combine go, if it is given no other place.
    """

    def __init__(
        self,
        group: EPGroup,
        settings: PluginSettings,
        max_tokens_per_rank: int,
        num_experts: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        masks: bool = True,
    ) -> None:
        self._group, self._settings, self._dtype = group, settings, dtype
        self._max_tokens_per_rank, self._num_experts = max_tokens_per_rank, num_experts
        self._workspaces: dict[Kind, Workspace] = {}
        self._dispatchers: dict[Kind, list[Dispatcher]] = {}
        self._pending: tuple[Dispatcher, Dispatched, int, torch.dtype] | None = None
        self._busy: list[tuple[str, contextlib.ExitStack]] = []
        self._opens = True
        self._scale_forms = ScaleForms(group, WARM_UP_S)
        self.output: torch.Tensor | None = None
        self._num_real_tokens: int | None = None
        """Of this rank's rows in the forwards that begin now; None: all."""
        self._on_device: torch.Tensor | None = None
        """The same number where captured graphs read it, [1] int32."""
        if masks and group.device.type != "cpu":
            self._on_device = torch.full((1,), max_tokens_per_rank, dtype=torch.int32, device=group.device)
        self.masks = masks

    @property
    def is_pending(self) -> bool:
        """Whether a dispatch waits for its combine."""
        return self._pending is not None

    def workspaces(self) -> list[Workspace]:
        """All that are open."""
        return list(self._workspaces.values())

    def refusal(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor | None,
        extra_tensors: list[torch.Tensor] | None = None,
        counts: Sequence[int] = (),
    ) -> str | None:
        """Why rows of these kinds, with what travels beside them, cannot be carried, equally on all ranks; None if they can.

        Args:
            counts: rows of each rank, where tensors travel beside them.

        Raises:
            As `ScaleForms.are_of_rows`.
        """
        refused = rows.refusal(hidden, extra_tensors)
        if refused is not None:
            return refused
        if weights.dim() != 2 or weights.dtype not in WEIGHT_DTYPES:
            return f"weights or logits of {weights.dtype} with {weights.dim()} dimensions"
        if ids is not None and ids.dtype not in INDEX_DTYPES:
            return f"expert numbers of {ids.dtype}"
        if weights.shape[1] > self._num_experts:
            return f"{weights.shape[1]} weights or logits a row, with {self._num_experts} experts"
        if extra_tensors and not self._scale_forms.are_of_rows(hidden, extra_tensors[0], counts):
            return "not every quantized row has scales of its own"
        if not self._opens:
            kind = rows.kind_of(hidden, weights, extra_tensors[0] if extra_tensors else None, self._dtype)
            if kind not in self._workspaces:
                return (
                    f"rows of {hidden.shape[1]} x {hidden.dtype} with {weights.shape[1]} numbers each came first when vLLM had "
                    "already given the memory to its KV cache"
                )
        return None

    def open_no_more(self) -> None:
        """vLLM has counted the memory of the workspaces that are open, and gives the rest to its KV cache: rows of other kinds
        are refused from now on. Does nothing where no workspace is open, for then there was no profile run."""
        self._opens = not self._workspaces

    def dispatch(
        self,
        forward: MutableMapping[str, Any],
        counts: Sequence[int],
        hidden_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        scales: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rows of all ranks, in rank order: hidden [V, H], ids and weights [V, K], in the dtypes that were given, and [V, ...] of
        the scales, if there are any.

        Args:
            forward: a dict that is fresh in each forward: the first dispatch of a forward begins a step. So does one with other
                counts than the last, which all ranks see alike.
            counts: rows of each rank.
            scales: [T, ...], of quantized rows.
        """
        kind = rows.kind_of(hidden_TH, ids_TK, scales, self._dtype)
        workspace = self._workspaces.get(kind) or self._open(kind)
        state = forward.setdefault(MARK, _Forward())
        if state.counts.get(kind) != tuple(counts):
            num_tokens = hidden_TH.shape[0]
            if counts[self._group.rank] != num_tokens:
                raise StateError(f"vLLM has announced {counts[self._group.rank]} rows for this rank, and brings {num_tokens}")
            # All ranks see the same counts. Equal ones need no exchange, so that graphs can be captured over NCCL too.
            promise = workspace.equal_counts() if len(set(counts)) == 1 else contextlib.nullcontext()
            with promise:
                workspace.begin_step(num_tokens, self._real_of(num_tokens))
            state.counts[kind] = tuple(counts)
        layer = self._layer(kind, workspace, state.num_layers.get(kind, 0))
        state.num_layers[kind] = layer.layer + 1
        sent = rows.to_wire(kind, hidden_TH, scales)
        got = layer.dispatch(sent, ids_TK.contiguous(), weights_TK.contiguous())
        # The host knows how many rows are real: experts that choose their tiles by the number of rows then see the true one,
        # and not the static bound of the symmetric transports.
        num_rows = sum(counts)
        self._pending = layer, got, num_rows, kind.dtype
        ids_VK, weights_VK = got.topk_idx[:num_rows].to(ids_TK.dtype), got.topk_weights[:num_rows].to(weights_TK.dtype)
        hidden_VH, scales = rows.from_wire(kind, got.hidden, num_rows, hidden_TH, scales)
        return hidden_VH, ids_VK, weights_VK, scales

    def combine_input(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Where the experts may write the rows for the combine to come, which saves a copy; None where they have to bring their
        own."""
        layer, got, num_rows, _ = self._taken()
        if got.topk_idx.shape[0] == num_rows:
            return None  # no fixed buffer: the caller's own rows go out as they are
        terms_RH = layer.combine_input()
        fits = terms_RH.dtype == dtype and tuple(shape) == (num_rows, terms_RH.shape[1])
        return terms_RH[:num_rows] if fits else None

    def combine(self, partial_VH: torch.Tensor, out_TH: torch.Tensor | None = None) -> torch.Tensor:
        """This rank's rows, each the sum of all ranks' terms, in `out_TH`, or else in `output`, if there is either. Answers the
        last dispatch."""
        layer, got, num_rows, result_dtype = self._taken()
        if out_TH is None:
            out_TH = self.output
        self._pending = None
        if partial_VH.shape[0] != num_rows:
            raise StateError(
                f"vLLM's experts returned {partial_VH.shape[0]} rows for the {num_rows} that were dispatched; tokenferry needs "
                "one for each, so switch it off for this model"
            )
        partial_VH = partial_VH.contiguous()
        if out_TH is None:
            return layer.combine(partial_VH, got)
        is_apart = out_TH.untyped_storage().data_ptr() != partial_VH.untyped_storage().data_ptr()
        if is_apart and out_TH.is_contiguous() and out_TH.dtype == result_dtype:
            return layer.combine(partial_VH, got, out_TH)
        return out_TH.copy_(layer.combine(partial_VH, got))

    def check_known(self) -> None:
        """Raises the failure of a peer that this host knows of, in any workspace. Waits for nothing; from any thread."""
        for workspace in self.workspaces():
            workspace.check(wait=False)

    def engine_step(self) -> AbstractContextManager[None]:
        """`Workspace.engine_step` of all workspaces that are open."""
        if len(self._workspaces) == 1:  # as a rule; entering several takes the host twice as long
            (workspace,) = self._workspaces.values()
            return workspace.engine_step()
        return self._engine_steps()

    @contextlib.contextmanager
    def _engine_steps(self) -> Iterator[None]:
        with contextlib.ExitStack() as steps:
            for workspace in self.workspaces():
                steps.enter_context(workspace.engine_step())
            yield

    @contextlib.contextmanager
    def busy(self, reason: str) -> Iterator[None]:
        """`Workspace.busy` of all workspaces that are open, or are opened within it."""
        with contextlib.ExitStack() as signs:
            for workspace in self.workspaces():
                signs.enter_context(workspace.busy(reason))
            self._busy.append((reason, signs))
            signs.callback(self._busy.remove, (reason, signs))
            yield

    @contextlib.contextmanager
    def real_rows(self, num_real_tokens: int) -> Iterator[None]:
        """Around forwards whose rows after the first `num_real_tokens` are no request's, but fill up a graph, or a rank that has
        no requests: they reach no expert, in replayed graphs either. Does nothing where rows are not masked."""
        before = self._num_real_tokens
        self._mask_from(num_real_tokens)
        try:
            yield
        finally:
            self._mask_from(before)

    def _mask_from(self, num_real_tokens: int | None) -> None:
        if not self.masks or num_real_tokens == self._num_real_tokens:
            return
        self._num_real_tokens = num_real_tokens
        if self._on_device is not None:
            self._on_device.fill_(self._max_tokens_per_rank if num_real_tokens is None else num_real_tokens)

    def _real_of(self, num_tokens: int) -> int | torch.Tensor:
        if self._on_device is not None:
            return self._on_device
        return num_tokens if self._num_real_tokens is None else min(self._num_real_tokens, num_tokens)

    def close(self) -> None:
        """Closes all workspaces. Calling it again does nothing."""
        opened, self._workspaces, self._pending = self._workspaces, {}, None
        self._dispatchers.clear()
        with contextlib.ExitStack() as closing:
            for workspace in opened.values():
                closing.callback(workspace.close)

    def _open(self, kind: Kind) -> Workspace:
        workspace = self._workspaces[kind] = Workspace(
            MoEConfig(hidden_size=kind.hidden_size, num_experts=self._num_experts, topk=kind.topk, dtype=kind.dtype),
            self._group,
            max_tokens_per_rank=self._max_tokens_per_rank,
            transport=self._settings.transport,
            dispatch_format=kind.row_format,
            combine_order=self._settings.combine_order,
            combine_dtype=None if self._settings.combine_dtype is None else FLOAT8,
            timeout_s=self._settings.timeout_s,
            open_timeout_s=WARM_UP_S,
        )
        for reason, signs in self._busy:
            signs.enter_context(workspace.busy(reason))
        _log.info(
            "tokenferry carries rows of %d x %s (format %s) with %d numbers each, up to %d from each of %d ranks: transport %s, "
            "%.1f MiB",
            kind.hidden_size, kind.dtype, kind.row_format, kind.topk, self._max_tokens_per_rank, self._group.size,
            workspace.transport, workspace.nbytes / 2**20,
        )  # fmt: skip
        return workspace

    def _layer(self, kind: Kind, workspace: Workspace, number: int) -> Dispatcher:
        """The dispatcher that names this layer of a forward in errors, made in the first forward."""
        made = self._dispatchers.setdefault(kind, [])
        if number == len(made):
            made.append(workspace.dispatcher_at(number))
        return made[number]

    def _taken(self) -> tuple[Dispatcher, Dispatched, int, torch.dtype]:
        if self._pending is None:
            raise StateError("combine: no dispatch waits for it")
        return self._pending
