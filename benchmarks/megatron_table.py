"""Megatron-Core's NCCL dispatcher against ours under CUDA graphs, in one run: the table of docs/megatron.md.

    python benchmarks/megatron_table.py --out megatron.jsonl        # 2 GPUs, megatron-core 0.19 installed; some 2 minutes
    python benchmarks/megatron_table.py --rehearse                  # CPUs: the same calls and checks, no graphs, no times

Each dispatcher runs one step of LAYERS layers, as a model's forward would: the counts once, then dispatch and combine a layer.
Expert outputs are rows that stand ready, so that what is timed is the dispatcher alone: float32, as Megatron's torch and vllm
backends write them and both sides then send them, and bfloat16, as its flashinfer backend writes them. Gathered rows and sums
of the two are compared first, in the same run.
"""

import argparse
import datetime
import json
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import triton

import tokenferry as tf
from tokenferry.benchmarking import GroupTimer
from tokenferry.integrations import megatron
from tokenferry.testing import run_ranks

LAYERS = 20
TOPK = 8
NUM_EXPERTS = 128
REPEATS = 15
"""Timings of one graph, of which the median counts; of the ranks, the slowest."""

TOKENS = (1, 8, 32, 128, 512, 4096)
SHAPES = ((7168, torch.float32), (7168, torch.bfloat16), (2048, torch.float32), (2048, torch.bfloat16))
"""Hidden size, and dtype of the experts' output."""
REHEARSAL = ((64, torch.float32), (64, torch.bfloat16))


@dataclass(frozen=True)
class Row:
    """One line of the table. Microseconds for a layer's dispatch and combine, a layer's share of the counts included."""

    hidden_size: int
    tokens_per_rank: int
    expert_dtype: str
    megatron_us: float
    megatron_spread_us: float
    tokenferry_us: float
    tokenferry_spread_us: float
    same_bits: bool
    transport: str

    @property
    def ratio(self) -> float:
        return self.megatron_us / self.tokenferry_us

    def __str__(self) -> str:
        return (
            f"| {self.hidden_size} | {self.expert_dtype} | {self.tokens_per_rank} | {self.megatron_us:.1f} | "
            f"{self.tokenferry_us:.1f} | {self.ratio:.1f} | {self.transport} | {'yes' if self.same_bits else 'no'} |"
        )


HEADER = (
    "| H | expert output | T | megatron, µs | tokenferry, µs | ratio | transport | same bits |\n|---|---|---|---|---|---|---|---|"
)


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


def partial_of(rank: int, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, hidden_size, generator=torch.Generator().manual_seed(100 + rank)).to(dtype).to(device)


def gathered_rows(layer, inputs: tuple[torch.Tensor, ...], partial: torch.Tensor, valid: int) -> list[torch.Tensor]:
    """What a dispatch gathers, and the sums."""
    hidden, routing, probs = inputs
    rows, row_probs = layer.token_dispatch(*layer.dispatch_preprocess(hidden, routing, probs))
    kept = [tensor[:valid].clone() for tensor in (rows, row_probs, layer.routing_map)]  # views, gone with combine
    return [*kept, layer.combine_postprocess(layer.token_combine(partial)).clone()]


def compare(theirs: list[torch.Tensor], ours: list[torch.Tensor], where: str) -> bool:
    """Whether the sums have the same bits. Rows that differ, or sums that differ by more than rounding, end the run."""
    for name, want, got in zip(("hidden states", "probabilities", "routing"), theirs, ours, strict=False):
        if not torch.equal(want, got):
            raise AssertionError(f"{where}: gathered {name} differ")
    want, got = theirs[-1], ours[-1]
    if not torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2):
        raise AssertionError(f"{where}: sums differ by {(got.float() - want.float()).abs().max()}")
    return torch.equal(want, got)


def run(group: tf.EPGroup, rehearse: bool, budget_s: float, out: Path | None) -> list[dict]:
    warnings.simplefilter("ignore")
    began = time.monotonic()
    if rehearse:
        torch.cuda.current_device = lambda: "cpu"  # Megatron's dispatcher asks for the device so
    backend = "gloo" if rehearse else "nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("torch", group.store), rank=group.rank, world_size=group.size)
    from megatron.core.transformer.moe.token_dispatcher_inference import NCCLAllGatherDispatcher as Theirs

    groups, timer = groups_of(group.size, group.rank), GroupTimer(group, repeats=REPEATS)
    Theirs.allocate_buffers()
    ours, rows = megatron.NVLSAllGatherVDispatcher, []
    for hidden_size, dtype in REHEARSAL if rehearse else SHAPES:
        config, counts = config_of(hidden_size, group.size), (1, 5) if rehearse else TOKENS
        ours._delete_buffers()
        megatron.configure(combine_dtype=dtype)
        ours.allocate_buffers(max(counts), TOPK, hidden_size, groups.ep)
        rsv = ours._get_rsv_tensor()
        for tokens in counts:
            if timer.slowest(time.monotonic() - began) > budget_s:
                break
            inputs = inputs_of(group.rank, tokens, hidden_size, group.device)
            partial = partial_of(group.rank, group.size * tokens, hidden_size, dtype, group.device)
            rsv[: partial.shape[0]] = partial
            their_layers, our_layers = (make_layers(cls, config, groups, group) for cls in (Theirs, ours))
            wanted = gathered_rows(their_layers[0], inputs, partial, partial.shape[0])
            got = gathered_rows(our_layers[0], inputs, rsv, partial.shape[0])
            same_bits = timer.slowest(not compare(wanted, got, f"H {hidden_size}, T {tokens}, {dtype}")) == 0
            their_step, our_step = Step(their_layers, inputs, partial), Step(our_layers, inputs, rsv)
            if rehearse:
                their_step(), our_step()
                continue
            their_us, their_spread = timer.time_graph(their_step, LAYERS)
            our_us, our_spread = timer.time_graph(our_step, LAYERS)
            megatron.check()
            row = Row(
                hidden_size=hidden_size,
                tokens_per_rank=tokens,
                expert_dtype=str(dtype).removeprefix("torch."),
                megatron_us=their_us,
                megatron_spread_us=their_spread,
                tokenferry_us=our_us,
                tokenferry_spread_us=our_spread,
                same_bits=same_bits,
                transport=ours._symm_rsv["handle"].transport,
            )
            rows.append(asdict(row))
            if out is not None and group.rank == 0:
                with out.open("a") as file:  # at once: a run that is stopped leaves what it measured
                    file.write(json.dumps(asdict(row)) + "\n")
    megatron.close()
    dist.destroy_process_group()
    return rows


def versions(commit: str, ranks: int, rehearse: bool) -> dict:
    """The first line of the file: what the rows were measured with."""
    from importlib import metadata

    try:
        megatron_version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        megatron_version = "unknown"
    if not commit:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": "cpu" if rehearse else torch.cuda.get_device_name(0),
        "ranks": ranks,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if rehearse else ".".join(map(str, torch.cuda.nccl.version())),
        "megatron_core": megatron_version,
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "layers": LAYERS,
        "topk": TOPK,
        "num_experts": NUM_EXPERTS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write versions and rows as JSON lines")
    parser.add_argument("--commit", default="", help="of the code measured, where there is no repository")
    parser.add_argument("--budget-s", type=float, default=130.0, help="begin no further size after so many seconds")
    parser.add_argument("--rehearse", action="store_true", help="on CPUs: every call and check, no times")
    options = parser.parse_args()
    head = versions(options.commit, options.ranks, options.rehearse)
    if options.out:
        options.out.write_text(json.dumps(head) + "\n")
    found = run_ranks(
        run,
        options.ranks,
        options.rehearse,
        options.budget_s,
        options.out,
        backend="gloo" if options.rehearse else "nccl",
        timeout_s=options.budget_s + 50.0,
        env={"NO_VCS_VERSION": "1"},
    )
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    if options.rehearse:
        print("rows and sums agree")
        return
    rows = [Row(**row) for row in found[0]]
    print(HEADER, *rows, sep="\n")
    missing = len(SHAPES) * len(TOKENS) - len(rows)
    if missing:
        print(f"{missing} sizes were left out: --budget-s {options.budget_s:g} was over")


if __name__ == "__main__":
    main()
