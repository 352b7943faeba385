"""What is published of round trips: curves by tokens per rank, in workspaces as engines open them and of C = T.

A record of `tokenferry bench roundtrip --capacity C --exact-too` has both, one without `--capacity` the second alone.
"""

import published
from result_files import Record, records

P2P, EXACT, RANK_ORDER, ANY_ORDER = "p2p", "p2p, C = T", "NCCL, rank order", "NCCL, any order"
MAIN_SIZE = 7168
"""The hidden size of the figures that stand alone."""
GOALS_US = {
    7168: {1: 4.7, 8: 5.2, 32: 7.3, 128: 15.2, 512: 49, 4096: 340},
    2048: {1: 4.3, 8: 4.8, 32: 5.3, 128: 7.5, 512: 16, 4096: 110},
}
"""Of a round trip, by hidden size and tokens per rank."""
UNEVEN_FACTOR = 1.3
"""Most that 1 token beside T may take, of what T on every rank takes."""
FEW, MOST_ABOVE_EXACT_US = 128, 0.4
"""Up to so many tokens a workspace as engines open it may take so much longer than one of C = T."""
MIDDLE_POINT, MIDDLE_GOAL_US = (2048, 512), 18
"""Most that this hidden size and number of tokens may take in a workspace as engines open it."""


def all_points() -> tuple[Record, ...]:
    return tuple(record for record in records(published.ROUND_TRIPS) if "round_trip_us" in record)


def capacity() -> int | None:
    """C of the workspaces that p2p is published in; None: C = T."""
    largest = max(record["capacity"] for record in all_points() if record["transport"] == "p2p" and max(record["tokens"]) == 1)
    return largest if largest > 1 else None


def in_workspaces() -> str:
    """In words, for a title."""
    return "C = T" if capacity() is None else f"C = {capacity()}"


def hidden_sizes() -> list[int]:
    return sorted({record["hidden_size"] for record in all_points()}, reverse=True)


def is_published(record: Record) -> bool:
    """Whether a record of p2p is of the workspaces that `capacity` names."""
    return record["capacity"] == (capacity() or max(record["tokens"]))


def curves(hidden_size: int) -> dict[str, dict[int, float]]:
    """For each way µs by tokens per rank, where all ranks bring the same number."""
    found: dict[str, dict[int, float]] = {name: {} for name in (P2P, EXACT, RANK_ORDER, ANY_ORDER)}
    for record in all_points():
        if record["hidden_size"] != hidden_size or len(set(record["tokens"])) != 1:
            continue
        count, us = record["tokens"][0], record["round_trip_us"]
        if record["transport"] == "collective":
            found[RANK_ORDER if record["combine_order"] == "rank" else ANY_ORDER][count] = us
            continue
        if is_published(record):
            found[P2P][count] = us
        if record["capacity"] == count and capacity() is not None:
            found[EXACT][count] = us
    return {name: curve for name, curve in found.items() if curve}


def faster_of_nccl(hidden_size: int) -> dict[int, float]:
    """The faster of its two orders of summation, by tokens per rank."""
    of = curves(hidden_size)
    return {count: min(us, of[ANY_ORDER][count]) for count, us in of[RANK_ORDER].items()}


def uneven(hidden_size: int) -> tuple[list[int], float] | None:
    """The tokens of both ranks, and µs, of the point with 1 token on one of them."""
    for record in all_points():
        if record["hidden_size"] == hidden_size and len(set(record["tokens"])) > 1 and is_published(record):
            return record["tokens"], record["round_trip_us"]
    return None


def words_on_capacity() -> str:
    if capacity() is None:
        return (
            "Each workspace was opened for just as many tokens as are sent (C = T). An engine opens its workspace once, for its "
            "largest step; in one for 4096 tokens up to 128 tokens took 0.15 to 0.32 µs more at hidden size 2048, in one call on "
            "two H200 ([In workspaces as engines open them](symmetric.md#in-workspaces-as-engines-open-them))."
        )
    return (
        f"Workspaces were opened for {capacity()} tokens, as an engine opens one for its largest step; 'C = T' names those "
        "that were opened for just as many tokens as are sent."
    )
