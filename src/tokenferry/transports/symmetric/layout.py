"""Where everything lies in a rank's symmetric buffer, and how much of it there is. Pure arithmetic, checked without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from tokenferry.config import MoEConfig
from tokenferry.dispatched import FLOAT8, SAME, RowFormat, num_scales, term_bytes
from tokenferry.errors import ConfigError
from tokenferry.kernels.control_block import CONTROL_BYTES, COUNT_PACKET_BYTES, FLAG_BYTES, MAX_RANKS, SPARE_BYTES

ALIGNMENT = 256
CANARY_BYTES = 16
"""Behind each region at least; nobody writes there, which debug mode checks."""
SLOT_ROWS = 512
"""Largest step, in rows of its largest rank, that goes through sentinel slots. A round trip of T = 512, H = 7168 took 52.4 µs
through slots and 55.9 in bulk on 2 x H100; H = 2048 took 17.9 and 23.6 (2026-11-22)."""

SLOT_ROWS_OF_MANY = 192
MOST_WITH_ALL_SLOT_ROWS = 8
"""The same for groups of more than 8 ranks, where a slot for each of them would make C = 4096 larger than 4.5 bytes for each
gathered bfloat16 element."""

MAX_PROGRAMS = 512
"""Most programs of a launch: each has a flag of its own for each peer, in bulk rounds."""

MAX_TIMEOUT_S = 1800.0
"""A wait counts its polls in 32 bits and begins its clock anew when they wrap, after about an hour."""


@dataclass(frozen=True)
class Region:
    """A part of the buffer."""

    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Regions of a rank's buffer, equal on all ranks.

    Attributes:
        counts: count packets, [2 parities][source rank].
        arrived, ready: flags of bulk rounds, [source rank][program]: dispatch rows are there; combine terms may be fetched.
        step_counts, solo_step_counts: the step's counts, for the kernels.
        dispatch_slots, combine_slots: [source, this rank left out], of `dispatch_slot_rows` and `slot_rows` rows each.
        hidden, scales, topk_idx, topk_weights: the gathered rows; scales of quantized ones alone, `scale_words(H)` words a row.
        terms, term_scales: the combine input; scales of float8 terms alone, `scale_words(H)` words a row.
    """

    slot_rows: int
    dispatch_slot_rows: int
    """Rows of bytes may have any words, also those of an empty slot: their dispatch is bulk in every step, and has no slots."""
    dispatch_slot_bytes: int
    combine_slot_bytes: int
    counts: Region
    arrived: Region
    ready: Region
    step_counts: Region
    solo_step_counts: Region
    dispatch_slots: Region
    combine_slots: Region
    hidden: Region
    scales: Region
    topk_idx: Region
    topk_weights: Region
    terms: Region
    term_scales: Region

    @property
    def num_bytes(self) -> int:
        """Of the whole buffer."""
        return self.term_scales.end + CANARY_BYTES

    @property
    def regions(self) -> dict[str, Region]:
        """In the order in which they lie."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: region for name, region in named.items() if isinstance(region, Region)}

    @property
    def gaps(self) -> list[range]:
        """The bytes that nobody may write: before the first region, between two, and behind the last."""
        regions = list(self.regions.values())
        begins = [CONTROL_BYTES - SPARE_BYTES, *(region.end for region in regions)]
        ends = [*(region.offset for region in regions), self.num_bytes]
        return [range(begin, end) for begin, end in zip(begins, ends, strict=True)]


def scale_words(hidden_size: int) -> int:
    """float32 words of a row of gathered scales: whole packets of four, of which the last ones may be unused."""
    return _round_up(num_scales(hidden_size), 4)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def plan(
    config: MoEConfig,
    ep_size: int,
    max_tokens_per_rank: int,
    combine_dtype: torch.dtype,
    *,
    multicast: bool = False,
    slot_rows: int | None = None,
    index_dtype: torch.dtype = torch.int32,
    dispatch_format: RowFormat = SAME,
) -> Layout:
    """The layout for C = `max_tokens_per_rank` rows a rank.

    Raises:
        ConfigError: rows are not a multiple of 8 bytes, or too many for 32-bit packet numbers, or too many ranks.
    """
    is_quantized = dispatch_format.is_quantized
    row_bytes = dispatch_format.wire_bytes(config)
    are_terms_quantized = combine_dtype == FLOAT8
    wire_row_bytes = term_bytes(config.hidden_size, combine_dtype)
    for what, num_bytes in (("hidden rows", row_bytes), ("combine rows", wire_row_bytes)):
        if num_bytes % 8:
            remedy = "them" if dispatch_format.name == "bytes" else "hidden_size"
            raise ConfigError(
                f"{what} have {num_bytes} bytes (hidden_size {config.hidden_size}), not a multiple of 8; pad {remedy}, or use "
                "transport='collective'"
            )
    if ep_size > MAX_RANKS:
        raise ConfigError(f"symmetric transports serve up to {MAX_RANKS} ranks, got {ep_size}; use transport='collective'")
    rows = max_tokens_per_rank * ep_size
    num_packets = max(rows * each // (16 if each % 16 == 0 else 8) for each in (row_bytes, wire_row_bytes))
    if is_quantized or are_terms_quantized:
        num_packets = max(num_packets, rows * scale_words(config.hidden_size) * 8)  # threads: eight for each scale
    if max(num_packets, rows * config.topk * 2) > 2**31 - 2**20:
        raise ConfigError(f"{rows} gathered rows make {num_packets} packets, more than 2**31; lower max_tokens_per_rank")
    if slot_rows is None:
        slot_rows = SLOT_ROWS if ep_size <= MOST_WITH_ALL_SLOT_ROWS else SLOT_ROWS_OF_MANY
    slot_rows = min(max_tokens_per_rank, slot_rows)
    dispatch_slot_rows = 0 if dispatch_format.name == "bytes" else slot_rows
    num_dispatch_slots = ep_size if multicast and ep_size > 1 else ep_size - 1
    dispatch_slot_bytes = _round_up(dispatch_slot_rows * row_bytes, 16) + _round_up(dispatch_slot_rows * 2 * config.topk * 4, 16)
    combine_slot_bytes = _round_up(slot_rows * wire_row_bytes, 16)
    is_ever_bulk = max_tokens_per_rank > min(slot_rows, dispatch_slot_rows)
    flag_bytes = ep_size * MAX_PROGRAMS * FLAG_BYTES if is_ever_bulk else 0
    sizes = {
        "counts": 2 * ep_size * COUNT_PACKET_BYTES,
        "arrived": flag_bytes,
        "ready": flag_bytes,
        "step_counts": (2 + 2 * ep_size) * 4,
        "solo_step_counts": 4 * 4,
        "dispatch_slots": num_dispatch_slots * dispatch_slot_bytes,
        "combine_slots": (ep_size - 1) * combine_slot_bytes,
        "hidden": rows * (config.hidden_size if is_quantized else row_bytes),
        "scales": rows * scale_words(config.hidden_size) * 4 if is_quantized else 0,
        "topk_idx": rows * config.topk * index_dtype.itemsize,
        "topk_weights": rows * config.topk * 4,
        "terms": rows * config.hidden_size * combine_dtype.itemsize,
        "term_scales": rows * scale_words(config.hidden_size) * 4 if are_terms_quantized else 0,
    }
    regions: dict[str, Region] = {}
    offset = CONTROL_BYTES
    for name, num_bytes in sizes.items():
        regions[name] = Region(offset, num_bytes)
        offset = _round_up(offset + num_bytes + CANARY_BYTES, ALIGNMENT)
    return Layout(
        slot_rows=slot_rows,
        dispatch_slot_rows=dispatch_slot_rows,
        dispatch_slot_bytes=dispatch_slot_bytes,
        combine_slot_bytes=combine_slot_bytes,
        **regions,
    )


def required_bytes(
    config: MoEConfig,
    ep_size: int,
    max_tokens_per_rank: int,
    combine_dtype: torch.dtype,
    multicast: bool,
    index_dtype: torch.dtype = torch.int32,
    dispatch_format: RowFormat = SAME,
) -> int:
    """What a rank holds: the buffer, the table of addresses (with its own once more, for `solo`), and the step's counts."""
    layout = plan(
        config,
        ep_size,
        max_tokens_per_rank,
        combine_dtype,
        multicast=multicast,
        index_dtype=index_dtype,
        dispatch_format=dispatch_format,
    )
    return layout.num_bytes + (ep_size + 1) * 8 + (3 + 2 * ep_size) * 4
