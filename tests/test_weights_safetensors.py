"""safetensors: names of every family, fused experts, FP8 blocks, the index, laziness."""
# ruff: noqa: SIM118  (a weight source has keys(), but is no mapping to iterate over)

import time
from pathlib import Path

import hostile
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ktcompile.errors import ModelFileError
from ktcompile.weights import MixedSource, ModuleSource, Part, SafetensorsSource, encoding, stored_bytes, values
from ktcompile.weights.safetensors_header import INDEX

FP8 = Path(__file__).parent / "data" / "tiny-deepseek-v3"
ARCHITECTURES = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)


@pytest.fixture(scope="module")
def source() -> SafetensorsSource:
    return SafetensorsSource(FP8, layers=6)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(FP8.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def dequantised(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The definition, one value at a time by index: fp8 * scale of its 128x128 block."""
    weight, scale = stored[name].float(), stored[name + "_scale_inv"]
    rows, cols = torch.arange(weight.shape[0]) // 128, torch.arange(weight.shape[1]) // 128
    return weight * scale[rows][:, cols]


def test_every_stored_value(source: SafetensorsSource, stored: dict[str, torch.Tensor]) -> None:
    for key in source.keys():
        got = values(source, key)
        if ".mlp.experts." in key:
            prefix = key.rpartition(".")[0]
            names = ("gate_proj", "up_proj") if key.endswith("gate_up_proj") else ("down_proj",)
            rows = [torch.cat([dequantised(stored, f"{prefix}.{e}.{n}.weight") for n in names]) for e in range(32)]
            assert torch.equal(got, torch.stack(rows)), key
        elif key + "_scale_inv" in stored:
            assert torch.equal(got, dequantised(stored, key)), key
        else:
            assert torch.equal(got, stored[key].float()), key


def test_only_the_mtp_layer_is_unused(source: SafetensorsSource, stored: dict[str, torch.Tensor]) -> None:
    unused = source.unused()
    assert set(unused) == {name for name in stored if name.startswith("model.layers.6.")}
    used = sum(stored_bytes(source, key) for key in source.keys())
    assert used == sum(t.nbytes for name, t in stored.items() if name not in unused)
    assert SafetensorsSource(FP8).unused() == ()


def test_the_mtp_layer_can_be_asked_for(source: SafetensorsSource) -> None:
    assert source.spec("model.layers.6.mlp.experts.gate_up_proj").shape == (32, 256, 256)
    assert values(source, "model.layers.6.eh_proj.weight").shape == (256, 512)


def test_specs(source: SafetensorsSource) -> None:
    key = "model.layers.1.mlp.experts.gate_up_proj"
    spec = source.spec(key)
    assert spec.shape == (32, 256, 256) and spec.dtype == torch.float32 and encoding(source, key) == "fp8_block128"
    parts = source.parts(key)
    assert len(parts) == 64 and len(source.parts("model.layers.1.mlp.experts.down_proj")) == 32
    assert source.read(parts[0]).dtype == torch.float8_e4m3fn
    scale = source.read_scale(parts[0])
    assert scale is not None and scale.shape == (1, 2)
    assert source.spec("lm_head.weight").dtype == torch.bfloat16


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 300), cols=st.integers(1, 300), block=st.sampled_from([16, 128]), fused=st.booleans())
def test_partial_blocks(
    tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, block: int, fused: bool
) -> None:
    path = tmp_path_factory.mktemp("fp8") / "model.safetensors"
    lead = (3,) if fused else ()
    scale = torch.rand(*lead, -(-rows // block), -(-cols // block))
    weight = torch.randn(*lead, rows, cols).to(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": scale}, path)
    at_row, at_col = torch.arange(rows) // block, torch.arange(cols) // block
    want = weight.float() * scale[..., at_row, :][..., at_col]
    assert torch.equal(values(SafetensorsSource(path, block=block), "w"), want)


def test_large_fp8_is_decoded_in_chunks(tmp_path: Path) -> None:
    weight = torch.randn(2100, 1030).to(torch.float8_e4m3fn)  # more than one chunk of 2^20 values, partial blocks
    scale = torch.rand(17, 9)
    save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    want = weight.float() * scale.repeat_interleave(128, 0)[:2100].repeat_interleave(128, 1)[:, :1030]
    assert torch.equal(values(SafetensorsSource(tmp_path), "w"), want)


def test_fused_tensors_and_scalars_pass_through(tmp_path: Path) -> None:
    tensors = {"a.experts.gate_up_proj": torch.randn(2, 6, 4).half(), "s": torch.tensor(3.0), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    for key, want in tensors.items():
        assert torch.equal(values(source, key), want.float()), key


def test_missing_expert(tmp_path: Path) -> None:
    names = ("0.gate_proj", "0.up_proj", "2.gate_proj", "2.up_proj", "999999.gate_proj")
    save_file({f"mlp.experts.{n}.weight": torch.zeros(4, 4) for n in names}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"'mlp.experts.1.gate_proj.weight' is missing"):
        SafetensorsSource(tmp_path).parts("mlp.experts.gate_up_proj")


def test_experts_of_different_sizes(tmp_path: Path) -> None:
    tensors = {f"mlp.experts.{e}.down_proj.weight": torch.zeros(4, 4 + e) for e in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"'mlp.experts.1.down_proj.weight' has shape \[4, 5\], 'mlp.experts.0"):
        SafetensorsSource(tmp_path).spec("mlp.experts.down_proj")


def test_experts_that_are_no_matrices(tmp_path: Path) -> None:
    save_file({"mlp.experts.0.down_proj.weight": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="experts are matrices of one shape"):
        SafetensorsSource(tmp_path).parts("mlp.experts.down_proj")


# ---- names


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_parameters_of_every_family(tmp_path: Path, family: str) -> None:
    """`save_pretrained` writes the names and tensors that repositories have."""
    model = tiny.model(family)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    source = SafetensorsSource(tmp_path)
    assert (tmp_path / INDEX).exists() and source.unused() == ()
    want = model.state_dict()
    assert set(source.keys()) == set(want)
    for key, tensor in want.items():
        assert source.spec(key).shape == tensor.shape and torch.equal(values(source, key), tensor), key


def test_mixtral_as_first_published(tmp_path: Path) -> None:
    prefix = "model.layers.0.block_sparse_moe"
    experts = {f"{prefix}.experts.{e}.{w}.weight": torch.randn(4, 4) for e in range(2) for w in ("w1", "w2", "w3")}
    save_file(experts | {f"{prefix}.gate.weight": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    at = "model.layers.0.mlp"
    assert set(source.keys()) == {f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj", f"{at}.gate.weight"}
    gate, down, up = (
        torch.stack([experts[f"{prefix}.experts.{e}.{w}.weight"] for e in range(2)]) for w in ("w1", "w2", "w3")
    )
    assert torch.equal(values(source, f"{at}.experts.gate_up_proj"), torch.cat([gate, up], 1))
    assert torch.equal(values(source, f"{at}.experts.down_proj"), down)


def test_block_sparse_moe_of_another_model_keeps_its_name(tmp_path: Path) -> None:
    key = "model.layers.0.block_sparse_moe.router.weight"
    save_file({key: torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(SafetensorsSource(tmp_path).keys()) == [key]


def test_tables_that_the_model_computes_are_unused(tmp_path: Path) -> None:
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({"a": torch.ones(2), table: torch.ones(2)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert list(source.keys()) == ["a"] and source.unused() == (table,)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a.experts.down_proj", "a.experts.0.down_proj.weight"),
        ("a.experts.0.down_proj.weight", "a.experts.down_proj"),
        ("a.experts.0.down_proj.weight", "a.experts.0.w2.weight"),
        ("a.experts.0.down_proj.weight", "a.experts.00.down_proj.weight"),
        ("a.weight", "a.weight_packed"),
        ("a.block_sparse_moe.experts.0.w1.weight", "a.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_parameters_that_are_there_twice(tmp_path: Path, first: str, second: str) -> None:
    for name in (first, second):
        save_file({name: torch.ones(2, 8, dtype=torch.int32)}, tmp_path / f"{name}.safetensors")
    names = {name: f"{name}.safetensors" for name in (first, second)}
    hostile.write_index(tmp_path, names)
    with pytest.raises(ModelFileError) as caught:
        SafetensorsSource(tmp_path)
    assert (
        "is stored twice" in str(caught.value)
        and repr(first) in str(caught.value)
        and repr(second) in str(caught.value)
    )


# ---- files


def test_tensors_beside_the_index_are_unused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "stray": torch.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"extra": torch.zeros(2)}, tmp_path / "y.safetensors")
    hostile.write_index(tmp_path, {"a": "x.safetensors"})
    source = SafetensorsSource(tmp_path)
    assert list(source.keys()) == ["a"] and source.unused() == ("stray",)


def test_folders_without_a_clear_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no safetensors file"):
        SafetensorsSource(tmp_path)
    with pytest.raises(ModelFileError, match="x: no such file or folder"):
        SafetensorsSource(tmp_path / "x")
    for name in "ab":
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelFileError, match=r"2 safetensors files, but no model\.safetensors\.index\.json"):
        SafetensorsSource(tmp_path)


def test_opening_reads_only_the_header(tmp_path: Path) -> None:
    size = 32 << 30  # a sparse file
    path = tmp_path / "model.safetensors"
    path.write_bytes(hostile.safetensors_file({"w": hostile.stored(0, size, [size // 128, 32])}, 0))
    with path.open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    start = time.perf_counter()
    source = SafetensorsSource(path)
    assert source.read(source.parts("w")[0].cut(0, 7, 8)).sum() == 0 and time.perf_counter() - start < 1


# ---- many experts


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsSource:
    """FP8 experts of a few values each, in rows of 128 x 128 blocks."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in (f"a.experts.{e}.{n}_proj.weight" for e in range(24) for n in ("gate", "up")):
        tensors[name] = torch.randn(300, 16, generator=generator).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.rand(3, 1, generator=generator)
    path = tmp_path_factory.mktemp("many") / "model.safetensors"
    save_file(tensors, path)
    return SafetensorsSource(path)


@given(expert=st.integers(0, 23), rows=st.tuples(st.integers(0, 599), st.integers(1, 600)))
def test_a_block_reads_only_the_scale_blocks_that_it_needs(
    many: SafetensorsSource, expert: int, rows: tuple[int, int]
) -> None:
    key = "a.experts.gate_up_proj"
    where = (slice(expert, expert + 1), slice(rows[0], min(rows[0] + rows[1], 600)), slice(0, 16))
    read: list[Part] = []

    class Watched(ModuleSource):
        spec, parts, read_scale = many.spec, many.parts, many.read_scale

        def read(self, part: Part) -> torch.Tensor:
            read.append(part)
            return many.read(part)

    assert torch.equal(values(Watched({}), key, where=where), values(many, key)[where])
    first, last = where[1].start, where[1].stop
    assert len(read) == (first < 300) + (last > 300)
    assert sum(part.spec.shape[0] for part in read) < last - first + 4 * 128


def test_parts_are_worked_out_once_and_are_in_order(many: SafetensorsSource) -> None:
    for source in (many, MixedSource(many)):
        parts = source.parts("a.experts.gate_up_proj")
        assert source.parts("a.experts.gate_up_proj") is parts and len({id(part.spec) for part in parts}) == 1
        assert source.spec("a.experts.gate_up_proj") is source.spec("a.experts.gate_up_proj")
        starts = [part.where[0].start for part in parts]
        assert starts == sorted(starts)


def test_parts_that_leave_a_hole_are_an_error_not_what_was_in_memory(many: SafetensorsSource) -> None:
    class Holed(ModuleSource):
        spec, read, read_scale = many.spec, many.read, many.read_scale

        def parts(self, key: str) -> tuple[Part, ...]:
            return many.parts(key)[:3] + many.parts(key)[4:]

    where = (slice(0, 2), slice(0, 600), slice(0, 16))
    with pytest.raises(ModelFileError, match="hold 14400 of 19200 values asked for"):
        values(Holed({}), "a.experts.gate_up_proj", where=where)
