"""One rank of `vllm_engine.py`: an engine, the loads that it serves, and what it measures."""

import contextlib
import datetime
import hashlib
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vllm_arms import Arms
from vllm_profile import launches_within, layers_of, split

FIRST_STEPS = 8
"""Left out of each wave: the prefill, and steps until the ranks are in step."""


@dataclass
class Wave:
    """What some requests took, step by step.

    Attributes:
        step_ms: between two forwards.
        forward_ms: of a replayed graph on the GPU; none without graphs.
        meeting_ms: in vLLM's host all-reduce before each forward, in which the earlier rank waits for the later.
        tokens: of each request.
    """

    step_ms: list[float]
    forward_ms: list[float]
    meeting_ms: list[float]
    tokens: list[list[int]] = field(default_factory=list)


class Rank:
    """An engine in this process, and what stands around it."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.meetings: list[tuple[float, float]] = []
        began_s = time.monotonic()
        with note("vLLM has started"):
            self.llm = start_engine(options)
        self.start_s = time.monotonic() - began_s
        self.engine = self.llm.llm_engine
        self.runner = self.engine.model_executor.driver_worker.worker.model_runner
        from vllm.distributed.parallel_state import get_dp_group

        self.group = get_dp_group()
        self.rank, self.size = self.group.rank_in_group, self.group.world_size
        with note("weights are drawn"):
            fill_weights(self.runner.get_model(), self.rank, self.size)
        self._watch_meetings()
        self.arms = Arms(self.runner, self.runner.model_config.hf_config.num_hidden_layers)

    def _watch_meetings(self) -> None:
        from vllm.v1.worker import gpu_model_runner

        original = gpu_model_runner.coordinate_batch_across_dp

        def watched(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.meetings.append((begin, time.perf_counter()))

        gpu_model_runner.coordinate_batch_across_dp = watched

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's."""
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, mine, group=self.group.cpu_group)
        return told

    def wave(self, requests: int, steps: int, name: str) -> Wave:
        """Serves `requests` prompts of this rank, `steps` tokens each; without any it keeps the others company."""
        from vllm import SamplingParams

        vocabulary = self.runner.model_config.hf_config.vocab_size
        sampling = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False)
        for i in range(requests):
            prompt = [3 + (7 * i + 11 * j + 131 * self.rank) % (vocabulary - 3) for j in range(12 + i % 5)]
            self.engine.add_request(f"{name}-{i}", {"prompt_token_ids": prompt}, sampling)
        finished: dict[str, list[int]] = {}
        self.gather(None)  # both begin together
        self.meetings.clear()
        self.arms.replays.clear()
        if not requests:
            for _ in range(steps):
                self.engine.engine_core.execute_dummy_batch()
        while self.engine.get_num_unfinished_requests():
            for answer in self.engine.step():
                if answer.finished:
                    finished[answer.request_id] = list(answer.outputs[0].token_ids)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begins = [begin for begin, _ in self.meetings]
        first = min(FIRST_STEPS, len(begins) - 2)
        return Wave(
            step_ms=[1e3 * (after - before) for before, after in pairwise(begins[first:])],
            forward_ms=[begin.elapsed_time(end) for begin, end in self.arms.replays[first:]],
            meeting_ms=[1e3 * (end - begin) for begin, end in self.meetings[first:]],
            tokens=[finished[key] for key in sorted(finished, key=lambda key: int(key.split("-")[1]))],
        )


def start_engine(options: Namespace) -> Any:
    import vllm

    from tokenferry.integrations.vllm.plugin import register

    register()  # as vLLM does by the entry point, if tokenferry is installed
    is_cpu = options.device == "cpu"
    given: dict[str, Any] = {
        "max_model_len": 512, "max_num_seqs": 32, "max_num_batched_tokens": 512 if is_cpu else 1024,
        "kv_cache_memory_bytes": (64 << 20) if is_cpu else (2 << 30), "dtype": "float32" if is_cpu else "bfloat16",
    }  # fmt: skip
    if not is_cpu:
        given["attention_backend"] = options.attention
    if is_cpu or options.modes == "eager":
        given["enforce_eager"] = True
    elif not options.compiled:
        given["compilation_config"] = {
            "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graph_sizes(options)
        }  # fmt: skip
    else:
        given["compilation_config"] = {"cudagraph_capture_sizes": graph_sizes(options)}
    return vllm.LLM(
        model=options.model, skip_tokenizer_init=True, load_format="dummy", seed=0, enable_prefix_caching=False,
        enable_expert_parallel=True, distributed_executor_backend="uni", worker_cls="tokenferry.integrations.vllm.Worker",
        additional_config={"tokenferry": {"transport": options.transport, "timeout_s": 120}}, **given,
    )  # fmt: skip


def loads(options: Namespace) -> list[tuple[int, ...]]:
    return [tuple(int(count) for count in load.split("/")) for load in options.loads.split(",")]


def graph_sizes(options: Namespace) -> list[int]:
    return sorted({max(load) for load in loads(options)})


def fill_weights(model: Any, rank: int, size: int) -> None:
    """Random weights, those of an expert the same wherever it lives: vLLM's own dummy weights are the same on both ranks, so that
    experts would be there twice, and too small to tell tokens apart."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if "bias" in name else 1.0)
            elif weight.dim() == 3:
                for expert, own in enumerate(weight):
                    own.copy_(drawn(f"{name}.{rank * weight.shape[0] + expert}", own))
            else:
                weight.copy_(drawn(name, weight))


def drawn(name: str, like: torch.Tensor) -> torch.Tensor:
    """Normal values with a deviation that keeps the rows' size, which follow from the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    generator = torch.Generator(device=like.device).manual_seed(seed)
    values = torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return values / like.shape[-1] ** 0.5


@contextlib.contextmanager
def note(what: str) -> Any:
    began_s = time.monotonic()
    yield
    print(f"[{time.monotonic() - began_s:.1f} s] {what}", flush=True)


class Measurement:
    """All loads on all arms, and the records of it, which rank 0 writes as they come."""

    def __init__(self, rank: Rank, out: Path) -> None:
        self.rank, self.out, self._number = rank, out, 0

    def add(self, **record: Any) -> None:
        if self.rank.rank == 0:
            with self.out.open("a") as file:
                file.write(json.dumps(rounded(record)) + "\n")
            print(json.dumps(rounded(record))[:400], flush=True)

    def run(self) -> None:
        options = self.rank.options
        with self.rank.arms.using("ours", graphs=False):
            self._wave((1,) * self.rank.size, 3)  # opens the workspace where no profile run has
        self.add(**self.about())
        with note("rows are remembered"):
            for load in loads(options):
                self._remember(load)
        for mode in options.modes.split(","):
            self._run_mode(mode)
        self.rank.gather(None)

    def _run_mode(self, mode: str) -> None:
        arms = self.rank.arms
        if mode == "balanced":
            arms.is_balanced = True
            for load in loads(self.rank.options):
                self._remember(load)
        if mode != "eager":
            with note(f"graphs are captured: {mode}"):
                for name in arms.managers:
                    arms.capture(name)
        for load in loads(self.rank.options):
            with note(f"{mode} {load}"):
                self._compare(mode, load)
            if self.rank.options.profile and mode != "eager":
                self._profile(mode, load)

    def about(self) -> dict[str, Any]:
        workspaces = self.rank.arms.managers["ours"].exchange.workspaces()
        config = self.rank.runner.model_config.hf_config
        names = ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        return {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "ranks": self.rank.size, "torch": torch.__version__, "vllm": metadata.version("vllm"), "start_s": self.rank.start_s,
            "date": str(datetime.date.today()), "attention": self.rank.options.attention, "compiled": self.rank.options.compiled,
            "transports": [workspace.transport for workspace in workspaces],
            "workspace_mib": [workspace.nbytes / 2**20 for workspace in workspaces],
            "model": {name: getattr(config, name) for name in names},
        }  # fmt: skip

    def _remember(self, load: tuple[int, ...]) -> None:
        padded = (max(load),) * len(load)
        for counts in {padded, tuple(max(1, count) for count in load)}:
            with self.rank.arms.remembering(load):
                self._wave(counts, 3)

    def _wave(self, load: tuple[int, ...], steps: int) -> Wave:
        self._number += 1
        return self.rank.wave(load[self.rank.rank], steps, f"wave{self._number}")

    def _compare(self, mode: str, load: tuple[int, ...]) -> None:
        options, arms = self.rank.options, self.rank.arms
        steps: int = options.steps
        waves: dict[str, list[Wave]] = {name: [] for name in arms.managers if mode == "graphs" or "," not in name}
        names, turns = list(waves), max(2, options.turns // 4) if mode == "eager" else options.turns
        for turn in range(turns + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                with arms.using(name, graphs=mode != "eager"):
                    wave = self._wave(load, FIRST_STEPS + 4 if turn == 0 else steps)
                if turn:  # the first one is for what has to be warm
                    waves[name].append(wave)
        for name, own in waves.items():
            self.add(arm=name, mode=mode, load="/".join(map(str, load)), steps=steps, **times_of(self.rank.gather(own)))
        self._compare_tokens(mode, load, waves)

    def _compare_tokens(self, mode: str, load: tuple[int, ...], waves: dict[str, list[Wave]]) -> None:
        """How many requests have all their tokens alike."""

        def alike(left: Wave, right: Wave) -> int:
            return sum(one == other for one, other in zip(left.tokens, right.tokens, strict=True))

        stock, ours = waves["stock"], waves["ours"]
        own = (
            alike(stock[0], ours[0]), alike(stock[0], waves.get("ours, no padding", ours)[0]),
            alike(stock[0], stock[-1]), alike(ours[0], ours[-1]),
            len(stock[0].tokens), len({token for tokens in ours[0].tokens for token in tokens}),
        )  # fmt: skip
        told = [sum(each) for each in zip(*self.rank.gather(own), strict=True)]
        names = (
            "stock_and_ours",
            "stock_and_ours_without_padding",
            "stock_and_stock",
            "ours_and_ours",
            "requests",
            "different_tokens",
        )
        self.add(tokens_alike=dict(zip(names, told, strict=True)), mode=mode, load="/".join(map(str, load)))

    def _profile(self, mode: str, load: tuple[int, ...]) -> None:
        steps, num_layers = 24, self.rank.runner.model_config.hf_config.num_hidden_layers

        def wave() -> None:
            with self.rank.arms.using("ours", graphs=True):
                self._wave(load, FIRST_STEPS + steps)

        try:
            own = layers_of(launches_within(wave), num_layers)
        except Exception as error:  # noqa: BLE001 - what a profiler cannot do is no reason to lose the rest
            own = []
            print(f"no profile: {error!r}", flush=True)
        told = [layers[-steps * (num_layers - 1) :] for layers in self.rank.gather(own)]
        if all(told):
            self.add(exchange=split(told), mode=mode, load="/".join(map(str, load)))


def times_of(waves: list[list[Wave]]) -> dict[str, Any]:
    """Of all ranks' waves: medians over all steps.

    "forward_ms" is that of the rank whose graph ended soonest after its begin: it began last, and waited for nobody's begin. The
    mean of each rank is beside it. So with "meeting_ms": the rank that came last has not waited.
    """

    def steps(name: str) -> list[tuple[float, ...]]:
        return list(zip(*([value for wave in rank for value in getattr(wave, name)] for rank in waves), strict=True))

    step_ms, forward_ms, meeting_ms = steps("step_ms"), steps("forward_ms"), steps("meeting_ms")
    return {
        "step_ms": statistics.median(max(each) for each in step_ms),
        "step_ms_of_waves": [statistics.fmean(wave.step_ms) for wave in waves[0]],
        "forward_ms": statistics.median(min(each) for each in forward_ms) if forward_ms else 0.0,
        "forward_ms_of_ranks": [statistics.median(each) for each in zip(*forward_ms, strict=True)],
        "meeting_ms": statistics.median(min(each) for each in meeting_ms),
    }


def rounded(value: Any) -> Any:
    """With five digits behind the point, which is a hundredth of a microsecond."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def main() -> None:
    options = Namespace(**json.loads(sys.argv[1]))
    if options.device == "cuda":
        print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    run: Callable[[], None] = Measurement(Rank(options), Path(options.out)).run
    run()
