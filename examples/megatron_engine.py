"""Megatron-Core's own inference engine, its MoE layers on tokenferry: a model, an engine, requests, and the tokens they get.

    torchrun --nproc-per-node 2 examples/megatron_engine.py          # a GPU for each rank; decode steps in CUDA graphs
    torchrun --nproc-per-node 2 examples/megatron_engine.py --cpu    # no GPU: the eager path, see below

It needs megatron-core 0.19 and einops. Where `make megatron` has unpacked them, set PYTHONPATH=.megatron, and NO_VCS_VERSION=1,
which lets an unpacked wheel be imported. There is no Transformer Engine: megatron_model.py says what stands in its place.
Megatron's dynamic batching also wants flash-attn; where that is not installed, the example takes a slower stand-in from
tests/engine_harness of this repository, and says so. With the type "nccl" the ranks agree on graphs by an all-reduce a step: the
messages of zmq come with Megatron's coordinator, which is not used here.

With --cpu the engine's scheduling, attention metadata, router and sampling run, and tokenferry's dispatchers between the ranks.
It ends where Megatron wants CUDA itself: there are no CUDA graphs and no streams, nothing is compiled, and torch's operations
stand in the place of its kernels for the cache and the experts (tests/engine_harness/cpu.py).
"""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from engine_harness import cpu
from engine_harness.attention import stand_in_for_flash_attention
from tokenferry.integrations import megatron

REQUESTS = {0: ((5, 6), (17, 4), (9, 8)), 1: ((12, 3),)}
"""For each rank (prompt tokens, tokens to generate); other ranks have none. Rank 1 is done first and helps until all are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the eager path, on CPUs")
    parser.add_argument("--dispatcher", choices=("nvls", "nccl"), default="nvls", help="inference_moe_token_dispatcher_type")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # Megatron says at every import what is not installed
    logging.disable(logging.INFO)
    device = connect(options.cpu)

    # 1. Our dispatchers and experts in the place of Megatron's, before the model is built. Everything below is Megatron's own.
    installation = megatron.install(experts=True)
    if dist.get_rank() == 0:
        print(installation)

    # 2. The model: any MoE GPTModel with transformer_impl="inference_optimized".
    from megatron_model import ModelSize, build_model, model_config

    size = ModelSize()
    if options.cpu:
        config = model_config(size, dispatcher=options.dispatcher, use_cpu_initialization=True)
    else:
        config = model_config(size, dispatcher=options.dispatcher, graph_scope="block")
    model = build_model(config, size, device)

    # 3. The context, which holds the cache, and allocates the dispatchers' buffers.
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

    inference = InferenceConfig(
        max_sequence_length=size.max_sequence_length, buffer_size_gb=0.01 if options.cpu else 0.25,
        block_size_tokens=16, max_requests=8, max_tokens=256, num_cuda_graphs=None if options.cpu else 4,
    )  # fmt: skip
    context = DynamicInferenceContext(config, inference)

    # 4. The engine. Its constructor captures the CUDA graphs.
    from megatron.core.inference.engines import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    wrapper = GPTInferenceWrapper(model, context)
    wrapper.model_is_pipeline_parallel = False
    tokenizer = SimpleNamespace(vocab_size=size.vocab_size, eod=-1, detokenize=lambda tokens: "")  # prompts are numbers here
    controller = TextGenerationController(wrapper, tokenizer)
    engine = DynamicInferenceEngine(controller, context)

    # 5. Requests, other ones on every rank, and their tokens.
    for number, (prompt_tokens, new_tokens) in enumerate(REQUESTS.get(dist.get_rank(), ())):
        add_request(engine, number, prompt_tokens, new_tokens, size.vocab_size)
    tokens = generate(engine, controller)
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            print(f"rank {rank}: {tokens}", flush=True)

    # 6. The end: buffers and connections before the process groups.
    megatron.close()
    installation()  # puts Megatron's own classes back
    dist.destroy_process_group()


def connect(on_cpu: bool) -> torch.device:
    """torch's and Megatron's process groups of the ranks that torchrun started, all of which share the experts."""
    is_stand_in = stand_in_for_flash_attention()  # before Megatron is imported
    if on_cpu:
        cpu.stand_in_for_cuda()
        dist.init_process_group("gloo")
        device = torch.device("cpu")
    else:
        dist.init_process_group("nccl")
        device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if is_stand_in and dist.get_rank() == 0:
        print("flash-attn is not installed: attention by the stand-in of tests/engine_harness/attention.py")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size(), expert_tensor_parallel_size=1)
    if on_cpu:
        cpu.stand_in_for_kernels()
    else:
        model_parallel_cuda_manual_seed(123, inference_rng_tracker=True, force_reset_rng=True)
    return device


def add_request(engine: Any, number: int, prompt_tokens: int, new_tokens: int, vocab_size: int) -> None:
    """A greedy request with a random prompt."""
    from megatron.core.inference.sampling_params import SamplingParams

    generator = torch.Generator().manual_seed(100 * dist.get_rank() + number)
    prompt = torch.randint(0, vocab_size, (prompt_tokens,), generator=generator).tolist()
    engine.add_request(number, prompt, SamplingParams(num_tokens_to_generate=new_tokens, termination_id=-1, top_k=1))


@torch.inference_mode()
def generate(engine: Any, controller: Any) -> dict[int, list[int]]:
    """Steps until no rank has work. A rank without work takes part in its peers' layers by dummy steps."""
    tokens = {}
    while any_rank(engine.has_unfinished_requests()):
        if not engine.has_unfinished_requests():
            controller.dummy_forward()
            continue
        for record in engine.step_modern()["finished_request_records"]:
            request = record.merge()
            tokens[request.request_id] = list(request.generated_tokens)
    megatron.check()  # a peer that is late or gone shows here
    return dict(sorted(tokens.items()))


def any_rank(flag: bool) -> bool:
    """Whether any rank says so. Megatron's coordinator asks by messages of zmq, and not before every step."""
    flags = [False] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return any(flags)


if __name__ == "__main__":
    main()
