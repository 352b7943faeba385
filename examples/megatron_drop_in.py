"""Megatron-Core's inference dispatchers, call by call as its MoE layer makes them, without Megatron being installed.

    python examples/megatron_drop_in.py      # 2 ranks: on CPUs over gloo, or on GPUs where there are as many

Code that was written for Megatron's NVLS or NCCL class changes one import. The classes take whatever has Megatron's field names:
its own `TransformerConfig` and `ProcessGroupCollection`, or the small stand-ins below. A whole engine: megatron_engine.py.
"""

import torch

import tokenferry as tf
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks

HIDDEN_SIZE, INTERMEDIATE_SIZE, EXPERTS_PER_RANK, TOPK, MAX_TOKENS = 32, 48, 2, 2, 16


def weights(num_experts: int, first: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """fc1 [count, I, H] and fc2 [count, H, I] of `count` experts; every rank draws all, and takes its own."""
    generator = torch.Generator().manual_seed(0)
    fc1 = torch.randn(num_experts, INTERMEDIATE_SIZE, HIDDEN_SIZE, generator=generator) * 0.2
    fc2 = torch.randn(num_experts, HIDDEN_SIZE, INTERMEDIATE_SIZE, generator=generator) * 0.2
    fc1, fc2 = (each[first : first + count].to(device, torch.bfloat16) for each in (fc1, fc2))
    return fc1, fc2


def plain(hidden: torch.Tensor, routing: torch.Tensor, probs: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
    """The same layer in float64, expert by expert, by a rank that has all of them."""
    rows = hidden.double()
    each = [torch.relu(rows @ up.double().T).square() @ down.double().T for up, down in zip(fc1, fc2, strict=True)]
    chosen = torch.stack(each, 1).gather(1, routing[:, :, None].expand(-1, -1, HIDDEN_SIZE))
    return (chosen * probs[:, :, None].double()).sum(1)


def worker(group: tf.EPGroup) -> str:
    num_experts, first = EXPERTS_PER_RANK * group.size, EXPERTS_PER_RANK * group.rank
    config = megatron.InferenceMoEConfig(
        moe_router_topk=TOPK, num_moe_experts=num_experts, hidden_size=HIDDEN_SIZE, expert_model_parallel_size=group.size
    )
    groups = megatron.ProcessGroups(ep=group)
    nvls = megatron.NVLSAllGatherVDispatcher
    nvls.allocate_buffers(MAX_TOKENS, TOPK, HIDDEN_SIZE, ep_group=group)
    layer = nvls(EXPERTS_PER_RANK, list(range(first, first + EXPERTS_PER_RANK)), config, groups)

    num_tokens = 3 + 4 * group.rank  # another number on every rank
    generator = torch.Generator().manual_seed(group.rank + 1)
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(group.device, torch.bfloat16)
    probs, routing = torch.rand(num_tokens, num_experts, generator=generator).to(group.device).topk(TOPK)
    fc1, fc2 = weights(num_experts, first, EXPERTS_PER_RANK, group.device)

    # What Megatron's MoE layer does with its dispatcher, and the experts between.
    rows, row_probs = layer.token_dispatch(*layer.dispatch_preprocess(hidden, routing, probs))
    rows, _, row_probs = layer.dispatch_postprocess(rows, row_probs)
    partial = megatron.fused_moe(
        rows, row_probs, fc1, fc2, "squared_relu", EXPERTS_PER_RANK, first,
        valid_tokens=nvls._valid_tokens(), routing_map=layer.routing_map, out=nvls._get_rsv_tensor(),
    )  # fmt: skip
    output = layer.combine_postprocess(layer.token_combine(layer.combine_preprocess(partial)))

    expected = plain(hidden, routing, probs, *weights(num_experts, 0, num_experts, group.device))
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)  # bfloat16 between the products
    megatron.check()
    megatron.close()
    return f"{num_tokens} tokens through {num_experts} experts on {group.size} ranks, as computed alone"


if __name__ == "__main__":
    backend = "nccl" if torch.cuda.device_count() >= 2 else "gloo"
    for rank, line in enumerate(run_ranks(worker, 2, backend=backend)):
        print(f"rank {rank}: {line}")
