"""A skewed load for `benchmarks/placement.py`, and experts laid out by hand as a placement says.

Legend: T rows of a rank, K choices, E experts of the model, P physical experts (E and their further replicas).
"""

import torch

from tokenferry.experts import Experts

ORDERS = ("sorted", "random")
"""How popular experts lie as the model numbers them: the most popular first, all of them on rank 0, or anywhere."""


def zipf_ids(num_rows, num_experts, topk, exponent, order, seed):
    """[T, K] int64 on the CPU: each row's K different experts, drawn one after another with the chances of a Zipf law: the expert
    of popularity rank r has 1 / r**exponent of the chances of the first."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.arange(1, num_experts + 1, dtype=torch.float64).log().mul(-exponent)
    uniform = torch.rand(num_rows, num_experts, dtype=torch.float64, generator=generator)
    by_popularity = (chances - torch.log(-torch.log(uniform))).topk(topk, dim=1).indices  # the Gumbel trick
    if order == "sorted":
        return by_popularity
    return torch.randperm(num_experts, generator=torch.Generator().manual_seed(7))[by_popularity]


def load_table(ids, num_experts):
    """[1, E] float64: how many rows name each expert, over all of `ids`, a list of [T, K]."""
    return sum(torch.bincount(each.flatten(), minlength=num_experts) for each in ids).double()[None]


def physical_ids(ids, placement, rank=0, layer=0):
    """The physical expert for each choice of `ids` [T, K]. Rows take an expert's replicas in turn; ranks begin with different
    ones, so that a popular expert's replicas get nearly the same number of rows."""
    number = placement.num_replicas[layer][ids]
    turn = (torch.arange(ids.shape[0])[:, None] + rank) % number
    return placement.log2phy[layer][ids, turn]


@torch.no_grad()
def lay_out(experts, placement, layer=0):
    """Gives the physical experts of this rank the weights of the logical ones that they are copies of. An expert's weights follow
    from its number alone, whatever rank makes them."""
    held = experts.expert_range
    for local, expert in enumerate(placement.phy2log[layer, held.start : held.stop].tolist()):
        generator = torch.Generator(experts.up_proj.device).manual_seed(1000 + expert)
        for name, std in (("up_proj", experts.config.hidden_size**-0.5), ("down_proj", experts.config.intermediate_size**-0.5),
                          ("up_bias", 0.1), ("down_bias", 0.1)):  # fmt: skip
            tensor = getattr(experts, name)
            if tensor is not None:
                tensor[local].normal_(0.0, std, generator=generator)


def experts_of(group, placement, sizes, dtype):
    """This rank's part of the P physical experts, laid out."""
    experts = Experts(sizes, group.expert_range(placement.num_physical), dtype=dtype, device=group.device)
    lay_out(experts, placement)
    return experts


def rows_and_touched(ids, placement, layer=0):
    """Of `ids`, physical ones of all ranks in one step: for each rank, its rows (a row as often as it names one of its experts),
    and how many of its experts get one."""
    loads = torch.bincount(torch.cat([each.flatten() for each in ids]), minlength=placement.num_physical)
    owner = placement.rank_of_place
    rows = torch.zeros(placement.num_ranks, dtype=torch.int64).index_add_(0, owner, loads)
    touched = torch.zeros(placement.num_ranks, dtype=torch.int64).index_add_(0, owner, (loads > 0).long())
    return rows.tolist(), touched.tolist()
