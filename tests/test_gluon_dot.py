"""The product on tensor cores is that of decoded weights, where there is a GPU for it; it compiles anywhere.

Gluon has no interpreter: elsewhere only its compilation, what is made of x, and what is said in its place are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_triton_linear import DEVICE, TOLERANCE, close, inside_canaries, make
from test_triton_linear import HERE as TRITON

from ktcompile.backends import gluon_dot, triton_mla
from ktcompile.backends.gluon_dot import Tiles, choose_tiles, together
from ktcompile.backends.planes import FORMATS, Planes
from ktcompile.backends.triton_dot import Vector, dot, most_tokens, tensor_cores
from ktcompile.backends.triton_linear import linear
from ktcompile.backends.triton_mla import Processors

ON_GPU = triton_mla.unavailable() is None and not triton_mla.interpreted()
WHY = tensor_cores(torch.cuda.current_device() if ON_GPU else -1)
HERE = pytest.mark.skipif(WHY is not None, reason=str(WHY))
TILES = (None, Tiles(2, 2, 2), Tiles(1, 8, 2), Tiles(4, 2, 3))  # each takes seconds to compile


@HERE
@settings(max_examples=20, deadline=None)
@given(
    encoding=st.sampled_from(gluon_dot.ENCODINGS),
    rows=st.sampled_from([1, 5, 16, 131]),
    pairs=st.sampled_from([1, 2, 3, 5, 14]),
    tokens=st.sampled_from([1, 3, 4, 7, 16, 17, 40]),
    tiles=st.sampled_from(TILES),
    scale=st.sampled_from([1e-20, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
@example("q4_k", 131, 14, 16, None, 1.0, 0)
@example("q6_k", 131, 14, 4, None, 1.0, 0)
def test_any_matrix_any_tiles(
    encoding: str, rows: int, pairs: int, tokens: int, tiles: Tiles | None, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    p, w = make(encoding, rows, 512 * pairs, seed)
    p = Planes(encoding, rows, p.cols, {name: inside_canaries(t) for name, t in p.tensors.items()})
    x = inside_canaries((torch.randn(tokens, p.cols) * scale).to(DEVICE, torch.bfloat16))
    x[0, 7] *= 1000  # one that is far larger takes the precision of its 256
    processors = triton_mla.processors_of(x.get_device())
    got = gluon_dot.dot(Vector(x).integers, p, x.dtype, processors, None, tiles)
    close(got, x.double() @ w.double().T, TOLERANCE[torch.bfloat16])


@HERE
@pytest.mark.parametrize("encoding", gluon_dot.ENCODINGS)
@pytest.mark.parametrize("cols", [1024, 7168])
def test_a_token_is_the_same_in_a_batch(encoding: str, cols: int) -> None:
    p, w = make(encoding, 37, cols)
    wide = torch.randn(20, cols + 40).to(DEVICE, torch.bfloat16)
    x = wide[:, 8 : 8 + cols]  # rows apart from each other
    got = linear(x, p)
    close(got, x.double() @ w.double().T, TOLERANCE[torch.bfloat16])
    for count in (1, 3, 7, 15):
        assert torch.equal(linear(x[2 : 2 + count], p), got[2 : 2 + count])


@HERE
@pytest.mark.parametrize("encoding", gluon_dot.ENCODINGS)
def test_x_keeps_sixteen_bits(encoding: str) -> None:
    p, w = make(encoding, 64, 1024)
    x = torch.randn(3, 1024).to(DEVICE)
    got = dot(Vector(x), p).double()
    want = x.double() @ w.double().T
    assert float((got - want).norm() / want.norm()) <= 1e-4


@HERE
def test_bias_zeros_and_what_is_not_finite() -> None:
    p, w = make("q4_k", 37, 512)
    bias = torch.randn(37).to(DEVICE, torch.bfloat16)
    x = torch.randn(4, 512).to(DEVICE, torch.bfloat16)
    close(dot(Vector(x), p, bias), x.double() @ w.double().T + bias.double(), TOLERANCE[torch.bfloat16])
    x[1], x[2, 100] = 0, float("nan")
    found = dot(Vector(x), p, bias)
    assert torch.equal(found[1], bias) and found[2].isnan().all() and found[[0, 1, 3]].isfinite().all()


@HERE
def test_it_is_chosen_and_others_are_not() -> None:
    device = torch.cuda.current_device()
    assert most_tokens(make("q6_k", 16, 1024)[0], device) == gluon_dot.MOST_TOKENS
    assert most_tokens(make("q6_k", 16, 768)[0], device) < gluon_dot.MOST_TOKENS  # no multiple of 512
    assert most_tokens(make("q8_0", 16, 1024)[0], device) < gluon_dot.MOST_TOKENS
    assert most_tokens(make("fp8_block128", 16, 1024)[0], device) == 0


@TRITON
@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 3), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), seed=st.integers(0, 99))
def test_integers_of_x(tokens: int, scale: float, seed: int) -> None:
    """Bytes lie where the kernel's doc says; x is their value within half a step of 2^-15 of the largest of 256."""
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, 512, generator=draw) * scale).to(DEVICE)
    words, sums = (t.cpu() for t in gluon_dot.integers(x))
    laid = (
        words.view(torch.int8).view(tokens, 2, 4, 2, 4, 2, 2, 4).int()
    )  # [., unit / 2, high, thread, unit % 2, half, 4]
    high, low = laid.permute(0, 1, 3, 2, 5, 6, 4, 7).reshape(tokens, 2, 2, 256).unbind(2)
    n = high * 256 + low
    rest = sums.view(tokens, 2, 4, 8)
    step = rest[:, :, 3, 0].contiguous().view(torch.float32)
    most = x.cpu().view(tokens, 2, 256).abs().amax(-1)
    assert float(((n * step[..., None] - x.cpu().view(tokens, 2, 256)).abs() / most[..., None]).max()) <= 0.51 / 32639
    units = n.view(tokens, 2, 8, 2, 16).sum(-1)
    assert torch.equal(rest[:, :, 0], units.sum(-1).int())
    assert torch.equal(rest[:, :, 1], units[..., 0].int()) and torch.equal(rest[:, :, 2], units[..., 1].int())


def test_sums_need_no_more_than_31_bits() -> None:
    """The largest integers that the kernel may meet: codes, bytes of x, scales, as many as are added."""
    x = gluon_dot.MOST_VALUE
    assert (x + 128) >> 8 <= 127
    for encoding in gluon_dot.ENCODINGS:
        f = FORMATS[encoding]
        code, scale = (1 << f.low + f.high) - 1, 63 if f.has_min else 128
        assert 256 * code * 128 * scale < 1 << 31
        assert 256 * x * scale < 1 << 31  # sums of x times scales or minima


def test_tiles() -> None:
    assert [together(n, 227 << 10) for n in (1, 2, 4, 5, 8, 9, 16, 17, 32)] == [1, 4, 4, 8, 8, 16, 16, 16, 16]
    assert [together(n, 99 << 10) for n in (1, 9, 32)] == [1, 8, 8]
    for rows, cols in ((7168, 16384), (24576, 1536), (2048, 7168), (576, 7168), (7168, 2048), (129280, 7168)):
        assert (
            len({choose_tiles(rows, cols, n, p).col_warps for n in range(1, 33) for p in PROCESSORS.values()}) == 1
        )  # else sums come differently


@pytest.mark.skipif(ON_GPU, reason="where there is a GPU, it is asked")
def test_other_machines_are_told_why() -> None:
    assert WHY in ("the interpreter does not know Gluon", "this Triton has no Gluon")
    assert most_tokens(Planes("q4_k", 16, 1024, {"low": torch.empty(16, 512, dtype=torch.uint8)}), -1) == 8


@pytest.mark.skipif(gluon_dot.gl is None, reason="there is no Gluon")
def test_compiles(tmp_path: Path) -> None:
    """Each format with the tiles of V3's matrices: all products are there, and shared memory that there is."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_gluon_dot as t; t.compile_cases()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(CASES)
    for (encoding, tokens, _, _, capability), (shared, products) in zip(CASES, lines, strict=True):
        assert int(shared) <= PROCESSORS[capability].shared_bytes
        assert int(products) == -(-tokens // 4) * (16 if FORMATS[encoding].group == 16 else 8)


PROCESSORS = {80: Processors(108, 163 << 10), 89: Processors(128, 99 << 10), 90: Processors(132, 227 << 10)}
"""Of an A100, an RTX 4090 and an H100, by compute capability."""

CASES = (
    ("q4_k", 1, 7168, 16384, 90),
    ("q5_k", 4, 7168, 2048, 90),
    ("q6_k", 8, 18432, 7168, 90),
    ("q4_k", 16, 2048, 7168, 90),
    ("q6_k", 4, 576, 7168, 89),
    ("q6_k", 8, 576, 7168, 89),
    ("q6_k", 8, 576, 7168, 80),
)


def compile_cases() -> None:
    """The body of `test_compiles`, for a process in which Triton does not interpret."""
    compiler, targets = import_module("triton.compiler"), import_module("triton.backends.compiler")
    source = import_module("triton.experimental.gluon._runtime").GluonASTSource
    kernel = gluon_dot.products
    for encoding, tokens, rows, cols, capability in CASES:
        f, t = FORMATS[encoding], choose_tiles(rows, cols, tokens, PROCESSORS[capability])
        constants = {
            "HIGH": f.high, "GROUP": f.group, "OFFSET": f.offset, "MINIMA": f.has_min, "BIAS": True, "TOKENS": tokens,
            "RW": t.row_warps, "KW": t.col_warps, "STAGES": t.stages,
        }  # fmt: skip
        types = {"words": "*i32", "sums": "*i32", "low": "*u8", "high": "*i32", "low_scale": "*u8"}
        types |= {
            "scale": "*u8" if f.has_min else "*i8",
            "d": "*fp16",
            "dmin": "*fp16",
            "bias": "*bf16",
            "out": "*bf16",
        }
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in types}
        built = compiler.compile(
            source(kernel, signature, constants, attributes),
            target=targets.GPUTarget("cuda", capability, 32),
            options={"num_warps": t.row_warps * t.col_warps},
        )
        print(built.metadata.shared, built.asm["ptx"].count("mma.sync"))
