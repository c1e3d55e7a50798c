"""Packing: every type there and back, in spans, with loss, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native.reference import decode, error, normal, source
from tolerances import ROUNDING

from ktcompile.backends import native

EXACT = [type for type in native.TYPES if type not in native.LOSSY]
BLOCK = dict.fromkeys(native.TYPES, 256) | dict.fromkeys(("q8_0", "q5_0", "q4_0", "iq4_nl", "mxfp4"), 32)
BLOCK |= dict.fromkeys(("f32", "bf16", "f16", "fp8_block128", "int8_row"), 1) | {"int4_64": 64, "int4_128": 128}


def shapes(type: str) -> list[tuple[int, int]]:
    """[rows, cols]: rows around groups of 16 and blocks of 128, columns around spans, blocks, and units of scales."""
    columns = (1, 31, 33, 127, 129, 300) if BLOCK[type] == 1 else (1, 2, 3, 5)
    return list(zip((1, 5, 16, 17, 130, 257), [BLOCK[type] * n for n in columns]))  # noqa: B905


def packed(type: str, rows: int, cols: int, seed: int = 0):
    src = "f32" if type in native.LOSSY else type
    made = source(src, rows, cols, np.random.default_rng(seed))
    return made, src, native.pack(made.raw, src, type, rows, cols, made.scale)


@pytest.mark.parametrize("type", EXACT)
def test_there_and_back(type):
    for rows, cols in shapes(type):
        made, _, bytes_ = packed(type, rows, cols)
        back = native.unpack(bytes_, type, rows, cols)
        if type == "fp8_block128":
            assert error(back, made.values) < 1e-7, (rows, cols)
        else:
            assert torch.equal(back.double(), made.values), (rows, cols)


@pytest.mark.parametrize("type", [type for type in EXACT if BLOCK[type] > 1])
def test_every_code_and_scale(type):
    """Random bits but for the floats: codes, scales and minima that quantisers do not make."""
    rows, cols = 48, 768
    raw = torch.from_numpy(np.random.default_rng(1).integers(0, 256, native.source_bytes(type, rows, cols), np.uint8))
    blocks = raw.view(-1, native.source_bytes(type, 1, BLOCK[type]))
    halves = {"q6_k": (208,), "q3_k": (108,), "q2_k": (80, 82), "q5_k": (0, 2), "q4_k": (0, 2), "mxfp4": ()}
    for offset in halves.get(type, (0,)):
        blocks[:, offset + 1] &= 0xBF  # exponents up to 15: no infinity, no NaN
    if type == "mxfp4":
        blocks[:, 0] %= 250
    back = native.unpack(native.pack(raw, type, type, rows, cols), type, rows, cols)
    assert torch.equal(back.double(), decode(raw, type, rows, cols))


@pytest.mark.parametrize("type", native.TYPES)
def test_spans_of_rows_are_the_whole(type):
    rows, cols = 300, 2 * max(BLOCK[type], 129 if BLOCK[type] == 1 else 1)
    made, src, whole = packed(type, rows, cols)
    row_bytes = native.source_bytes(src, 1, cols)
    unit = 128 if src == "fp8_block128" else 16
    out = torch.zeros_like(native.empty(len(whole)))
    for first, last in ((2 * unit, rows), (0, unit), (unit, 2 * unit)):  # in any order
        scale = None if made.scale is None else made.scale[first // 128 : -(-last // 128)].contiguous()
        part = made.raw[first * row_bytes : last * row_bytes]
        native.pack(part, src, type, rows, cols, scale, out=out, span=(first, last))
    assert torch.equal(out, whole)


@pytest.mark.parametrize("type", native.TYPES)
def test_writes_stay_inside(type):
    for rows, cols in shapes(type):
        made, src, whole = packed(type, rows, cols)
        buffer = torch.full((len(whole) + 512,), 0xA5, dtype=torch.uint8)
        raw, scale = made.raw.clone(), None if made.scale is None else made.scale.clone()
        native.pack(raw, src, type, rows, cols, scale, out=buffer[256:-256])
        assert (buffer[:256] == 0xA5).all() and (buffer[-256:] == 0xA5).all()
        assert torch.equal(buffer[256:-256], whole)
        assert torch.equal(raw, made.raw)


@pytest.mark.parametrize("type", native.TYPES)
def test_rows_that_fill_up_a_group_are_zero(type):
    for rows, cols in shapes(type):
        _, _, bytes_ = packed(type, rows, cols)
        filled = -(-rows // 16) * 16
        assert len(bytes_) == native.packed_bytes(type, filled, cols)
        assert not native.unpack(bytes_, type, filled, cols)[rows:].any()


@pytest.mark.parametrize("type", [type for type in native.TYPES if type not in ("f32", "bf16")])
def test_no_weight_is_beyond_its_bound(type):
    """The last 64 bytes of a group: a bound of each of its rows, that keeps what tiles compute with in float16."""
    for rows, cols in shapes(type):
        _, _, bytes_ = packed(type, rows, cols)
        bounds = bytes_.view(-1, native.packed_bytes(type, 16, cols))[:, -64:].contiguous().view(torch.float32)
        largest = native.unpack(bytes_, type, rows, cols).abs().amax(1)
        assert (largest <= bounds.reshape(-1)[:rows]).all(), (rows, cols)


@pytest.mark.parametrize("dst", ["f32", "bf16"])
@pytest.mark.parametrize("type", [*EXACT, "f16"])
def test_to_floats(type, dst):
    for rows, cols in shapes(type):
        made = source(type, rows, cols, np.random.default_rng(0))
        got = native.unpack(native.pack(made.raw, type, dst, rows, cols, made.scale), dst, rows, cols)
        exact = made.values.float()  # all types but fp8 are exact in float; its product is rounded once
        assert torch.equal(got, exact if dst == "f32" else exact.bfloat16().float()), (rows, cols)


def test_every_float16_and_bfloat16():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    half = every.view(torch.float16)
    for raw, src in ((half, "f16"), (every.view(torch.bfloat16), "bf16")):
        got = native.unpack(native.pack(raw, src, "f32", 256, 256), "f32", 256, 256).reshape(-1)
        assert torch.equal(got.nan_to_num(7), raw.float().nan_to_num(7))
        assert torch.equal(got.isnan(), raw.isnan())
    got = native.unpack(native.pack(half, "f16", "bf16", 256, 256), "bf16", 256, 256).reshape(-1)
    assert torch.equal(got.nan_to_num(7), half.to(torch.bfloat16).float().nan_to_num(7))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70))
@settings(max_examples=50, deadline=None)
def test_rounds_to_nearest_even(bits):
    raw = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    got = native.unpack(native.pack(raw, "f32", "bf16", 1, len(bits)), "bf16", 1, len(bits)).reshape(-1)
    expected = raw.to(torch.bfloat16).float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (130, 300), (257, 129)])
@pytest.mark.parametrize("dst", ["f32", "bf16", "fp8_block128"])
def test_fp8_with_partial_blocks(shape, dst):
    """Every byte but NaN, which only floats hold."""
    rows, cols = shape
    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    if dst == "fp8_block128":
        raw[raw & 0x7F == 0x7F] = 0x7E
    scale = torch.from_numpy(rng.uniform(0.5, 2, (-(-rows // 128), -(-cols // 128))).astype(np.float32))
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
    expected = raw.view(torch.float8_e4m3fn).float() * wide
    got = native.unpack(native.pack(raw, "fp8_block128", dst, rows, cols, scale), dst, rows, cols)
    expected = expected.bfloat16().float() if dst == "bf16" else expected
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("at", [(0, 0), (3, 129), (129, 7), (16, 127)])
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_that_is_not_a_number(byte, at):
    """Kernels do not look for the one byte of e4m3 that is none."""
    raw = torch.full((130, 130), 0x7E, dtype=torch.uint8)
    scale = torch.ones(2, 2)
    native.pack(raw, "fp8_block128", "fp8_block128", 130, 130, scale)
    raw[at] = byte
    with pytest.raises(ValueError, match="cannot pack rows 0 to 130 of 130 from fp8_block128 as fp8_block128"):
        native.pack(raw, "fp8_block128", "fp8_block128", 130, 130, scale)


@pytest.mark.parametrize("src", native.SOURCES)
@pytest.mark.parametrize("dst", native.LOSSY)
def test_loss(src, dst):
    """Each weight within half a step of its row's, or block's, largest; normal weights within the family's bound."""
    rows, cols = 70, 768
    made = source(src, rows, cols, np.random.default_rng(0))
    got = native.unpack(native.pack(made.raw, src, dst, rows, cols, made.scale), dst, rows, cols).double()
    steps, run = (127, cols) if dst == "int8_row" else (7, BLOCK[dst])
    step = made.values.view(rows, -1, run).abs().amax(2, keepdim=True) / steps
    # A scale in float16 is rounded itself: the largest code moves by that, and codes are cut off at `steps`.
    slack = 1e-5 if dst == "int8_row" else 2 * steps * 2.0**-11
    assert error(got, made.values) < ROUNDING[dst]
    worst = float(((got - made.values).view(rows, -1, run).abs() / step).max())
    assert worst <= 0.5 + slack


def test_loss_of_what_is_stored_as_q4_0():
    x = normal(64, 1024, np.random.default_rng(0))
    stored = native.quantize(x, "q4_0")
    got = native.unpack(native.pack(stored, "q4_0", "q4_0", 64, 1024), "q4_0", 64, 1024)
    assert error(got, x.double()) < ROUNDING["q4_0"]


@pytest.mark.parametrize("dst", native.LOSSY)
def test_loss_of_zeros_and_of_one_value(dst):
    x = torch.zeros(17, 128)
    x[3, 5], x[4, 64], x[16] = -2.5, 1e-30, 4.0
    got = native.unpack(native.pack(x, "f32", dst, 17, 128), dst, 17, 128)
    assert torch.allclose(got, x, rtol=1e-3, atol=1e-29)


def test_refusals():
    with pytest.raises(ValueError, match=r"100 columns are no multiple of the block of q4_k"):
        native.packed_bytes("q4_k", 1, 100)
    with pytest.raises(ValueError, match=r"1088 columns are no multiple of the block of int4_128"):
        native.packed_bytes("int4_128", 1, 1088)
    with pytest.raises(ValueError, match="a matrix of 0 x 32"):
        native.packed_bytes("f32", 0, 32)
    with pytest.raises(ValueError, match="no source type 'int8_row'"):
        native.pack(torch.zeros(1, 32), "int8_row", "f32", 1, 32)
    with pytest.raises(ValueError, match=r"cannot pack rows 0 to 1 of 1 from f32 as q8_0: there is no conversion"):
        native.pack(torch.zeros(1, 32), "f32", "q8_0", 1, 32)
    with pytest.raises(ValueError, match="raw holds 128 bytes, not 256"):
        native.pack(torch.zeros(1, 32), "f32", "f32", 2, 32)
    with pytest.raises(ValueError, match="needs a scale"):
        native.pack(torch.zeros(4, dtype=torch.uint8), "fp8_block128", "f32", 2, 2)
    with pytest.raises(ValueError, match="takes no scale"):
        native.pack(torch.zeros(2, 2), "f32", "f32", 2, 2, torch.ones(1, 1))
    for span in ((8, 24), (0, 24), (32, 64), (16, 16)):
        with pytest.raises(ValueError):
            native.pack(torch.zeros(span[1] - span[0], 32), "f32", "f32", 40, 32, span=span)
    raw = torch.zeros(136, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot pack rows 64 to 200 of 200"):
        native.pack(raw, "fp8_block128", "f32", 200, 32, torch.ones(2, 1), span=(64, 200))


def test_sizes_that_overflow():
    lib = native._native().lib
    for type in range(len(native.TYPES)):
        for rows, cols in ((2**63, 2**16), (2**40, 2**40), (2**64 - 1, 256), (1, 2**62)):
            assert lib.kt_packed_bytes(lib.KT_SCALAR, type, rows, cols) == 0, (native.TYPES[type], rows, cols)
            assert lib.kt_source_bytes(type, rows, cols) in (0, rows * cols), (native.TYPES[type], rows, cols)
    assert lib.kt_packed_bytes(lib.KT_SCALAR, lib.KT_F16, 16, 256) == 0
    assert lib.kt_packed_bytes(lib.KT_SCALAR, 99, 16, 256) == lib.kt_source_bytes(99, 16, 256) == 0
    assert lib.kt_source_bytes(lib.KT_INT8, 16, 256) == 0
