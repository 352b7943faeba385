"""What the collective transport's exchanges cost beside their alternatives, in one run: docs/transports.md has the figures.

    python benchmarks/collective.py --out collective.jsonl      # 2 GPUs; some 2 minutes

Every form of a dispatch or a combine is captured in a graph of LAYERS calls. The counts of all ranks are equal, as in Megatron's
decode graphs. "three calls", "reduce-scatter call" and their round trip are what megatron-core 0.19's NCCL dispatcher makes of
`torch.distributed`. Sums are compared with `tokenferry.reference`; among the terms are infinities, NaNs and subnormals.
"""

import argparse
import datetime
import json
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import triton
from torch.distributed.distributed_c10d import AllgatherOptions, ReduceScatterOptions

import tokenferry as tf
from tokenferry.benchmarking import GroupTimer
from tokenferry.kernels import own_routing, term_sum
from tokenferry.kernels.launch import has_pdl, launch_unbound
from tokenferry.testing import run_ranks
from tokenferry.testing.numeric import same_bits
from tokenferry.transports.base import mask_padding

LAYERS = 20
TOPK = 8
NUM_EXPERTS = 128
REPEATS = 11
"""Timings of one graph, of which the median counts; of the ranks, the slowest."""
HIDDEN_SIZES = (2048, 7168)
TOKENS = (1, 8, 32, 64, 128, 512, 4096)
Form = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One form at one size. `same_bits`: whether its sums are those of `reference`; None for a dispatch."""

    hidden_size: int
    tokens_per_rank: int
    form: str
    us: float
    spread_us: float
    same_bits: bool | None


class Forms:
    """All forms of one size, on tensors that stay."""

    def __init__(self, group: tf.EPGroup, backend, hidden_size: int, tokens: int) -> None:
        self.group, self.backend, self.H, self.T = group, backend, hidden_size, tokens
        generator = torch.Generator().manual_seed(group.rank)
        self.hidden = torch.randn(tokens, hidden_size, generator=generator).bfloat16().to(group.device)
        self.ids = torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(TOPK).indices.to(group.device)
        self.weights = torch.rand(tokens, TOPK, generator=generator).to(group.device)
        self.partials = {
            dtype: [terms_of(rank, group.size * tokens, hidden_size, dtype, group.device) for rank in range(group.size)]
            for dtype in (torch.float32, torch.bfloat16)
        }
        self.at_once = AllgatherOptions()
        self.at_once.asyncOp = False
        self.at_once_reduce = ReduceScatterOptions()
        self.at_once_reduce.asyncOp = False

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((self.group.size * rows.shape[0], *rows.shape[1:]))

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def three_calls(self) -> torch.Tensor:
        for rows in (self.ids, self.weights, self.hidden):
            out = self.gathered(rows)
            dist.all_gather_into_tensor(out, rows)
        return out

    def coalesced(self, *rows: torch.Tensor, at_once: bool = False) -> torch.Tensor:
        outs = [self.gathered(each) for each in rows]
        self.backend._start_coalescing()
        for out, each in zip(outs, rows, strict=True):
            if at_once:
                self.backend._allgather_base(out, each, self.at_once)
            else:
                self.backend._allgather_base(out, each)
        work = self.backend._end_coalescing()
        if work is not None:  # none on the current stream
            work.wait()
        return outs[0]

    def coalesced_call(self) -> torch.Tensor:
        return self.coalesced(self.hidden, self.ids, self.weights)

    def coalesced_at_once(self) -> torch.Tensor:
        return self.coalesced(self.hidden, self.ids, self.weights, at_once=True)

    def coalesced_checked(self) -> torch.Tensor:
        ids, weights = torch.empty_like(self.ids), torch.empty_like(self.weights)
        launch_unbound(
            own_routing.own_routing_kernel,
            triton.cdiv(ids.numel(), 1024),
            (self.ids, self.weights, ids, ids, weights, self.T, self.T, 0),
            {"K": TOPK, "BLOCK": 1024, "PDL": has_pdl(ids.device)},
            num_warps=4,
            device=ids.device,
        )
        return self.coalesced(self.hidden, ids, weights)

    def one_message(self) -> torch.Tensor:
        """As many bytes in one tensor: what packing could reach if it cost nothing."""
        if not hasattr(self, "packed"):
            self.packed = torch.zeros(self.T, 2 * self.H + 12 * TOPK, dtype=torch.uint8, device=self.hidden.device)
        out = self.gathered(self.packed)
        self.backend._allgather_base(out, self.packed).wait()
        return out

    # --- combine ----------------------------------------------------------------------------------------------------

    def reduce_scatter_call(self, dtype: torch.dtype) -> torch.Tensor:
        rows = self.partials[dtype][self.group.rank]
        out = rows.new_empty((self.T, self.H))
        dist.reduce_scatter_tensor(out, rows)
        return out.to(torch.bfloat16)

    def reduce_scatter(self, dtype: torch.dtype, at_once: bool = False) -> torch.Tensor:
        rows = self.partials[dtype][self.group.rank]
        out = rows.new_empty((self.T, self.H))
        if at_once:
            self.backend._reduce_scatter_base(out, rows, self.at_once_reduce)
        else:
            self.backend._reduce_scatter_base(out, rows).wait()
        return out.to(torch.bfloat16)

    def sends(self, dtype: torch.dtype) -> torch.Tensor:
        rows = self.partials[dtype][self.group.rank].view(self.group.size, self.T, self.H)
        terms = torch.empty_like(rows)
        self.exchange([(each,) for each in rows], [(each,) for each in terms])
        return self.summed(terms, rows[self.group.rank])

    def all_to_all(self, dtype: torch.dtype) -> torch.Tensor:
        rows = self.partials[dtype][self.group.rank]
        terms = torch.empty_like(rows)
        self.backend.alltoall_base(terms, rows, [], []).wait()
        terms = terms.view(self.group.size, self.T, self.H)
        return self.summed(terms, terms[self.group.rank])

    def swapped_gather(self, dtype: torch.dtype) -> torch.Tensor:
        """Of two ranks each gives what is the other's: the gathered rows are the exchanged ones."""
        rows = self.partials[dtype][self.group.rank].view(2, self.T, self.H)
        terms = torch.empty_like(rows)
        self.backend._allgather_base(terms.flatten(0, 1), rows[1 - self.group.rank]).wait()
        return self.summed(terms, rows[self.group.rank])

    def summed(self, terms: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        out = torch.empty(self.T, self.H, dtype=torch.bfloat16, device=terms.device)
        launch_unbound(
            term_sum.term_sum_kernel,
            triton.cdiv(out.numel(), 1024),
            (terms, own, out, self.group.rank, self.T, self.T),
            {"SIZE": self.group.size, "H": self.H, "BLOCK": 1024, "PDL": has_pdl(out.device)},
            num_warps=4,
            device=out.device,
        )
        return out

    def sum_alone(self, dtype: torch.dtype) -> torch.Tensor:
        terms = self.partials[dtype][self.group.rank].view(self.group.size, self.T, self.H)
        return self.summed(terms, terms[self.group.rank])

    def round_trip(self) -> torch.Tensor:
        self.three_calls()
        return self.reduce_scatter_call(torch.float32)

    def new_round_trip(self) -> torch.Tensor:
        self.coalesced_call()
        return self.reduce_scatter(torch.float32)

    def messages(self, dtype: torch.dtype) -> torch.Tensor:
        """What the transport did before it had all-gathers: messages to each rank, ids and weights packed in one; PyTorch's
        operators do the rest."""
        rank, counts, size = self.group.rank, [self.T] * self.group.size, self.group.size
        packed = torch.cat([mask_padding(self.ids, self.T), self.weights.view(torch.int32)], dim=1)
        outs = [self.gathered(self.hidden), self.gathered(packed)]
        parts = [out.split(counts) for out in outs]
        self.exchange([(self.hidden, packed)] * size, list(zip(*parts, strict=True)))
        parts[0][rank].copy_(self.hidden)
        parts[1][rank].copy_(packed)
        ids, weights = outs[1].chunk(2, dim=1)
        ids.contiguous().to(torch.int64), weights.contiguous().view(torch.float32)
        outgoing = self.partials[dtype][rank].split(counts)
        terms = [outgoing[rank] if peer == rank else torch.empty_like(outgoing[rank]) for peer in range(size)]
        self.exchange([(rows,) for rows in outgoing], [(term,) for term in terms])
        return tf.reference.sum_in_rank_order(terms).to(torch.bfloat16)

    def exchange(self, outgoing: list[tuple[torch.Tensor, ...]], incoming: list[tuple[torch.Tensor, ...]]) -> None:
        self.backend._start_coalescing()
        for shift in range(1, self.group.size):
            peer = (self.group.rank + shift) % self.group.size
            for rows in outgoing[peer]:
                self.backend.send([rows], peer, 0)
            for rows in incoming[peer]:
                self.backend.recv([rows], peer, 0)
        self.backend._end_coalescing().wait()

    def table(self) -> dict[str, tuple[Form, torch.dtype | None]]:
        """Each form, with the dtype of the terms that it sums."""
        forms: dict[str, tuple[Form, torch.dtype | None]] = {
            "dispatch: three calls": (self.three_calls, None),
            "dispatch: coalesced": (self.coalesced_call, None),
            "dispatch: coalesced, current stream": (self.coalesced_at_once, None),
            "dispatch: ids checked, coalesced": (self.coalesced_checked, None),
            "dispatch: one message": (self.one_message, None),
        }
        for dtype in (torch.float32, torch.bfloat16):
            for name, form in (
                ("reduce-scatter call", self.reduce_scatter_call),
                ("reduce-scatter", self.reduce_scatter),
                ("reduce-scatter, current stream", lambda dtype: self.reduce_scatter(dtype, at_once=True)),
                ("sends + sum", self.sends),
                ("all-to-all + sum", self.all_to_all),
                ("swapped all-gather + sum", self.swapped_gather),
                ("sum alone", self.sum_alone),
            ):
                if name == "swapped all-gather + sum" and self.group.size != 2:
                    continue
                summed = None if name == "sum alone" else dtype
                label = f"combine {str(dtype).removeprefix('torch.')}: {name}"
                forms[label] = ((lambda form=form, dtype=dtype: form(dtype)), summed)
            label = f"round trip: messages to each rank, {str(dtype).removeprefix('torch.')} terms"
            forms[label] = ((lambda dtype=dtype: self.messages(dtype)), dtype)
        forms["round trip: three calls, reduce-scatter"] = (self.round_trip, torch.float32)
        forms["round trip: coalesced, reduce-scatter"] = (self.new_round_trip, torch.float32)
        return forms

    def wanted(self, dtype: torch.dtype) -> torch.Tensor:
        counts = [self.T] * self.group.size
        return tf.reference.combine(self.partials[dtype], counts, dtype, torch.bfloat16)[self.group.rank]


def terms_of(rank: int, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Half of the columns normal, half of random bits; two columns of zeros with both signs."""
    generator = torch.Generator(device).manual_seed(100 + rank)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(bits)
    terms = torch.randn(rows, hidden_size, generator=generator, device=device).to(dtype)
    half = hidden_size // 2
    shape = (rows, hidden_size - half)
    terms[:, half:] = torch.randint(info.min, info.max, shape, dtype=bits, generator=generator, device=device).view(dtype)
    terms[:, 0] = -0.0
    terms[:, 1] = -0.0 if rank % 2 else 0.0
    return terms


class Product:
    """The transport as it is: a step of LAYERS dispatches and combines."""

    def __init__(self, forms: Forms, dtype: torch.dtype) -> None:
        config = tf.MoEConfig(hidden_size=forms.H, num_experts=NUM_EXPERTS, topk=TOPK, dtype=torch.bfloat16)
        self.workspace = tf.Workspace(
            config, forms.group, max_tokens_per_rank=forms.T, transport="collective", combine_dtype=dtype,
            index_dtype=torch.int64, counts="equal",
        )  # fmt: skip
        self.layers = [self.workspace.dispatcher() for _ in range(LAYERS)]
        self.rows = (forms.hidden, forms.ids, forms.weights)
        self.partial = forms.partials[dtype][forms.group.rank]

    def __call__(self) -> torch.Tensor:
        self.workspace.begin_step(self.rows[0].shape[0])
        for layer in self.layers:
            layer.dispatch(*self.rows)
            out = layer.combine(self.partial)
        return out


def run(group: tf.EPGroup, budget_s: float, out: Path | None) -> list[dict]:
    warnings.simplefilter("ignore")
    began = time.monotonic()
    dist.init_process_group("nccl", store=dist.PrefixStore("torch", group.store), rank=group.rank, world_size=group.size)
    options = dist.ProcessGroupNCCL.Options()
    backend = dist.ProcessGroupNCCL(dist.PrefixStore("forms", group.store), group.rank, group.size, options)
    timer, rows = GroupTimer(group, repeats=REPEATS), []

    def record(form: str, hidden_size: int, tokens: int, timed: tuple[float, float], right: bool | None) -> None:
        row = Row(hidden_size, tokens, form, round(timed[0], 2), round(timed[1], 2), right)
        rows.append(asdict(row))
        if out is not None and group.rank == 0:
            with out.open("a") as file:  # at once: a run that is stopped leaves what it measured
                file.write(json.dumps(asdict(row)) + "\n")

    for hidden_size in HIDDEN_SIZES:
        for tokens in TOKENS:
            if timer.slowest(time.monotonic() - began) > budget_s:
                break
            forms = Forms(group, backend, hidden_size, tokens)
            wanted = {dtype: forms.wanted(dtype) for dtype in forms.partials}
            for name, (form, dtype) in forms.table().items():
                right = None if dtype is None else timer.slowest(not same_bits(form(), wanted[dtype])) == 0
                record(
                    name, hidden_size, tokens, timer.time_graph(lambda form=form: [form() for _ in range(LAYERS)], LAYERS), right
                )
            for dtype in forms.partials:
                product = Product(forms, dtype)
                right = timer.slowest(not same_bits(product(), wanted[dtype])) == 0
                name = f"round trip: the transport, {str(dtype).removeprefix('torch.')} terms"
                record(name, hidden_size, tokens, timer.time_graph(product, LAYERS), right)
                product.workspace.close()
            del forms, wanted, product
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    return rows


def versions(commit: str, ranks: int) -> dict:
    """The first line of the file: what the rows were measured with."""
    if not commit:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(0),
        "ranks": ranks,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "commit": commit or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "layers": LAYERS,
        "topk": TOPK,
    }


def table(rows: list[dict]) -> str:
    """Forms down, tokens across; a star where the sums' bits are not the reference's."""
    lines = []
    for hidden_size in HIDDEN_SIZES:
        cells = {
            (row["form"], row["tokens_per_rank"]): f"{row['us']:.1f}{'*' if row['same_bits'] is False else ''}"
            for row in rows
            if row["hidden_size"] == hidden_size
        }
        lines += [f"| H {hidden_size} | " + " | ".join(map(str, TOKENS)) + " |", "|---" * (len(TOKENS) + 1) + "|"]
        for form in dict.fromkeys(form for form, _ in cells):
            lines.append(f"| {form} | " + " | ".join(cells.get((form, tokens), "") for tokens in TOKENS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write versions and rows as JSON lines")
    parser.add_argument("--commit", default="", help="of the code measured, where there is no repository")
    parser.add_argument("--budget-s", type=float, default=150.0, help="begin no further size after so many seconds")
    options = parser.parse_args()
    head = versions(options.commit, options.ranks)
    if options.out:
        options.out.write_text(json.dumps(head) + "\n")
    found = run_ranks(run, options.ranks, options.budget_s, options.out, backend="nccl", timeout_s=options.budget_s + 60.0)
    print(", ".join(f"{name} {value}" for name, value in head.items()))
    print(table(found[0]))


if __name__ == "__main__":
    main()
