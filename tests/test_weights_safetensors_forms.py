"""Quantised tensors in safetensors: FP8 with all kinds of scales, int4, MXFP4; and what does not fit together."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ktcompile.errors import ModelFileError
from ktcompile.weights import SafetensorsSource, decode, values
from ktcompile.weights.source import everywhere, pieces


def stored(folder: Path, tensors: dict[str, Tensor], block: int = 128) -> SafetensorsSource:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return SafetensorsSource(folder, block=block)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def same_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = (t.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (got, want))
    assert torch.equal(got, want)


# ---- FP8


def fp8(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [(), (1,), (5,), (5, 1)], ids=str)
@pytest.mark.parametrize("ending", ["_scale", "_scale_inv"])
def test_fp8_with_a_scale_for_rows_or_for_all(
    tmp_path: Path, ending: str, scales: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight, scale = fp8(0, 5, 40), numbers(1, *scales).to(dtype)
    extra = {"a.input_scale": torch.tensor(0.5)}  # of activations
    source = stored(tmp_path, {"a.weight": weight, "a.weight" + ending: scale, **extra})
    assert list(source.keys()) == ["a.weight"] and source.unused() == ("a.input_scale",)
    spec = source.spec("a.weight")
    assert (spec.encoding, spec.nbytes) == ("fp8_row", weight.nbytes + scale.nbytes)
    (part,) = source.parts("a.weight")
    read = source.read_scale(part)
    assert read is not None and read.shape == (5, 1) and read.dtype == torch.float32
    same_bits(values(source, "a.weight"), weight.float() * scale.float().view(-1, 1))
    cut = part.cut(0, 2, 4).cut(1, 8, 24)
    found = decode(source.read(cut), "fp8_row", source.read_scale(cut))
    same_bits(found, values(source, "a.weight")[2:4, 8:24])


def test_fp8_blocks_under_the_other_name_and_in_bf16(tmp_path: Path) -> None:
    weight, scale = fp8(0, 200, 130), numbers(1, 2, 2).bfloat16()
    source = stored(tmp_path, {"a.weight": weight, "a.weight_scale": scale})
    assert source.spec("a.weight").encoding == "fp8_block128"
    rows, cols = torch.arange(200) // 128, torch.arange(130) // 128
    same_bits(values(source, "a.weight"), weight.float() * scale.float()[rows][:, cols])
    read = source.read_scale(source.parts("a.weight")[0])
    assert read is not None and read.dtype == torch.float32


def test_fp8_experts_in_one_tensor_with_scales_of_rows(tmp_path: Path) -> None:
    weight, scale = fp8(0, 3, 5, 8), numbers(1, 3, 5, 1)
    source = stored(tmp_path, {"experts.down_proj": weight, "experts.down_proj_scale": scale})
    (part,) = source.parts("experts.down_proj")
    for piece in pieces(part, 16):  # two rows of one expert
        found = decode(source.read(piece), "fp8_row", source.read_scale(piece))
        same_bits(found, (weight.float() * scale)[piece.where].reshape(found.shape))


# ---- packed int4


def pack(integers: Tensor) -> Tensor:
    """The definition, one value at a time: value i of a row, plus 8, in bits 4 (i % 8) of its int32 number i // 8."""
    out = torch.zeros(integers.shape[0], -(-integers.shape[1] // 8), dtype=torch.int64)
    for i in range(integers.shape[1]):
        out[:, i // 8] |= (integers[:, i].long() + 8) << 4 * (i % 8)
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


def int4(seed: int, rows: int, cols: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of one matrix `.weight…`, and its values in fp32."""
    integers = torch.randint(-8, 8, (rows, cols), generator=torch.Generator().manual_seed(seed))
    scale = numbers(seed, rows, cols // group).bfloat16()
    tensors = {"packed": pack(integers), "scale": scale, "shape": torch.tensor([rows, cols])}
    return tensors, integers.float() * scale.float().repeat_interleave(group, 1)


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.weight_{name}": tensor for name, tensor in tensors.items()}


def test_the_order_of_packed_integers() -> None:
    """The numbers that compressed-tensors 0.20 packs -8 … 7 into."""
    assert pack(torch.arange(-8, 8)[None]).tolist() == [[1985229328, -19088744]]


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128]),
    most=st.sampled_from([1, 300, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_int4(
    tmp_path_factory: pytest.TempPathFactory, rows: int, groups: int, group: int, most: int, seed: int
) -> None:
    tensors, want = int4(seed, rows, group * groups, group)
    source = stored(tmp_path_factory.mktemp("int4"), named("a", tensors))
    assert list(source.keys()) == ["a.weight"] and source.unused() == ()
    spec = source.spec("a.weight")
    assert (spec.shape, spec.encoding) == (tuple(want.shape), f"int4_group{group}")
    assert spec.nbytes == sum(t.nbytes for t in tensors.values())
    for dtype in (torch.float32, torch.bfloat16):
        same_bits(values(source, "a.weight", dtype), want.to(dtype))
    (part,) = source.parts("a.weight")
    assert source.read(part).dtype == torch.int32
    for piece in pieces(part, most):
        same_bits(decode(source.read(piece), spec.encoding, source.read_scale(piece)), want[piece.where])


def test_int4_experts_are_fused(tmp_path: Path) -> None:
    tensors, matrices = {}, {}
    for i, name in enumerate(f"{e}.{p}" for e in range(3) for p in ("gate_proj", "up_proj")):
        packed, matrices[name] = int4(i, 16, 64, 32)
        tensors |= named(f"model.layers.1.mlp.experts.{name}", packed)
    source = stored(tmp_path, tensors)
    key = "model.layers.1.mlp.experts.gate_up_proj"
    assert list(source.keys()) == [key] and source.unused() == ()
    want = torch.stack([torch.cat([matrices[f"{e}.{p}_proj"] for p in ("gate", "up")]) for e in range(3)])
    same_bits(values(source, key), want)
    block = (slice(1, 3), slice(10, 20), slice(5, 50))
    same_bits(values(source, key, where=block), want[block])


def test_columns_of_packed_values_cannot_be_cut(tmp_path: Path) -> None:
    source = stored(tmp_path, named("a", int4(0, 4, 64, 32)[0]))
    with pytest.raises(ValueError, match="cuts columns"):
        source.read(source.parts("a.weight")[0].cut(1, 0, 32))


# ---- MXFP4


def mxfp4(seed: int, experts: int, rows: int, blocks: int) -> dict[str, Tensor]:
    scales = noise(seed + 1, experts, rows, blocks)
    scales[scales == 255] = 0
    return {"a.experts.up_blocks": noise(seed, experts, rows, blocks, 16), "a.experts.up_scales": scales}


@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_mxfp4_is_what_transformers_decodes(
    tmp_path_factory: pytest.TempPathFactory, experts: int, rows: int, blocks: int, dtype: torch.dtype, seed: int
) -> None:
    tensors = mxfp4(seed, experts, rows, blocks)
    source = stored(tmp_path_factory.mktemp("mxfp4"), tensors)
    want = convert_moe_packed_tensors(*tensors.values(), dtype=dtype)  # type: ignore[no-untyped-call]
    assert list(source.keys()) == ["a.experts.up"] and source.unused() == ()
    spec = source.spec("a.experts.up")
    assert (spec.shape, spec.encoding) == ((experts, 32 * blocks, rows), "mxfp4")
    assert spec.nbytes == sum(t.nbytes for t in tensors.values())
    same_bits(values(source, "a.experts.up", dtype), want + 0.0)  # ggml has no negative zero
    part = source.parts("a.experts.up")[0]
    for piece in pieces(part, 64):
        found = decode(source.read(piece), "mxfp4", source.read_scale(piece)).transpose(-2, -1).to(dtype)
        same_bits(found, (want + 0.0)[piece.where].reshape(found.shape))


def test_mxfp4_block_as_ggml_has_it(tmp_path: Path) -> None:
    """Values 0 … 15 in the low halves, 16 … 31 in the high ones."""
    codes = torch.arange(32, dtype=torch.uint8) % 16  # code i is value i
    packed = (codes[0::2] | codes[1::2] << 4).view(1, 1, 1, 16)
    source = stored(tmp_path, {"x_blocks": packed, "x_scales": torch.full((1, 1, 1), 127, dtype=torch.uint8)})
    assert source.read(source.parts("x")[0]).tolist() == [[[127, *(17 * i for i in range(16))]]]
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values(source, "x")[0, :, 0].tolist() == 2 * (positive + [-v for v in positive])


def test_mxfp4_scale_that_is_no_number(tmp_path: Path) -> None:
    tensors = mxfp4(0, 2, 3, 2)
    tensors["a.experts.up_scales"][1, 2, 1] = 255
    source = stored(tmp_path, tensors)
    first, second = (source.parts("a.experts.up")[0].cut(0, e, e + 1) for e in range(2))
    assert source.read(first).shape == (1, 3, 34)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: 'a.experts.up_scales' has a scale of 255"):
        source.read(second)


# ---- what does not fit together

U8, I32, BF16, F32 = torch.uint8, torch.int32, torch.bfloat16, torch.float32


def blank(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape).to(dtype)


PACKED = {"w_packed": blank(I32, 4, 8), "w_scale": blank(BF16, 4, 2)}
BLOCKS = {"w_blocks": blank(U8, 2, 4, 3, 16), "w_scales": blank(U8, 2, 4, 3)}
FP8 = {"w": blank(torch.float8_e4m3fn, 4, 4)}
MISFITS: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "FP8 alone": (FP8, ("'w' is F8_E4M3, but there is no 'w_scale_inv'",)),
    "FP8 scales": (
        FP8 | {"w_scale_inv": blank(F32, 2, 1)},
        ("'w_scale_inv' is F32 [2, 1]; 'w' [4, 4] needs [1, 1] (blocks of 128), [4, 1] (rows) or one, in F32",),
    ),
    "FP8 scale type": (FP8 | {"w_scale": blank(I32, 4, 1)}, ("'w_scale' is I32 [4, 1]; 'w' [4, 4] needs",)),
    "FP8 vector": (
        {"w": blank(torch.float8_e4m3fn, 4), "w_scale": blank(F32, 1)}, ("'w_scale' is F32 [1]; 'w' [4] needs",)
    ),
    "integers": ({"w": blank(torch.int64, 4, 4)}, ("'w' is I64; known are F32, F16, BF16, F8_E4M3, I32 named",)),
    "packed alone": ({"w_packed": PACKED["w_packed"]}, ("'w_packed' is I32, but there is no 'w_scale'",)),
    "packed, fewer rows": (PACKED | {"w_scale": blank(BF16, 3, 2)}, ("'w_scale' is BF16 [3, 2]", "'w_packed' [4, 8]")),
    "packed, odd groups": (PACKED | {"w_scale": blank(BF16, 4, 3)}, ("'w_scale' is BF16 [4, 3]", "'w_packed' [4, 8]")),
    "packed, group of 64 rows": (PACKED | {"w_scale": blank(BF16, 2)}, ("'w_scale' is BF16 [2]", "'w_packed' [4, 8]")),
    "packed, group of 16": (PACKED | {"w_scale": blank(BF16, 4, 4)}, ("with g one of 32, 64, 128",)),
    "packed, no groups": (PACKED | {"w_scale": blank(BF16, 4, 0)}, ("'w_scale' is BF16 [4, 0]",)),
    "packed, integer scales": (PACKED | {"w_scale": blank(I32, 4, 2)}, ("'w_scale' is I32 [4, 2]",)),
    "packed, three axes": (
        {"w_packed": blank(I32, 2, 4, 8), "w_scale": blank(BF16, 2, 4, 2)}, ("'w_packed' [2, 4, 8]",)
    ),
    "packed scalar": ({"w_packed": blank(I32), "w_scale": blank(BF16)}, ("'w_packed' []",)),
    "asymmetric": (
        PACKED | {"w_zero_point": blank(I32, 1, 2)},
        ("'w_packed' has a 'w_zero_point'; only symmetric integers are known",),
    ),
    "groups out of order": (
        PACKED | {"w_g_idx": blank(I32, 64)}, ("'w_packed' has a 'w_g_idx'; only groups in order are known",)
    ),
    "blocks alone": ({"w_blocks": BLOCKS["w_blocks"]}, ("'w_blocks' is U8, but there is no 'w_scales'",)),
    "blocks, fewer scales": (
        BLOCKS | {"w_scales": blank(U8, 2, 4, 2)}, ("'w_scales' is U8 [2, 4, 2]", "'w_blocks' [2, 4, 3, 16]")
    ),
    "blocks, other scales": (BLOCKS | {"w_scales": blank(BF16, 2, 4, 3)}, ("'w_scales' is BF16 [2, 4, 3]",)),
    "blocks of 8": (BLOCKS | {"w_blocks": blank(U8, 2, 4, 3, 8)}, ("'w_blocks' [2, 4, 3, 8] needs U8",)),
    "blocks, two axes": ({"w_blocks": blank(U8, 3, 16), "w_scales": blank(U8, 3)}, ("'w_blocks' [3, 16] needs U8",)),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_together(tmp_path: Path, case: str) -> None:
    tensors, messages = MISFITS[case]
    source = stored(tmp_path, tensors)
    with pytest.raises(ModelFileError, match=r"model\.safetensors: ") as caught:
        source.parts("w")
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (torch.tensor([4, 63]), r"'w_shape' is \[4, 63\]; 'w_packed' \[4, 8\] holds \[4, 64\]"),
        (torch.tensor([4.0, 64.0]), r"'w_shape' is F32 \[2\]; 'w_packed'"),
        (torch.tensor([4]), r"'w_shape' is I64 \[1\]; 'w_packed'"),
    ],
)
def test_shape_that_the_file_contradicts(tmp_path: Path, shape: Tensor, message: str) -> None:
    """Known only when the weights are read: opening a model reads headers."""
    source = stored(tmp_path, PACKED | {"w_shape": shape})
    with pytest.raises(ModelFileError, match=message):
        values(source, "w")


@pytest.mark.parametrize("shape", [torch.tensor([4, 64]), torch.tensor([4, 64], dtype=I32), None])
def test_shapes_that_agree(tmp_path: Path, shape: Tensor | None) -> None:
    source = stored(tmp_path, PACKED | ({} if shape is None else {"w_shape": shape}))
    assert values(source, "w").shape == (4, 64) and source.parts("w")[0].where == everywhere((4, 64))


def test_names_of_scales_alone_mean_nothing(tmp_path: Path) -> None:
    """A plain tensor may be called like the scale of another plain one."""
    source = stored(tmp_path, {"logit": torch.ones(2), "logit_scale": torch.ones(1), "x_blocks": torch.ones(1)})
    assert sorted(source.keys()) == ["logit", "logit_scale", "x_blocks"]
