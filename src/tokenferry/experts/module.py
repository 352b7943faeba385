"""The routed experts of this rank as a module.

Legend of shape suffixes: R gathered rows, H hidden size, I intermediate size, N columns of the first product (2·I with a gate,
else I), E experts of the group, L experts of this rank (`e` elsewhere).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokenferry.config import HIDDEN_DTYPES
from tokenferry.dispatched import FLOAT8, Dispatched, PartialRows
from tokenferry.errors import ConfigError, DeviceError, DtypeError, ShapeError, StateError, check_kind
from tokenferry.experts import mxfp4
from tokenferry.experts.apply import apply_checked
from tokenferry.experts.float8 import quantize_weights
from tokenferry.experts.plan import class_of_rows
from tokenferry.experts.scratch import ExpertScratch
from tokenferry.experts.weights import ExpertsConfig, ExpertWeights, check_weights
from tokenferry.precision import KeepsPrecision, refuse_conversion
from tokenferry.workspace import Workspace

SCRATCH_NAME = "expert_scratch"
"""Under which the experts of a workspace keep what they share."""


class Experts(KeepsPrecision):
    """The routed experts that this rank holds.

    Parameters (no gradients): `up_proj` [L, N, H], `down_proj` [L, H, I]; with `config.bias` also `up_bias` [L, N] and
    `down_bias` [L, H]. After `quantize` the matrices are float8_e4m3fn, with buffers `up_scale` and `down_scale`; after
    `load_mxfp4` they and their scales are int32, as `tokenferry.experts.mxfp4.pack` makes them.

    Args:
        config: the shape, of all experts.
        expert_range: which global experts this rank holds: `group.expert_range(config.num_experts)`.
        dtype: of the parameters, and of the hidden rows.
        device: of the parameters.
        batch_invariant: on CUDA, a row's bits do not depend on how many other rows an expert gets (one cut of the products for
            every number of rows); see docs/experts.md for its cost.

    Raises:
        ConfigError: a range that is empty, has gaps, or leaves [0, E).
        DtypeError: a dtype other than bfloat16, float16 and float32.
    """

    up_proj: nn.Parameter
    down_proj: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None

    def __init__(
        self,
        config: ExpertsConfig,
        expert_range: range,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        check_kind("config", config, ExpertsConfig)
        check_kind("expert_range", expert_range, range)
        if not expert_range or expert_range.step != 1 or expert_range.start < 0 or expert_range.stop > config.num_experts:
            raise ConfigError(
                f"expert_range must be a part of range(0, {config.num_experts}) without gaps, got {expert_range}; "
                "take group.expert_range(num_experts)"
            )
        if dtype not in HIDDEN_DTYPES:
            raise DtypeError(f"experts take {', '.join(map(str, HIDDEN_DTYPES))}, got {dtype!r}")
        self.config, self.expert_range, self.batch_invariant = config, expert_range, batch_invariant
        self._hidden_dtype = dtype  # of hidden rows once the parameters are float8 or MXFP4
        self._packed_sizes: tuple[int, int] | None = None  # see ExpertWeights
        self._known: ExpertWeights | None = None  # see `weights`
        self._checked: tuple[ExpertWeights, torch.Size, torch.Size] | None = None
        self.scratch: ExpertScratch | None = None
        """Memory and kernels on CUDA: the workspace's after `prepare`, else this module's own from its first call."""
        self._max_rows: int | None = None
        self._bound: weakref.ref[Workspace] | None = None
        L, H, I = len(expert_range), config.hidden_size, config.intermediate_size
        N = config.activation.num_columns(I)
        shapes = {"up_proj": (L, N, H), "down_proj": (L, H, I), "up_bias": (L, N), "down_bias": (L, H)}
        for name, shape in shapes.items():
            absent = name.endswith("bias") and not config.bias
            tensor = None if absent else nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
            self.register_parameter(name, tensor)
        self.register_buffer("up_scale", None)
        self.register_buffer("down_scale", None)
        nn.init.normal_(self.up_proj, std=H**-0.5)
        nn.init.normal_(self.down_proj, std=I**-0.5)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden rows; of the parameters too unless they are float8 or MXFP4."""
        return self.up_proj.dtype if self.up_scale is None else self._hidden_dtype

    def kept_dtypes(self) -> Mapping[str, torch.dtype]:
        """See `KeepsPrecision`: float8 values mean something together with their scales alone, and packed ones are no numbers."""
        if self.up_scale is None:
            return {}
        if self._packed_sizes is not None:
            return dict.fromkeys(("up_proj", "down_proj", "up_scale", "down_scale"), torch.int32)
        return {"up_proj": FLOAT8, "down_proj": FLOAT8, "up_scale": torch.float32, "down_scale": torch.float32}

    @property
    def weights(self) -> ExpertWeights:
        """The parameters, as `apply_experts` takes them: the same object as long as they are the same tensors."""
        # Not by the module's own attributes, which take ten times as long, and not anew each time: 10 microseconds of a call.
        parts, scales, known = self._parameters, self._buffers, self._known
        if (
            known is None
            or known.up_proj is not parts["up_proj"]
            or known.down_proj is not parts["down_proj"]
            or known.up_bias is not parts["up_bias"]
            or known.down_bias is not parts["down_bias"]
            or known.up_scale is not scales["up_scale"]
            or known.down_scale is not scales["down_scale"]
        ):
            known = self._known = ExpertWeights(
                up_proj=self.up_proj,
                down_proj=self.down_proj,
                up_bias=self.up_bias,
                down_bias=self.down_bias,
                up_scale=self.up_scale,
                down_scale=self.down_scale,
                packed_sizes=self._packed_sizes,
            )
        return known

    def bind(self, workspace: Workspace) -> None:
        """From here on, and while `workspace` is open, casts and moves that it could not follow are refused; a layer does it."""
        self._bound = weakref.ref(workspace)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, belongs to no workspace, and has parameters of its own."""
        return {**self.__dict__, "_bound": None, "_known": None, "_checked": None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        workspace = None if self._bound is None else self._bound()
        if workspace is not None and not workspace.lifecycle.closed:
            refuse_conversion(fn, self.dtype, workspace.device, "the experts of a layer")
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def quantize(self) -> None:
        """Turns both stacks of matrices into block-scaled float8 (see `quantize_weights`): once, after `load`, before `prepare`.
        Hidden rows are quantized by block too, unless they come as `QuantizedRows`, and so are activated rows.

        Raises:
            DtypeError: they are float8 already, or hidden rows are float32.
            StateError: they are prepared, as a `MoELayer` does: other kernels would be compiled in mid-step while peers wait.
        """
        if self.up_scale is not None or self.dtype == torch.float32:  # before the state: in another one this would fail too
            raise DtypeError(f"quantize takes bfloat16 or float16 experts once; these are {self.up_proj.dtype}")
        if self._max_rows is not None:
            raise StateError("quantize: these experts are prepared for a workspace; quantize them before MoELayer is made")
        self._hidden_dtype = self.dtype
        for name in ("up", "down"):
            weights, scale = quantize_weights(getattr(self, f"{name}_proj"))
            setattr(self, f"{name}_proj", nn.Parameter(weights, requires_grad=False))
            setattr(self, f"{name}_scale", scale)

    @torch.no_grad()
    def load(
        self,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        """Copy weights in, of all E experts (this rank's part is taken) or of this rank's L.

        Args:
            up_proj: [E or L, N, H]; gate and up rows lie as `config.activation.interleaved` says.
            down_proj: [E or L, H, I].
            up_bias, down_bias: [E or L, N], [E or L, H]; given if and only if `config.bias`.
            transposed: the matrices come as [.., H, N] and [.., I, H] (gpt-oss checkpoints).

        Raises:
            ShapeError: a tensor of another shape, or a bias too many or missing.
            DtypeError: after `quantize` or `load_mxfp4`.
        """
        if self.up_scale is not None:
            kind = "float8" if self._packed_sizes is None else "MXFP4"
            raise DtypeError(f"these experts are {kind} already; load before that, or make others")
        if transposed:
            up_proj, down_proj = up_proj.transpose(1, 2), down_proj.transpose(1, 2)
        self._copy_in({"up_proj": up_proj, "down_proj": down_proj, "up_bias": up_bias, "down_bias": down_bias})

    @torch.no_grad()
    def load_mxfp4(
        self,
        up_blocks: torch.Tensor,
        up_scales: torch.Tensor,
        down_blocks: torch.Tensor,
        down_scales: torch.Tensor,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> None:
        """Packed MXFP4 weights in the place of both stacks, as gpt-oss checkpoints have them: of all E experts (this rank's part
        is taken) or of this rank's L. They stay packed, rearranged once, on the device of the parameters; of experts that were
        made with device="meta", for which no bfloat16 weights are allocated, on that of `up_blocks`. Before `prepare`.

        Args:
            up_blocks, up_scales: [E or L, N, H / 32, 16] and [E or L, N, H / 32] uint8 (gate_up_proj_blocks and _scales); gate
                and up rows lie as `config.activation.interleaved` says.
            down_blocks, down_scales: [E or L, H, I / 32, 16] and [E or L, H, I / 32] uint8.
            up_bias, down_bias: as in `load`.

        Raises:
            ShapeError: a tensor of another shape, a scale byte above 128 (a factor of 2), or a bias too many or missing.
            DtypeError: hidden rows are not bfloat16, these experts are float8 or MXFP4 already, or a tensor is not uint8.
            StateError: they are prepared, as a `MoELayer` does.
        """
        if self._max_rows is not None:
            raise StateError("load_mxfp4: these experts are prepared for a workspace; load before MoELayer is made")
        if self.up_scale is not None or self.dtype != torch.bfloat16:
            raise DtypeError(f"load_mxfp4 takes bfloat16 experts once; these are {self.up_proj.dtype}")
        L, H, I = len(self.expert_range), self.config.hidden_size, self.config.intermediate_size
        N = self.config.activation.num_columns(I)
        if H % mxfp4.GROUP or I % mxfp4.GROUP:
            raise ShapeError(f"MXFP4 experts need sizes that are multiples of {mxfp4.GROUP}, got hidden {H}, intermediate {I}")

        check_kind("up_blocks", up_blocks, torch.Tensor)
        device = up_blocks.device if self.up_proj.is_meta else self.up_proj.device

        def own(name: str, tensor: torch.Tensor, *shape: int) -> torch.Tensor:
            return self._part_of_this_rank(name, tensor, shape).to(device)

        weights = ExpertWeights.from_mxfp4(
            own("up_blocks", up_blocks, L, N, H // mxfp4.GROUP, mxfp4.GROUP // 2),
            own("up_scales", up_scales, L, N, H // mxfp4.GROUP),
            own("down_blocks", down_blocks, L, H, I // mxfp4.GROUP, mxfp4.GROUP // 2),
            own("down_scales", down_scales, L, H, I // mxfp4.GROUP),
            self.config.activation,
        )
        for name in ("up_bias", "down_bias"):
            bias: nn.Parameter | None = getattr(self, name)
            if bias is not None and bias.is_meta:
                setattr(self, name, nn.Parameter(torch.empty_like(bias, device=device), requires_grad=False))
        self._copy_in({"up_bias": up_bias, "down_bias": down_bias})
        self.up_proj = nn.Parameter(weights.up_proj, requires_grad=False)
        self.down_proj = nn.Parameter(weights.down_proj, requires_grad=False)
        self.up_scale, self.down_scale, self._packed_sizes = weights.up_scale, weights.down_scale, weights.packed_sizes

    def _copy_in(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        for name, source in tensors.items():
            target: torch.Tensor | None = getattr(self, name)
            if (target is None) != (source is None):
                raise ShapeError(f"{name} is {'missing' if source is None else 'given'} but config.bias is {self.config.bias}")
            if target is not None and source is not None:
                target.copy_(self._part_of_this_rank(name, source, target.shape))

    def _part_of_this_rank(self, name: str, source: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        check_kind(name, source, torch.Tensor)
        if source.dim() and source.shape[0] == self.config.num_experts:
            source = source[self.expert_range.start : self.expert_range.stop]
        if source.shape != tuple(shape):
            raise ShapeError(
                f"{name} is {list(source.shape)} after transposition and slicing but this rank holds {list(shape)}; "
                f"give {self.config.num_experts} (all) or {len(self.expert_range)} (this rank's) experts, or check `transposed`"
            )
        return source

    def prepare(self, workspace: Workspace, scratch: ExpertScratch | None = None) -> None:
        """Compiles and loads every kernel that this workspace can ask for, and takes their memory. Nothing to do on CPUs.

        Before the first step: loading a kernel waits for the device, so never while a peer waits, nor during a capture.

        Args:
            workspace: its layers share one scratch.
            scratch: another one, e.g. smaller. A workspace without one keeps it for the layers to come, so that a MoELayer made
                afterwards works in it. Default: the workspace's, made here if it has none.

        Raises:
            DeviceError: a scratch of another device.
        """
        check_kind("workspace", workspace, Workspace)
        if scratch is None:
            if not ExpertScratch.serves(workspace.device):
                return
            scratch = workspace.attached.get(SCRATCH_NAME) or ExpertScratch(workspace.device)
        check_kind("scratch", scratch, ExpertScratch)
        if scratch.device != workspace.device:
            raise DeviceError(f"scratch is on {scratch.device} but the workspace is on {workspace.device}; make one there")
        workspace.attached.setdefault(SCRATCH_NAME, scratch)
        scratch.counts_loads |= workspace.telemetry.is_available
        from tokenferry.experts import triton_path  # here: Triton is not everywhere

        self.scratch, self._max_rows = scratch, workspace.max_tokens_per_rank * workspace.group.size
        for out_dtype in {workspace.combine_dtype, workspace.config.dtype}:
            triton_path.prepare(
                scratch,
                self.weights,
                self.config.activation,
                topk=workspace.config.topk,
                index_dtype=workspace.index_dtype,
                out_dtype=out_dtype,
                batch_invariant=self.batch_invariant,
                max_rows=self._max_rows,
                hidden_dtype=self.dtype,
                quantized_rows=workspace.dispatch_format.is_quantized,
            )

    @torch.no_grad()
    def forward(self, dispatched: Dispatched, out: PartialRows | None = None) -> Any:
        """`apply_experts` with this rank's weights: [R, H] partial rows, in `out` if given. Without `prepare`, the first call on
        CUDA loads the kernels."""
        check_kind("dispatched", dispatched, Dispatched)
        weights = self.weights
        checked = weights, weights.up_proj.shape, weights.down_proj.shape  # another `.data` is the same parameter
        if checked != self._checked:
            check_weights(weights, self.config.activation)
            self._checked = checked
        device = weights.up_proj.device
        if device.type == "cuda" and (self.scratch is None or self.scratch.device != device) and ExpertScratch.serves(device):
            self.scratch, self._max_rows = ExpertScratch(device), None
        return apply_checked(
            dispatched,
            weights,
            self.expert_range.start,
            self.config.activation,
            out,
            scratch=self.scratch,
            batch_invariant=self.batch_invariant,
            max_rows=class_of_rows(self._max_rows, dispatched.max_expert_rows, self.batch_invariant),
            dtype=weights.up_proj.dtype if weights.up_scale is None else self._hidden_dtype,
        )

    def extra_repr(self) -> str:
        return f"{self.config}, {self.expert_range}"
