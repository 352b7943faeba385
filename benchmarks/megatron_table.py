"""Megatron-Core's NCCL dispatcher against ours under CUDA graphs, in one run: the table of docs/megatron.md.

    python benchmarks/megatron_table.py --out megatron.jsonl        # 2 GPUs, megatron-core 0.19 installed
    python benchmarks/megatron_table.py --rehearse                  # CPUs: the same calls and checks, no graphs, no times

Each dispatcher runs one step of LAYERS layers, as a model's forward would: the counts once, then dispatch and combine a layer.
Expert outputs are float32 rows that stand ready, so that what is timed is the dispatcher alone. Results are compared first.
"""

import argparse
import json
import statistics
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import tokenferry as tf
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks

LAYERS = 20
TOPK = 8
NUM_EXPERTS = 128
REPEATS = 30
"""Timings of one graph, of which the median counts; of the ranks, the slowest."""

SIZES = tuple((hidden, tokens) for hidden in (7168, 2048) for tokens in (1, 8, 32, 128, 512, 4096))
REHEARSAL = ((64, 1), (64, 5))


@dataclass(frozen=True)
class Row:
    """One line of the table. Microseconds for a layer's dispatch and combine, a layer's share of the counts included."""

    hidden_size: int
    tokens_per_rank: int
    megatron_us: float
    tokenferry_us: float
    transport: str
    megatron_version: str
    device: str

    @property
    def ratio(self) -> float:
        return self.megatron_us / self.tokenferry_us


class Step:
    """One forward's dispatches and combines on fixed inputs. Calling it gives the last layer's rows."""

    def __init__(self, layers: list, inputs: tuple[torch.Tensor, ...], partial: torch.Tensor) -> None:
        self.layers, self.inputs, self.partial = layers, inputs, partial

    def __call__(self) -> torch.Tensor:
        hidden, routing, probs = self.inputs
        for layer in self.layers:
            rows, row_probs = layer.dispatch_preprocess(hidden, routing, probs)
            layer.token_dispatch(rows, row_probs)
            out = layer.combine_postprocess(layer.token_combine(self.partial))
        return out


def config_of(hidden_size: int, ep_size: int):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=hidden_size, num_attention_heads=4, num_moe_experts=NUM_EXPERTS, moe_router_topk=TOPK,
        transformer_impl="inference_optimized", moe_router_dtype="fp32", add_bias_linear=False, normalization="RMSNorm",
        expert_model_parallel_size=ep_size, moe_token_dispatcher_type="alltoall", bf16=True, params_dtype=torch.bfloat16,
    )  # fmt: skip


def groups_of(size: int, rank: int):
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    groups.ep = groups.tp_ep = dist.group.WORLD
    groups.tp = groups.expt_tp = [dist.new_group([peer]) for peer in range(size)][rank]
    return groups


def make_layers(cls: type, config, groups, group: tf.EPGroup) -> list:
    share = NUM_EXPERTS // group.size
    indices = list(range(group.rank * share, (group.rank + 1) * share))
    return [cls(share, indices, config, groups, runs_metadata_sync=number == 0) for number in range(LAYERS)]


def inputs_of(rank: int, tokens: int, hidden_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(tokens, 1, hidden_size, generator=generator).bfloat16()
    routing = torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(TOPK).indices
    probs = torch.rand(tokens, TOPK, generator=generator)
    return hidden.to(device), routing.to(device), probs.to(device)


def partial_of(rank: int, rows: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, hidden_size, generator=torch.Generator().manual_seed(100 + rank)).to(device)


def graph_of(step: Step) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def layer_us(step: Step, group: tf.EPGroup, name: str) -> float:
    """Median over the repeats, of the slowest rank."""
    graph = graph_of(step)
    times = []
    for repeat in range(REPEATS):
        torch.cuda.synchronize()
        group.channel.barrier(f"{name}/{repeat}", 60.0)
        graph.replay()  # the ranks leave the barrier apart: a first replay takes that up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS)
    megatron.check()
    return max(group.channel.exchange(f"{name}/median", statistics.median(times), 60.0))


def run(group: tf.EPGroup, rehearse: bool) -> list[dict]:
    warnings.simplefilter("ignore")
    if rehearse:
        torch.cuda.current_device = lambda: "cpu"  # Megatron's dispatcher asks for the device so
    backend = "gloo" if rehearse else "nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("torch", group.store), rank=group.rank, world_size=group.size)
    from megatron.core import package_info
    from megatron.core.transformer.moe.token_dispatcher_inference import NCCLAllGatherDispatcher as Theirs

    groups, sizes = groups_of(group.size, group.rank), REHEARSAL if rehearse else SIZES
    capacity = max(tokens for _, tokens in sizes)
    Theirs.allocate_buffers()
    ours = megatron.NVLSAllGatherVDispatcher
    rows = []
    for hidden_size, tokens in sizes:
        config = config_of(hidden_size, group.size)
        ours.allocate_buffers(capacity, TOPK, hidden_size, groups.ep)
        inputs = inputs_of(group.rank, tokens, hidden_size, group.device)
        partial = partial_of(group.rank, group.size * tokens, hidden_size, group.device)
        rsv = ours._get_rsv_tensor()
        rsv[: partial.shape[0]] = partial
        theirs_step = Step(make_layers(Theirs, config, groups, group), inputs, partial)
        our_step = Step(make_layers(ours, config, groups, group), inputs, rsv)
        wanted, got = theirs_step().clone(), our_step().clone()
        if not torch.allclose(got.float(), wanted.float(), rtol=1e-2, atol=1e-2):
            raise AssertionError(f"H {hidden_size}, T {tokens}: sums differ by {(got.float() - wanted.float()).abs().max()}")
        if rehearse:
            continue
        name = f"{hidden_size}/{tokens}"
        rows.append(
            Row(
                hidden_size=hidden_size,
                tokens_per_rank=tokens,
                megatron_us=layer_us(theirs_step, group, f"{name}/theirs"),
                tokenferry_us=layer_us(our_step, group, f"{name}/ours"),
                transport=ours._symm_rsv["handle"].transport,
                megatron_version=package_info.__version__,
                device=torch.cuda.get_device_name(group.device),
            )
        )
    megatron.close()
    dist.destroy_process_group()
    return [asdict(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines")
    parser.add_argument("--rehearse", action="store_true", help="on CPUs: every call and check, no times")
    options = parser.parse_args()
    backend = "gloo" if options.rehearse else "nccl"
    found = run_ranks(run, options.ranks, options.rehearse, backend=backend, timeout_s=900.0, env={"NO_VCS_VERSION": "1"})
    rows = [Row(**row) for row in found[0]]
    if options.rehearse:
        print("sums agree")
    if options.out:
        options.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    for row in rows:
        print(
            f"| {row.hidden_size} | {row.tokens_per_rank} | {row.megatron_us:.1f} | {row.tokenferry_us:.1f} | {row.ratio:.1f} | "
            f"{row.transport} |"
        )


if __name__ == "__main__":
    main()
