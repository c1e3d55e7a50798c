"""`ktrans inspect`: what a person is told about a model file, from its headers alone."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import hostile
import pytest
from conftest import Golden

from ktcompile.checkpoint import EMBEDDED
from ktcompile.errors import ModelFileError
from ktcompile.inspect import inspect_json, inspect_text

HERE = Path(__file__).parent
ROOT = HERE.parent


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages name the path as it was given: relative, they are the same on every machine."""
    monkeypatch.chdir(ROOT)


PAGES = {
    "gguf": f"ktcompile/assets/{EMBEDDED}",
    "fp8": "tests/data/tiny-deepseek-v3",
    "config_only": "tests/data/deepseek-v3-671b",
    "one_shard": "tests/data/tiny-deepseek-v3/model-00001-of-00002.safetensors",
}


@pytest.mark.parametrize("name", PAGES)
def test_pages(golden: Golden, name: str) -> None:
    page = inspect_text(PAGES[name])
    golden(name, page)
    assert max(len(line) for line in page.splitlines()) <= 110
    assert page.count("\n") <= 30


def test_an_unknown_architecture_is_described_as_far_as_its_header_goes(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(hostile.gguf_model().replace(b"deepseek2", b"jamba-moe"))
    os.chdir(tmp_path)
    page = inspect_text("model.gguf")
    golden("unknown", page)
    assert "architecture 'jamba-moe' is not known; known are deepseek2" in page and "explain" not in page


def test_any_shard_stands_for_all(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(hostile.gguf_model())
    extra = hostile.gguf_file((), (hostile.tensor("blk.7.odd.weight"),))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(extra)
    first, second = (inspect_json(str(tmp_path / f"m-0000{i}-of-00002.gguf")) for i in (1, 2))
    assert {**first, "path": ""} == {**second, "path": ""}
    assert first["files"] == 2 and first["unused"] == ["blk.7.odd.weight"]
    assert "1 tensor that nothing reads: blk.7.odd.weight" in inspect_text(str(tmp_path / "m-00001-of-00002.gguf"))


def test_json_says_the_same() -> None:
    facts = json.loads(json.dumps(inspect_json(PAGES["gguf"])))
    assert facts["version"] == 1 and facts["problem"] is None
    groups = {g["name"]: g for g in facts["groups"]}
    assert sum(g["parameters"] for g in groups.values()) == facts["parameters"]
    assert groups["routed experts"]["types"]["q4_k"]["tensors"] == 10
    assert facts["active"] == facts["parameters"] - groups["routed experts"]["parameters"] * 24 // 32
    assert facts["cpu"]["nbytes"] == groups["routed experts"]["nbytes"]


def test_what_is_no_model(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.gguf", "no such file"), (tmp_path, "no config.json in this folder")):
        with pytest.raises(ModelFileError, match=said):
            inspect_text(str(path))
    (tmp_path / "x.gguf").write_bytes(b"PK")
    with pytest.raises(ModelFileError, match=r"give the file itself: .*x\.gguf"):
        inspect_text(str(tmp_path))


def test_a_tensor_that_cannot_be_decoded_is_the_reason(tmp_path: Path) -> None:
    header = {"model.norm.weight": hostile.stored(), "x.weight": hostile.stored(32, 64, [8], "U32")}
    (tmp_path / "model.safetensors").write_bytes(hostile.safetensors_file(header, 64))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    page = inspect_text(str(tmp_path))
    assert "norms" in page and "'x.weight' is U32; known are" in " ".join(page.split()) and "explain" not in page


def test_nothing_but_headers_is_read(tmp_path: Path) -> None:
    """671B parameters in one sparse file of 1.3 TB: 58 layers of 256 experts of three matrices of bf16."""
    config = json.loads((HERE / "data" / "deepseek-v3-671b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for layer in range(3, 61):
        for name in ("gate_up_proj", "down_proj"):
            shape = [256, 4096, 7168] if name == "gate_up_proj" else [256, 7168, 2048]
            size = 2 * shape[0] * shape[1] * shape[2]
            header[f"model.layers.{layer}.mlp.experts.{name}"] = hostile.stored(offset, offset + size, shape, "BF16")
            offset += size
    path = tmp_path / "model.safetensors"
    path.write_bytes(hostile.safetensors_file(header, 0))
    os.truncate(path, path.stat().st_size + offset)
    start = time.perf_counter()
    page = inspect_text(str(tmp_path))
    assert time.perf_counter() - start < 2
    assert "653.9B" in page and "1218 GiB" in page


def test_experts_that_are_stored_one_by_one_take_no_time(tmp_path: Path) -> None:
    """A quarter of the 92,000 tensors of 671B: 15 layers of 256 experts of three FP8 matrices with their scales."""
    shutil.copy(HERE / "data" / "deepseek-v3-671b" / "config.json", tmp_path)
    header, offset = {}, 0
    for layer, expert, name in itertools.product(range(3, 18), range(256), ("gate", "up", "down")):
        shape = [7168, 2048] if name == "down" else [2048, 7168]
        tensor = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for stored, dtype, shape_now, size in (
            (tensor, "F8_E4M3", shape, shape[0] * shape[1]),
            (f"{tensor}_scale_inv", "F32", [n // 128 for n in shape], shape[0] * shape[1] // 4096),
        ):
            header[stored] = hostile.stored(offset, offset + size, shape_now, dtype)
            offset += size
    path = tmp_path / "model.safetensors"
    path.write_bytes(hostile.safetensors_file(header, 0))
    os.truncate(path, path.stat().st_size + offset)
    start = time.process_time()
    page = inspect_text(str(tmp_path))
    assert time.process_time() - start < 1.5
    assert "fp8_block128 11,520" in page and "169.1B" in page
