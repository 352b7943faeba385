"""Whether the scales beside quantized rows are one for each row, or one for all rows of a rank: all ranks find the same.

A rank that has a single row cannot tell a scale of shape [1, 1] for that row from one for all of its rows, while its peers can.
It once took the first for granted, and waited in our exchange for ranks that had gone to vLLM's own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import torch

from tokenferry.errors import StateError
from tokenferry.groups import EPGroup

_EACH: Final = "each"
_ALL: Final = "all"
_EITHER: Final = "either"


class ScaleForms:
    """What the ranks of a group have found out together, for each kind of rows and scales.

    Args:
        timeout_s: how long a rank waits for the others where it has to ask them.
    """

    def __init__(self, group: EPGroup, timeout_s: float) -> None:
        self._group, self._timeout_s = group, timeout_s
        self._found: dict[Hashable, str] = {}

    def are_of_rows(self, hidden: torch.Tensor, scales: torch.Tensor, counts: Sequence[int]) -> bool:
        """Whether each row has scales of its own. Collective where rows of this kind come for the first time; not where every
        rank brings a single one: there a scale for the row is one for all rows too, and all ranks see the same shapes.

        Args:
            hidden, scales: of this rank, both with two dimensions.
            counts: rows of each rank.

        Raises:
            StateError: they were of each row before.
            PeerTimeoutError, PeerFailedError: another rank did not come.
        """
        kind = hidden.dtype, hidden.shape[1], scales.dtype, scales.shape[1]
        own = _form_of(hidden.shape[0], scales.shape[0])
        found = self._found.get(kind)
        if found is None:
            if all(count == 1 for count in counts):
                return own != _ALL
            told = self._group.channel.exchange(self._group.unique_name("vllm/scales"), own, self._timeout_s)
            found = self._found[kind] = _ALL if _ALL in told else _EACH
        if found == _EACH and own == _ALL:
            raise StateError(
                f"{hidden.shape[0]} quantized rows came with scales of shape {list(scales.shape)}, and such rows had scales of "
                "their own before; switch tokenferry off for this model"
            )
        return found == _EACH


def _form_of(num_rows: int, num_scales: int) -> str:
    """What a rank alone can say.

    Example:
        3 rows with 3 scales: "each"; with 1: "all"; 1 row with 1 scale: "either"; no rows with 1 scale: "all". Any other number
        of scales, as where they are padded, counts as "all".
    """
    if num_rows != num_scales:
        return _ALL
    return _EITHER if num_rows == 1 else _EACH
