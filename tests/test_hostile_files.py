"""Files made to do harm, and files that change under us: a clear error, soon, for little memory."""
# ruff: noqa: SIM118  (a weight source has keys(), but is no mapping to iterate over)

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import GPU, captured
from safetensors.torch import save_file

from ktcompile import Context, RulesError, load_rules
from ktcompile.checkpoint import EMBEDDED, open_checkpoint
from ktcompile.errors import ModelFileError
from ktcompile.inspect import inspect_text
from ktcompile.weights import GGUFSource, SafetensorsSource, values
from ktcompile.weights.json import load_json, parse_json

HERE = Path(__file__).parent
FP8 = HERE / "data" / "tiny-deepseek-v3"
ASSETS = HERE.parent / "ktcompile" / "assets"
SECONDS = 1.0
MEGABYTES = 100


@pytest.fixture(autouse=True)
def nothing_to_collect() -> Iterator[None]:
    """What other tests left in memory is not looked through in the second that a refusal may take."""
    gc.freeze()
    yield
    gc.unfreeze()


def refused(path: Path, open_it: Callable[[Path], object]) -> str:
    """The message of the ModelFileError, which names a file of that folder, is short and comes within a second."""
    start = time.process_time()
    with pytest.raises(ModelFileError) as caught:
        open_it(path)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert str(path if path.is_dir() else path.parent) in message and len(message) < 1_500
    assert message.replace("\n", "").isprintable()  # nothing of the file moves the cursor
    message.encode()
    return message


# ---- GGUF


@pytest.mark.parametrize("case", hostile.GGUF)
def test_gguf(tmp_path: Path, case: str) -> None:
    raw, said = hostile.GGUF[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    message = refused(path, GGUFSource)
    assert said in message
    assert case in hostile.NO_OFFSET or f"{path}: byte " in message


def test_what_the_attacks_are_made_of_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(hostile.gguf_file())
    assert values(GGUFSource(path), "model.embed_tokens.weight").tolist() == [0.0] * 32
    path.write_bytes(hostile.EVERYTHING)
    metadata = GGUFSource(path).metadata
    assert [metadata[f"of.type.{code}"] for code in hostile.SCALARS] == [
        7, -1, 513, -1, 5, -1, 1e-6, True, "grün", 1 << 40, -1, 0.1
    ]  # fmt: skip
    assert metadata["of.strings"] == ["a", "", "é"] and list(metadata["of.nothing"]) == []
    path.write_bytes(hostile.gguf_model())
    source = open_checkpoint(path).source
    assert isinstance(source, GGUFSource) and source.unused() == ()


@pytest.mark.parametrize("raw", [hostile.gguf_file(), hostile.EVERYTHING, hostile.gguf_model()], ids=len)
def test_gguf_cut_at_every_byte(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw)
    source = GGUFSource(path)
    with path.open("r+b") as file:
        for size in range(len(raw) - 1, -1, -1):
            file.truncate(size)
            last = max(s.offset + s.nbytes for _, s in source._stored.values())
            if size >= last:
                continue
            with pytest.raises(ModelFileError, match=r"cut.gguf: (byte \d+: \S|the file is empty)"):
                GGUFSource(path)


@given(share=st.floats(0, 1, exclude_max=True))
def test_the_embedded_model_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    whole = (ASSETS / EMBEDDED).read_bytes()
    path = tmp_path_factory.mktemp("cut") / "model.gguf"
    path.write_bytes(whole[: int(share**4 * len(whole))])  # mostly inside the header
    refused(path, GGUFSource)


@settings(max_examples=200)
@given(where=st.integers(0, len(hostile.EVERYTHING) - 513), byte=st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, where: int, byte: int) -> None:
    raw = bytearray(hostile.EVERYTHING)
    raw[where] = byte
    path = tmp_path_factory.mktemp("byte") / "x.gguf"
    path.write_bytes(raw)
    try:
        source = GGUFSource(path)
        for key in source.keys():
            values(source, key)
    except ModelFileError as error:
        assert str(path) in str(error)


def test_pipes_devices_and_folders_are_no_model_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "zero.gguf").symlink_to("/dev/zero")
    (tmp_path / "circle.gguf").symlink_to(tmp_path / "circle.gguf")
    for name in ("pipe", "folder", "zero", "circle"):
        refused(tmp_path / f"{name}.gguf", GGUFSource)
    refused(tmp_path / "pipe.safetensors", SafetensorsSource)
    os.mkfifo(tmp_path / "config.json")
    refused(tmp_path / "config.json", lambda path: load_json(path, 100))


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2, 3))
    first.write_bytes(hostile.gguf_file())
    assert "missing: m-00002-of-00002.gguf" in refused(first, GGUFSource)
    assert "missing: m-00001-of-00002.gguf" in refused(tmp_path / "nowhere" / first.name, GGUFSource)
    second.write_bytes(hostile.gguf_file())
    assert "tensor 'token_embd.weight' is also in m-00001-of-00002.gguf" in refused(first, GGUFSource)
    second.write_bytes(hostile.gguf_file(tensors=(hostile.tensor("output_norm.weight"),)))
    assert len(list(GGUFSource(second).keys())) == 3
    third.write_bytes(hostile.gguf_file())
    assert "m-00003-of-00002.gguf" in refused(third, GGUFSource)
    many = tmp_path / "m-00001-of-99999.gguf"
    many.write_bytes(hostile.gguf_file())
    assert "m-00002-of-99999.gguf" in refused(many, GGUFSource)


# ---- configurations inside GGUF


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_count": 10**9}, "expert_count"),
        ({"expert_count": (1 << 32) - 1}, "expert_count"),
        ({"expert_used_count": 5}, "more than the 4"),
        ({"expert_group_count": 3}, "n_group"),
        ({"expert_group_count": 0}, "n_group"),
        ({"expert_group_used_count": 3}, "topk_group"),
        ({"expert_gating_func": 9}, "expert_gating_func"),
        ({"block_count": 10**9}, "block_count"),
        ({"block_count": None}, "block_count"),
        ({"embedding_length": "8"}, "embedding_length"),
        ({"embedding_length": 1 << 31}, "hidden_size"),
        ({"context_length": (1 << 32) - 1}, "max_position_embeddings"),
        ({"attention.head_count": 10**9}, "head_count"),
        ({"attention.key_length": 1}, "qk_nope_head_dim"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"rope.freq_base": float("nan")}, "rope_theta is nan"),
        ({"rope.freq_base": float("inf")}, "rope_theta is inf"),
        ({"rope.scaling.factor": float("nan")}, "factor is nan"),
        ({"rope.scaling.factor": -1.0}, "factor is -1.0"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"expert_weights_scale": float("nan")}, "routed_scaling_factor is nan"),
    ],
    ids=str,
)
def test_metadata_that_makes_no_sense(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(hostile.gguf_model(**changes))
    assert said in refused(path, open_checkpoint)
    inspect_text(str(path))  # what the header says can still be read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "word2vec"}, "word2vec"),
        ({"pre": "nobody's"}, "nobody's"),
        ({"tokens": ["a", "a"]}, "'a' occurs twice"),
        ({"tokens": "abc"}, "a list of strings"),
        ({"token_type": [1]}, "token_type"),
        ({"merges": ["a"]}, "merges"),
        ({"merges": ["a zz"]}, "merges"),
        ({"bos_token_id": 99}, "bos_token_id"),
    ],
    ids=str,
)
def test_tokenizers_that_make_no_sense(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(hostile.gguf_model(**changes))
    assert said in refused(path, lambda p: open_checkpoint(p).tokenizer)


def test_text_of_a_file_never_moves_the_cursor(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(hostile.gguf_model(name="\x1b[2Jcleared\r\n", chat_template="\x1b]0;title\x07"))
    assert "\x1b" not in inspect_text(str(path)) and "\r" not in inspect_text(str(path))


# ---- safetensors


@pytest.mark.parametrize("case", hostile.SAFETENSORS)
def test_safetensors(tmp_path: Path, case: str) -> None:
    raw, said = hostile.SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert said in refused(path, SafetensorsSource)


def test_safetensors_cut_at_every_byte(tmp_path: Path) -> None:
    raw = hostile.safetensors_file({"a": hostile.stored(), "__metadata__": {"format": "pt"}})
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert list(SafetensorsSource(path).keys()) == ["a"]
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(ModelFileError, match=r"model\.safetensors"):
            SafetensorsSource(path)


@pytest.mark.parametrize("file", hostile.OUTSIDE, ids=repr)
def test_an_index_that_leaves_the_folder(tmp_path: Path, file: object) -> None:
    hostile.write_index(tmp_path, {"w": file})
    assert "in the same folder" in refused(tmp_path, SafetensorsSource)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 7])
def test_an_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    hostile.write_index(tmp_path, weight_map)
    assert "weight_map" in refused(tmp_path, SafetensorsSource)


def test_missing_swapped_and_extra_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    hostile.write_index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert "1 of 2 shards are missing: b.safetensors" in refused(tmp_path, SafetensorsSource)
    save_file({"c": torch.zeros(2)}, tmp_path / "b.safetensors")
    assert "b.safetensors: lacks 1 tensors that the index promises, e.g. 'b'" in refused(tmp_path, SafetensorsSource)


def undecodable(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> SafetensorsSource:
    """A file of tensors by dtype, shape and bytes."""
    header, end = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = hostile.stored(end, end + nbytes, shape, dtype)
        end += nbytes
    path.write_bytes(hostile.safetensors_file(header, end))
    return SafetensorsSource(path)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("{}", {"{}": ("U32", [8], 32)}),
        ("{}", {"{}": ("F8_E4M3", [4, 8], 32)}),
        ("{}", {"{}": ("F8_E4M3", [4, 8], 32), "{}_scale": ("U8", [3], 3)}),
        ("{}", {"{}_packed": ("I32", [4, 8], 128), "{}_scale": ("F32", [5], 20)}),
        ("{}", {"{}_packed": ("I32", [4, 8], 128), "{}_scale": ("F32", [4, 2], 32), "{}_g_idx": ("U8", [1], 1)}),
        ("{}", {"{}_blocks": ("U8", [4, 8], 32), "{}_scales": ("U8", [4], 4)}),
        ("{}.experts.down_proj", {"{}.experts.1.down_proj.weight": ("F32", [2, 4], 32)}),
        (
            "{}.experts.down_proj",
            {f"{{}}.experts.{e}.down_proj.weight": ("F32", [2, 4 + e], 32 + 8 * e) for e in range(2)},
        ),
        ("missing", {"missing.{}": ("F32", [8], 32), "missin{}": ("F32", [8], 32)}),
        ("{}", {"missing.{}": ("F32", [8], 32)}),
    ],
    ids=str,
)
def test_parameters_whose_names_move_the_cursor(
    tmp_path: Path, name: str, tensors: dict[str, tuple[str, list[int], int]]
) -> None:
    named = {text.format(hostile.ESCAPE): stored for text, stored in tensors.items()}
    source = undecodable(tmp_path / "model.safetensors", named)
    message = refused(tmp_path, lambda _: source.parts(name.format(hostile.ESCAPE)))
    assert "x1b" in message or name == "missing"
    assert inspect_text(str(source.path)).replace("\n", "").isprintable()


def test_a_name_that_moves_the_cursor_stored_twice(tmp_path: Path) -> None:
    names = (f"{hostile.ESCAPE}.experts.0.{kind}.weight" for kind in ("down_proj", "w2"))
    said = refused(tmp_path, lambda p: undecodable(p / "model.safetensors", dict.fromkeys(names, ("F32", [8], 32))))
    assert r"in '\x1b]0;title" in said


def test_an_index_that_promises_a_name_that_moves_the_cursor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    hostile.write_index(tmp_path, {"a": "a.safetensors", hostile.ESCAPE: "a.safetensors"})
    assert r"e.g. '\x1b]0;title" in refused(tmp_path, SafetensorsSource)


# ---- JSON


def test_json_is_bounded_in_values_and_in_width(tmp_path: Path) -> None:
    many = b'{"a": [' + b"0," * 400_000 + b"0]}"
    assert "400000 are allowed" in refused(tmp_path / "x.json", lambda p: parse_json(many, str(p)))
    wide = b'{"a": "' + b"x" * (8 << 20) + "é".encode() + b'"}'
    assert "not all ASCII" in refused(tmp_path / "x.json", lambda p: parse_json(wide, str(p)))
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "😀"}
    with pytest.raises(ModelFileError, match="half a surrogate pair"):
        parse_json(b'{"a": ["\\ude00\\ud83d"]}', "x")


# ---- folders


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny model's config.json, changed; extra files as bytes."""

    def write(files: dict[str, bytes] | None = None, **fields: object) -> Path:
        config = json.loads((FP8 / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, raw in (files or {}).items():
            (tmp_path / name).write_bytes(raw)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000"),
        ({"n_routed_experts": 10**400}, "n_routed_experts is 1000"),
        ({"n_routed_experts": -1}, "n_routed_experts is -1"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33, more than the 32"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": 2**63}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"rope_theta": float("nan")}, "NaN"),
        ({"rope_theta": float("inf")}, "Infinity"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "NaN"),
        ({"rope_scaling": {"type": "yarn", "factor": -1.0}}, "rope_scaling.factor is -1.0"),
        ({"rope_scaling": 7}, "config.json"),
        ({"routed_scaling_factor": -2.5}, "routed_scaling_factor is -2.5"),
        ({"model_type": "evil"}, "evil"),
        ({"model_type": ["deepseek_v3"]}, "model_type"),
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(folder: Callable[..., Path], fields: dict[str, object], said: str) -> None:
    assert said in refused(folder(**fields), open_checkpoint)


def test_a_number_that_becomes_infinite(folder: Callable[..., Path]) -> None:
    path = folder()
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(re.sub(r'"rope_theta": [\d.]+', '"rope_theta": 1e999', text))
    assert "1e999" in refused(path, open_checkpoint)


def test_no_code_of_a_model_is_run(folder: Callable[..., Path]) -> None:
    marker = "import pathlib\npathlib.Path(__file__).with_name('marker').touch()\n"
    code = f"{marker}class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n".encode()
    mapped = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    settings = json.loads((FP8 / "tokenizer_config.json").read_text())
    settings |= {"auto_map": mapped, "tokenizer_class": "Tokenizer"}
    path = folder(
        {
            "evil.py": code,
            "__init__.py": code,
            "tokenizer.json": (FP8 / "tokenizer.json").read_bytes(),
            "tokenizer_config.json": json.dumps(settings).encode(),
            "generation_config.json": json.dumps({"auto_map": mapped, "custom_generate": "evil"}).encode(),
        },
        auto_map=mapped,
        _attn_implementation="someone/kernel",
        custom_pipelines={"text-generation": {"impl": "evil.Model"}},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer("a").input_ids and not hasattr(checkpoint.config, "auto_map")
    assert not (path / "marker").exists()


def test_a_tokenizer_of_a_gigabyte(folder: Callable[..., Path]) -> None:
    path = folder({"tokenizer.json": b"{}"})
    os.truncate(path / "tokenizer.json", 1 << 30)  # a sparse file
    assert "tokenizer.json: 1073741824 bytes" in refused(path, lambda p: open_checkpoint(p).tokenizer)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_other_files_of_a_gigabyte(folder: Callable[..., Path], name: str) -> None:
    path = folder({"tokenizer.json": (FP8 / "tokenizer.json").read_bytes(), name: b"{}"})
    os.truncate(path / name, 1 << 30)
    assert f"{name}: 1073741824 bytes" in refused(path, lambda p: open_checkpoint(p).tokenizer)


# ---- rules


def refused_rules(path: Path) -> str:
    start = time.process_time()
    with pytest.raises(RulesError) as caught:
        load_rules(path)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert len(message) < 1_000
    message.encode()
    return message


@pytest.mark.parametrize("case", hostile.RULES)
def test_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.yaml"
    path.write_bytes(hostile.RULES[case])
    message = refused_rules(path)
    assert case.startswith("extends") or str(path) in message
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("what", hostile.RULES_LINES)
def test_rules_of_ten_megabytes(tmp_path: Path, what: str) -> None:
    path = tmp_path / "my.yaml"
    line = hostile.RULES_LINES[what]
    path.write_bytes(line * ((10 << 20) // len(line)))
    assert "65536 bytes" in refused_rules(path)
    path.write_bytes(line * ((60 << 10) // len(line)))
    refused_rules(path)


def test_rules_inside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("pipeline:\n" + "- " * 15 + "fold\n")
    assert "2: a pass" in refused_rules(path)
    path.write_text("pipeline:\n" + "- " * 16 + "fold\n")
    assert "my.yaml:2: lists and mappings more than 16 deep" in refused_rules(path)


@pytest.mark.parametrize("case", hostile.RULES_AGAINST_A_MODEL)
def test_rules_that_a_model_refuses(tmp_path: Path, case: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(hostile.RULES_AGAINST_A_MODEL[case])
    graph = captured("deepseek_v3")
    start = time.process_time()
    with pytest.raises(RulesError) as caught:
        load_rules(path).run(graph, Context(GPU))
    seconds = time.process_time() - start
    assert re.match(rf"{re.escape(str(path))}:[35]: ", str(caught.value)) and len(str(caught.value)) < 4_000
    assert seconds < 3 * SECONDS  # folding the model is most of it


# ---- files that change while they are open


def gguf_of(path: Path) -> GGUFSource:
    path.write_bytes(hostile.gguf_model())
    return GGUFSource(path)


def safetensors_of(path: Path) -> SafetensorsSource:
    save_file({"model.embed_tokens.weight": torch.zeros(5, 8), "model.norm.weight": torch.ones(8)}, path)
    return SafetensorsSource(path)


KINDS = {"model.gguf": gguf_of, "model.safetensors": safetensors_of}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_becomes_shorter(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    source = KINDS[name](path)
    os.truncate(path, 100)
    assert str(path) in refused(path, lambda _: values(source, "model.embed_tokens.weight"))
    os.truncate(path, 0)
    refused(path, lambda _: values(source, "model.embed_tokens.weight"))


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_written_to(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    source = KINDS[name](path)
    assert values(source, "model.embed_tokens.weight").sum() == 0
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(path, ns=(0, 1))  # the clock of the file system may be too coarse to show it
    assert "written to" in refused(path, lambda _: values(source, "model.embed_tokens.weight"))


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_replaced_stays_what_it_was(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    source = KINDS[name](path)
    (tmp_path / "new").write_bytes(b"something else")
    (tmp_path / "new").rename(path)
    assert values(source, "model.embed_tokens.weight").shape == (5, 8)
    path.unlink()
    assert values(source, "model.embed_tokens.weight").sum() == 0


# ---- memory

BIG = {
    "strings": lambda: hostile.gguf_file((hostile.array("a", 8, bytes(8 << 20), 1 << 20),)),
    "wide strings": lambda: hostile.gguf_file((hostile.array("a", 8, hostile.text("😀" * 5) * (1 << 20), 1 << 20),)),
    "one wide string": lambda: hostile.gguf_file((hostile.entry("a", 8, hostile.text("x" * (31 << 20) + "😀")),)),
    "numbers": lambda: hostile.gguf_file((hostile.array("a", 0, bytes(31 << 20), 31 << 20),)),
}
"""The most expensive headers that are accepted, or refused last."""


CHILD = """
import resource, sys
from pathlib import Path
from ktcompile import KtransError, load_rules
from ktcompile.checkpoint import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
for name in sys.argv[1:]:
    try:
        load_rules(name) if name.endswith(".yaml") else open_checkpoint(name)
    except KtransError:
        continue
    raise SystemExit(f"{name} was accepted")
print(peak() - before)
"""


def test_the_whole_corpus_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Its peak of memory hardly moves, whatever it opens."""
    for name, make in BIG.items():
        (tmp_path / f"{name}.gguf").write_bytes(make())
    for i, (raw, _) in enumerate(hostile.GGUF.values()):
        (tmp_path / f"{i}.gguf").write_bytes(raw)
    for i, raw in enumerate(hostile.RULES.values()):
        (tmp_path / f"{i}.yaml").write_bytes(raw)
    for i, (raw, _) in enumerate(hostile.SAFETENSORS.values()):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.json").write_bytes((FP8 / "config.json").read_bytes())
        (tmp_path / str(i) / "model.safetensors").write_bytes(raw)
    names = sorted(str(path) for path in tmp_path.iterdir())
    made = subprocess.run([sys.executable, "-c", CHILD, *names], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert int(made.stdout) < MEGABYTES
