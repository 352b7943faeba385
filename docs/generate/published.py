"""The records whose figures are published: names of files in benchmarks/results, which `docs/generate/figures.py` changes."""

ROUND_TRIPS = "2xH100-2026-11-22.jsonl"
LAYERS = "2xH100-2026-11-26-layer.jsonl"
MODELS = "2xH200-2026-11-26-model.jsonl"
