"""Expert numbers of 64 bits that no int32 holds, sent where no host looks at the values; on CPUs and GPUs alike."""

import torch

import tokenferry as tf
from cases import settle
from tokenferry import dispatcher

WIDE = (2**32 + 3, -(2**32) + 1, 2**32 - 1, 2**31)
"""Cut to 32 bits these are 3, 1, -1 and the smallest int32."""


def gathered(group: tf.EPGroup, transport: str, index_dtype: torch.dtype) -> list[list[int]]:
    """The numbers that arrive when every rank sends `WIDE`."""
    dispatcher.ids_out_of_range = lambda *_: None  # on CUDA nobody asks: a look at the values would wait for the device
    config, rows = tf.MoEConfig(hidden_size=8, num_experts=4, topk=1, dtype=torch.float32), len(WIDE)
    with tf.Workspace(config, group, max_tokens_per_rank=rows, transport=transport, index_dtype=index_dtype) as ws:
        given = torch.ones(rows, 8), torch.tensor(WIDE)[:, None], torch.ones(rows, 1)
        layer = ws.dispatcher()
        ws.begin_step(rows)
        got = layer.dispatch(*(tensor.to(ws.device) for tensor in given))
        arrived = got.topk_idx[: rows * group.size].clone()
        layer.combine(got.hidden.clone(), got)
        settle(ws)
        return arrived.flatten().tolist()
