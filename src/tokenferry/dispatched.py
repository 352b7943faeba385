"""What a dispatch hands to the experts, and the formats that rows may have on their way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self

import torch

from tokenferry.config import MoEConfig
from tokenferry.errors import ConfigError, ShapeError

SCALE_BLOCK: Final = 128
"""Columns of a quantized row that share a scale."""
FLOAT8: Final = torch.float8_e4m3fn
FORMAT_NAMES: Final = ("same", "fp8_block128", "bytes")


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows in float8 with a scale for every 128 columns: number = value * scale.

    Attributes:
        values: [R, H] float8_e4m3fn.
        scales: [R, ceil(H / 128)] float32, row after row. The last scale of a row stands for fewer columns if 128 does not
            divide H. A scale of NaN, or values of NaN (0x7F), say that the row held a NaN or an infinity there.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """[R, H]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where both tensors live."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Of both tensors."""
        return self.values.nbytes + self.scales.nbytes

    def __getitem__(self, rows: slice) -> QuantizedRows:
        """Some of the rows, as views."""
        return QuantizedRows(self.values[rows], self.scales[rows])

    def clone(self) -> QuantizedRows:
        """A copy."""
        return QuantizedRows(self.values.clone(), self.scales.clone())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[R, H] of `dtype`: the products in float32, each rounded once. A new tensor.

        Raises:
            ShapeError: not a scale for every 128 columns.
        """
        columns, found = self.values.shape[1], self.scales.shape[1]
        if found != num_scales(columns):  # fewer would be an assertion on the GPU, which ends all of the process's work there
            raise ShapeError(
                f"scales have {found} columns but values have {columns}, which need {num_scales(columns)}; give one for every "
                f"{SCALE_BLOCK} columns"
            )
        # Not by repeat_interleave and a cut: there torch 2.13's inductor reads other memory for a shorter last block (on CPUs).
        block = torch.arange(columns, dtype=torch.int64, device=self.values.device) // SCALE_BLOCK
        return (self.values.to(torch.float32) * self.scales.index_select(1, block)).to(dtype)


HiddenRows = torch.Tensor | QuantizedRows
"""Rows as they are handed to `dispatch`, and as it returns them."""
PartialRows = torch.Tensor | QuantizedRows
"""Partial rows as they are handed to `combine`, and as `combine_input()` is."""


@dataclass(frozen=True)
class RowFormat:
    """What a row is while it travels, and when the experts get it. `Workspace(dispatch_format=...)` takes one, or its name.

    "same": hidden rows as they are. "fp8_block128": quantized by the sender, one float32 scale for every 128 columns; hidden_size
    must be a multiple of 16. "bytes": rows of `row_bytes` bytes, uint8, which nobody interprets: whatever an engine quantizes
    itself, with its scales, or integers that belong to a row. They arrive exactly.

    Attributes:
        name: one of these three.
        row_bytes: of "bytes" only. Default: the bytes of a hidden row in the configuration's dtype.
        power_of_two_scales: of "fp8_block128" only: each scale is rounded up to a power of two.

    Raises:
        ConfigError: an unknown name, or a setting of another format.
    """

    name: Literal["same", "fp8_block128", "bytes"] = "same"
    row_bytes: int | None = field(default=None, kw_only=True)
    power_of_two_scales: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.name not in FORMAT_NAMES:
            raise ConfigError(f"dispatch_format must be a RowFormat or one of {', '.join(FORMAT_NAMES)}, got {self.name!r}")
        size = self.row_bytes
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(f"row_bytes must be a positive int, got {size!r}")
        if size is not None and self.name != "bytes":
            raise ConfigError(f"row_bytes is {size} but hidden_size gives that of format {self.name!r}; leave it out")
        if not isinstance(self.power_of_two_scales, bool):
            raise ConfigError(f"power_of_two_scales must be a bool, got {self.power_of_two_scales!r}")
        if self.power_of_two_scales and self.name != "fp8_block128":
            raise ConfigError(f"power_of_two_scales is for 'fp8_block128'; rows of format {self.name!r} have no scales")

    @classmethod
    def of(cls, given: object) -> Self:
        """A format as it is, or by its name."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, str):
            raise ConfigError(f"dispatch_format must be a RowFormat or one of {', '.join(FORMAT_NAMES)}, got {given!r}")
        return cls(name=given)  # type: ignore[arg-type]

    def resolved(self, config: MoEConfig) -> RowFormat:
        """The same with `row_bytes` in numbers where the configuration would give them: equal formats are equal then."""
        return replace(self, row_bytes=self.columns(config)) if self.name == "bytes" else self

    def __str__(self) -> str:
        """As errors name it."""
        size = "" if self.row_bytes is None else f" of {self.row_bytes}"
        return f"{self.name}{size}{' with power-of-two scales' if self.power_of_two_scales else ''}"

    @property
    def is_same(self) -> bool:
        """Whether rows travel as they are handed over."""
        return self.name == "same"

    @property
    def is_quantized(self) -> bool:
        """Whether a dispatch returns `QuantizedRows`."""
        return self.name == "fp8_block128"

    def columns(self, config: MoEConfig) -> int:
        """Of the tensor that `dispatch` takes."""
        if self.name != "bytes":
            return config.hidden_size
        return self.row_bytes or config.hidden_size * config.dtype.itemsize

    def dtype(self, config: MoEConfig) -> torch.dtype:
        """Of the tensor that `dispatch` takes."""
        return torch.uint8 if self.name == "bytes" else config.dtype

    def wire_bytes(self, config: MoEConfig) -> int:
        """Bytes of a row in a message; of quantized rows see `quantized_bytes`."""
        if not self.is_quantized:
            return self.columns(config) * self.dtype(config).itemsize
        return quantized_bytes(config.hidden_size)

    def check(self, config: MoEConfig) -> None:
        """Raises ConfigError for a configuration whose rows it cannot carry."""
        if self.is_quantized and config.hidden_size % 16:
            raise ConfigError(
                f"dispatch_format {self.name!r} needs hidden_size to be a multiple of 16, got {config.hidden_size}; pad it, or "
                "use dispatch_format='same'"
            )


SAME: Final = RowFormat()


def num_scales(hidden_size: int) -> int:
    """Of a quantized row."""
    return -(-hidden_size // SCALE_BLOCK)


def quantized_bytes(hidden_size: int) -> int:
    """Bytes of a quantized row in a message: its values first, then its scales, rounded up to 16 bytes.

    Example:
        hidden_size 7168: 7168 + 56 * 4 = 7392. 2880: 2880 + 23 * 4, rounded up: 2976. 256: 272.
    """
    return -(-(hidden_size + num_scales(hidden_size) * 4) // 16) * 16


def term_bytes(hidden_size: int, combine_dtype: torch.dtype) -> int:
    """Bytes of a partial row in a message: float8 ones have scales."""
    return quantized_bytes(hidden_size) if combine_dtype == FLOAT8 else hidden_size * combine_dtype.itemsize


def empty_terms(num_rows: int, hidden_size: int, combine_dtype: torch.dtype, device: torch.device) -> PartialRows:
    """New partial rows as they travel: `QuantizedRows` of float8 ones."""
    values = torch.empty((num_rows, hidden_size), dtype=combine_dtype, device=device)
    if combine_dtype != FLOAT8:
        return values
    return QuantizedRows(values, torch.empty((num_rows, num_scales(hidden_size)), dtype=torch.float32, device=device))


@dataclass(eq=False)
class LoadsToCount:
    """Where the rows that one dispatch brings for each expert are to be added, by whoever counts them first: experts of our own,
    whose table has the numbers, or else telemetry itself, before the combine.

    Attributes:
        words: int64 on the device. The first is 0 while nothing shall be counted.
        first: the number of expert 0's word in this layer.
    """

    words: torch.Tensor
    first: int
    taken: list[range] = field(default_factory=list)

    def take(self, experts: range) -> bool:
        """Whether the caller is the first to count these experts, and must do so now."""
        if any(taken.start < experts.stop and experts.start < taken.stop for taken in self.taken):
            return False
        self.taken.append(experts)
        return True


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched:
    """All ranks' rows, in rank order. R rows, of which the first V are real (`R` is static where a graph needs it).

    Attributes:
        hidden: [R, H] in the configuration's dtype; `QuantizedRows` with dispatch_format "fp8_block128", and [R, row_bytes] uint8
            with "bytes". Rows >= V are undefined, NaNs included.
        topk_idx: [R, K] global expert numbers, int32 or the workspace's `index_dtype`; -1 = no expert: padding rows, and every
            row >= V.
        topk_weights: [R, K] float32, carried unchanged, also where the id is -1. Rows >= V are undefined.
        valid_tokens: [1] int32, V, on the device.
        max_expert_rows: as `Step.max_expert_rows`: experts of our own make no launches for more. None: not known.

    On symmetric transports these are views of the workspace's buffers, valid until the matching `combine_begin`. On `local` (one
    rank, and `solo()` over the collective transport) they may be the very tensors that `dispatch` was given; elsewhere they never
    share memory with them.
    """

    hidden: Any
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    valid_tokens: torch.Tensor
    handle: object = field(default=None, repr=False)
    """Which dispatch of which workspace this is; private to `Dispatcher`."""
    max_expert_rows: int | None = None
    loads: LoadsToCount | None = field(default=None, repr=False)
    """With telemetry: where experts of our own add the rows that they get."""
