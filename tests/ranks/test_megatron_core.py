"""Megatron-Core itself beside ours: the same names, and the same bits from both dispatchers."""

import importlib.util
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import tokenferry as tf
from megatron_work import BASE, NCCL, NVLS, Shape, W, combine, dispatch, process_groups, same
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks

pytestmark = pytest.mark.ranks


def megatron_setup(group: tf.EPGroup) -> SimpleNamespace:
    """megatron-core's own objects for a group of these ranks."""
    warnings.simplefilter("ignore")
    if group.device.type == "cpu":
        torch.cuda.current_device = lambda: "cpu"  # its dispatchers ask for the device so
    process_groups(group, "megatron")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import experts, moe_layer, token_dispatcher_inference
    from megatron.core.transformer.transformer_config import TransformerConfig

    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = dist.group.WORLD
    groups.tp = groups.expt_tp = [dist.new_group([rank]) for rank in range(group.size)][group.rank]
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=2 * group.size, moe_router_topk=2,
        transformer_impl="inference_optimized", moe_router_dtype="fp32", add_bias_linear=False, normalization="RMSNorm",
        expert_model_parallel_size=group.size, moe_token_dispatcher_type="alltoall",
    )  # fmt: skip
    return SimpleNamespace(config=config, groups=groups, original=token_dispatcher_inference, layer=moe_layer, experts=experts)


def run_megatron_steps(group: tf.EPGroup, layer, switch) -> list[tuple[torch.Tensor, ...]]:
    """Rows and sums of a few steps; `switch` holds the mode of the NCCL classes."""
    results = []
    for tokens, uneven in (((3, 3), False), ((2, 5), True), ((1, 8), True)):
        switch._use_allgather_v = uneven
        own, V = Shape(2).inputs(tokens, seed=sum(tokens))[group.rank], sum(tokens)
        hidden, probs = dispatch(layer, own)
        partial = torch.full((hidden.shape[0], 16), float("nan"))
        partial[:V] = own.partial
        results.append((hidden[:V].clone(), probs[:V].clone(), layer.routing_map[:V].clone(), combine(layer, partial)))
    return results


def same_names(theirs: type, ours: type) -> None:
    """Every name that their class defines is ours too, with the same parameters."""
    for name in vars(theirs):
        assert hasattr(ours, name), f"{ours.__name__} has no {name}"
        if not name.startswith("__") and callable(getattr(theirs, name)):
            parameters = [list(inspect.signature(getattr(cls, name)).parameters) for cls in (theirs, ours)]
            assert parameters[0] == parameters[1], f"{ours.__name__}.{name}"


def run_against_megatron(group: tf.EPGroup) -> str:
    theirs = megatron_setup(group)
    original = theirs.original.NCCLAllGatherDispatcher
    original.allocate_buffers()
    arguments = {
        "num_local_experts": 2,
        "local_expert_indices": [2 * group.rank, 2 * group.rank + 1],
        "config": theirs.config,
        "pg_collection": theirs.groups,
    }
    wanted = run_megatron_steps(group, original(**arguments), original)
    for name in (BASE.__name__, NCCL.__name__, NVLS.__name__):
        same_names(getattr(theirs.original, name), getattr(megatron, name))
    undo = megatron.install()
    assert theirs.layer.NVLSAllGatherVDispatcher is theirs.experts.NVLSAllGatherVDispatcher is NVLS
    assert issubclass(theirs.layer.NCCLAllGatherDispatcher, theirs.original.MoEAllGatherTokenDispatcher)
    NCCL.allocate_buffers()
    NVLS.allocate_buffers(per_rank_worst_case_token_count=W, topk=2, hidden_size=16, ep_group=theirs.groups.ep)
    for cls in (theirs.layer.NCCLAllGatherDispatcher, theirs.layer.NVLSAllGatherVDispatcher):
        for want, ours in zip(wanted, run_megatron_steps(group, cls(**arguments), NCCL), strict=True):
            for name, a, b in zip(("hidden", "probs", "routing", "combined"), ours, want, strict=True):
                same(f"{cls.__name__} {name}", a, b)
    undo()
    assert theirs.layer.NCCLAllGatherDispatcher is original
    megatron.close()
    dist.destroy_process_group()
    return undo.version


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed (it needs Python 3.12)")
def test_same_bits_as_megatrons_own_dispatcher() -> None:
    versions = run_ranks(run_against_megatron, 2, env={"NO_VCS_VERSION": "1"})
    assert versions[0].startswith(megatron.KNOWN_VERSIONS)
