"""One rank of vLLM on CPUs, offline: `python vllm_engine.py MODEL OUT`. VLLM_DP_* say which rank of how many."""

import json
import os
import sys

PROMPTS = [[3 + (7 * i + 11 * j) % 500 for j in range(5 + 3 * i)] for i in range(6)]
OF_RANK = ((0, 2, 3, 5), (1, 4))
"""Which prompts a rank of two serves: uneven, and of different lengths, so that one rank is idle at the end."""


def main() -> None:
    from vllm import LLM, SamplingParams

    model, out = sys.argv[1:3]
    rank, size = int(os.environ.get("VLLM_DP_RANK", "0")), int(os.environ.get("VLLM_DP_SIZE", "1"))
    mine = range(len(PROMPTS)) if size == 1 else OF_RANK[rank]
    ours = {"enable_expert_parallel": True, "worker_cls": "tokenferry.integrations.vllm.Worker"}
    if size > 1:
        ours["additional_config"] = {"tokenferry": {"timeout_s": 60}}
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        enable_prefix_caching=False,
        **(ours if size > 1 else {}),
    )
    sampling = [SamplingParams(temperature=0.0, max_tokens=12 + 2 * i, ignore_eos=True, detokenize=False) for i in mine]
    answers = llm.generate([{"prompt_token_ids": PROMPTS[i]} for i in mine], sampling)
    with open(out, "w") as file:
        json.dump({i: list(answer.outputs[0].token_ids) for i, answer in zip(mine, answers, strict=True)}, file)


if __name__ == "__main__":
    main()
