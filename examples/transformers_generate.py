"""`generate()` of an unmodified transformers model, its experts spread over ranks, other prompts on every rank.

    python examples/transformers_generate.py                       # a tiny random model, without any download
    python examples/transformers_generate.py --model PATH_OR_ID    # a real one; its text is readable

It needs the extra `transformers`. Ranks are processes on CPUs, or one for each GPU where there are enough of them. There decode
steps are compiled and captured as CUDA graphs at first, which takes far longer than these few tokens; `--eager` leaves that out.
"""

import argparse
import tempfile

import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

PROMPTS = (["The ferry leaves at"], ["Tokens travel", "Each expert", "All ranks take part"])
"""For each rank its own; further ranks have none, and only help."""


def worker(group: tf.EPGroup, path: str, max_new_tokens: int, eager: bool) -> list[str]:
    from transformers import AutoTokenizer

    from tokenferry.integrations.transformers import from_pretrained

    graphs = False if eager else "auto"
    model = from_pretrained(path, group=group, max_tokens_per_rank=512, dtype=torch.float32, cuda_graphs=graphs)
    prompts = PROMPTS[group.rank] if group.rank < len(PROMPTS) else []
    texts = []
    if prompts:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(group.device)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = [tokenizer.decode(row[inputs["input_ids"].shape[1] :].tolist()) for row in tokens]
    model.expert_parallel.finish()  # take part, with zero tokens, until every rank is done
    model.expert_parallel.close()
    return [f"{prompt!r} -> {text!r}" for prompt, text in zip(prompts, texts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="path or name of a mixture-of-experts checkpoint; default: a tiny random one")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    backend = "nccl" if torch.cuda.device_count() >= options.ranks else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if path is None:
            from tokenferry.testing.tiny_models import make_tiny

            path = str(make_tiny("qwen3_moe", folder))
        arguments = (path, options.max_new_tokens, options.eager)
        results = run_ranks(worker, options.ranks, *arguments, backend=backend, timeout_s=600.0)
    for rank, lines in enumerate(results):
        for line in lines or ["no prompts"]:
            print(f"rank {rank}: {line}")


if __name__ == "__main__":
    main()
