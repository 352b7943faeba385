"""Times a decode step of a transformers model under expert parallelism, each step a call or a replay of one hand-made CUDA graph.

    torchrun --nproc-per-node 2 benchmarks/transformers_decode.py --out decode.jsonl

Ways: `ours` (our expert kernels), `library` (our exchange, transformers' grouped_mm), `rival` (transformers' own expert
parallelism with grouped_mm, whose ranks all work on the whole batch; 5.17 takes these settings, 5.23 does not).
Random weights, greedy tokens, a static cache. A step's time is the slowest rank's, by CUDA events around all timed steps.
"""

import argparse
import contextlib
import datetime
import gc
import json
import logging
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache
from transformers.distributed.configuration_utils import DistributedConfig

import tokenferry as tf
from tokenferry.integrations.transformers import LOCAL_EXPERTS, from_config, random_state, register
from tokenferry.testing.model_configs import MODEL_CONFIGS, model_config

TINY = {
    "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "moe_intermediate_size": 32, "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
WARM_STEPS = 3


class Decoder:
    """Greedy decoding with a static cache, eagerly or from a graph of one step."""

    def __init__(self, model, ids, num_steps):
        self.model, self.ids = model, ids
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 2 * num_steps + 2 * WARM_STEPS + 4)
        self.token = torch.zeros(ids.shape[0], 1, dtype=torch.long, device=ids.device)
        self.graph = None
        self.workspace = model.expert_parallel.workspace if hasattr(model, "expert_parallel") else None

    def call(self, ids):
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].float().argmax(-1, keepdim=True))

    def capture(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.call(self.token)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        capturing = self.workspace.capturing() if self.workspace is not None else contextlib.nullcontext()
        with capturing, torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.call(self.token)
        torch.cuda.current_stream().wait_stream(stream)

    def step(self):
        if self.graph is None:
            self.call(self.token)
            return
        with self.workspace.replaying() if self.workspace is not None else contextlib.nullcontext():
            self.graph.replay()

    def steps(self, count):
        """Milliseconds a step, and the tokens."""
        made = []
        for _ in range(WARM_STEPS):
            self.step()
            made.append(self.token.clone())
        synchronize()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if torch.cuda.is_available() else (None, None)
        start_s = time.perf_counter()
        if begin is not None:
            begin.record()
        for _ in range(count):
            self.step()
            made.append(self.token.clone())
        if end is not None:
            end.record()
        synchronize()
        if self.workspace is not None:
            self.workspace.check()
        ms = begin.elapsed_time(end) if begin is not None else (time.perf_counter() - start_s) * 1e3
        return ms / count, torch.cat(made, 1)

    @torch.no_grad()
    def run(self, count):
        """Milliseconds of an eager step and of one from a graph."""
        self.call(self.ids)
        eager, tokens = self.steps(max(count // 4, 4))
        if not torch.cuda.is_available():
            return slowest(eager), None, tokens
        self.capture()
        replayed, more = self.steps(count)
        return slowest(eager), slowest(replayed), torch.cat([tokens, more], 1)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def slowest(ms):
    found = torch.tensor([ms], dtype=torch.float64, device=DEVICE)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return round(found.item(), 3)


def make(way, config, args):
    if way == "rival":
        [model_class] = {AutoModelForCausalLM._model_mapping[type(config)]}
        state = random_state(model_class, config, args.dtype, DEVICE)
        settings = DistributedConfig(tp_size=dist.get_world_size(), enable_expert_parallel=True)
        return model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=args.dtype,
            distributed_config=settings,
            experts_implementation=LOCAL_EXPERTS,
        )
    own = {} if way == "ours" else {"experts_implementation": "grouped_mm"}
    transport = "p2p" if DEVICE.type == "cuda" else "collective"
    return from_config(
        config, group=tf.EPGroup(dist.group.WORLD), max_tokens_per_rank=args.capacity, transport=transport, dtype=args.dtype,
        timeout_s=20.0, open_timeout_s=120.0, **own,
    )  # fmt: skip


def prompts(config, batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size - 1, (batch, length), generator=generator).to(DEVICE)


def measure(way, config, args, record):
    model = make(way, config, args)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    for batch in args.batches:
        mine = [prompts(config, batch, args.prompt, 100 * batch + rank) for rank in range(dist.get_world_size())]
        ids = torch.cat(mine) if way == "rival" else mine[dist.get_rank()]
        eager, replayed, tokens = Decoder(model, ids, args.steps).run(args.steps)
        first = tokens[:1, :4].tolist()
        record({"way": way, "model": args.model, "batch": batch, "eager_ms": eager, "graph_ms": replayed, "tokens": first})
    if hasattr(model, "expert_parallel"):
        model.expert_parallel.finish()
        model.expert_parallel.close()
    del model
    gc.collect()
    torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(MODEL_CONFIGS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ways", nargs="+", default=["ours", "rival", "library"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on CPUs: whether it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.dtype = torch.float32 if args.rehearse else torch.bfloat16
    config = model_config(f"{args.model}:{args.layers}")
    if args.rehearse:
        config.update({name: value for name, value in TINY.items() if hasattr(config, name)})
    lines = [{"device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", "torch": torch.__version__,
              "transformers": transformers.__version__, "layers": args.layers, "capacity": args.capacity}]  # fmt: skip

    def record(line):
        lines.append(line)
        if dist.get_rank() == 0:
            print(line, flush=True)
            if args.out is not None:
                args.out.write_text("".join(json.dumps(each) + "\n" for each in lines))

    for way in args.ways:
        try:
            measure(way, config, args, record)
        except Exception:  # noqa: BLE001 - the other ways are still worth their time
            record({"way": way, "failed": traceback.format_exc()[-1500:]})
    dist.destroy_process_group()


if __name__ == "__main__":
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    has_gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if has_gpus else "gloo", timeout=datetime.timedelta(seconds=90))
    DEVICE = torch.device("cuda", dist.get_node_local_rank()) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(DEVICE)
    register()
    main()
