"""A rank dies amid a run, the others are told which one, and go on without it.

    python examples/fault_recovery.py

Three ranks on CPUs over gloo. In its third step rank 1 leaves without a word, as a process would that the system has killed. The
others get an error that names it, agree on who is left, and go on as a group of two, in which the experts are divided anew.
"""

import torch

import tokenferry as tf
from tokenferry.testing import run_ranks

HIDDEN_SIZE, NUM_EXPERTS, NUM_TOKENS, VICTIM = 4, 6, 3, 1


def step(workspace: tf.Workspace, dispatcher: tf.Dispatcher) -> list[float]:
    """A forward of one layer. Expert e multiplies by e + 1, and each token goes to two experts with weight 1."""
    group = workspace.group
    mine = group.expert_range(NUM_EXPERTS)
    topk_idx = torch.tensor([[token, token + 3] for token in range(NUM_TOKENS)])
    workspace.begin_step(NUM_TOKENS)
    got = dispatcher.dispatch(torch.ones(NUM_TOKENS, HIDDEN_SIZE), topk_idx, torch.ones(NUM_TOKENS, 2))
    is_mine = (got.topk_idx >= mine.start) & (got.topk_idx < mine.stop)
    factor = ((got.topk_idx + 1) * got.topk_weights * is_mine).sum(1, keepdim=True)
    return dispatcher.combine(got.hidden * factor, got)[:, 0].tolist()


def worker(group: tf.EPGroup) -> list[str]:
    log = []
    config = tf.MoEConfig(hidden_size=HIDDEN_SIZE, num_experts=NUM_EXPERTS, topk=2, dtype=torch.float32)
    with tf.Workspace(config, group, max_tokens_per_rank=8, timeout_s=5.0) as workspace:
        dispatcher = workspace.dispatcher()
        for number in range(1, 6):
            if number == 3 and group.rank == VICTIM:
                workspace.close()
                return ["left without a word"]
            try:
                log.append(f"step {number}: {step(workspace, dispatcher)} from {workspace.group.size} ranks")
            except tf.PeerError as error:
                lost = error.rank
                log.append(f"step {number}: {type(error).__name__} names rank {lost}")
                # Who is left is the engine's to say. Here it is everyone but the rank that the error names.
                survivors = [rank for rank in range(group.size) if rank != lost]
                workspace.reset(group.subset(survivors))
                # An engine loads here the experts that this rank holds from now on, and captures its graphs anew.
                log.append(f"went on with ranks {survivors}, experts {list(workspace.group.expert_range(NUM_EXPERTS))}")
                log.append(f"step {number} again: {step(workspace, dispatcher)} from {workspace.group.size} ranks")
    return log


if __name__ == "__main__":
    for rank, lines in enumerate(run_ranks(worker, 3)):
        for line in lines:
            print(f"rank {rank}: {line}")
