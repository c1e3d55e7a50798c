"""What loading takes: the bytes of the page, and little more on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ktcompile
from ktcompile.checkpoint import open_checkpoint
from ktcompile.verify import PROVABLE_BYTES

LAYERS, EXPERTS, HIDDEN, WIDTH = 4, 64, 1024, 512
CHILD = r"""
import ctypes, gc, json, sys
from pathlib import Path
import torch
import ktcompile
from ktcompile.checkpoint import open_checkpoint
from ktcompile.model import settings_for
from ktcompile.target import Target, detect

torch.set_num_threads(1)
host = Target((detect(2).host,))

def measured(name):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith(name + ":")).split()[1]) * 1024

folder, quantize = sys.argv[1], sys.argv[2] or None
checkpoint = open_checkpoint(folder)
settings = settings_for(checkpoint, target=host, context=256, quantize=quantize)
plan = ktcompile.explain(checkpoint, settings)[-1]
ktcompile.load(checkpoint, target=host, context=256, quantize=quantize)  # what imports, dynamo and threads keep once
before = measured("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = ktcompile.load(checkpoint, target=host, context=256, quantize=quantize)
cache = model.new_cache()
peak, after = measured("VmHWM"), measured("VmRSS")
held = model.store.nbytes["cpu"] + cache.nbytes
planned = plan.uses[0].weights + plan.uses[0].cache
layer = max(r.nbytes for r in plan.rows)
print(json.dumps({"planned": planned, "held": held, "grown": after - before, "peak": peak - before, "layer": layer}))
"""


def folder(path: Path) -> Path:
    """A Qwen3-MoE of random bf16 weights, written a tensor at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, moe_intermediate_size=WIDTH, intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=4,
        max_position_embeddings=1024,
    )  # fmt: skip
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    save_file(
        {k: torch.randn(v.shape, dtype=torch.bfloat16) * 0.02 for k, v in shapes.items()}, path / "model.safetensors"
    )
    return path


@pytest.mark.parametrize("quantize", ["", "int4"])
def test_loading_takes_the_bytes_of_the_page(tmp_path: Path, quantize: str) -> None:
    """Within 2 % after loading; on the way at most 1.2 times the packed bytes of one layer beyond them.

    The smaller quantised model only has its tensors counted: beside it, 2 % is less than what its graphs take.

    Before the first weight is read, bindings are verified on random weights of at most PROVABLE_BYTES.
    """
    command = [sys.executable, "-c", CHILD, folder(tmp_path), quantize]
    # One heap, and buffers outside it: what glibc keeps of freed ones would be a few percent, another time others.
    env = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, env=env)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] > (100 << 20)
    assert found["held"] == found["planned"], found
    assert quantize or abs(found["grown"] - found["planned"]) <= 0.02 * found["planned"], found
    assert found["peak"] <= max(found["planned"] + 1.2 * found["layer"], PROVABLE_BYTES), found


def test_the_embedded_model_holds_what_the_page_says() -> None:
    checkpoint = open_checkpoint()
    model = ktcompile.load(checkpoint)
    uses = {u.device: u for u in model.plans["decode"].uses}
    assert model.store.nbytes == {name: use.weights for name, use in uses.items()}
    assert model.new_cache().nbytes == sum(use.cache for use in uses.values())
