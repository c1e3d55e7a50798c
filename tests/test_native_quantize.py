"""The quantisers of csrc/quantize.c: those of the gguf package to the byte, the others within bounds, FP8 as torch."""

import ctypes
import hashlib
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from ktcompile.backends import native
from ktcompile.weights import ggml

CSRC = Path(__file__).parent.parent / "csrc"
PLAIN = ("q8_0", "q4_0", "q5_0")
K_TYPES = ("q4_k", "q5_k", "q6_k")
BLOCKS = (*PLAIN, *K_TYPES)
FP8 = "fp8_block128"
STEPS = {"q8_0": 127, "q4_0": 8, "q5_0": 16}
MOST = {
    "q8_0": 65504 * 127,
    "q4_0": 65504 * 8,
    "q5_0": 65504 * 16,
    "q4_k": 65504 * 63 * 15,
    "q5_k": 65504 * 63 * 31,
    "q6_k": 65504 * 128 * 32,
}
"""The largest magnitude a block can hold, of the sign that reaches further."""


def quantized(x: Tensor, dst: str) -> Tensor:
    """The bytes of a block type."""
    found = native.quantize(x, dst)
    assert isinstance(found, Tensor) and found.dtype == torch.uint8
    return found


def decoded(x: Tensor, dst: str) -> Tensor:
    """Quantised and decoded again, by code that has its own tests: float32."""
    return torch.from_numpy(ggml.BY_NAME[dst].decode(quantized(x, dst).numpy()))


def relative_rms(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / x.double().norm())


def normal(rows: int = 64, cols: int = 1024, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32))


def heavy_tailed() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_t(3, size=(64, 1024)).astype(np.float32))


def uniform() -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).uniform(-1, 1, size=(64, 1024)).astype(np.float32))


def all_positive() -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).uniform(0.5, 1, size=(64, 1024)).astype(np.float32))


def with_outliers() -> Tensor:
    """One value in a sub-block of each row is a hundred times the others."""
    x = normal(seed=4)
    x[:, 7::256] = 100
    return x


# ---- bit for bit


@pytest.mark.parametrize("dst", PLAIN)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 4),
    exponent=st.integers(-100, 16),
    kind=st.sampled_from(["normal", "ties", "sparse", "mixed"]),
)
@example(seed=0, rows=1, blocks=1, exponent=-1, kind="sparse")
def test_bytes_are_those_of_the_package(dst: str, seed: int, rows: int, blocks: int, exponent: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 32 * blocks))
    if kind == "ties":  # halves of a step, with both signs of the largest value
        x = rng.integers(-2 * STEPS[dst], 2 * STEPS[dst] + 1, x.shape) / 2
    if kind == "sparse":  # blocks of zeros of either sign too
        x *= rng.random(x.shape) < 0.02
    if kind == "mixed":
        x *= 2.0 ** rng.integers(-20, 1, x.shape)
    x = np.ldexp(x, exponent - 3).astype(np.float32)
    with np.errstate(all="ignore"):
        want = gguf.quants.quantize(x, gguf.GGMLQuantizationType[dst.upper()])
    assert np.array_equal(quantized(torch.from_numpy(x), dst).numpy(), want)


def everywhere_the_same() -> Tensor:
    """Values made by integer arithmetic: a bell of 24-bit numbers, times powers of two."""
    i = np.arange(24 * 1024, dtype=np.uint64)
    bell = sum(
        (i * odd >> np.uint64(7)) % np.uint64(1 << 20) for odd in map(np.uint64, (2654435761, 2246822519, 3266489917))
    )
    x = (bell.astype(np.float32) - np.float32(1.5 * 2**20)) * np.float32(2**-20)
    return torch.from_numpy(x.reshape(24, 1024)) * 2.0 ** torch.arange(-12, 12)[:, None]


def digest(parts: Tensor | tuple[Tensor, ...]) -> str:
    tensors = parts if isinstance(parts, tuple) else (parts,)
    return hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()[:16]


DIGESTS = {
    "q8_0": "15ed092414150af3",
    "q4_0": "4f8828c29420ff69",
    "q5_0": "e5eddd0ee575652f",
    "q4_k": "ececc699fbc4f72b",
    "q5_k": "869c87a270ff7d2e",
    "q6_k": "31a2cafab1875687",
    "fp8_block128": "efcbd39104985cfd",
}


@pytest.mark.parametrize("dst", native.QUANTIZERS)
def test_bytes_are_the_same_on_every_machine(dst: str) -> None:
    """Changes with the method; then it changes on all machines."""
    assert digest(native.quantize(everywhere_the_same(), dst)) == DIGESTS[dst]


@pytest.mark.parametrize("flags", ["-O0", "-O3 -march=native -ffp-contract=fast"])
def test_bytes_do_not_depend_on_the_compiler(tmp_path: Path, flags: str) -> None:
    """Wider vectors and fused products are allowed by the flags, and not used to round otherwise."""
    library = tmp_path / "quantize.so"
    compiler = (sysconfig.get_config_var("CC") or "cc").split()
    command = [*compiler, "-std=gnu11", "-shared", "-fPIC", *flags.split(), f"-I{CSRC}", "-o", str(library)]
    subprocess.run([*command, *map(str, CSRC.glob("quantize*.c")), str(CSRC / "blocks.c")], check=True)
    run = ctypes.CDLL(str(library)).kt_quantize
    x = torch.cat([everywhere_the_same(), heavy_tailed()])
    for dst in BLOCKS:
        want = quantized(x, dst)
        got = torch.empty_like(want)
        sizes = map(ctypes.c_size_t, x.shape)
        assert (
            run(native.TYPES.index(dst), *sizes, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(got.data_ptr()), None)
            == 0
        )
        assert torch.equal(got, want), dst


def test_bytes_do_not_depend_on_threads() -> None:
    x = heavy_tailed()
    want = {dst: digest(native.quantize(x, dst)) for dst in native.QUANTIZERS}
    wrong: list[str] = []

    def call() -> None:
        wrong.extend(dst for _ in range(3) for dst in want if digest(native.quantize(x, dst)) != want[dst])

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- how good


BOUNDS: dict[Callable[[], Tensor], tuple[float, float, float]] = {
    normal: (0.0715, 0.0353, 0.0176),
    heavy_tailed: (0.0923, 0.0455, 0.0250),
    uniform: (0.0548, 0.0269, 0.0131),
    all_positive: (0.0222, 0.0110, 0.0099),
    with_outliers: (0.0570, 0.0494, 0.0325),
}
"""Relative RMS error of q4_k, q5_k and q6_k: what was measured, and a percent."""


def plain_rounding(x: Tensor, dst: str) -> Tensor:
    """The largest magnitude of a sub-block over the largest integer, with exact scales."""
    size, most = {"q4_k": (32, 7), "q5_k": (32, 15), "q6_k": (16, 31)}[dst]
    parts = x.view(-1, size)
    scale = parts.abs().amax(-1, keepdim=True) / most
    return ((parts / scale).round() * scale).view(x.shape)


@pytest.mark.parametrize("dst", K_TYPES)
@pytest.mark.parametrize("make", BOUNDS, ids=lambda f: f.__name__)
def test_error_of_k_types(make: Callable[[], Tensor], dst: str) -> None:
    x = make()
    error = relative_rms(x, decoded(x, dst))
    assert error <= BOUNDS[make][K_TYPES.index(dst)]
    assert error < relative_rms(x, plain_rounding(x, dst))


@pytest.mark.parametrize("dst", K_TYPES)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.371, -3e4, 65504.0])
def test_a_constant_keeps_eleven_bits(value: float, dst: str) -> None:
    x = torch.full((1, 512), value)
    assert ((decoded(x, dst) - x).abs() <= 2**-11 * abs(value) * 1.001).all()


@pytest.mark.parametrize("dst", BLOCKS)
def test_zeros_stay_zeros(dst: str) -> None:
    x = torch.zeros(2, 512)
    x[1, ::2] = -0.0
    assert (decoded(x, dst) == 0).all()


@pytest.mark.parametrize("dst", K_TYPES)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_single_value_disturbs_no_zero(value: float, dst: str) -> None:
    """Where zero is q = 15 or 31, of q4_k and q5_k below zero, it is a difference of two fp16 scales."""
    for at in (0, 37, 255):
        x = torch.zeros(1, 256)
        x[0, at] = value
        y = decoded(x, dst)
        assert ((y - x).abs() <= (2**-11 if value > 0 or dst == "q6_k" else 2**-10)).all()
        assert y.count_nonzero() == 1 or (value < 0 and dst != "q6_k")


@pytest.mark.parametrize("dst", K_TYPES)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(0, 8))
def test_powers_of_two_pass_through(dst: str, seed: int, exponent: int) -> None:
    x = normal(2, 256, seed)
    assert torch.equal(decoded(x * 2.0**exponent, dst), decoded(x, dst) * 2.0**exponent)


@pytest.mark.parametrize("dst", PLAIN)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-10, 10))
def test_decoded_values_quantize_to_themselves(dst: str, seed: int, exponent: int) -> None:
    once = decoded(normal(4, 64, seed) * 2.0**exponent, dst)
    assert torch.equal(decoded(once, dst), once)


@pytest.mark.parametrize("dst", BLOCKS)
@pytest.mark.parametrize("size", [1e30, 3e38, 1e12])
def test_huge_values_are_clipped(size: float, dst: str) -> None:
    sign = 1.0 if dst.startswith("q4_k") or dst == "q5_k" else -1.0
    assert (decoded(torch.full((1, 256), sign * size), dst) == sign * MOST[dst]).all()
    y = decoded(normal(4, 512).clamp(-1, 1) * size, dst)
    assert y.isfinite().all() and y.abs().max() <= MOST[dst]


@pytest.mark.parametrize("dst", BLOCKS)
@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-44])
def test_tiny_values_are_zero(size: float, dst: str) -> None:
    assert (decoded(normal(4, 512).clamp(-1, 1) * size, dst) == 0).all()


@pytest.mark.parametrize("dst", K_TYPES)
def test_small_values_use_the_smallest_scales(dst: str) -> None:
    """fp16 scales are subnormal here: what rounding them costs goes into the integers."""
    x = normal() * 1e-5
    assert relative_rms(x, decoded(x, dst)) <= 1.15 * BOUNDS[normal][K_TYPES.index(dst)]


@pytest.mark.parametrize("dst", K_TYPES)
@given(data=st.data())
def test_any_finite_block_decodes_to_finite_values(dst: str, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=256, max_size=256))
    x = torch.from_numpy(np.array(bits, np.uint32).view(np.float32)).nan_to_num(1.0, 2.0, -2.0)[None]
    for shrunk in (x, x.clamp(-1, 1), x.clamp(-1e-3, 1e3)):
        y = decoded(shrunk, dst)
        assert y.isfinite().all()
        if shrunk.abs().max() <= MOST[dst] / 2 and shrunk.abs().max() > 1e-3:
            assert (y - shrunk).norm() <= shrunk.norm()


# ---- FP8


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (130, 257), (3, 500), (300, 7)])
def test_fp8_is_torchs_with_a_scale_for_each_block(shape: tuple[int, int]) -> None:
    x = normal(*shape) * 10.0 ** torch.linspace(-6, 3, shape[1])
    found = native.quantize(x, FP8)
    assert isinstance(found, tuple)
    raw, scales = found
    rows, cols = -(-shape[0] // 128), -(-shape[1] // 128)
    assert raw.dtype == torch.float8_e4m3fn and raw.shape == x.shape and scales.shape == (rows, cols)
    for r in range(rows):
        for c in range(cols):
            block = x[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            assert scales[r, c] == block.abs().max() / 448
            want = (block / scales[r, c]).to(torch.float8_e4m3fn)
            got = raw[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_fp8_error_is_half_a_step() -> None:
    x = heavy_tailed()
    raw, scales = native.quantize(x, FP8)
    y = native.unpack(native.pack(raw, FP8, FP8, *x.shape, scale=scales), FP8, *x.shape)
    scale = scales.repeat_interleave(128, 0)[: x.shape[0]].repeat_interleave(128, 1)
    # Three bits after the leading one; below 2^-6 steps of 2^-9.
    assert ((x - y).abs() <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()


def test_every_fp8_value_is_kept() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    raw, scales = native.quantize(codes.view(torch.float8_e4m3fn).float().view(2, 127), FP8)
    assert scales.item() == 1 and torch.equal(raw.view(torch.uint8).flatten(), codes)


@pytest.mark.parametrize(("size", "scale"), [(0.0, 1.0), (1e-44, 2.0**-126), (3e38, 3e38 / 448)])
def test_fp8_scales_are_normal_numbers(size: float, scale: float) -> None:
    raw, scales = native.quantize(torch.full((2, 2), size), FP8)
    assert scales.item() == pytest.approx(scale, rel=1e-6)
    assert (raw.float() * scales).isfinite().all() and raw.float().abs().max() in (0, 448)


# ---- refusals


@pytest.mark.parametrize("dst", native.QUANTIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(dst: str, bad: float) -> None:
    for row, col in ((0, 0), (130, 511), (64, 300)):
        x = normal(131, 512)
        x[row, col] = bad
        with pytest.raises(ValueError, match=rf"x\[{row}, {col}\] is {bad}, and {dst} holds finite values only"):
            native.quantize(x, dst)


def test_refusals() -> None:
    x = normal(2, 256)
    with pytest.raises(ValueError, match="no quantizer 'q3_k'; there are q8_0, "):
        native.quantize(x, "q3_k")
    with pytest.raises(ValueError, match="100 columns are no multiple of the block of q4_k"):
        native.quantize(normal(2, 100), "q4_k")
    with pytest.raises(ValueError, match=r"x is \(256,\), not \[rows, cols\]"):
        native.quantize(x[0], "q4_k")
    with pytest.raises(ValueError, match=r"x is \(0, 256\), not"):
        native.quantize(x[:0], "q4_k")
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        native.quantize(x.double(), "q8_0")
    with pytest.raises(ValueError, match="x is not contiguous"):
        native.quantize(normal(256, 32).T, "q8_0")
    with pytest.raises(ValueError, match=r"out is torch\.uint8 \(2, 143\), not torch\.uint8 \(2, 144\)"):
        native.quantize(x, "q4_k", out=torch.empty(2, 143, dtype=torch.uint8))


def test_status_codes() -> None:
    lib, ffi = native._native().lib, native._native().ffi
    x, out, scales = ffi.new("float[]", 256), ffi.new("uint8_t[]", 1024), ffi.new("float[]", 2)
    others = (
        lib.KT_TYPE_COUNT,
        -1,
        64,
        *(code for code, name in enumerate(native._CODES) if name not in native.QUANTIZERS),
    )
    wrong = [
        *(lib.kt_quantize(type, 1, 256, x, out, ffi.NULL) for type in others),
        lib.kt_quantize(lib.KT_Q8_0, 0, 256, x, out, ffi.NULL),
        lib.kt_quantize(lib.KT_Q8_0, 1, 0, x, out, ffi.NULL),
        lib.kt_quantize(lib.KT_Q8_0, 1, 256, ffi.NULL, out, ffi.NULL),
        lib.kt_quantize(lib.KT_Q8_0, 1, 256, x, ffi.NULL, ffi.NULL),
        lib.kt_quantize(lib.KT_Q8_0, 1, 256, x, out, scales),
        lib.kt_quantize(lib.KT_FP8_BLOCK128, 1, 256, x, out, ffi.NULL),
    ]
    assert wrong == [lib.KT_BAD_ARGUMENT] * len(wrong)
    assert lib.kt_quantize(lib.KT_Q6_K, 1, 128, x, out, ffi.NULL) == lib.KT_BAD_COLUMNS
    assert lib.kt_quantize(lib.KT_Q8_0, 2**62, 2**40, x, out, ffi.NULL) == lib.KT_TOO_LARGE
    assert lib.kt_source_bytes(99, 1, 256) == lib.kt_source_bytes(lib.KT_Q4_K, 1, 255) == 0


@pytest.mark.parametrize("dst", native.QUANTIZERS)
def test_out_is_written_and_nothing_else(dst: str) -> None:
    x = normal(3, 512)
    want = native.quantize(x, dst)
    raw = (want[0] if isinstance(want, tuple) else want).view(torch.uint8)
    room = torch.full((5, raw.shape[1]), 0xA5, dtype=torch.uint8)
    assert digest(native.quantize(x, dst, out=room[1:4])) == digest(want)
    assert torch.equal(room[1:4], raw) and (room[::4] == 0xA5).all()
    if dst != FP8:
        assert raw.shape[1] == ggml.BY_NAME[dst].row_bytes(512)
