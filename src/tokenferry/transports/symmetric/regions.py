"""What a fresh symmetric buffer holds, and the regions of it that callers see as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenferry.dispatched import FLOAT8, HiddenRows, PartialRows, QuantizedRows, num_scales
from tokenferry.kernels import control_block
from tokenferry.transports.base import Gathered, TransportSettings
from tokenferry.transports.symmetric.buffer import SymmetricBuffer
from tokenferry.transports.symmetric.layout import MAX_TIMEOUT_S, Layout, Region, scale_words


@dataclass(frozen=True)
class RegionTensors:
    """The regions that callers see: what a dispatch returns, and the combine input."""

    gathered: Gathered
    terms_RH: PartialRows

    @classmethod
    def of(cls, settings: TransportSettings, buffer: SymmetricBuffer, layout: Layout) -> RegionTensors:
        """Views of the buffer, of R = C * EP rows."""
        config, num_rows = settings.config, settings.max_tokens_per_rank * settings.group.size

        def view(region: Region, dtype: torch.dtype, columns: int) -> torch.Tensor:
            end = region.offset + num_rows * columns * dtype.itemsize
            return buffer.tensor[region.offset : end].view(dtype).view(num_rows, columns)

        row_format = settings.dispatch_format
        if row_format.is_quantized:
            scales = view(layout.scales, torch.float32, scale_words(config.hidden_size))
            hidden: HiddenRows = QuantizedRows(
                view(layout.hidden, FLOAT8, config.hidden_size), scales[:, : num_scales(config.hidden_size)]
            )
        else:
            hidden = view(layout.hidden, row_format.dtype(config), row_format.columns(config))
        gathered = Gathered(
            hidden,
            view(layout.topk_idx, settings.index_dtype, config.topk),
            view(layout.topk_weights, torch.float32, config.topk),
        )
        terms = view(layout.terms, settings.combine_dtype, config.hidden_size)
        if settings.combine_dtype != FLOAT8:
            return cls(gathered, terms)
        scales = view(layout.term_scales, torch.float32, scale_words(config.hidden_size))
        return cls(gathered, QuantizedRows(terms, scales[:, : num_scales(config.hidden_size)]))

    @classmethod
    def none(cls) -> RegionTensors:
        """After closing: nothing that would keep the buffer alive."""
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        return cls(Gathered(empty, empty, empty), empty)


def limits_of(settings: TransportSettings) -> int:
    """How long a kernel waits, as the control block has it."""
    return control_block.limits(settings.timeout_s, min(settings.longest_wait_s, MAX_TIMEOUT_S))


def initialise(settings: TransportSettings, buffer: SymmetricBuffer, layout: Layout, mirror_address: int) -> None:
    """Fills the control block and empties the slots. The buffer is zero elsewhere.

    Args:
        mirror_address: of the host word that gets a copy of the abort record, or 0.
    """
    control = torch.zeros(control_block.CONTROL_BYTES // 8, dtype=torch.int64, device="cpu")
    control[control_block.LIMITS_OFFSET // 8] = limits_of(settings)
    control[control_block.MIRROR_OFFSET // 8] = mirror_address
    control[control_block.PEER_TABLE_OFFSET // 8] = buffer.table_address
    if settings.recorder is not None:
        board = settings.recorder.make_board(settings.group.device)
        control[(control_block.COUNTERS_OFFSET + control_block.BOARD_OFFSET) // 8] = board.data_ptr()
    # Little-endian: the group's size is the lower half, and the upper half is the int32 at DIRTY_ROWS_OFFSET.
    control[control_block.GROUP_SIZE_OFFSET // 8] = settings.group.size
    buffer.tensor[: control_block.CONTROL_BYTES].copy_(control.view(torch.uint8))
    for region in (layout.dispatch_slots, layout.combine_slots, layout.topk_idx):  # sentinels, and ids of -1
        buffer.tensor[region.offset : region.end].fill_(0xFF)
    if settings.group.device.type == "cuda":
        torch.cuda.current_stream(settings.group.device).synchronize()
