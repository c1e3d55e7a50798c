"""ggml's block types: the set, the sizes and every decoder are those of the gguf package, bit for bit."""

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ktcompile.weights import ggml, ggml_grids

CODES = {t.name: gguf.GGMLQuantizationType(t.code) for t in ggml.TYPES}
HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01)
"""fp16: zeros, subnormals, the least normal, ones, the largest, infinities, NaN."""
HIGH_HALVES = (0x0000, 0x8000, 0x0001, 0x8001, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFF81)
"""The same of bf16, and of the upper half of fp32."""
FIRST_HALF_SCALE = {"q2_k": 80, "q3_k": 108, "q6_k": 208, "tq1_0": 52, "tq2_0": 64}
"""Where a block's fp16 scale lies, if not at its start; `q2_k` has another behind it."""

each_type = pytest.mark.parametrize("kind", ggml.TYPES, ids=lambda t: t.name)


def same_bits(kind: ggml.BlockType, raw: np.ndarray) -> np.ndarray:
    """The decoded rows, which are those of the package; one NaN is as good as another."""
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, CODES[kind.name])
    got = kind.decode(raw)
    assert got.shape == want.shape and got.dtype == np.float32
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])
    return got


def noise(kind: ggml.BlockType, seed: int, rows: int, blocks: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * kind.block_bytes), dtype=np.uint8)


def test_every_type_that_the_package_decodes_is_here() -> None:
    decodable = set()
    for code, (values, nbytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), code)
        except NotImplementedError:
            continue
        decodable.add((code.value, code.name.lower(), values, nbytes))
    assert {(t.code, t.name, t.block_values, t.block_bytes) for t in ggml.TYPES} == decodable
    assert len(ggml.BY_CODE) == len(ggml.BY_NAME) == len(ggml.TYPES)


@each_type
def test_sizes_are_those_of_the_package(kind: ggml.BlockType) -> None:
    assert gguf.GGML_QUANT_SIZES[CODES[kind.name]] == (kind.block_values, kind.block_bytes)
    assert kind.row_bytes(3 * kind.block_values) == 3 * kind.block_bytes
    assert kind.bits * kind.block_values == 8 * kind.block_bytes


@each_type
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 33), blocks=st.integers(1, 3))
@example(seed=0, rows=1, blocks=1)
def test_random_blocks(kind: ggml.BlockType, seed: int, rows: int, blocks: int) -> None:
    same_bits(kind, noise(kind, seed, rows, blocks))


@each_type
@given(data=st.data())
def test_arbitrary_blocks(kind: ggml.BlockType, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=kind.block_bytes, max_size=kind.block_bytes))
    same_bits(kind, np.frombuffer(raw, np.uint8).reshape(1, -1))


@each_type
def test_blocks_of_one_byte(kind: ggml.BlockType) -> None:
    same_bits(kind, np.repeat(np.arange(256, dtype=np.uint8)[:, None], 2 * kind.block_bytes, axis=1))


@each_type
@given(seed=st.integers(0, 2**32 - 1))
def test_each_byte_of_a_block_at_its_extremes(kind: ggml.BlockType, seed: int) -> None:
    """Over a random block: each position in turn 0x00, 0x7F, 0x80 and 0xFF."""
    size = kind.block_bytes
    raw = np.repeat(noise(kind, seed, 1), 4 * size, axis=0)
    at = np.arange(4 * size)
    raw[at, at // 4] = np.array([0x00, 0x7F, 0x80, 0xFF], np.uint8)[at % 4]
    same_bits(kind, raw)


@each_type
@given(seed=st.integers(0, 2**32 - 1))
def test_scales_at_their_extremes(kind: ggml.BlockType, seed: int) -> None:
    """Subnormal, infinite, NaN and negative scales over random values; wherever the scale lies, all 13 are there."""
    halves = np.array(HIGH_HALVES if kind.name in ("f32", "bf16") else HALVES, np.uint16)
    raw = noise(kind, seed, len(halves) ** 2)
    first, second = (x.ravel() for x in np.meshgrid(halves, halves))
    if kind.name == "iq1_m":  # four nibbles, each on top of a word of scales
        for word in range(4):
            top = (first >> np.uint16(4 * word) & np.uint16(15)).astype(np.uint8) << np.uint8(4)
            raw[:, 49 + 2 * word] = raw[:, 49 + 2 * word] & 15 | top
    elif kind.name not in ("mxfp4", "nvfp4"):
        start = FIRST_HALF_SCALE.get(kind.name, 0)
        raw[:, start : start + 2] = first.view(np.uint8).reshape(-1, 2)
        if kind.name in ("q2_k", "q4_k", "q5_k", "q4_1", "q5_1", "f32"):
            raw[:, start + 2 : start + 4] = second.view(np.uint8).reshape(-1, 2)
    got = same_bits(kind, raw)
    if kind.name not in ("mxfp4", "nvfp4"):  # no e8m0 or ue4m3 is NaN in ggml
        assert np.isnan(got).any() and np.isinf(got).any()


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_each_scale_byte_with_each_value(name: str) -> None:
    kind = ggml.BY_NAME[name]
    scales = kind.block_bytes - kind.block_values // 2
    raw = np.empty((256, kind.block_bytes), np.uint8)
    raw[:, :scales] = np.arange(256)[:, None]
    raw[:, scales:] = np.resize(np.arange(16) * 17, kind.block_bytes - scales)
    got = same_bits(kind, raw)
    assert not np.isnan(got).any() and len(np.unique(np.abs(got[60]))) == 8


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_grids_are_those_of_the_package(name: str) -> None:
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    assert np.array_equal(getattr(ggml_grids, name), theirs.grid[0, 0])


@each_type
def test_pieces_and_leading_axes(kind: ggml.BlockType) -> None:
    """More values than are decoded at a time, in three dimensions, out of a larger array, read only."""
    rows = ggml.PIECE_VALUES // kind.block_values // 4 + 3
    raw = noise(kind, 2, 2 * rows, 3).reshape(2, rows, -1)[:, :, : 2 * kind.block_bytes]
    raw.flags.writeable = False
    got = kind.decode(raw)
    assert got.shape == (2, rows, 2 * kind.block_values)
    same_bits(kind, np.ascontiguousarray(raw[1]))
    want = np.stack([kind.decode(np.ascontiguousarray(part)) for part in raw])
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


def test_bits_per_weight() -> None:
    assert {name: ggml.BY_NAME[name].bits for name in ("f32", "q8_0", "q4_k", "iq1_s", "tq1_0", "mxfp4", "nvfp4")} == {
        "f32": 32.0,
        "q8_0": 8.5,
        "q4_k": 4.5,
        "iq1_s": 1.5625,
        "tq1_0": 1.6875,
        "mxfp4": 4.25,
        "nvfp4": 4.5,
    }
