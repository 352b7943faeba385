"""The memory that expert kernels work in: one allocation for a workspace, shared by its layers and graphs.

Legend: K choices of a row, H hidden size, I intermediate size, L experts of this rank.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

from tokenferry import env
from tokenferry.errors import ConfigError, DeviceError

DEFAULT_MAX_BYTES = 3 << 29
"""1.5 GiB: 9,370 gathered rows a chunk for float8 deepseek-v3, whose rows are the largest in use (171,776 bytes): 4,096 of each
of two ranks. Each further chunk reads the weights again."""

ALIGNMENT = 256
POISON = 0xFF
"""Four of these bytes are a NaN in each floating dtype, and -1 as int32. Written before each call with TOKENFERRY_DEBUG=1."""
MIN_CUDA_MAJOR = 8


@dataclass(frozen=True)
class RowShape:
    """What a gathered row needs: for each of its K choices an activated row of I numbers, an output row of H, and a table entry.
    With float8 weights also the row and its activated rows once more, quantized."""

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
    """Views of the scratch for the `num_rows` rows of a chunk: see the kernels."""

    num_rows: int
    counts_L: torch.Tensor
    offsets_L: torch.Tensor
    pairs_P: torch.Tensor
    activated_PI: torch.Tensor
    outputs_PH: torch.Tensor
    quantized: tuple[torch.Tensor, ...]
    """With float8 weights: the gathered rows of the chunk and their scales, the activated rows and theirs."""


class ExpertScratch:
    """Working memory for the experts of all layers that never run at the same time. The kernels that were loaded for them are
    kept with it, in `attached`.

    Gathered rows are worked on in chunks of as many rows as fit `max_bytes`; chunks beyond the valid rows end at once. How many
    rows a chunk has follows from the shape and `max_bytes` alone, and never from a call's rows: so no bits depend on these.

    Args:
        device: where the experts are: CUDA, capability 8.0 or newer (or the CPU under Triton's interpreter).
        max_bytes: upper bound of the memory that a call works in. Less is taken while fewer rows come. Where more rows come than
            ever before, and `Experts.prepare` has not taken memory for them, there is a new allocation of at least twice the
            bytes of the last, which stays, since captured graphs may write there.

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
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.max_bytes = device, max_bytes
        self.counts_loads = env.read(env.TelemetrySettings).enabled
        """Whether experts that are prepared from here on count their rows for telemetry: `Experts.prepare` sees to it where the
        workspace has that. Where they do not, telemetry counts the gathered numbers in a launch of its own."""
        self.attached: dict[str, Any] = {}
        """What else lives as long as this memory, by name."""
        self._memory = self._take(0)
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
        return self._memory.nbytes + sum(memory.nbytes for memory in self._retired)

    def rows_per_chunk(self, shape: RowShape) -> int:
        """Gathered rows of a chunk; at least 1, also where `max_bytes` is too small for one."""
        return max(1, self.max_bytes // shape.nbytes)

    def reserve(self, shape: RowShape, num_rows: int, num_local_experts: int, dtype: torch.dtype) -> Buffers:
        """Buffers for calls with up to `num_rows` gathered rows, or more. Grows where it must; earlier buffers stay valid."""
        rows = min(num_rows, self.rows_per_chunk(shape))
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
            # At least twice as much: steps that grow by a row each would each leave an allocation behind, all of them held.
            num_bytes = max(sum(padded), min(2 * self._memory.numel(), self.max_bytes))
            if self._memory.numel():
                self._retired.append(self._memory)
            self._memory = self._take(num_bytes)
            self.poison()
            self._buffers.clear()
        pieces = self._memory[: sum(padded)].split(padded)
        counts, offsets, table, activated, outputs, *quantized = (
            piece[:size].view(kind).view(extent) for piece, size, (kind, extent) in zip(pieces, sizes, parts, strict=True)
        )
        return Buffers(rows, counts, offsets, table, activated, outputs, tuple(quantized))

    def _take(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # debug mode writes to it by PyTorch, and perhaps outside of the mode
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def poison(self) -> None:
        """In debug mode: fills the memory, so that what no kernel of the next call writes is NaN, or -1."""
        if self._poisons:
            self._memory.fill_(POISON)
