"""What a rank does: load its share of the model, answer its prompts, and take part in the others' steps until all are done."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from tokenferry import env
from tokenferry.cli.context import check_prompts
from tokenferry.cli.expert_facts import expert_facts
from tokenferry.cli.job import Answer, Job, RankResult
from tokenferry.cli.phases import telling_phases
from tokenferry.cli.spread import batches, capacity, spread
from tokenferry.cli.tokens import cut_after_stop, load_tokenizer, stop_token_ids, tokenize
from tokenferry.demo.quiet import quiet_transformers
from tokenferry.groups import EPGroup
from tokenferry.testing.model_configs import config_values, model_config
from tokenferry.testing.tiny_models import byte_tokenizer
from tokenferry.transports.opening import telling_the_others

Send = Callable[[dict[str, Any]], None]
TINY: Final = "tiny:"
RANDOM: Final = "random:"
"""Before a configuration whose weights every rank makes up; see `tokenferry.testing.model_configs`."""
LOADING_TIMEOUT_S: Final = 600.0


def answer_as_rank(job: Job, group: EPGroup, send: Send, scratch: Path | None = None) -> RankResult:
    """Answer this rank's prompts under expert parallelism. Collective over `group`.

    `send` gets `{"phase": ...}` in words while the rank loads, `{"total": ..., "prompts": ...}` once it has, `{"new": ...}` as
    tokens come, and `{"done": true}`.
    `scratch` is a folder that somebody else removes, also if this process is killed.
    """
    send({"phase": "importing transformers"})
    from tokenferry.integrations.transformers import from_config, from_pretrained

    quiet_transformers()
    if job.telemetry:
        env.turn_telemetry_on()
    with telling_phases(send), model_folder(job, scratch) as folder:
        send({"phase": "reading the prompts"})
        with telling_the_others(group):
            tokenizer = load_tokenizer(folder)
            token_ids = tokenize(tokenizer, job.prompts)
        lengths = [len(ids) for ids in token_ids]
        check_prompts(folder, lengths, job.max_new_tokens)
        settings: dict[str, Any] = {
            "group": group,
            "max_tokens_per_rank": capacity(lengths, group.size),
            "transport": job.transport,
            "dtype": torch_dtype(job),
            "exact": job.exact,
            "dispatch_format": job.dispatch_format,
            "combine_dtype": getattr(torch, job.combine_dtype),
            "timeout_s": job.timeout_s,
        }
        send({"phase": "loading the model's weights"})
        if job.model.startswith(RANDOM):
            model = from_config(model_config(str(folder)), seed=job.seed, **settings)
        else:
            model = from_pretrained(str(folder), **settings)
        expert = expert_facts(model.expert_parallel, folder / "config.json", job) if job.telemetry else {}
    parallel = model.expert_parallel
    prompts = spread(lengths, group.size)[group.rank]
    send({"prompts": len(prompts), "total": len(prompts) * job.max_new_tokens})
    group.channel.barrier(group.unique_name("cli/loaded"), timeout_s=LOADING_TIMEOUT_S)

    start_s, communication_before_s = time.perf_counter(), parallel.communication_s
    answers = [
        answer for batch in batches(prompts, lengths) for answer in answer_batch(job, model, tokenizer, token_ids, batch, send)
    ]
    generate_s = time.perf_counter() - start_s
    send({"done": True})
    parallel.finish()
    result = RankResult(
        rank=group.rank,
        device=str(group.device),
        transport=parallel.workspace.transport,
        dtype=str(model.dtype).removeprefix("torch."),
        answers=tuple(answers),
        generate_s=generate_s,
        total_s=time.perf_counter() - start_s,
        communication_s=parallel.communication_s - communication_before_s,
        num_threads=torch.get_num_threads(),
        peak_memory_bytes=peak_memory_bytes(group.device),
        telemetry=counted(parallel, expert) if job.telemetry else None,
        **layers_held(parallel, group),
    )
    parallel.close()
    return result


def layers_held(parallel: Any, group: EPGroup) -> dict[str, Any]:
    """How many layers are under expert parallelism, and which of their experts this rank holds."""
    if not parallel.layers:
        return {"num_layers": 0, "experts": (0, 0), "num_experts": 0}
    num_experts = parallel.layers[0].num_experts
    held = group.expert_range(num_experts)
    return {"num_layers": len(parallel.layers), "experts": (held.start, held.stop), "num_experts": num_experts}


def counted(parallel: Any, expert: dict[str, float]) -> dict[str, Any]:
    """What telemetry has counted, and what the experts are that it counted for."""
    return {"snapshot": parallel.workspace.telemetry.snapshot().to_dict(), "expert": expert}


def answer_batch(
    job: Job, model: Any, tokenizer: Any, token_ids: Sequence[Sequence[int]], batch: Sequence[int], send: Send
) -> list[Answer]:
    """Greedy answers to one batch of prompts (numbers into `token_ids`), by the model's own `generate`."""
    stop_ids = stop_token_ids(model)
    inputs = tokenizer.pad({"input_ids": [list(token_ids[prompt]) for prompt in batch]}, return_tensors="pt").to(model.device)
    generated = model.generate(
        **inputs,
        max_new_tokens=job.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[progress(send, stop_ids)],
        return_dict_in_generate=True,
        output_logits=job.keep_logits,
        disable_compile=True,  # compiling takes longer than it saves in one run
    )
    new_ids_BN = generated.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    answers = []
    for row, prompt in enumerate(batch):
        ids = cut_after_stop(new_ids_BN[row], stop_ids)
        logits = torch.stack([step[row] for step in generated.logits[: len(ids)]]).float().cpu() if job.keep_logits else None
        answers.append(
            Answer(
                prompt=prompt,
                num_prompt_tokens=len(token_ids[prompt]),
                token_ids=tuple(ids),
                text=tokenizer.decode(ids, skip_special_tokens=True),
                complete=len(ids) == job.max_new_tokens or (bool(ids) and ids[-1] in stop_ids),
                logits=logits,
            )
        )
    return answers


@contextlib.contextmanager
def model_folder(job: Job, scratch: Path | None) -> Iterator[Path]:
    """The job's model as a folder; a tiny one is made in `scratch` (None: the system's) for as long as it is needed. Of one with
    random weights the folder has the configuration alone, and a tokenizer of bytes."""
    if job.model.startswith(RANDOM):
        with tempfile.TemporaryDirectory(prefix="tokenferry-random-", dir=scratch) as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config_values(job.model.removeprefix(RANDOM))))
            byte_tokenizer().save_pretrained(folder)
            yield Path(folder)
        return
    if not job.model.startswith(TINY):
        yield Path(job.model)
        return
    from tokenferry.testing.tiny_models import make_tiny

    with tempfile.TemporaryDirectory(prefix="tokenferry-tiny-", dir=scratch) as folder:
        yield make_tiny(job.model.removeprefix(TINY), folder, seed=job.seed)


def torch_dtype(job: Job) -> torch.dtype | str:
    """The dtype to load: "auto" is as stored on GPUs, and float32 on CPUs, most of which compute slowly in bfloat16."""
    if job.dtype == "auto":
        return "auto" if job.device == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, job.dtype)
    return dtype


def progress(send: Send, stop_ids: frozenset[int]) -> Callable[..., torch.Tensor]:
    """A stopping criterion that stops nothing and reports the tokens of rows that have not ended yet."""
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device="cpu")
    running: list[torch.Tensor] = []

    def report(input_ids: torch.Tensor, scores: Any, **_kwargs: Any) -> torch.Tensor:
        last = input_ids[:, -1].cpu()
        alive = running.pop() if running else torch.ones_like(last, dtype=torch.bool)
        send({"new": int(alive.sum())})
        running.append(alive & ~torch.isin(last, stop))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return report


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
