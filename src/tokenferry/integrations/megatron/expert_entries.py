"""`fused_moe` in the place of Megatron-Core's two entries to its expert kernels, where it serves, and its working memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from tokenferry.experts import ExpertScratch
from tokenferry.experts.scratch import DEFAULT_MAX_BYTES
from tokenferry.integrations.megatron.fused_moe import fused_moe

_log = logging.getLogger(__name__)

SERVED_ACTIVATIONS: Final = ("squared_relu", "swiglu")
"""Values of Megatron's `ActivationType`: 0.19 has the first, 0.20 both."""

ENOUGH_BYTES: Final = 1 << 62
"""Rows of fixed number, [G, *], are one chunk whatever they need: Megatron's own intermediates have the same size, and further
chunks would cost a decode step their launches."""


class ExpertEntries:
    """Stands in for `vllm_fused_moe` and `mcore_fused_moe`, call by call: ours where it serves a configuration, else Megatron's.

    Who serves follows from the activation, the kinds of the operands and the batch-invariant mode alone, so it never changes
    between the capture of a graph and an eager call. It is looked up by these, and said once for each in the log.

    Args:
        originals: Megatron's two functions by name.
        is_batch_invariant: whether Megatron's batch-invariant mode is on.
        scratch_bytes: upper bound of an `ExpertScratch`; None: what the rows of [G, *] buffers need in one chunk, and the default
            of `ExpertScratch` for other rows.

    Attributes:
        replacements: what stands in for each of `originals`, by name and with its parameters.
        decisions: the sentences that were logged.
    """

    def __init__(
        self,
        originals: Mapping[str, Callable[..., torch.Tensor]],
        is_batch_invariant: Callable[[], bool],
        scratch_bytes: int | None = None,
    ) -> None:
        self._is_batch_invariant, self._scratch_bytes = is_batch_invariant, scratch_bytes
        self.decisions: list[str] = []
        self._serves: dict[tuple[Any, ...], bool] = {}
        self._scratches: dict[tuple[torch.device, bool], ExpertScratch] = {}
        self.replacements = {
            "mcore_fused_moe": self._mcore(originals["mcore_fused_moe"]),
            "vllm_fused_moe": self._vllm(originals["vllm_fused_moe"]),
        }

    def free(self) -> None:
        """Lets go of the scratch of all devices. Graphs that were captured with it must not be replayed."""
        self._scratches.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of scratch held now."""
        return sum(scratch.nbytes for scratch in self._scratches.values())

    # Two functions, not one of *args: a call by name costs nothing on top, and each keeps the parameters that callers know.

    def _mcore(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def mcore_fused_moe(
            hidden_states: torch.Tensor,
            probs: torch.Tensor,
            fc1_weight: Any,
            fc2_weight: Any,
            activation_type: Any,
            num_local_experts: int,
            local_expert_start: int,
            valid_tokens: torch.Tensor,
            routing_map: torch.Tensor,
            disable_fused_quant_kernels: bool = False,
            out: torch.Tensor | None = None,
        ) -> torch.Tensor:
            operands = (hidden_states, probs, fc1_weight, fc2_weight, activation_type, num_local_experts, local_expert_start)
            rest = (valid_tokens, routing_map, disable_fused_quant_kernels, out)
            if self._ours_serves("mcore_fused_moe", hidden_states, fc1_weight, fc2_weight, activation_type, valid_tokens, out):
                partial: torch.Tensor = fused_moe(*operands, *rest, scratch=self._scratch(hidden_states.device, out))
                return partial
            return original(*operands, *rest)

        return mcore_fused_moe

    def _vllm(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(original)
        def vllm_fused_moe(
            hidden_states: torch.Tensor,
            probs: torch.Tensor,
            fc1_weight: Any,
            fc2_weight: Any,
            activation_type: Any,
            num_local_experts: int,
            local_expert_start: int,
            valid_tokens: torch.Tensor,
            routing_map: torch.Tensor,
            out: torch.Tensor | None = None,
            num_tokens_hint: int | None = None,
        ) -> torch.Tensor:
            operands = (hidden_states, probs, fc1_weight, fc2_weight, activation_type, num_local_experts, local_expert_start)
            if self._ours_serves("vllm_fused_moe", hidden_states, fc1_weight, fc2_weight, activation_type, valid_tokens, out):
                scratch = self._scratch(hidden_states.device, out)
                rest = (valid_tokens, routing_map, False, out, num_tokens_hint)
                partial: torch.Tensor = fused_moe(*operands, *rest, scratch=scratch)
                return partial
            return original(*operands, valid_tokens, routing_map, out, num_tokens_hint)

        return vllm_fused_moe

    def _ours_serves(
        self, entry: str, hidden: torch.Tensor, fc1: Any, fc2: Any, activation: Any, valid: Any, out: torch.Tensor | None
    ) -> bool:
        key = (
            entry, activation, hidden.dtype, hidden.device, type(fc1), getattr(fc1, "dtype", None), type(fc2), type(valid),
            None if out is None else out.dtype, self._is_batch_invariant(),
        )  # fmt: skip
        serves = self._serves.get(key)
        if serves is None:
            reason = reason_against(hidden, fc1, fc2, activation, valid, out, is_batch_invariant=key[-1])
            serves = self._serves[key] = not reason
            self._say(entry, hidden, activation, reason)
        return serves

    def _say(self, entry: str, hidden: torch.Tensor, activation: Any, reason: str) -> None:
        kind = f"{getattr(activation, 'value', activation)} experts in {hidden.dtype} on {hidden.device}"
        if reason:
            text = f"{kind}: Megatron's own {entry} serves, since {reason}"
        else:
            text = f"{kind}: tokenferry's fused_moe serves in the place of {entry}"
        if text not in self.decisions:
            self.decisions.append(text)
            _log.log(logging.WARNING if reason else logging.INFO, "%s", text)

    def _scratch(self, device: torch.device, out: torch.Tensor | None) -> ExpertScratch:
        has_fixed_rows = out is not None  # the RSV buffer: the NVLS class's rows are always [G, *]
        scratch = self._scratches.get((device, has_fixed_rows))
        if scratch is None:
            max_bytes = self._scratch_bytes or (ENOUGH_BYTES if has_fixed_rows else DEFAULT_MAX_BYTES)
            scratch = self._scratches[device, has_fixed_rows] = ExpertScratch(device, max_bytes=max_bytes)
        return scratch


def reason_against(
    hidden: torch.Tensor, fc1: Any, fc2: Any, activation: Any, valid: Any, out: torch.Tensor | None, *, is_batch_invariant: bool
) -> str:
    """Why `fused_moe` does not serve such a call, or an empty text."""
    kind = getattr(activation, "value", activation)
    if kind not in SERVED_ACTIVATIONS:
        return f"ours has {' and '.join(SERVED_ACTIVATIONS)}, not {kind!r}"
    for weight in (fc1, fc2):
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):  # a subclass may hold anything behind its dtype
            return f"weights are {type(weight).__name__}, and ours takes stacked torch.Tensors"
        if weight.dtype != torch.bfloat16:
            return f"weights are {weight.dtype}, not torch.bfloat16"
    if hidden.dtype != torch.bfloat16:
        return f"hidden states are {hidden.dtype}, not torch.bfloat16"
    if is_batch_invariant:
        return "its batch-invariant mode promises the bits of its own training forward"
    if not isinstance(valid, torch.Tensor) or valid.dtype != torch.int32:
        return f"valid_tokens is {getattr(valid, 'dtype', type(valid).__name__)}, not a torch.int32 tensor"
    if out is not None and out.dtype not in (torch.float32, torch.bfloat16):
        return f"out is {out.dtype}, neither torch.float32 nor torch.bfloat16"
    if not ExpertScratch.serves(hidden.device):
        return f"our kernels need CUDA, capability 8.0 or newer, and Triton, and rows are on {hidden.device}"
    return ""
