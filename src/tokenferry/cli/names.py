"""Names that help texts show. What they name stands elsewhere, and importing it would bring torch, for which `--help` must not
wait; tests/test_start_up.py compares the two."""

from __future__ import annotations

from typing import Final

TRANSPORTS: Final = ("local", "p2p", "nvls", "collective")
"""Of `transports.selection`."""
PRESETS: Final = ("qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-20b-mxfp4", "gpt-oss-120b", "deepseek-v3", "mixtral-8x7b")
"""Of `benchmarking.presets`: one MoE layer each."""
REHEARSAL_PRESETS: Final = ("tiny", "tiny-oss", "tiny-mxfp4", "tiny-v3")
"""The same, for CPUs."""
MODEL_CONFIGS: Final = ("qwen3-30b-a3b", "gpt-oss-20b", "gpt-oss-20b-mxfp4", "mixtral-8x7b")
"""Of `testing.model_configs`: whole models."""
WAYS: Final = ("plain", "p2p", "transformers", "collective")
"""Of `benchmarking.model_request`: how `bench model` decodes."""
