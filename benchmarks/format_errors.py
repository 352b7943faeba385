"""What float8 on the wire costs in accuracy, on CPUs: rows, terms, and the answers of the demo model. docs/formats.md quotes it.

    python benchmarks/format_errors.py OUTPUT.jsonl [--commit HASH] [--new-tokens 40] [--model demo]

Records, by "what":
    rows           relative L2 error of rows that a dispatch quantizes
    terms          relative L2 error of combined rows against the sum in float64 of float32 terms, of each layer call and of all
    given answers  the unmodified model's answer is given to both: share of positions with its most likely token, and how far
                   logits are off, the largest difference and each answer's L2 relative to the logits' own
    free answers   `tokenferry verify`: each model goes on with its own tokens, so that one other token changes all that follow

Real rows and terms are those of the demo model in float32, whose prompts and answers two ranks compute together.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import tokenferry as tf
from tokenferry.cli.prompts import DEFAULT_PROMPTS
from tokenferry.cli.tokens import load_tokenizer, tokenize
from tokenferry.demo.model import demo_checkpoint
from tokenferry.demo.quiet import quiet_transformers
from tokenferry.dispatched import FLOAT8
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.testing import run_ranks

RANDOM_SHAPE = (512, 7168)
RANKS = 2
SETTINGS = (
    ("same", "float32"),
    ("same", "bfloat16"),
    ("same", "float8_e4m3fn"),
    ("fp8_block128", "float32"),
    ("fp8_block128", "float8_e4m3fn"),
)
"""dispatch_format and combine_dtype."""


def relative_l2(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


def spread_of(errors):
    errors = sorted(errors)
    return {"calls": len(errors), "least": errors[0], "median": errors[len(errors) // 2], "most": errors[-1]}


def row_record(source, batches):
    errors = [relative_l2(tf.reference.quantize(rows).dequantize(), rows) for rows in batches]
    return {"what": "rows", "source": source, **spread_of(errors)}


def term_records(source, calls):
    """`calls`: for each call of a layer all ranks' float32 terms."""
    for combine_dtype in (torch.bfloat16, FLOAT8):
        for out_dtype in (torch.float32, torch.bfloat16):
            errors = []
            for terms in calls:
                counts = [len(terms[0]), *[0] * (len(terms) - 1)]
                summed = tf.reference.combine(terms, counts, combine_dtype, out_dtype)[0]
                errors.append(relative_l2(summed, sum(term.double() for term in terms)))
            names = {"combine_dtype": str(combine_dtype), "result_dtype": str(out_dtype)}
            yield {"what": "terms", "source": source, "ranks": len(calls[0]), **names, **spread_of(errors)}


class Recording:
    """A layer's experts, which keep the rows that they see and the partial rows that they make."""

    def __init__(self, experts, kept):
        self.experts, self.owned, self.kept = experts, experts.owned, kept

    def partial(self, hidden, topk_idx, topk_weights, dtype):
        terms = self.experts.partial(hidden, topk_idx, topk_weights, dtype)
        self.kept.append((hidden.clone(), terms.clone()))
        return terms


def answer_logits(model, prompt, answer):
    """[tokens of the answer, vocabulary]: what the model makes of the prompt and the answer's tokens so far."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].float()


def on_rank(group, folder, setting, prompts, answers):
    """This rank's logits by prompt, and where all travels in float32 what its experts saw and made."""
    quiet_transformers()
    torch.set_num_threads(1)
    dispatch_format, combine_dtype = setting
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    model = from_pretrained(
        folder, group=group, max_tokens_per_rank=longest, transport="collective", dtype=torch.float32,
        dispatch_format=dispatch_format, combine_dtype=getattr(torch, combine_dtype), timeout_s=120.0,
    )  # fmt: skip
    kept = []
    if setting == SETTINGS[0]:
        for layer in model.expert_parallel.layers:
            layer.experts = Recording(layer.experts, kept)
    logits = {
        number: answer_logits(model, prompts[number], answers[number]) for number in range(group.rank, len(prompts), group.size)
    }
    model.expert_parallel.finish()
    model.expert_parallel.close()
    return logits, [(hidden, terms) for hidden, terms in kept if len(hidden)]


def given_record(setting, logits, wanted):
    differences = [logits[number] - wanted[number] for number in sorted(wanted)]
    equal = sum(int((logits[n].argmax(-1) == wanted[n].argmax(-1)).sum()) for n in wanted)
    return {
        "what": "given answers",
        "dispatch_format": setting[0],
        "combine_dtype": setting[1],
        "equal_tokens": equal,
        "tokens": sum(len(each) for each in wanted.values()),
        "largest_logit_difference": max(float(each.abs().max()) for each in differences),
        "relative_l2_by_answer": [relative_l2(logits[number], wanted[number]) for number in sorted(wanted)],
    }


def free_record(setting, model, new_tokens):
    options = ["--dispatch-format", setting[0], "--combine-dtype", setting[1], "--max-new-tokens", str(new_tokens)]
    command = [sys.executable, "-m", "tokenferry.cli", "verify", "--model", model, "--device", "cpu", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return {
        "what": "free answers", "dispatch_format": setting[0], "combine_dtype": setting[1], **json.loads(done.stdout)["verify"],
    }  # fmt: skip


def unmodified_answers(folder, new_tokens):
    """Prompts and answers as token ids, each answer of `new_tokens`, and the unmodified model's logits of these."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    prompts = tokenize(load_tokenizer(folder), DEFAULT_PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **length)[0, len(prompt) :].tolist())
    pairs = zip(prompts, answers, strict=True)
    return prompts, answers, {number: answer_logits(model, *pair) for number, pair in enumerate(pairs)}


def records(model, new_tokens):
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(RANDOM_SHAPE, generator=generator) for _ in range(8)]
    yield row_record("normal random, 512 x 7168", terms[:1])
    for num_ranks in (2, 8):
        yield from term_records("normal random, 512 x 7168", [terms[:num_ranks]])
    folder = demo_checkpoint(print) if model == "demo" else Path(model)
    prompts, answers, wanted = unmodified_answers(folder, new_tokens)
    for setting in SETTINGS:
        found = run_ranks(on_rank, RANKS, folder, setting, prompts, answers, timeout_s=1200.0)
        if setting == SETTINGS[0]:
            by_rank = [kept for _, kept in found]
            yield row_record(f"{model} model", [hidden for hidden, _ in by_rank[0]])
            yield from term_records(f"{model} model", [[terms for _, terms in call] for call in zip(*by_rank, strict=True)])
        yield given_record(setting, {number: each for logits, _ in found for number, each in logits.items()}, wanted)
    for setting in SETTINGS:
        yield free_record(setting, model, new_tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--model", default="demo", help="demo, or a checkpoint's folder")
    parser.add_argument("--new-tokens", type=int, default=40)
    given = parser.parse_args()
    common = {"device": "cpu", "cpus": os.cpu_count(), "torch": torch.__version__, "commit": given.commit}
    common["date"] = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    given.output.write_text("")
    for record in records(given.model, given.new_tokens):
        with given.output.open("a") as file:
            file.write(json.dumps({**record, **common}) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
