"""The loop of a serving engine around tokenferry: requests arrive while others are decoded, and ranks go idle at different times.

    python examples/engine_loop.py            # 2 ranks: on CPUs over gloo, or on GPUs where there are as many
    python examples/engine_loop.py --ranks 4

Every rank has requests of its own. A step decodes one token of each of its running requests, so that ranks bring other numbers of
tokens, and sometimes none. On GPUs a step replays the CUDA graph of the smallest bucket that holds its tokens; on CPUs the same
`GraphRunner` pads to the bucket and runs eagerly. The model is a toy: an embedding, two MoE layers and an output matrix, random.
"""

import argparse
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import nn

import tokenferry as tf
from tokenferry.experts import Experts, ExpertsConfig
from tokenferry.layer import MoELayer
from tokenferry.router import Router, RouterConfig
from tokenferry.testing import run_ranks

HIDDEN_SIZE, NUM_EXPERTS, TOPK, VOCAB_SIZE, DTYPE = 64, 8, 2, 97, torch.bfloat16
MAX_RUNNING = 8  # requests that a rank decodes at a time: the capacity, and the largest bucket


@dataclass
class Request:
    """What a client asks for. `arrives_at` is the step of the rank's loop in which it is there."""

    number: int
    arrives_at: int
    prompt_token: int
    num_new_tokens: int
    tokens: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.tokens) == self.num_new_tokens


def requests_of(rank: int) -> deque[Request]:
    """Rank 0 gets 6 requests in a row, rank 1 gets 3 and a long pause before the last; further ranks get one each."""
    arrivals = {0: [(0, 5), (0, 3), (1, 7), (2, 4), (4, 6), (5, 2)], 1: [(0, 2), (1, 3), (12, 4)]}.get(rank, [(rank, 3)])
    return deque(
        Request(number, arrives_at, (31 * rank + 7 * number) % VOCAB_SIZE, length)
        for number, (arrives_at, length) in enumerate(arrivals)
    )


class Model(nn.Module):
    """Attention is left out: it needs no other rank, so an engine's own code stays as it is."""

    def __init__(self, workspace: tf.Workspace, group: tf.EPGroup) -> None:
        super().__init__()
        torch.manual_seed(0)  # the ranks share what is no expert
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE, dtype=DTYPE)
        self.output = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False, dtype=DTYPE)
        self.layers = nn.ModuleList(self._layer(workspace, group, seed) for seed in (1, 2))

    @staticmethod
    def _layer(workspace: tf.Workspace, group: tf.EPGroup, seed: int) -> MoELayer:
        mine = group.expert_range(NUM_EXPERTS)
        router = Router(RouterConfig(hidden_size=HIDDEN_SIZE, num_experts=NUM_EXPERTS, topk=TOPK, renormalize=True), dtype=DTYPE)
        shape = ExpertsConfig(hidden_size=HIDDEN_SIZE, intermediate_size=96, num_experts=NUM_EXPERTS)
        experts = Experts(shape, mine, dtype=DTYPE)
        torch.manual_seed(seed)  # experts are drawn whole, and each rank keeps its own
        with torch.no_grad():
            router.weight.normal_(std=0.2)
            for parameter in experts.parameters():
                every = torch.randn(NUM_EXPERTS, *parameter.shape[1:]) * 0.1
                parameter.copy_(every[mine.start : mine.stop])
        return MoELayer(workspace, router, experts)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] token numbers to [T] next ones. The runner has begun the step."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.output(hidden).argmax(-1)


def serve(group: tf.EPGroup) -> dict[str, object]:
    """One rank's engine, until no rank has anything left."""
    config = tf.MoEConfig(hidden_size=HIDDEN_SIZE, num_experts=NUM_EXPERTS, topk=TOPK, dtype=DTYPE)
    with tf.Workspace(config, group, max_tokens_per_rank=MAX_RUNNING) as workspace, torch.device(group.device):
        model = Model(workspace, group)
        runner = tf.GraphRunner(workspace, model, [1, 2, 4, MAX_RUNNING], inputs=[torch.empty(0, dtype=torch.int64)])
        waiting, running, finished = requests_of(group.rank), list[Request](), list[Request]()
        batch_sizes = []
        while True:
            while waiting and waiting[0].arrives_at <= len(batch_sizes) and len(running) < MAX_RUNNING:
                running.append(waiting.popleft())
            batch_sizes.append(len(running))
            if not running:  # take part all the same: the others' tokens need this rank's experts
                if runner.idle(done=not waiting):
                    break  # every rank said done in this same step
                continue
            last = torch.tensor([request.tokens[-1] if request.tokens else request.prompt_token for request in running])
            for request, token in zip(running, runner(last).tolist(), strict=True):
                request.tokens.append(token)
            finished += [request for request in running if request.is_finished]
            running = [request for request in running if not request.is_finished]
        result = {
            "transport": workspace.transport,
            "graphs": runner.num_graphs,
            "tokens in each step": batch_sizes,
            "answers": {request.number: request.tokens for request in sorted(finished, key=lambda request: request.number)},
        }
        runner.close()
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    ranks = parser.parse_args().ranks
    backend = "nccl" if torch.cuda.device_count() >= ranks else "gloo"
    for rank, result in enumerate(run_ranks(serve, ranks, backend=backend)):
        print(f"rank {rank}: {result}")


if __name__ == "__main__":
    main()
