"""A transformers model as one rank loads it, with no peers and no workspace; what is read of each stored tensor is noted."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenferry as tf
from tokenferry.integrations.transformers import from_pretrained
from tokenferry.integrations.transformers.expert_parallel import ExpertParallel


class Opened(Exception):
    """Raised in the place of opening a workspace: loading is over."""


class Recorder:
    """A stored tensor that notes which rows of it are read."""

    def __init__(self, key: str, tensor: torch.Tensor, reads: dict[str, list[range]]) -> None:
        self._key, self._tensor, self.reads = key, tensor, reads

    def __getitem__(self, index: Any) -> torch.Tensor:
        size = self._tensor.shape[0] if self._tensor.dim() else 0
        rows = range(size) if index is Ellipsis else range(*index.indices(size))
        self.reads.setdefault(self._key, []).append(rows)
        return self._tensor[index].clone()

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8", torch.bfloat16: "BF16"}[self._tensor.dtype]


def stored(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def pack_experts(path: Path) -> Path:
    """Puts random MXFP4 blocks in the place of a gpt_oss checkpoint's expert matrices."""
    from safetensors.torch import save_file

    packed, generator = {}, torch.Generator().manual_seed(0)
    for key, tensor in stored(path).items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, num_inputs, num_outputs = tensor.shape
            shape = (num_experts, num_outputs, num_inputs // 32)
            packed[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            packed[f"{key}_scales"] = torch.full(shape, 124, dtype=torch.uint8)
        else:
            packed[key] = tensor
    save_file(packed, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def load_recorded(
    path: Path, group: tf.EPGroup, monkeypatch: pytest.MonkeyPatch, dtype: str = "auto", **kwargs: Any
) -> tuple[Any, dict[str, list[range]]]:
    """A model as one rank has it, with no peers and no workspace, and the rows that were read of each stored tensor."""
    reads: dict[str, list[range]] = {}

    @contextlib.contextmanager
    def recorded(files: Sequence[str]) -> Iterator[dict[str, Any]]:
        yield {key: Recorder(key, tensor, reads) for file in files for key, tensor in loading_file(file).items()}

    kept: list[Any] = []
    whole_open = ExpertParallel.open

    def keep_and_open(parallel: ExpertParallel, model: Any) -> None:
        kept.append(model)
        whole_open(parallel, model)

    def stop(*_: Any, **__: Any) -> None:
        raise Opened

    from safetensors.torch import load_file as loading_file

    monkeypatch.setattr("tokenferry.integrations.transformers.model.open_tensors", recorded)
    monkeypatch.setattr("tokenferry.integrations.transformers.settings.Workspace", stop)
    monkeypatch.setattr(ExpertParallel, "open", keep_and_open)
    with pytest.raises(Opened):
        from_pretrained(str(path), group=group, max_tokens_per_rank=16, dtype=dtype, **kwargs)
    return kept[0], reads
