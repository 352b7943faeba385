"""vLLM's own expert-parallel group, manager and prepare/finalize on two CPU processes, without an engine.

`python vllm_unit.py MODE FOLDER`: MODE is "plain" for vLLM's manager over plain gathers, or the name of a transport. Each rank
leaves what it got in FOLDER.
"""

import os
import sys
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

    from tokenferry.integrations.vllm import cpu

    load_general_plugins()
    # Given as an argument, the port would be replaced by a free one, and the ranks would not meet.
    config = VllmConfig(parallel_config=ParallelConfig(enable_expert_parallel=True, is_moe_model=True))
    config.model_config = Model()
    config.scheduler_config.max_num_batched_tokens = 16
    config.compilation_config.max_cudagraph_capture_size = 0
    if mode == "plain":
        cpu.bring_what_is_missing()
    else:
        config.additional_config = {"tokenferry": {"transport": mode, "timeout_s": 60}}
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        manager = get_ep_group().device_communicator.all2all_manager
        prepare_finalize = MoEPrepareAndFinalizeNaiveDPEPModular()
        results = []
        config.model_config = None  # a forward context would ask it for more than there is
        for step, counts in enumerate(COUNTS):
            torch.manual_seed(100 * step + rank)
            n = counts[rank]
            x = torch.randn(n, HIDDEN, dtype=torch.bfloat16)
            weights, ids = torch.rand(n, TOPK), torch.randint(0, EXPERTS, (n, TOPK), dtype=torch.int32)
            across = torch.tensor(counts, dtype=torch.int32)
            with set_forward_context(None, config, num_tokens=n, num_tokens_across_dp=across):
                for _ in range(LAYERS):
                    with get_forward_context().dp_metadata.sp_local_sizes(1):
                        rows, _, _, all_ids, all_weights = prepare_finalize.prepare(
                            x, weights, ids, EXPERTS, None, False, FUSED_MOE_UNQUANTIZED_CONFIG
                        )
                        out = torch.empty_like(x)
                        partial = rows * (rank + 1) * 1.0078125
                        prepare_finalize.finalize(out, partial, all_weights, all_ids, False, TopKWeightAndReduceNoOP())
                    results.append([tensor.clone() for tensor in (rows, all_ids, all_weights, out)])
        transports = [each.transport for each in manager.exchange.workspaces()] if mode != "plain" else []
        torch.save(
            {"manager": type(manager).__name__, "transports": transports, "results": results}, Path(folder) / f"{mode}.{rank}"
        )
        get_ep_group().device_communicator.destroy()


if __name__ == "__main__":
    mp.start_processes(worker, (int(sys.argv[3]), *sys.argv[1:3]), nprocs=2, start_method="spawn")
