"""The generator of benchmark models: what it writes is opened like any file, and its values stay sane."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ktcompile import load
from ktcompile.checkpoint import open_checkpoint
from ktcompile.weights.ggml import BY_NAME

SPEC = importlib.util.spec_from_file_location("synthetic", Path(__file__).parent.parent / "benchmarks" / "synthetic.py")
assert SPEC and SPEC.loader
synthetic = importlib.util.module_from_spec(SPEC)
sys.modules["synthetic"] = synthetic  # dataclasses look their module up
SPEC.loader.exec_module(synthetic)

TINY = {
    "v3": {"q_lora": 256, "kv_lora": 256, "rope": 32, "nope": 32, "value": 32, "dense": 512, "groups": 4},
    "v2-lite": {"kv_lora": 256, "rope": 32, "nope": 32, "value": 32, "dense": 480},
    "qwen3-30b": {"kv_heads": 2, "head": 64},
}
SMALL = {"hidden": 256, "heads": 8, "experts": 16, "used": 4, "width": 256, "vocabulary": 6200, "layers": 2}


def tiny(model):
    return replace(synthetic.SHAPES[model], **SMALL, **TINY[model])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(synthetic, "_STEP_BYTES", 1 << 20)


@pytest.mark.parametrize("model", sorted(TINY))
def test_a_tiny_one_runs(model, tmp_path, capsys):
    path = synthetic.write(replace(tiny(model), groups_used=2 if model == "v3" else 1), tmp_path)
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == path.stat().st_size and told["path"] == str(path) and told["gb_s"] > 0
    compiled = load(path, dtype="fp32", context=64)
    cache, ids, at = compiled.new_cache(1), torch.tensor([5, 9, 100, 7]), 0
    for _ in range(3):
        positions = torch.arange(at, at + len(ids))
        logits = compiled.step(ids, positions, [len(ids)], torch.tensor([len(ids) - 1]), cache)
        assert logits.isfinite().all() and 0.1 < float(logits.float().std()) < 20
        at, ids = at + len(ids), logits.argmax(-1).cpu()


def test_shards_and_the_tokenizer(tmp_path):
    path = synthetic.write(tiny("v2-lite"), tmp_path, 3)
    assert path.name == "synthetic-00001-of-00003.gguf" and len(list(tmp_path.iterdir())) == 3
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.vocab_size == 6200
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer("Hello").input_ids[1:]) == "Hello"
    with pytest.raises(SystemExit, match="--shards 9: 3 layers make 1 to 4"):
        synthetic.write(tiny("v2-lite"), tmp_path, 9)


@pytest.mark.parametrize("model", sorted(synthetic.SHAPES))
def test_full_sizes_are_the_models(model):
    """Within what Q4_K_M files of these models take, in 10^9 bytes."""
    shape = synthetic.SHAPES[model]
    layers = shape.layers + bool(shape.dense)
    total = sum(t.nbytes for i in range(layers) for t in synthetic.tensors_of(shape, i))
    total += sum(t.nbytes for t in synthetic.ends_of(shape))
    least, most = {"v3": (390, 415), "v2-lite": (9.5, 11), "qwen3-30b": (18, 19)}[model]
    assert least < total / 1e9 < most


@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "q5_0", "q8_0", "f32"])
def test_values_are_centred_and_of_their_size(kind):
    blocks = synthetic.blocks_of(kind, 1024, 1 << 20, np.random.default_rng(0))
    values = BY_NAME[kind].decode(blocks)
    wanted = 0.02 * np.sqrt(7)
    assert abs(values.mean()) < 0.03 * wanted
    assert values.std() == pytest.approx(wanted, rel=0.05)
