"""`convert` writes what was read, in any encoding, whole or not at all, in little memory."""

import _thread
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from ktcompile.backends.native import quantize
from ktcompile.checkpoint import Checkpoint, open_checkpoint
from ktcompile.convert import TARGETS, Report, convert, to_gguf, to_safetensors
from ktcompile.errors import ModelFileError
from ktcompile.model import load
from ktcompile.weights import GGUFSource, ModuleSource, SafetensorsSource, WeightSource, decode, values
from ktcompile.weights.file import ModelFile
from ktcompile.weights.gguf_header import Value, read_header
from ktcompile.weights.safetensors_header import INDEX

FOLDER = Path(__file__).parent / "data" / "tiny-deepseek-v3"
TEXTS = ("Once upon a time", "  1234567 tabs\tand\n\nlines", "<think>\n漢字 und Straße 🙂")

BOUNDS = {"f32": 0.0, "bf16": 0.003, "f16": 0.001, "fp8_block128": 0.04, "q8_0": 0.006}
BOUNDS |= {"q6_k": 0.02, "q5_k": 0.04, "q5_0": 0.05, "q4_k": 0.09, "q4_0": 0.12}
"""Relative L2 error of one parameter after one rounding."""


def converted(checkpoint: Checkpoint, out: Path, to: str, **options: object) -> Report:
    return convert(checkpoint, out, to, quantize=quantize, threads=2, **options)  # type: ignore[arg-type]


def error_of(got: WeightSource, want: WeightSource, key: str) -> float:
    a, b = values(got, key), values(want, key)
    assert a.shape == b.shape, key
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check_close(got: WeightSource | None, want: WeightSource | None) -> None:
    """Every parameter is there, within the bound of the coarsest encoding that it has now."""
    assert got is not None and want is not None and set(got.keys()) == set(want.keys())
    for key in list(want.keys()):
        bound = max(BOUNDS[name] for name in got.spec(key).encoding.split("+"))
        assert error_of(got, want, key) <= bound, f"{key}: {got.spec(key).encoding}"


def same_text(got: Checkpoint, want: Checkpoint) -> None:
    for text in TEXTS:
        ids = want.tokenizer(text).input_ids
        assert got.tokenizer(text).input_ids == ids
        assert got.tokenizer.decode(ids) == want.tokenizer.decode(ids)
    messages = [{"role": "user", "content": "Hello"}]
    texts = [c.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for c in (got, want)]
    assert texts[0] == texts[1]


def in_memory(source: WeightSource, config: object) -> Checkpoint:
    """A checkpoint of weights in memory."""
    return Checkpoint("tiny", "nowhere", config, source, GenerationConfig(), lambda: open_checkpoint().tokenizer)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("to", ["q8_0", "q4_k_m", "bf16"])
def test_an_fp8_folder_becomes_a_gguf_file(tmp_path: Path, to: str) -> None:
    before = open_checkpoint(FOLDER)
    report = converted(before, tmp_path / "out.gguf", to)
    after = open_checkpoint(tmp_path / "out.gguf")
    assert isinstance(after.source, GGUFSource) and before.source is not None
    check_close(after.source, before.source)
    same_text(after, before)
    theirs = before.config.to_dict()
    ours = after.config.to_dict()
    for name in ("hidden_size", "n_routed_experts", "kv_lora_rank", "topk_group", "rope_parameters", "vocab_size"):
        assert ours[name] == theirs[name]
    assert ours["num_hidden_layers"] == 6
    assert after.source.metadata["general.quantization_version"] == 2
    assert after.source.metadata["general.file_type"] == {"q8_0": 7, "q4_k_m": 15, "bf16": 32}[to]
    assert os.listdir(tmp_path) == ["out.gguf"]
    assert report.bytes_out == (tmp_path / "out.gguf").stat().st_size
    assert report.weights == sum(math.prod(before.source.spec(key).shape) for key in list(before.source.keys()))
    assert any("218 stored tensors" in note for note in report.notes)


@pytest.mark.parametrize("to", [t for t in TARGETS if t not in to_safetensors.TARGETS])
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, to: str) -> None:
    path = tmp_path / "out.gguf"
    converted(open_checkpoint(), path, to)
    reader, source = gguf.GGUFReader(path), GGUFSource(path)
    assert not source.unused()
    assert {t.name for t in reader.tensors} == {t.name for t in gguf.GGUFReader(open_checkpoint().path).tensors}
    own = {name: kind for name, (_, kind) in source._stored.items()}
    for tensor in reader.tensors:
        assert tensor.data_offset == own[tensor.name].offset and tensor.data_offset % 32 == 0
        assert tensor.tensor_type.name.lower() == own[tensor.name].type.name
        if tensor.tensor_type.name not in ("F32", "F16"):
            raw = torch.from_numpy(np.array(tensor.data).view(np.uint8))
            theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(decode(raw, tensor.tensor_type.name.lower()).numpy().ravel(), theirs.ravel())
    assert all(t.tensor_type.name == "F32" for t in reader.tensors if "norm" in t.name or "inp" in t.name)
    reader.data._mmap.close()  # type: ignore[attr-defined]


def test_a_folder_with_experts_from_a_gguf_file_becomes_one_file(tmp_path: Path) -> None:
    before = open_checkpoint(FOLDER, open_checkpoint().path)
    converted(before, tmp_path / "out.gguf", "q4_k_m")
    after = open_checkpoint(tmp_path / "out.gguf")
    check_close(after.source, before.source)
    same_text(after, before)
    stored = {t.name: t.data for t in gguf.GGUFReader(open_checkpoint().path).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        if "_exps" in tensor.name:
            np.testing.assert_array_equal(tensor.data, stored[tensor.name])


def test_a_type_that_is_there_already_is_copied_bit_for_bit(tmp_path: Path) -> None:
    before = open_checkpoint()
    report = converted(before, tmp_path / "out.gguf", "q4_k_m")
    ours, theirs = gguf.GGUFReader(tmp_path / "out.gguf"), gguf.GGUFReader(before.path)
    mine = {t.name: t for t in ours.tensors}
    for tensor in theirs.tensors:
        if tensor.name != "token_embd.weight":  # q4_k in llama.cpp's mixture, q6_k in ours
            assert mine[tensor.name].tensor_type == tensor.tensor_type, tensor.name
            np.testing.assert_array_equal(mine[tensor.name].data, tensor.data)
    assert report.copied == len(theirs.tensors) - 1
    assert "rounded a second time, from an encoding that had lost precision already: 1 q4_k to q6_k" in report.notes
    for key, value in GGUFSource(before.path).metadata.items():
        np.testing.assert_array_equal(np.array(GGUFSource(tmp_path / "out.gguf").metadata[key]), np.array(value))


def test_fp8_becomes_bf16_as_decoded(tmp_path: Path) -> None:
    before = open_checkpoint(FOLDER)
    converted(before, tmp_path / "out", "bf16-safetensors", shard_bytes=10_000_000)
    after = open_checkpoint(tmp_path / "out")
    assert isinstance(after.source, SafetensorsSource) and before.source is not None
    assert set(after.source.keys()) == set(before.source.keys())
    for key in list(before.source.keys()):
        want = values(before.source, key)
        assert torch.equal(values(after.source, key), want.bfloat16().float() if want.dim() > 1 else want), key
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 5 and all(s.stat().st_size < 10_200_000 for s in shards)
    same_text(after, before)
    assert after.generation.to_diff_dict() == before.generation.to_diff_dict()
    with safe_open(shards[0], "pt") as file:
        name = next(n for n in list(file.keys()) if n.endswith("experts.0.gate_proj.weight"))
        assert file.get_tensor(name).dtype == torch.bfloat16


def test_fp8_stays_fp8_byte_for_byte(tmp_path: Path) -> None:
    before = open_checkpoint(FOLDER)
    report = converted(before, tmp_path / "out", "fp8")
    assert report.copied == sum(report.types.values())
    stored = json.loads((FOLDER / INDEX).read_text())["weight_map"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as ours:
        names = [name for name in stored if not name.startswith("model.layers.6.")]
        assert set(ours.keys()) == set(names)
        for shard in sorted(set(stored.values())):
            with safe_open(FOLDER / shard, "pt") as theirs:
                for name in set(names) & set(theirs.keys()):
                    a, b = ours.get_tensor(name), theirs.get_tensor(name)
                    assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def test_gguf_becomes_fp8(tmp_path: Path) -> None:
    before = open_checkpoint()
    report = converted(before, tmp_path / "out", "fp8")
    after = open_checkpoint(tmp_path / "out")
    assert after.source is not None and before.source is not None
    check_close(after.source, before.source)
    same_text(after, before)
    assert after.source.spec("model.layers.1.mlp.experts.gate_up_proj").encoding == "fp8_block128"
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert fields["weight_block_size"] == [128, 128] and "lm_head" in fields["modules_to_not_convert"]
    assert "model.layers.1.mlp.gate" in fields["modules_to_not_convert"]
    assert any(note.startswith("rounded a second time") for note in report.notes)


def test_gguf_to_safetensors_to_gguf_runs(tmp_path: Path) -> None:
    converted(open_checkpoint(), tmp_path / "wide", "bf16-safetensors")
    report = converted(open_checkpoint(tmp_path / "wide"), tmp_path / "out.gguf", "q8_0")
    assert not [note for note in report.notes if "second time" in note]
    expected = json.loads((FOLDER.parent / "expected.json").read_text(encoding="utf-8"))
    prompt = expected["prompts"]["chat_story"]["ids"]
    answer = expected["tiny-deepseek-v3-Q4_K_M.gguf, llama.cpp"]["greedy"]["chat_story"]["tokens"]
    with torch.no_grad():
        logits = load(tmp_path / "out.gguf")(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    assert (logits.argmax(-1) == torch.tensor(answer)).float().mean() > 0.95


@pytest.mark.parametrize("family", sorted(set(tiny._CONFIGS) - {"glm4_moe_lite"}))  # GLM-4.7-Flash: safetensors only
def test_every_architecture_comes_back_as_it_was(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcompile.convert.metadata.tokenizer_metadata", lambda *a: {})  # its tokenizer is too large
    limit = {"swiglu_limit": 7.0} if family == "gpt_oss" else {}  # llama.cpp's, which no key of a file can change
    model = tiny.model(family, **limit)
    source = ModuleSource({name: value.detach() for name, value in model.state_dict().items()})
    checkpoint = in_memory(source, model.config)
    converted(checkpoint, tmp_path / "out.gguf", "f32")
    back = open_checkpoint(tmp_path / "out.gguf")
    assert back.source is not None and back.config.model_type == model.config.model_type
    converted(checkpoint, tmp_path / "out", "bf16-safetensors")
    narrow = open_checkpoint(tmp_path / "out").source
    assert narrow is not None
    converted(checkpoint, tmp_path / "fp8", "fp8")
    check_close(open_checkpoint(tmp_path / "fp8").source, source)
    assert set(back.source.keys()) == set(narrow.keys()) == set(source.keys())
    for key in list(source.keys()):
        assert torch.equal(values(back.source, key), values(source, key)), key
        assert error_of(narrow, source, key) <= BOUNDS["bf16"], key


def test_large_matrices_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted(open_checkpoint(FOLDER), tmp_path / "whole.gguf", "q5_k")
    converted(open_checkpoint(FOLDER), tmp_path / "whole", "fp8")
    monkeypatch.setattr("ktcompile.convert.chunks.CHUNK_VALUES", 20_000)
    monkeypatch.setattr("ktcompile.convert.to_gguf.CHUNK_VALUES", 20_000)
    converted(open_checkpoint(FOLDER), tmp_path / "cut.gguf", "q5_k")
    converted(open_checkpoint(FOLDER), tmp_path / "cut", "fp8")
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / file.name).read_bytes() == file.read_bytes()


def test_the_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    for threads in (1, 3):
        convert(open_checkpoint(), tmp_path / f"{threads}.gguf", "q6_k", quantize=quantize, threads=threads)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


_NUMBERS = st.floats(width=32, allow_nan=False).map(lambda x: float(str(np.float32(x))))  # as read_header gives it
_VALUES = st.one_of(
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    _NUMBERS,
    st.text(max_size=9),
    st.just(1e300),
    st.lists(st.text(max_size=9), min_size=1, max_size=4),
    st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=4).map(lambda x: np.array(x, np.int32)),
    st.lists(_NUMBERS, min_size=1, max_size=4).map(lambda x: np.array(x, np.float32)),
)


@given(st.dictionaries(st.text(min_size=1, max_size=9).map("general.x{}".format), _VALUES, max_size=6))
def test_metadata_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, metadata: Mapping[str, Value]
) -> None:
    path = tmp_path_factory.mktemp("metadata") / "out.gguf"
    to_gguf.write_header(path, "deepseek2", metadata, [])
    found = dict(read_header(ModelFile(path)).metadata)
    assert found.pop("general.architecture") == "deepseek2" and found.keys() == metadata.keys()
    for key, value in metadata.items():
        assert type(found[key]) is type(value), key
        np.testing.assert_array_equal(np.array(found[key]), np.array(value))


_SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)
_KINDS = st.sampled_from([("F32", 4, torch.float32), ("BF16", 2, torch.bfloat16), ("F8_E4M3", 1, torch.float8_e4m3fn)])


@given(st.dictionaries(st.text(min_size=1, max_size=9).filter(str.isprintable), st.tuples(_SHAPES, _KINDS), max_size=6))
def test_safetensors_reads_every_layout(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: Mapping[str, tuple[tuple[int, ...], tuple[str, int, torch.dtype]]],
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    entries = [to_safetensors.Entry(n, kind[0], kind[1], shape) for n, (shape, kind) in tensors.items()]
    shard = to_safetensors.shard("model.safetensors", entries)
    to_safetensors.create(folder, [shard])
    data = {n: os.urandom(e.nbytes) for n, e in zip(tensors, entries, strict=True)}
    with (folder / shard.name).open("r+b") as file:
        for entry in entries:
            assert shard.offsets[entry.name] % entry.size == 0
            file.seek(shard.offsets[entry.name])
            file.write(data[entry.name])
    with safe_open(folder / shard.name, "pt") as found:
        assert set(found.keys()) == set(tensors)
        for name, (shape, kind) in tensors.items():
            tensor = found.get_tensor(name)
            assert tuple(tensor.shape) == shape and tensor.dtype == kind[2]
            assert bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) == data[name]


def test_a_value_that_f16_cannot_hold_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcompile.convert.metadata.tokenizer_metadata", lambda *a: {})
    model = tiny.model("qwen3_moe")
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    weights["model.layers.1.mlp.experts.down_proj"][3, 2, 1] = 70000.0
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down_exps\.weight: 70000 does not fit f16.*bf16"):
        converted(in_memory(ModuleSource(weights), model.config), tmp_path / "out.gguf", "f16")
    weights["model.layers.1.mlp.experts.down_proj"][3, 2, 1] = math.nan
    with pytest.raises(ModelFileError, match=r"blk\.1\.ffn_down_exps\.weight: cannot be written as q8_0: .*nan"):
        converted(in_memory(ModuleSource(weights), model.config), tmp_path / "out.gguf", "q8_0")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------ refusals and faults


def refusal(out: Path, to: str = "q8_0", source: Path | None = None, **options: object) -> str:
    with pytest.raises(ModelFileError) as caught:
        converted(open_checkpoint(source), out, to, **options)
    text = str(caught.value)
    assert str(out) in text and "\n" not in text
    return text


def test_what_is_there_stays_without_force(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    path.write_text("mine")
    assert "--force replaces it" in refusal(path)
    assert path.read_text() == "mine"
    converted(open_checkpoint(), path, "q8_0", force=True)
    assert path.stat().st_size > 1_000_000
    folder = tmp_path / "out"
    converted(open_checkpoint(), folder, "fp8")
    assert "--force replaces it" in refusal(folder, "bf16-safetensors")
    converted(open_checkpoint(), folder, "bf16-safetensors", force=True)
    assert open_checkpoint(folder).source.spec("lm_head.weight").encoding == "bf16"  # type: ignore[union-attr]
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in refusal(folder, "fp8", force=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.gguf"]


def test_the_source_is_never_the_target(tmp_path: Path) -> None:
    own = tmp_path / "model.gguf"
    shutil.copy(open_checkpoint().path, own)
    (tmp_path / "link.gguf").symlink_to(own)
    for name in ("model.gguf", "link.gguf", "../" + tmp_path.name + "/model.gguf"):
        assert "being read" in refusal(tmp_path / name, "q8_0", own, force=True)
    folder = tmp_path / "folder"
    shutil.copytree(FOLDER, folder)
    assert "being read" in refusal(folder, "bf16-safetensors", folder, force=True)
    converted(open_checkpoint(folder), folder / "inside.gguf", "q8_0")  # beside the shards is a good place


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("out.bin", "q8_0", "NAME.gguf"),
        ("out.gguf", "fp8", "a folder"),
        ("none/out.gguf", "q8_0", "there is no folder"),
        ("folder.gguf", "q8_0", "is a folder"),
    ],
)
def test_a_wrong_target_is_refused(tmp_path: Path, name: str, to: str, words: str) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert words in refusal(tmp_path / name, to)


def test_an_unknown_encoding_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'q3_k'.*q4_k_m.*fp8"):
        converted(open_checkpoint(), tmp_path / "out.gguf", "q3_k")


def test_a_configuration_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="nothing to convert"):
        converted(open_checkpoint(FOLDER.parent / "deepseek-v3-671b"), tmp_path / "out.gguf", "q8_0")


@pytest.mark.parametrize(("name", "to"), [("out.gguf", "q8_0"), ("out", "fp8")])
def test_half_a_model_is_refused_with_what_it_lacks(tmp_path: Path, name: str, to: str) -> None:
    whole = open_checkpoint()
    assert whole.source is not None
    kept = [key for key in list(whole.source.keys()) if ".mlp.experts." not in key and key != "model.norm.weight"]
    weights = {key: values(whole.source, key) for key in kept}
    with pytest.raises(ModelFileError) as caught:
        converted(in_memory(ModuleSource(weights), whole.config), tmp_path / name, to)
    names = "model.layers.*.mlp.experts.down_proj (5), model.layers.*.mlp.experts.gate_up_proj (5), model.norm.weight"
    assert str(caught.value).startswith("nowhere: lacks 11 of the 95 parameters of the model")
    assert f": {names}; " in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_tied_head_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcompile.convert.metadata.tokenizer_metadata", lambda *a: {})
    model = tiny.model("qwen3_moe")
    model.config.tie_word_embeddings = True
    weights = {name: value.detach() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    converted(in_memory(ModuleSource(weights), model.config), tmp_path / "out.gguf", "f32")
    assert "output.weight" not in GGUFSource(tmp_path / "out.gguf").stored()


def test_too_little_space_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert "needs 22.6" in (text := refusal(tmp_path / "out.gguf")) and "1.00 MB are free" in text
    assert "are free" in refusal(tmp_path / "out", "fp8")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    assert "cannot be written" in refusal(Path("/proc/out.gguf"))
    assert "cannot be written" in refusal(Path("/proc/out"), "fp8")


@pytest.mark.parametrize(("name", "to"), [("out.gguf", "q8_0"), ("out", "fp8")])
def test_a_file_size_limit_leaves_nothing(tmp_path: Path, name: str, to: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = open_checkpoint()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, limits[1]))
    try:
        with pytest.raises(ModelFileError, match="File too large; nothing is left of it"):
            converted(checkpoint, tmp_path / name, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "to"), [("out.gguf", "q8_0"), ("out", "fp8")])
def test_a_disk_that_becomes_full_leaves_nothing(
    tmp_path: Path, name: str, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [5_000_000]
    write = os.pwrite

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, offset)

    monkeypatch.setattr("os.pwrite", pwrite)
    assert "No space left on device; nothing is left of it" in refusal(tmp_path / name, to)
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted(open_checkpoint(), tmp_path / "a.gguf", "q8_0")
    write = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda handle, data, offset: write(handle, data[: 1 + len(data) // 3], offset))
    converted(open_checkpoint(), tmp_path / "b.gguf", "q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(("name", "to"), [("out.gguf", "q8_0"), ("out", "fp8")])
def test_ctrl_c_leaves_nothing_and_the_old_file_as_it_was(tmp_path: Path, name: str, to: str) -> None:
    if name == "out.gguf":
        (tmp_path / name).write_text("mine")
    before = os.listdir(tmp_path)
    seen: list[str] = []

    def progress(tensor: str, done: int, total: int) -> None:
        if not seen:
            _thread.interrupt_main()
        seen.append(tensor)

    threads = torch.get_num_threads()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            converted(open_checkpoint(), tmp_path / name, to, force=True, progress=progress)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert os.listdir(tmp_path) == before
    assert torch.get_num_threads() == threads
    assert all((tmp_path / n).read_text() == "mine" for n in before)


def test_progress_counts_every_byte_of_the_tensors(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = converted(open_checkpoint(), tmp_path / "out", "fp8", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[-1] == calls[-1][2] <= report.bytes_out
    text = report.text()
    assert f"{report.bits:.2f} bits per weight" in text and "GB/s" in text and text.startswith(str(tmp_path / "out"))


# ------------------------------------------------------------------------------------------------ in another process

_CHILD = """
import sys, time
from ktcompile.backends.native import quantize
from ktcompile.checkpoint import open_checkpoint
from ktcompile.convert import convert
source, out, to, wait = sys.argv[1:]
def peak_kib():  # getrusage would count the parent's pages at fork
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
def progress(name, done, total):
    if wait == "wait":
        print("writing", flush=True)
        time.sleep(60)
checkpoint = open_checkpoint(source)
before = peak_kib()
convert(checkpoint, out, to, quantize=quantize, threads=2, progress=progress)
print(peak_kib() - before)
"""


def child(source: Path, out: Path, to: str, wait: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _CHILD, str(source), str(out), to, "wait" if wait else "run"]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.parametrize(("name", "to"), [("out.gguf", "q8_0"), ("out", "fp8")])
def test_killed_in_the_middle_nothing_has_the_final_name(tmp_path: Path, name: str, to: str) -> None:
    with child(FOLDER, tmp_path / name, to, wait=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert [entry.endswith(".partial") for entry in os.listdir(tmp_path)] == [True]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A model of 201 MB, 403 MB in fp32, 107 MB in q8_0, takes less than 130 MB of working memory."""
    large_folder(tmp_path / "large", experts=16, hidden=2048, width=1024)
    with child(tmp_path / "large", tmp_path / "out.gguf", "q8_0", wait=False) as process:
        assert process.stdout is not None
        kib = int(process.stdout.read())
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 200_000_000
    assert kib * 1024 < 130_000_000


def large_folder(folder: Path, experts: int, hidden: int, width: int) -> None:
    """A bf16 model of one layer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FOLDER / name, folder / name)
    config = json.loads((FOLDER / "config.json").read_text())
    del config["quantization_config"]
    config |= {"hidden_size": hidden, "moe_intermediate_size": width, "n_routed_experts": experts, "n_group": 1}
    config |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "topk_group": 1, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(width * hidden, generator=generator).bfloat16()

    def some(*shape: int) -> Tensor:
        return pool[: math.prod(shape)].reshape(shape).clone()

    layer, attention, mlp = "model.layers.0.", "model.layers.0.self_attn.", "model.layers.0.mlp."
    weights = {f"{layer}{name}_layernorm.weight": some(hidden) for name in ("input", "post_attention")}
    weights |= {"model.norm.weight": some(hidden), "model.embed_tokens.weight": some(64, hidden)}
    weights |= {"lm_head.weight": some(64, hidden), f"{attention}q_a_proj.weight": some(96, hidden)}
    weights |= {f"{attention}q_a_layernorm.weight": some(96), f"{attention}q_b_proj.weight": some(512, 96)}
    weights |= {
        f"{attention}kv_a_proj_with_mqa.weight": some(96, hidden),
        f"{attention}kv_a_layernorm.weight": some(64),
    }
    weights |= {f"{attention}kv_b_proj.weight": some(512, 64), f"{attention}o_proj.weight": some(hidden, 256)}
    weights |= {f"{mlp}gate.weight": some(experts, hidden), f"{mlp}gate.e_score_correction_bias": some(experts).float()}
    for where in ("shared_experts", *(f"experts.{e}" for e in range(experts))):
        weights |= {f"{mlp}{where}.{name}_proj.weight": some(width, hidden) for name in ("gate", "up")}
        weights[f"{mlp}{where}.down_proj.weight"] = some(hidden, width)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
