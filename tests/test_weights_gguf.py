"""GGUF: decoders bit for bit those of the gguf package, every parameter covered, laziness."""
# ruff: noqa: SIM118  (a weight source has keys(), but is no mapping to iterate over)

import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import gguf
import hostile
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktcompile.errors import ModelFileError
from ktcompile.weights import (
    GGUFSource,
    ModuleSource,
    SafetensorsSource,
    WeightSource,
    encoding,
    ggml,
    stored_bytes,
    values,
)
from ktcompile.weights.file import ModelFile
from ktcompile.weights.gguf_header import read_header

EMBEDDED = Path(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf"))
FP8 = Path(__file__).parent / "data" / "tiny-deepseek-v3"
TYPES = {t.name: gguf.GGMLQuantizationType(t.code) for t in ggml.TYPES}


# ---- decoders


def same_bits(kind: ggml.BlockType, raw: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, TYPES[kind.name])
    got = kind.decode(raw)
    assert got.shape == want.shape and got.dtype == np.float32
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


@pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)
def test_sizes_are_those_of_the_gguf_package(kind: ggml.BlockType) -> None:
    assert gguf.GGML_QUANT_SIZES[TYPES[kind.name]] == (kind.block_values, kind.block_bytes)


@pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 33), blocks=st.integers(1, 3))
@example(seed=0, rows=1, blocks=1)
def test_random_blocks(kind: ggml.BlockType, seed: int, rows: int, blocks: int) -> None:
    rng = np.random.default_rng(seed)
    same_bits(kind, rng.integers(0, 256, (rows, blocks * kind.block_bytes), dtype=np.uint8))


@pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_arbitrary_blocks(kind: ggml.BlockType, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=kind.block_bytes, max_size=kind.block_bytes))
    same_bits(kind, np.frombuffer(raw, np.uint8).reshape(1, -1))


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x0F, 0x7B, 0x7C, 0x7F, 0x80, 0xF0, 0xFB, 0xFC, 0xFF])
@pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)
def test_edge_blocks(kind: ggml.BlockType, byte: int) -> None:
    same_bits(kind, np.full((2, 2 * kind.block_bytes), byte, np.uint8))


# ---- the embedded model


@pytest.fixture(scope="module")
def source() -> GGUFSource:
    return GGUFSource(EMBEDDED)


def test_header_equals_the_gguf_package(source: GGUFSource) -> None:
    reader = gguf.GGUFReader(EMBEDDED)
    header = read_header(ModelFile(EMBEDDED))
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for key, want in fields.items():
        got = header.metadata[key]
        got = got.tolist() if isinstance(got, np.ndarray) else got
        assert got == (pytest.approx(want, rel=1e-6) if isinstance(want, float) else want), key
    for t in reader.tensors:
        stored = header.tensors[t.name]
        assert (stored.offset, stored.nbytes) == (t.data_offset, t.n_bytes)
        assert stored.shape == tuple(int(n) for n in reversed(t.shape))


def test_whole_tensors_decode_as_in_the_gguf_package(source: GGUFSource) -> None:
    tensors = {t.name: t for t in gguf.GGUFReader(EMBEDDED).tensors}
    for key in source.keys():
        parts = source.parts(key)
        if len(parts) > 2:
            continue
        rows = [gguf.quants.dequantize(tensors[p.name].data, tensors[p.name].tensor_type) for p in parts]
        want = np.concatenate(rows, axis=-2) if len(rows) > 1 else rows[0]
        assert np.array_equal(values(source, key).numpy(), want), key


def test_kv_b_is_assembled_from_heads(source: GGUFSource) -> None:
    key = "model.layers.1.self_attn.kv_b_proj.weight"
    tensors = {t.name: t for t in gguf.GGUFReader(EMBEDDED).tensors}
    k, v = (
        gguf.quants.dequantize(tensors[n].data, tensors[n].tensor_type)
        for n in ("blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight")
    )
    want = np.concatenate([k.transpose(0, 2, 1), v], axis=1).reshape(-1, k.shape[1])
    assert np.array_equal(values(source, key).numpy(), want)
    assert len(source.parts(key)) == 16
    assert source.read(source.parts(key)[0]).dtype == torch.uint8


def test_bytes_of_all_parameters_are_the_bytes_of_the_file(source: GGUFSource) -> None:
    assert source.unused() == ()
    total = sum(t.n_bytes for t in gguf.GGUFReader(EMBEDDED).tensors)
    assert sum(stored_bytes(source, key) for key in source.keys()) == total


def test_encodings(source: GGUFSource) -> None:
    assert encoding(source, "model.layers.1.mlp.experts.gate_up_proj") == "q4_k"
    assert encoding(source, "model.layers.1.mlp.experts.down_proj") == "q5_0"
    assert encoding(source, "lm_head.weight") == "q6_k"
    assert source.spec("model.layers.1.mlp.experts.gate_up_proj").shape == (32, 256, 256)


def test_an_expert_is_read_alone(source: GGUFSource) -> None:
    part = source.parts("model.layers.1.mlp.experts.gate_up_proj")[1]
    whole, one = source.read(part), source.read(part.cut(0, 3, 4))
    assert whole.shape == (32, 128, 144) and torch.equal(one, whole[3:4])


@pytest.mark.parametrize("opened", [lambda: GGUFSource(EMBEDDED), lambda: SafetensorsSource(FP8, layers=6)])
@pytest.mark.parametrize("key", ["mlp.experts.gate_up_proj", "self_attn.kv_b_proj.weight", "mlp.gate.weight"])
@given(st.data())
def test_a_block_of_a_parameter(opened: Callable[[], WeightSource], key: str, data: st.DataObject) -> None:
    source, key = opened(), f"model.layers.1.{key}"
    where = []
    for size in source.spec(key).shape:
        start = data.draw(st.integers(0, size - 1))
        where.append(slice(start, data.draw(st.integers(start + 1, size))))
    assert torch.equal(values(source, key, where=tuple(where)), values(source, key)[tuple(where)])


def test_values_agree_with_fp8(source: GGUFSource) -> None:
    fp8 = SafetensorsSource(FP8, layers=6)
    assert set(source.keys()) == set(fp8.keys())
    for key in source.keys():
        got, want = values(source, key), values(fp8, key)
        assert got.shape == want.shape
        bound = {"f32": 1e-6, "q8_0": 0.01, "q6_k": 0.03, "q5_0": 0.05, "q4_k": 0.08}[encoding(source, key)]
        assert (got - want).norm() <= bound * want.norm(), key


def test_out_and_dtype(source: GGUFSource) -> None:
    key = "model.layers.1.mlp.experts.down_proj"
    want = values(source, key)
    out = torch.empty(32, 256, 128, dtype=torch.bfloat16)
    assert values(source, key, out=out) is out
    assert torch.equal(out, want.bfloat16()) and torch.equal(out, values(source, key, torch.bfloat16))
    with pytest.raises(ValueError, match="out has shape"):
        values(source, key, out=torch.empty(1))


def test_missing_key_names_near_matches(source: GGUFSource) -> None:
    with pytest.raises(ModelFileError, match=r"no parameter 'model.norm.weigth'; near matches: model.norm.weight"):
        source.parts("model.norm.weigth")


def test_module_source_round_trips(source: GGUFSource) -> None:
    tensors = {k: values(source, k, torch.bfloat16) for k in ("model.norm.weight", "lm_head.weight")}
    memory = ModuleSource(tensors)
    for key, tensor in tensors.items():
        assert memory.read(memory.parts(key)[0]).data_ptr() == tensor.data_ptr()
        assert torch.equal(values(memory, key), tensor.float()) and encoding(memory, key) == "bf16"


# ---- files made here


def write(
    path: Path, tensors: dict[str, np.ndarray], arch: str = "deepseek2", meta: dict[str, int] | None = None
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (meta or {}).items():
        writer.add_uint32(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_old_files_with_whole_kv_b_and_tied_head(tmp_path: Path) -> None:
    kv_b = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    embedding = np.ones((8, 32), np.float32)
    path = write(tmp_path / "a.gguf", {"token_embd.weight": embedding, "blk.0.attn_kv_b.weight": kv_b, "odd": kv_b})
    source = GGUFSource(path)
    key = "model.layers.0.self_attn.kv_b_proj.weight"
    assert torch.equal(values(source, key), torch.from_numpy(kv_b))
    assert torch.equal(values(source, "lm_head.weight"), torch.from_numpy(embedding))
    assert source.unused() == ("odd",)


def test_gate_and_up_of_different_types(tmp_path: Path) -> None:
    gate = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    up = gguf.quants.quantize(gate, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "deepseek2")
    writer.add_tensor("blk.0.ffn_gate_exps.weight", gate)
    writer.add_tensor("blk.0.ffn_up_exps.weight", up, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "a.gguf")
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert encoding(source, key) == "f32+q8_0" and source.spec(key).shape == (2, 8, 32)
    got = values(source, key)
    assert np.array_equal(got[:, :4].numpy(), gate)
    assert np.array_equal(got[:, 4:].numpy(), gguf.quants.dequantize(up, gguf.GGMLQuantizationType.Q8_0))


def test_shards(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", {"token_embd.weight": np.ones((2, 32), np.float32)})
    with pytest.raises(ModelFileError, match=r"missing: m-00002-of-00002.gguf"):
        GGUFSource(first)
    second = write(tmp_path / "m-00002-of-00002.gguf", {"output_norm.weight": np.ones(32, np.float32)})
    for path in (first, second):
        assert set(GGUFSource(path).keys()) == {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    write(second, {"token_embd.weight": np.ones((2, 32), np.float32)})
    with pytest.raises(ModelFileError, match="is also in"):
        GGUFSource(first)


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"x": np.ones(32, np.float32)}, arch="mamba")
    with pytest.raises(ModelFileError, match="'mamba'; known are deepseek2"):
        GGUFSource(path)


def test_opening_reads_only_the_header(tmp_path: Path) -> None:
    rows = 1 << 28  # 32 GiB of fp32 that are not there: a sparse file
    path = tmp_path / "sparse.gguf"
    path.write_bytes(hostile.gguf_file(tensors=(hostile.tensor("token_embd.weight", (32, rows)),), data_bytes=0))
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) + 128 * rows)
    start = time.perf_counter()
    source = GGUFSource(path)
    part = source.parts("model.embed_tokens.weight")[0]
    raw = source.read(part.cut(0, rows - 2, rows))
    assert time.perf_counter() - start < 1
    assert part.spec.nbytes == 128 * rows and part.spec.shape == (rows, 32) and raw.shape == (2, 32)
