"""What a round trip carries, and what its results are compared with. Every rank can make every rank's rows from the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from tokenferry import reference
from tokenferry.config import MoEConfig
from tokenferry.dispatched import FLOAT8, HiddenRows, QuantizedRows, RowFormat, term_bytes

NUM_EXPERTS: Final = 64


@dataclass(frozen=True, kw_only=True)
class RoundTripPoint:
    """One row of the table of round trips: bfloat16 rows of `hidden_size`, `topk` of 64 experts.

    Attributes:
        transport: a transport's name, as `Workspace` takes it.
        tokens: T of every rank.
        capacity: C that the workspace is opened with.
        combine_order: as `Workspace` takes it. With "any" the sums are not compared: their bits are not promised.
        in_place: whether the partial rows stand in `combine_input()`, where the transport has one.
        dispatch_format: as `Workspace` takes it. The hidden rows of "bytes" are the bytes of bfloat16 rows.
        quantized: whether rows of "fp8_block128" are quantized before the timed part; else the dispatch quantizes them.
        combine_format: "same" (bfloat16 terms) or "fp8_block128".
        quantized_terms: whether float8 terms are quantized before the timed part, and stand in `combine_input()` if `in_place`;
            else the combine is handed bfloat16 rows in memory of their own, and quantizes them.
    """

    transport: str
    hidden_size: int
    tokens: tuple[int, ...]
    capacity: int
    topk: int = 8
    combine_order: str = "rank"
    in_place: bool = True
    dispatch_format: str = "same"
    quantized: bool = False
    combine_format: str = "same"
    quantized_terms: bool = False

    @property
    def config(self) -> MoEConfig:
        """Of the workspace."""
        return MoEConfig(hidden_size=self.hidden_size, num_experts=NUM_EXPERTS, topk=self.topk)

    @property
    def combine_dtype(self) -> torch.dtype:
        """Of the workspace."""
        return torch.bfloat16 if self.combine_format == "same" else FLOAT8


@dataclass(frozen=True)
class RankInputs:
    """What one rank dispatches."""

    hidden: HiddenRows
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def inputs_of(point: RoundTripPoint, rank: int, seed: int, device: torch.device) -> RankInputs:
    """Rank `rank`'s tokens, the same on every rank that asks."""
    generator = torch.Generator(device).manual_seed(seed * 1000 + rank)
    count = point.tokens[rank]
    choices = (count, point.topk)
    hidden = torch.randn((count, point.hidden_size), generator=generator, device=device, dtype=torch.bfloat16)
    rows: HiddenRows = hidden.view(torch.uint8) if point.dispatch_format == "bytes" else hidden
    return RankInputs(
        reference.quantize(hidden) if point.quantized else rows,
        torch.randint(NUM_EXPERTS, choices, generator=generator, device=device, dtype=torch.int32),
        torch.rand(choices, generator=generator, device=device, dtype=torch.float32),
    )


def partial_of(point: RoundTripPoint, rank: int, seed: int, device: torch.device) -> torch.Tensor:
    """[V, H]: rank `rank`'s term for every gathered row."""
    generator = torch.Generator(device).manual_seed(seed * 1000 + 500 + rank)
    shape = (sum(point.tokens), point.hidden_size)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def differences(point: RoundTripPoint, rank: int, seed: int, got: Any, out: torch.Tensor) -> list[str]:
    """What of rank `rank`'s `Dispatched` and sums has other bits than the reference gives; an empty list if all is right."""
    device, num_valid, ranks = out.device, sum(point.tokens), range(len(point.tokens))
    everyone = [inputs_of(point, each, seed, device) for each in ranks]
    terms = [partial_of(point, each, seed, device) for each in ranks]
    sums = reference.combine(terms, point.tokens, point.combine_dtype, torch.bfloat16)[rank]
    row_format = RowFormat.of(point.dispatch_format)
    wanted = [reference.in_format(rows.hidden, row_format) for rows in everyone]
    pairs = {
        **dict(zip(("hidden", "scales"), zip(_parts([got.hidden[:num_valid]]), _parts(wanted), strict=True), strict=False)),
        "topk_idx": (got.topk_idx[:num_valid], torch.cat([rows.topk_idx for rows in everyone])),
        "topk_weights": (got.topk_weights[:num_valid], torch.cat([rows.topk_weights for rows in everyone])),
        "combined": (out, sums),
    }
    if point.combine_order == "any":
        del pairs["combined"]
    return [f"{name}: {int((a != b).sum())} elements" for name, (a, b) in pairs.items() if not torch.equal(a, b)]


def _parts(rows: list[HiddenRows]) -> list[torch.Tensor]:
    """The tensors that rows consist of, all ranks' one behind the other."""
    quantized = [each for each in rows if isinstance(each, QuantizedRows)]
    if not quantized:
        return [torch.cat(rows)]  # type: ignore[arg-type]
    return [torch.cat([each.values.view(torch.uint8) for each in quantized]), torch.cat([each.scales for each in quantized])]


def wire_bytes(point: RoundTripPoint, rank: int) -> int:
    """Bytes that rank `rank` sends: its tokens to every other rank, and its terms for their tokens."""
    num_tokens, num_ranks = point.tokens[rank], len(point.tokens)
    row_bytes, choice_bytes = RowFormat.of(point.dispatch_format).wire_bytes(point.config), point.topk * 8
    dispatched = num_tokens * (num_ranks - 1) * (row_bytes + choice_bytes)
    return dispatched + (sum(point.tokens) - num_tokens) * term_bytes(point.hidden_size, point.combine_dtype)
