"""A stand-in for CUDA graphs on CPUs: what a call does on its tensors is recorded and done anew at each replay.

As in a capture, nothing that changes a tensor is done while recording, and asking for a value is an error. A replay runs no
Python of the call; it reads and writes the recorded tensors, and leaves new numbers in what was returned.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tokenferry as tf
from tokenferry import layer_operator
from tokenferry.recording import Recorded

NOT_PERMITTED = "operation not permitted when stream is capturing"
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)


class _Tape(TorchDispatchMode):
    """Operators on tensors, in order. Those that return new tensors are run while recording, for their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code stays so within it."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.tokenferry.moe.default:
            with self:  # what it does is recorded, not that it was called
                return layer_operator._moe(*args)
        if function in _READS:
            raise RuntimeError(NOT_PERMITTED)
        if function._can_decompose():  # `to()` and the like, which may copy or not
            with self:
                return function.decompose(*args, **kwargs)
        writes = [argument for argument in function._schema.arguments if argument.alias_info and argument.alias_info.is_write]
        if writes:
            self._calls.append((function, args, kwargs, []))
            places = [function._schema.arguments.index(argument) for argument in writes]
            changed = [args[place] if place < len(args) else kwargs[function._schema.arguments[place].name] for place in places]
            return changed[0] if len(function._schema.returns) == 1 else None
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if not all(tensor.untyped_storage()._cdata in given for tensor in made):  # else views, the same in every replay
            self._calls.append((function, args, kwargs, made))
        return result

    def replay(self) -> None:
        """Does all of it anew."""
        with torch.no_grad():
            for function, args, kwargs, made in self._calls:
                result = function(*args, **kwargs)
                again = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                for kept, new in zip(made, again, strict=False):
                    kept.copy_(new)


class StandIn:
    """In the place of `Recorder`, on a workspace without peers.

    Attributes:
        num_recorded, num_replayed: how often, for all that it has recorded.
        fails_with: raised at the end of each recording, if there is one.
    """

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0
        self.fails_with: Exception | None = None

    def __call__(self, workspace: tf.Workspace) -> Any:
        self._workspace = workspace
        return self

    def record(self, call: Callable[[], Any]) -> Recorded:
        """As `Recorder.record`."""
        tape = _Tape()
        with self._workspace.capturing() as num_steps, tape:
            result = call()
            if self.fails_with is not None:
                raise self.fails_with
        self.num_recorded += 1
        poison(result)
        graph: Any = _Graph(tape, self)
        return Recorded(graph, result, num_steps())


class _Graph:
    def __init__(self, tape: _Tape, owner: StandIn) -> None:
        self._tape, self._owner = tape, owner

    def replay(self) -> None:
        """As `torch.cuda.CUDAGraph.replay`."""
        self._owner.num_replayed += 1
        self._tape.replay()


def poison(result: Any) -> None:
    """Nothing ran while recording: what was returned holds no results."""
    if isinstance(result, torch.Tensor):
        tree_map(lambda tensor: tensor.fill_(float("nan") if tensor.is_floating_point() else 99), result)
    elif hasattr(result, "logits"):
        result.logits.fill_(float("nan"))
