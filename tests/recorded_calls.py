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
from tokenferry.recording import Recorded

NOT_PERMITTED = "operation not permitted when stream is capturing"
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)


class _Tape(TorchDispatchMode):
    """Operators on tensors, in order. Those that return new tensors are run while recording, for their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _READS:
            raise RuntimeError(NOT_PERMITTED)
        schema = function._schema
        changed = [
            given
            for argument, given in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ] + [kwargs[a.name] for a in schema.arguments if a.name in kwargs and a.alias_info is not None and a.alias_info.is_write]
        if changed:
            self._calls.append((function, args, kwargs, []))
            return changed[0] if len(schema.returns) == 1 else None
        result = function(*args, **kwargs)
        if any(returned.alias_info is not None for returned in schema.returns):
            return result  # a view: of the same memory in every replay
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        given_storages = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        if made and all(tensor.untyped_storage().data_ptr() in given_storages for tensor in made if tensor.numel()):
            return result
        self._calls.append((function, args, kwargs, made))
        return result

    def replay(self) -> None:
        """Does all of it anew."""
        with torch.no_grad():
            for function, args, kwargs, made in self._calls:
                result = function(*args, **kwargs)
                again = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                for kept, new in zip(made, again, strict=bool(made)):
                    if kept is not new:
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
