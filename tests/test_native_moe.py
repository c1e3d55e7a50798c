"""The native kernels: every instruction set that runs here, and AMX under an emulator, against float64."""

import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import report
from native.reference import ROUTINGS, Layer, error, layer, random_raw, route, values
from tolerances import TOLERANCE

from ktcompile.backends import native

TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33)
DENSE_SHAPES = ((1, 1), (31, 33), (64, 96), (257, 130))
SHAPES = {
    "f32": DENSE_SHAPES,
    "bf16": DENSE_SHAPES,
    "q8_0": ((32, 32), (96, 160), (1056, 64)),
    "q5_0": ((32, 32), (96, 160), (1056, 64)),
    "q4_k": ((256, 256), (1280, 256)),
    "q6_k": ((256, 256), (1280, 256)),
}
CASES = [(type, shape) for type, shapes in SHAPES.items() for shape in shapes]
EXPERTS, TOP_K = 5, 3

for _isa, _reason in native.isas().items():
    report.ran(_isa, f"not run: {_reason}" if _reason else "no test of it selected")
HERE = [isa for isa, reason in native.isas().items() if reason is None]


@pytest.fixture(scope="module")
def pool() -> Iterator[native.Pool]:
    made = native.Pool(2)
    yield made
    made.close()


@lru_cache(maxsize=4)
def cached_layer(types: tuple[str, str, str], hidden: int, width: int, activation: str = "silu") -> Layer:
    return layer(types, EXPERTS, hidden, width, activation)


@lru_cache(maxsize=64)
def problem(types: tuple[str, str, str], hidden: int, width: int, tokens: int, routing: str, activation: str = "silu"):
    made = cached_layer(types, hidden, width, activation)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens))
    ids, scores = route(routing, EXPERTS, tokens, TOP_K, seed=tokens)
    return made.weights, x, ids, scores, made.expected(x, ids, scores)


def check(pool: native.Pool, isa: str, types: tuple[str, str, str], *key) -> None:
    weights, x, ids, scores, expected = problem(types, *key)
    got = native.moe(pool, isa, weights, x, ids, scores)
    report.ran(isa, "native")
    assert error(got, expected) < TOLERANCE[native.FAMILY[isa]], (isa, types, key)


# The instruction sets are innermost, so that they share the references.
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("type", "shape"), CASES)
def test_agrees_with_float64(pool, type, shape, isa):
    if native.refuses(isa, [type]):
        with pytest.raises(ValueError, match=f"{isa} computes in .* and does not take {type} weights"):
            native.moe(pool, isa, *problem((type,) * 3, *shape, 1, "random")[:4])
        return
    for tokens in TOKENS:
        for routing in ROUTINGS:
            check(pool, isa, (type,) * 3, *shape, tokens, routing)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_and_mixed_types(pool, activation, tokens, isa):
    types = ("q4_k", "q5_0", "q8_0") if native.FAMILY[isa] == "int8" else ("q4_k", "q6_k", "q8_0")
    check(pool, isa, types, 256, 320, tokens, "random", activation)


@pytest.mark.parametrize("isa", HERE)
def test_many_tokens_on_one_expert(pool, isa):
    """More than one kt_dot takes, with the columns in more than one panel."""
    check(pool, isa, ("q8_0",) * 3, 2080, 64, 300, "one expert")


@pytest.mark.parametrize("isa", HERE)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_size(pool, isa, data):
    """All numbers positive: where nothing cancels, the bound holds for a single product too."""
    type = data.draw(st.sampled_from([type for type in ("f32", "bf16", "q8_0") if not native.refuses(isa, [type])]))
    unit = 32 if type == "q8_0" else 1
    hidden, width = (unit * data.draw(st.integers(1, 200 // unit)) for _ in range(2))
    tokens, top_k, experts = (data.draw(st.integers(1, most)) for most in (40, 4, 6))
    made = layer((type,) * 3, experts, hidden, width, positive=True)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0)).abs()
    ids, scores = route(data.draw(st.sampled_from(ROUTINGS)), experts, tokens, top_k)
    scores = scores.abs()
    got = native.moe(pool, isa, made.weights, x, ids, scores)
    assert error(got, made.expected(x, ids, scores)) < TOLERANCE[native.FAMILY[isa]]


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_threads_do_not_change_a_bit(tokens, isa):
    weights, x, ids, scores, _ = problem(("q4_k", "q4_k", "q8_0"), 256, 288, tokens, "random")
    results = []
    for threads in (1, 2, 3):
        own = native.Pool(threads)
        results += [native.moe(own, isa, weights, x, ids, scores) for _ in range(3)]
        own.close()
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("tokens", [1, 33])
def test_writes_stay_inside(pool, tokens, isa):
    """Scratch and y with a margin of canaries, weights and x read-only by comparison; scratch at an odd address."""
    type, shape = ("bf16", (257, 130)) if native.refuses(isa, ["bf16"]) is None else ("q8_0", (96, 160))
    weights, x, ids, scores, _ = problem((type,) * 3, *shape, tokens, "random")
    before = [tensor.clone() for tensor in (weights.gate, weights.up, weights.down, x, ids, scores)]
    lib, number = native._native().lib, native._ISAS.index(isa)
    nbytes = lib.kt_moe_scratch_bytes(pool._handle, weights._struct, number, tokens, TOP_K)
    margin = 256
    scratch = torch.full((nbytes + 2 * margin,), 0xA5, dtype=torch.uint8)
    y = torch.full((x.numel() + 2 * margin,), 12345.0)
    inner_scratch, inner_y = scratch[margin + 1 : margin + 1 + nbytes], y[margin : margin + x.numel()]

    def run(scratch_bytes: int) -> int:
        return lib.kt_moe_run(
            pool._handle,
            weights._struct,
            number,
            tokens,
            TOP_K,
            native._pointer("float", x),
            native._pointer("int64_t", ids),
            native._pointer("float", scores),
            native._pointer("float", inner_y),
            native._pointer("void", inner_scratch),
            scratch_bytes,
        )

    assert run(nbytes - 1) == lib.KT_SMALL_SCRATCH
    assert (y == 12345).all()
    assert run(nbytes) == lib.KT_OK
    assert (scratch[: margin + 1] == 0xA5).all() and (scratch[margin + 1 + nbytes :] == 0xA5).all()
    assert (y[:margin] == 12345).all() and (y[-margin:] == 12345).all()
    after = (weights.gate, weights.up, weights.down, x, ids, scores)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(inner_y.view(x.shape), native.moe(pool, isa, weights, x, ids, scores))


@pytest.mark.parametrize("type", native.TYPES)
def test_pack_and_dequantize(type):
    rows, cols = 5, 512
    raw = random_raw(type, rows, cols, np.random.default_rng(0))
    nbytes = native.packed_bytes(type, rows, cols)
    assert raw.numel() == nbytes
    buffer = torch.full((nbytes + 64,), 0xA5, dtype=torch.uint8)
    assert torch.equal(native.pack(raw, type, type, rows, cols, out=buffer[:nbytes]), raw)
    assert (buffer[nbytes:] == 0xA5).all()
    exact = values(raw, type, rows, cols)
    assert error(native.dequantize(raw, type, rows, cols), exact) < 1e-7
    rounded = native.pack(raw, type, "bf16", rows, cols).view(torch.bfloat16).view(rows, cols)
    assert torch.equal(rounded, native.dequantize(raw, type, rows, cols).to(torch.bfloat16))


def test_pack_every_float16_and_bfloat16():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    half = every.view(torch.float16)
    for raw, src in ((half, "f16"), (every.view(torch.bfloat16), "bf16")):
        got = native.pack(raw, src, "f32", 256, 256).view(torch.float32)
        assert torch.equal(got.nan_to_num(7), raw.float().nan_to_num(7))
        assert torch.equal(got.isnan(), raw.isnan())
    got = native.pack(half, "f16", "bf16", 256, 256).view(torch.bfloat16)
    assert torch.equal(got.nan_to_num(7), half.to(torch.bfloat16).nan_to_num(7))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70))
@settings(max_examples=50, deadline=None)
def test_pack_rounds_to_nearest_even(bits):
    raw = torch.tensor(bits, dtype=torch.uint32).view(torch.float32)
    got = native.pack(raw, "f32", "bf16", 1, len(bits)).view(torch.bfloat16)
    expected = raw.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (130, 300), (257, 129)])
@pytest.mark.parametrize("dst", ["f32", "bf16"])
def test_pack_fp8_with_partial_blocks(shape, dst):
    rows, cols = shape
    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    scale = torch.from_numpy(rng.uniform(0.5, 2, (-(-rows // 128), -(-cols // 128))).astype(np.float32))
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
    expected = raw.view(torch.float8_e4m3fn).float() * wide
    got = native.pack(raw, "fp8_block128", dst, rows, cols, scale)
    dtype = torch.float32 if dst == "f32" else torch.bfloat16
    assert torch.equal(got.view(dtype).view(rows, cols).nan_to_num(7), expected.to(dtype).nan_to_num(7))


def test_experts_with_a_stride(pool):
    weights, x, ids, scores, _ = problem(("q8_0",) * 3, 96, 160, 7, "random")
    wide = torch.zeros(EXPERTS, weights.gate.shape[1] + 101, dtype=torch.uint8)
    wide[:, 1:-100] = weights.gate
    moved = native.MoeWeights(EXPERTS, 96, 160, "silu", wide[:, 1:-100], weights.up, weights.down, *weights.types)
    expected = native.moe(pool, "scalar", weights, x, ids, scores)
    assert torch.equal(native.moe(pool, "scalar", moved, x, ids, scores), expected)


def test_no_tokens(pool):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 1, "random")
    assert native.moe(pool, "scalar", weights, x[:0], ids[:0], scores[:0]).shape == (0, 31)
    assert not native.moe(pool, "scalar", weights, x, ids[:, :0].contiguous(), scores[:, :0].contiguous()).any()


@pytest.mark.parametrize("bad", [-1, EXPERTS, 2**40])
def test_bad_expert_leaves_y_alone(pool, bad):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    ids = ids.clone()
    ids[-1, -1] = bad
    y = torch.full_like(x, 5.0)
    with pytest.raises(ValueError, match=rf"{bad}.* allowed is \[0, {EXPERTS}\)"):
        native.moe(pool, "scalar", weights, x, ids, scores, out=y)
    assert (y == 5).all()


def test_refusals_and_bad_input(pool):
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    assert "does not take f32" in str(native.refuses("amx", ["f32"]))
    assert native.refuses("scalar", native.TYPES) is None
    assert "no kernel takes" in str(native.refuses("scalar", ["f16"]))
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        native.moe(pool, "sse9", weights, x, ids, scores)
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        native.moe(pool, "scalar", weights, x.double(), ids, scores)
    with pytest.raises(ValueError, match=r"scores is torch\.float32"):
        native.moe(pool, "scalar", weights, x, ids, scores[:-1])
    with pytest.raises(ValueError, match="x is not contiguous"):
        native.moe(pool, "scalar", weights, x.T.contiguous().T, ids, scores)
    with pytest.raises(ValueError, match=r"100 columns are no multiple of the block of q4_k"):
        native.packed_bytes("q4_k", 1, 100)
    with pytest.raises(ValueError, match=r"cannot pack f32 as q8_0"):
        native.pack(torch.zeros(1, 32), "f32", "q8_0", 1, 32)
    with pytest.raises(ValueError, match="raw holds 128 bytes, not 256"):
        native.pack(torch.zeros(1, 32), "f32", "f32", 2, 32)
    with pytest.raises(ValueError, match="needs a scale"):
        native.pack(torch.zeros(4, dtype=torch.uint8), "fp8_block128", "f32", 2, 2)
    with pytest.raises(ValueError, match="gate has 4 experts, not 5"):
        native.MoeWeights(EXPERTS, 31, 33, "silu", weights.gate[1:], weights.up, weights.down, *weights.types)
    with pytest.raises(ValueError, match="no activation 'relu'"):
        native.MoeWeights(EXPERTS, 31, 33, "relu", weights.gate, weights.up, weights.down, *weights.types)
    with pytest.raises(ValueError, match="1 to 4096 threads"):
        native.Pool(0)


def test_status_codes(pool):
    lib, ffi = native._native().lib, native._native().ffi
    weights, _x, _ids, _scores, _ = problem(("f32",) * 3, 31, 33, 7, "random")
    assert all(ffi.string(lib.kt_error(code)) != b"unknown status" for code in range(lib.KT_STATUS_COUNT))
    assert ffi.string(lib.kt_error(99)) == b"unknown status"
    floats, longs = (ffi.new(f"{kind}[]", 256) for kind in ("float", "int64_t"))

    def run(isa=lib.KT_SCALAR, tokens=1, x=floats, **changes) -> int:
        moe = ffi.new("kt_moe *", weights._struct[0])
        for name, value in changes.items():
            setattr(moe, name, value)
        assert lib.kt_moe_scratch_bytes(pool._handle, moe, isa, 1, 1) == 0 or not changes
        return lib.kt_moe_run(pool._handle, moe, isa, tokens, 1, x, longs, floats, floats, floats, 4)

    wrong = [run(isa=99), run(activation=9), run(gate_type=77), run(width=0), run(up=ffi.NULL), run(x=ffi.NULL)]
    assert wrong == [lib.KT_BAD_ARGUMENT] * 6
    assert run(gate_type=lib.KT_F16) == lib.KT_REFUSED
    assert run(gate_type=lib.KT_Q4_K) == lib.KT_BAD_COLUMNS
    assert run(tokens=2**40) == lib.KT_TOO_LARGE
    assert run() == lib.KT_SMALL_SCRATCH
    assert run(tokens=0) == lib.KT_OK
    assert lib.kt_isa_missing(99) != ffi.NULL and not lib.kt_isa_supported(99)
    assert lib.kt_packed_bytes(lib.KT_AMX, lib.KT_F32, 1, 1) == 0


def test_calls_from_two_threads_take_turns(pool):
    weights, x, ids, scores, _ = problem(("q8_0",) * 3, 96, 160, 17, "random")
    expected = native.moe(pool, "scalar", weights, x, ids, scores)
    wrong: list[int] = []

    def call() -> None:
        for i in range(50):
            if not torch.equal(native.moe(pool, "scalar", weights, x, ids, scores), expected):
                wrong.append(i)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pool_in_a_forked_child():
    """The child is told, does not hang, and can make a pool of its own."""
    code = """
import os, torch
from native.reference import layer, route
from ktcompile.backends import native
pool, made = native.Pool(2), layer(("f32",) * 3, 2, 4, 4)
ids, scores = route("random", 2, 3, 2)
x = torch.ones(3, 4)
y = native.moe(pool, "scalar", made.weights, x, ids, scores)
child = os.fork()
if child == 0:
    tensors = {"x": ("float", x), "ids": ("int64_t", ids), "scores": ("float", scores), "y": ("float", y),
               "scratch": ("void", pool._scratch)}
    pointers = [native._pointer(*tensor) for tensor in tensors.values()]
    status = native._native().lib.kt_moe_run(
        pool._handle, made.weights._struct, 0, 3, 2, *pointers, pool._scratch.numel())
    try:
        native.moe(pool, "scalar", made.weights, x, ids, scores)
    except RuntimeError as error:
        told = "before fork()" in str(error)
    pool.close()
    own = native.Pool(2)
    same = torch.equal(native.moe(own, "scalar", made.weights, x, ids, scores), y)
    own.close()
    os._exit(0 if told and same and status == native._native().lib.KT_FORKED else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(native.moe(pool, "scalar", made.weights, x, ids, scores), y)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment())


def test_closed_pool():
    weights, x, ids, scores, _ = problem(("f32",) * 3, 31, 33, 1, "random")
    own = native.Pool(3)
    own.close()
    own.close()
    with pytest.raises(ValueError, match="the pool is closed"):
        native.moe(own, "scalar", weights, x, ids, scores)


def test_amx_under_the_emulator(tmp_path):
    """The same object code, trapped instruction by instruction: AMX is tested on machines that have none.

    Its decoding uses AVX-512 BF16, which is not emulated.
    """
    reason = native.isas()["avx512_bf16"]
    if reason is not None:
        report.ran("amx", f"not emulated: {reason}")
        pytest.skip(reason)
    here, library = Path(__file__).parent / "native", tmp_path / "amx_emu.so"
    compiler = sysconfig.get_config_var("CC").split()[0]
    command = [compiler, "-O2", "-shared", "-fPIC", str(here / "amx_emu.c"), "-o", str(library), "-ldl", "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, str(here / "amx_run.py")],
        env=environment(LD_PRELOAD=str(library)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "emulated" in done.stdout
    report.ran("amx", "emulated")


def environment(**more: str) -> dict[str, str]:
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, (str(tests.parent), str(tests), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}
