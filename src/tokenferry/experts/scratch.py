"""The memory that expert kernels work in: one block a workspace, shared by its layers and graphs.

Legend: K slots of a row, H hidden size, I intermediate size, L experts of this rank.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tokenferry import env
from tokenferry.activations import Activation
from tokenferry.dispatched import Dispatched
from tokenferry.errors import ConfigError, DeviceError
from tokenferry.experts.weights import ExpertWeights

if TYPE_CHECKING:  # Triton is not everywhere
    from tokenferry.experts.launch import KernelStore
    from tokenferry.experts.triton_path import Loaded, Variant

DEFAULT_MAX_BYTES = 3 << 29
"""1.5 GiB: 9,370 gathered rows a round for float8 deepseek-v3, whose rows are the largest in use (171,776 bytes): 4,096 of each
of two ranks. Each further round reads the weights again."""

ALIGNMENT = 256
POISON = 0xFF
"""Four of these bytes are a NaN in each floating dtype, and -1 as int32. Written before each call with TOKENFERRY_DEBUG=1."""
MIN_CUDA_MAJOR = 8


@dataclass(frozen=True)
class RowShape:
    """What a gathered row needs: K pairs of an activated row of I and an output row of H numbers, and a table entry each.
    With float8 the row and the activated rows once more, quantized."""

    topk: int
    hidden_size: int
    intermediate_size: int
    itemsize: int
    float8: bool = False

    @property
    def hidden_groups(self) -> int:
        """Scales of a quantized row."""
        return -(-self.hidden_size // 128)

    @property
    def activated_groups(self) -> int:
        """Scales of a quantized activated row."""
        return -(-self.intermediate_size // 128)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch for one gathered row."""
        plain = self.topk * ((self.hidden_size + self.intermediate_size) * self.itemsize + 4)
        quantized = self.hidden_size + 4 * self.hidden_groups + self.topk * (self.intermediate_size + 4 * self.activated_groups)
        return plain + quantized * self.float8


@dataclass(frozen=True, eq=False)
class Buffers:
    """Views of the scratch for `num_rows` rows of a round: see the kernels."""

    num_rows: int
    counts_L: torch.Tensor
    offsets_L: torch.Tensor
    pairs_P: torch.Tensor
    activated_PI: torch.Tensor
    outputs_PH: torch.Tensor
    quantized: tuple[torch.Tensor, ...]
    """With float8: gathered rows of the round, their scales, activated rows, theirs."""


class ExpertScratch:
    """Working memory and loaded kernels for the experts of all layers that never run at the same time.

    Gathered rows are worked on in rounds of as many rows as fit `max_bytes`; rounds beyond the valid rows end at once. How many
    rows a round has follows from the shape and `max_bytes` alone, never from a call's rows, so neither do any bits.

    Args:
        device: where the experts are: CUDA, capability 8.0 or newer (or the CPU under Triton's interpreter).
        max_bytes: upper bound of the memory that a call works in. Less is taken while fewer rows come; where more come than ever,
            without `prepare`, a block of at least twice the last one's bytes, which stays, since captured graphs may write there.

    Raises:
        ConfigError: max_bytes below 1.
        DeviceError: the kernels do not run there.
    """

    def __init__(self, device: torch.device | str, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, got {max_bytes!r}; give an int")
        device = torch.device(device)
        if not self.serves(device):
            raise DeviceError(
                f"expert kernels need CUDA, capability 8.0 or newer, and Triton; got {device}; give no scratch there"
            )
        from tokenferry.experts.launch import KernelStore

        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.max_bytes = device, max_bytes
        self.kernels: KernelStore = KernelStore(device)
        self.loaded: dict[Variant, Loaded] = {}
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._retired: list[torch.Tensor] = []  # captured graphs may still write there
        self._buffers: dict[tuple[RowShape, int, torch.dtype], Buffers] = {}
        self._poisons = env.read(env.DebugSettings).enabled

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Whether the kernels run on this device."""
        if importlib.util.find_spec("triton") is None:
            return False
        if device.type == "cuda":
            return torch.cuda.get_device_capability(device)[0] >= MIN_CUDA_MAJOR
        from tokenferry.kernels import wire

        return bool(wire.INTERPRETED) and device.type == "cpu"

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._memory.nbytes + sum(block.nbytes for block in self._retired)

    def rows_per_round(self, shape: RowShape) -> int:
        """Gathered rows of a round; at least 1, also where `max_bytes` is too small for one."""
        return max(1, self.max_bytes // shape.nbytes)

    def reserve(self, shape: RowShape, num_rows: int, num_local_experts: int, dtype: torch.dtype) -> Buffers:
        """Buffers for calls with up to `num_rows` gathered rows, or more. Grows where it must; earlier buffers stay valid."""
        rows = min(num_rows, self.rows_per_round(shape))
        key = (shape, num_local_experts, dtype)
        buffers = self._buffers.get(key)
        if buffers is None or buffers.num_rows < rows:  # not one for each number of rows: a collective step may bring any
            buffers = self._buffers[key] = self._carve(shape, rows, num_local_experts, dtype)
        return buffers

    def _carve(self, shape: RowShape, rows: int, num_local_experts: int, dtype: torch.dtype) -> Buffers:
        pairs = rows * shape.topk
        parts: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int32, (num_local_experts,)),
            (torch.int32, (num_local_experts,)),
            (torch.int32, (pairs,)),
            (dtype, (pairs, shape.intermediate_size)),
            (dtype, (pairs, shape.hidden_size)),
        ]
        if shape.float8:
            parts += [
                (torch.float8_e4m3fn, (rows, shape.hidden_size)),
                (torch.float32, (rows, shape.hidden_groups)),
                (torch.float8_e4m3fn, (pairs, shape.intermediate_size)),
                (torch.float32, (pairs, shape.activated_groups)),
            ]
        sizes = [math.prod(size) * kind.itemsize for kind, size in parts]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        if self._memory.numel() < sum(padded):
            # Twice as much at least: steps that grow by a row each would leave a block each behind, all of them held.
            num_bytes = max(sum(padded), min(2 * self._memory.numel(), self.max_bytes))
            if self._memory.numel():
                self._retired.append(self._memory)
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self._poison()
            self._buffers.clear()
        pieces = self._memory[: sum(padded)].split(padded)
        counts, offsets, table, activated, outputs, *quantized = (
            piece[:size].view(kind).view(extent) for piece, size, (kind, extent) in zip(pieces, sizes, parts, strict=True)
        )
        return Buffers(rows, counts, offsets, table, activated, outputs, tuple(quantized))

    def _poison(self) -> None:
        """In debug mode: what no kernel of this call will have written is NaN, or -1."""
        if self._poisons:
            self._memory.fill_(POISON)

    def prepare(
        self,
        weights: ExpertWeights,
        activation: Activation,
        *,
        topk: int,
        index_dtype: torch.dtype,
        out_dtype: torch.dtype,
        batch_invariant: bool,
        max_rows: int,
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        """Loads the kernels, and takes the memory, for calls with up to `max_rows` gathered rows.

        Args:
            weights, activation: of the experts.
            topk: K.
            index_dtype: of the ids that a dispatch gives.
            out_dtype: of the partial rows.
            batch_invariant: see `apply_experts`.
            max_rows: C·EP.
            hidden_dtype: of the rows; default: the weights'.
        """
        from tokenferry.experts import triton_path

        dtype = hidden_dtype or weights.up_proj.dtype
        variant = triton_path.variant_of(
            weights, activation, topk, dtype, index_dtype, out_dtype, batch_invariant=batch_invariant, max_rows=max_rows
        )
        triton_path.load(variant, self)
        self.reserve(triton_path.row_shape(variant), max_rows, variant.num_local_experts, dtype)

    def run(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        first_expert: int,
        activation: Activation,
        out: torch.Tensor,
        batch_invariant: bool,
        max_rows: int | None,
    ) -> torch.Tensor:
        """`apply_experts` on checked operands with R > 0."""
        from tokenferry.experts import triton_path

        self._poison()
        return triton_path.run(
            dispatched, weights, first_expert, activation, out, self, batch_invariant=batch_invariant, max_rows=max_rows
        )
