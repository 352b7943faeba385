"""The records whose figures are published: names of files in benchmarks/results, which `docs/generate/figures.py` changes."""

ROUND_TRIPS = "2xH200-2026-11-27-round-trips.jsonl"
LAYERS = "2xH200-2026-11-27-layer.jsonl"
MODELS = "2xH200-2026-11-26-model.jsonl"
