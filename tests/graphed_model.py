"""A model of transformers whose decode steps a stand-in records, beside the unmodified model."""

from dataclasses import dataclass
from typing import Any

import torch

from recorded_calls import StandIn
from tokenferry.integrations.transformers.decode_graphs import DecodeGraphs
from transformers_work import prompts

LENGTH = 9
"""Tokens of a prompt."""


@dataclass
class Graphed:
    """A model whose steps the stand-in records, and the unmodified model."""

    model: Any
    plain: Any
    stand_in: StandIn

    @property
    def decode(self) -> DecodeGraphs:
        decode: DecodeGraphs = self.model.expert_parallel.graphs.decode
        return decode

    def expect_equal(self, batch: int = 2, new_tokens: int = 6, **kwargs: Any) -> None:
        """Both models give the same tokens."""
        ids = torch.tensor(prompts((LENGTH,) * batch, batch))
        expected = self.plain.generate(ids, max_new_tokens=new_tokens)
        assert self.model.generate(ids, max_new_tokens=new_tokens, **kwargs).tolist() == expected.tolist()
