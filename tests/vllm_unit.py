"""vLLM's own expert-parallel group, manager and prepare/finalize in two processes, on GPUs if there are any, without an engine.

`python vllm_unit.py MODE FOLDER PORT`: MODE is "plain" for vLLM's manager over its own gathers, on CPUs those that the plug-in
brings, or the name of a transport. Each rank leaves what it got in FOLDER.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp

COUNTS = ([3, 5], [0, 4], [7, 1], [1, 1], [0, 0])
HIDDEN, TOPK, EXPERTS, LAYERS = 64, 2, 8, 2


class Model:
    """What the manager asks vLLM's model configuration for; anything else is None."""

    is_moe = True
    enforce_eager = True

    @staticmethod
    def get_num_experts() -> int:
        return EXPERTS

    def __getattr__(self, name: str) -> None:
        return None


def rows_of(rank: int, count: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows, weights and expert numbers."""
    torch.manual_seed(100 * seed + rank)
    hidden, weights = torch.randn(count, HIDDEN, dtype=torch.bfloat16), torch.rand(count, TOPK)
    return hidden.to(device), weights.to(device), torch.randint(0, EXPERTS, (count, TOPK), dtype=torch.int32).to(device)


def in_a_graph(
    forward: Callable[[tuple[torch.Tensor, ...]], list[list[torch.Tensor]]], inputs: list[tuple[torch.Tensor, ...]]
) -> list[list[torch.Tensor]]:
    """What a captured forward gives for each of `inputs`."""
    static, stream, results = tuple(each.clone() for each in inputs[0]), torch.cuda.Stream(), []
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        found = forward(static)
    for given in inputs:
        for place, each in zip(static, given, strict=True):
            place.copy_(each)
        graph.replay()
        torch.cuda.synchronize()
        results += [[each.cpu() for each in layer] for layer in found]
    return results


def worker(rank: int, port: int, mode: str, folder: str) -> None:
    place = {"SIZE": "2", "RANK": rank, "RANK_LOCAL": rank, "MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({f"VLLM_DP_{name}": str(value) for name, value in place.items()})
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import get_ep_group, init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import get_forward_context, set_forward_context
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import MoEPrepareAndFinalizeNaiveDPEPModular
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.plugins import load_general_plugins

    from tokenferry.integrations.vllm import cpu, plugin

    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    load_general_plugins()
    if is_cuda:
        torch.cuda.set_device(device)
        plugin.register()  # tokenferry may be on the path alone there, without its entry point
    # Given as an argument, the port would be replaced by a free one, and the ranks would not meet.
    config = VllmConfig(parallel_config=ParallelConfig(enable_expert_parallel=True, is_moe_model=True))
    config.model_config = Model()
    config.scheduler_config.max_num_batched_tokens = 16
    config.compilation_config.max_cudagraph_capture_size = 0
    if mode == "plain" and not is_cuda:
        cpu.bring_what_is_missing()
    if mode != "plain":
        config.additional_config = {"tokenferry": {"transport": mode, "timeout_s": 60}}
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", rank if is_cuda else 0, "nccl" if is_cuda else "gloo")
        initialize_model_parallel(1, 1)
        manager = get_ep_group().device_communicator.all2all_manager
        prepare_finalize = MoEPrepareAndFinalizeNaiveDPEPModular()
        config.model_config = None  # a forward context would ask it for more than there is

        def forward(counts: list[int], given: tuple[torch.Tensor, ...]) -> list[list[torch.Tensor]]:
            """What each layer gathers, and what its experts' rows come to."""
            x, weights, ids = given
            found, across = [], torch.tensor(counts, dtype=torch.int32)
            with set_forward_context(None, config, num_tokens=x.shape[0], num_tokens_across_dp=across):
                for _ in range(LAYERS):
                    with get_forward_context().dp_metadata.sp_local_sizes(1):
                        rows, _, _, all_ids, all_weights = prepare_finalize.prepare(
                            x, weights, ids, EXPERTS, None, False, FUSED_MOE_UNQUANTIZED_CONFIG
                        )
                        kept = [each.clone() for each in (rows, all_ids, all_weights)]  # peers write there after finalize
                        out, partial = torch.empty_like(x), rows * (rank + 1) * 1.0078125
                        prepare_finalize.finalize(out, partial, all_weights, all_ids, False, TopKWeightAndReduceNoOP())
                        found.append([*kept, out])
            return found

        results = []
        for step, counts in enumerate(COUNTS):
            given = rows_of(rank, counts[rank], step, device)
            results += [[each.cpu() for each in layer] for layer in forward(counts, given)]
        if is_cuda:
            results += in_a_graph(lambda given: forward([4, 4], given), [rows_of(rank, 4, seed, device) for seed in (7, 8, 9)])
        transports = [each.transport for each in manager.exchange.workspaces()] if mode != "plain" else []
        torch.save(
            {"manager": type(manager).__name__, "transports": transports, "results": results}, Path(folder) / f"{mode}.{rank}"
        )
        get_ep_group().device_communicator.destroy()


if __name__ == "__main__":
    mp.start_processes(worker, (int(sys.argv[3]), *sys.argv[1:3]), nprocs=2, start_method="spawn")
