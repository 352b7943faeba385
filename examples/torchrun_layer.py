"""One mixture-of-experts layer under torchrun: router, dispatch, experts and combine, each rank with other tokens.

    torchrun --nproc-per-node 2 examples/torchrun_layer.py    # GPUs over p2p or NCCL where each rank has one, else CPUs over gloo

Each rank compares its result with the same layer computed alone, without any exchange, from the weights of all experts.
"""

import os

import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig

HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOPK = 128, 64, 8, 2


def connect() -> tf.EPGroup:
    """The group of all processes that torchrun started."""
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    return tf.EPGroup(dist.group.WORLD)


def make_layer(group: tf.EPGroup, max_tokens_per_rank: int) -> MoELayer:
    """The same layer on every group: weights of all experts are drawn, and a rank keeps those of `group.expert_range`."""
    config = tf.MoEConfig(hidden_size=HIDDEN_SIZE, num_experts=NUM_EXPERTS, topk=TOPK, dtype=torch.float32)
    workspace = tf.Workspace(config, group, max_tokens_per_rank=max_tokens_per_rank)
    shape = ExpertsConfig(hidden_size=HIDDEN_SIZE, intermediate_size=INTERMEDIATE_SIZE, num_experts=NUM_EXPERTS)
    mine, generator = group.expert_range(NUM_EXPERTS), torch.Generator().manual_seed(0)
    with torch.device(group.device):
        router = Router(RouterConfig(hidden_size=HIDDEN_SIZE, num_experts=NUM_EXPERTS, topk=TOPK), dtype=torch.float32)
        experts = Experts(shape, mine, dtype=torch.float32)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator, device="cpu"))
        for parameter in experts.parameters():
            every = torch.randn(NUM_EXPERTS, *parameter.shape[1:], generator=generator, device="cpu") * 0.05
            parameter.copy_(every[mine.start : mine.stop])
    return MoELayer(workspace, router, experts)


def main() -> None:
    group = connect()
    num_tokens = 3 + 2 * group.rank
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(group.rank + 1)).to(group.device)

    layer = make_layer(group, max_tokens_per_rank=64)
    layer.workspace.begin_step(num_tokens)  # once per model forward, on every rank, with 0 tokens too
    output = layer(hidden)

    alone = make_layer(tf.EPGroup.alone(group.device), max_tokens_per_rank=64)
    alone.workspace.begin_step(num_tokens)
    torch.testing.assert_close(output, alone(hidden), rtol=1e-4, atol=1e-4)  # the order of the sums differs
    print(f"rank {group.rank}: {num_tokens} tokens over {layer.workspace.transport}, as computed alone", flush=True)

    for each in (layer, alone):
        each.workspace.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
