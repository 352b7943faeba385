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

from tokenferry.reference import quantize

COUNTS = ([3, 5], [0, 4], [7, 1], [1, 1], [0, 0])
HIDDEN, TOPK, EXPERTS, LAYERS = 128, 2, 8, 2


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


def quantize_on_cpu(
    rows: torch.Tensor, *_: object, quant_dtype: object, **__: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In the place of vLLM's quantizers, which are GPU kernels."""
    if quant_dtype is None:
        return rows, None
    quantized = quantize(rows)
    return quantized.values, quantized.scales


def captured(
    forward: Callable[[tuple[torch.Tensor, ...]], list[list[torch.Tensor]]], first: tuple[torch.Tensor, ...]
) -> Callable[[tuple[torch.Tensor, ...]], list[list[torch.Tensor]]]:
    """The same forward, from a graph."""
    static, stream = tuple(each.clone() for each in first), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        found = forward(static)

    def replayed(given: tuple[torch.Tensor, ...]) -> list[list[torch.Tensor]]:
        for place, each in zip(static, given, strict=True):
            place.copy_(each)
        graph.replay()
        torch.cuda.synchronize()
        return [[each.cpu() for each in layer] for layer in found]

    return replayed


def worker(rank: int, port: int, mode: str, folder: str) -> None:
    place = {"SIZE": "2", "RANK": rank, "RANK_LOCAL": rank, "MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({f"VLLM_DP_{name}": str(value) for name, value in place.items()})
    from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import get_ep_group, init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import get_forward_context, set_forward_context
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, fp8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.plugins import load_general_plugins

    from tokenferry.integrations.vllm import cpu, plugin

    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    os.environ["VLLM_MOE_SKIP_PADDING"] = "1"  # so that rows are masked on GPUs too
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
        prepare_finalize = naive_dp_ep.MoEPrepareAndFinalizeNaiveDPEPModular()
        config.model_config = None  # a forward context would ask it for more than there is

        weight_scale = torch.ones(EXPERTS, 1, 1, device=device)
        float8 = fp8_w8a8_moe_quant_config(weight_scale, weight_scale, block_shape=[128, 128])
        if not is_cuda:
            naive_dp_ep.moe_kernel_quantize_input = quantize_on_cpu

        def forward(counts: list[int], given: tuple[torch.Tensor, ...]) -> list[list[torch.Tensor]]:
            """What each layer gathers, and what its experts' rows come to. The last one quantizes its rows."""
            x, weights, ids = given
            found, across = [], torch.tensor(counts, dtype=torch.int32)
            with set_forward_context(None, config, num_tokens=x.shape[0], num_tokens_across_dp=across):
                # vLLM's quantizers on GPUs take no empty batch; its idle ranks have a row.
                for layer in range(LAYERS + (not is_cuda or min(counts) > 0)):
                    quant_config = float8 if layer == LAYERS else FUSED_MOE_UNQUANTIZED_CONFIG
                    with get_forward_context().dp_metadata.sp_local_sizes(1):
                        rows, scales, _, all_ids, all_weights = prepare_finalize.prepare(
                            x, weights, ids, EXPERTS, None, False, quant_config
                        )
                        gathered = [rows, all_ids, all_weights] if scales is None else [rows, all_ids, all_weights, scales]
                        kept = [each.clone() for each in gathered]  # peers write there after finalize
                        numbers = rows if scales is None else (rows.float() * scales).to(torch.bfloat16)
                        out, partial = torch.empty_like(x), numbers * (rank + 1) * 1.0078125
                        prepare_finalize.finalize(out, partial, all_weights, all_ids, False, TopKWeightAndReduceNoOP())
                        found.append([*kept, out])
            return found

        results = []
        for step, counts in enumerate(COUNTS):
            given = rows_of(rank, counts[rank], step, device)
            results += [[each.cpu() for each in layer] for layer in forward(counts, given)]
        masked = []
        if is_cuda:
            inputs = [rows_of(rank, 4, seed, device) for seed in (7, 8, 9)]
            replayed = captured(lambda given: forward([4, 4], given), inputs[0])
            for given in inputs:
                results += replayed(given)
            if mode != "plain":
                for num_real in (4 * rank, 3):
                    with manager.exchange.real_rows(num_real):
                        masked += [layer[1].tolist() for layer in replayed(inputs[0])]
        transports = [each.transport for each in manager.exchange.workspaces()] if mode != "plain" else []
        said = {"manager": type(manager).__name__, "transports": transports, "results": results, "masked": masked}
        torch.save(said, Path(folder) / f"{mode}.{rank}")
        get_ep_group().device_communicator.destroy()


if __name__ == "__main__":
    mp.start_processes(worker, (int(sys.argv[3]), *sys.argv[1:3]), nprocs=2, start_method="spawn")
