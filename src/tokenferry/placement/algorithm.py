"""From loads to a placement: replicate the most loaded experts, then pack the copies onto ranks.

The algorithm is the one that DeepSeek published with EPLB (2025): a further replica goes, again and again, to the expert with the
most load per replica; then the copies, heaviest first, go to the rank with the least load that has room. The hierarchical form
keeps groups of experts together on a node, for models whose router picks groups first: it packs groups onto nodes, replicates
within each node, and packs within each node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenferry.errors import ConfigError
from tokenferry.placement.layout import Placement, balanced_blocks, checked_loads


def pack(weights: Sequence[float], capacities: Sequence[int]) -> list[list[int]]:
    """Puts items into packs of given capacities, the heaviest first, each into the lightest pack that has room.

    Among equals the item of the lower number goes first, and the pack of the lower number is taken.

    Returns:
        The items of each pack, in the order in which they came. All packs are full if the capacities add up to the items.

    Example:
        pack([4, 3, 2, 1], [2, 2]) == [[0, 3], [1, 2]]
    """
    items: list[list[int]] = [[] for _ in capacities]
    sums = [0.0] * len(capacities)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        pack_number = min((p for p, room in enumerate(capacities) if len(items[p]) < room), key=lambda p: (sums[p], p))
        items[pack_number].append(item)
        sums[pack_number] += weights[item]
    return items


def replicate(weights: Sequence[float], num_physical: int) -> tuple[list[int], list[int]]:
    """Gives each item one copy, and each further copy to the item with the most weight per copy so far.

    Returns:
        The item of each of the `num_physical` copies, and the number of copies of each item.

    Example:
        replicate([4, 9, 2], 5) == ([0, 1, 2, 1, 1], [1, 3, 1]): 9 is split in two, and 4.5 is more than 4.
    """
    copies, counts = list(range(len(weights))), [1] * len(weights)
    for _ in range(num_physical - len(weights)):
        item = max(range(len(weights)), key=lambda i: (weights[i] / counts[i], -i))
        copies.append(item)
        counts[item] += 1
    return copies, counts


def place(
    loads: Sequence[Sequence[float]] | torch.Tensor,
    num_ranks: int,
    *,
    num_replicas: int = 0,
    num_groups: int = 1,
    num_nodes: int = 1,
) -> Placement:
    """The placement that the algorithm finds for a table of loads.

    Args:
        loads: [L, E] the rows that each expert of each layer got, over any span of time.
        num_ranks: that share the experts.
        num_replicas: places beyond one for each expert: P = E + num_replicas. 0: experts are only rearranged.
        num_groups: of experts, as the model's router picks them: contiguous blocks of equal size.
        num_nodes: that the ranks are spread over, in contiguous blocks of equal size. With more than one, and groups that
            divide by them, the experts of a group stay on one node; otherwise groups and nodes are not looked at.

    Raises:
        ConfigError: sizes that do not fit one another; each message has both numbers.
        ShapeError, DtypeError: loads that are no [L, E] of numbers >= 0.
    """
    table = checked_loads(loads)
    num_experts = table.shape[1]
    num_physical = num_experts + num_replicas
    if num_replicas < 0:
        raise ConfigError(f"num_replicas is {num_replicas}, but it counts the places beyond one for each expert; give 0 or more")
    if num_ranks < 1:
        raise ConfigError(f"num_ranks is {num_ranks}, but the experts need a rank; give 1 or more")
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"{num_experts} experts do not divide into {num_groups} groups")
    if num_nodes < 1 or num_ranks % num_nodes:
        raise ConfigError(f"{num_ranks} ranks do not divide over {num_nodes} nodes")
    if num_ranks > num_physical:
        raise ConfigError(f"{num_ranks} ranks for {num_physical} places; every rank needs one: add replicas or take fewer ranks")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    if num_physical % num_nodes:
        raise ConfigError(f"{num_physical} places do not divide over {num_nodes} nodes; change num_replicas by a few")
    if num_nodes > 1 and num_physical % num_ranks:  # the ranks of one node would hold more places than its copies are
        raise ConfigError(f"{num_physical} places do not divide over {num_ranks} ranks on {num_nodes} nodes; change num_replicas")
    rows = [_place_layer(weights, num_ranks, num_physical, num_groups, num_nodes) for weights in table.tolist()]
    placed = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), num_physical)
    return Placement.of(placed, num_experts, num_ranks)


def _place_layer(weights: list[float], num_ranks: int, num_physical: int, num_groups: int, num_nodes: int) -> list[int]:
    """One row of `phy2log`: nodes in order, in each its ranks in order."""
    group_size = len(weights) // num_groups
    group_sums = [sum(weights[group * group_size : (group + 1) * group_size]) for group in range(num_groups)]
    row: list[int] = []
    ranks_per_node = num_ranks // num_nodes
    for groups in pack(group_sums, [num_groups // num_nodes] * num_nodes):
        experts = [group * group_size + member for group in groups for member in range(group_size)]
        copies, counts = replicate([weights[expert] for expert in experts], num_physical // num_nodes)
        shares = [weights[experts[copy]] / counts[copy] for copy in copies]
        for held in pack(shares, balanced_blocks(len(copies), ranks_per_node)):
            row.extend(experts[copies[place]] for place in held)
    return row
