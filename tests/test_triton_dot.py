"""One token in integers times planes: the decoded weights' product, up to the rounding of x to 16 bits.

In Triton's interpreter, where `dp4a` is emulated, or on a GPU; `test_triton_linear` compiles it for Hopper.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton_linear import DEVICE, HERE, TOLERANCE, close, inside_canaries, make, odd

from ktcompile.backends import triton_dot
from ktcompile.backends.planes import FORMATS, Planes
from ktcompile.backends.triton_dot import DotTiles, Vector, dot, dot_tiles
from ktcompile.backends.triton_linear import linear

INTEGERS = sorted(e for e, f in FORMATS.items() if not f.float8)
TILES = (None, DotTiles(1, 2, 32), DotTiles(4, 1, 64), DotTiles(2, 4, 16), DotTiles(1, 1, 128))


@HERE
@settings(max_examples=25)
@given(
    encoding=st.sampled_from(INTEGERS),
    rows=st.sampled_from([1, 5, 131]),
    tiles=st.sampled_from(TILES),
    scale=st.sampled_from([1e-20, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_any_matrix_any_tiles(encoding: str, rows: int, tiles: DotTiles | None, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    p, w = make(encoding, rows, odd(encoding), seed)
    p = Planes(encoding, rows, p.cols, {name: inside_canaries(t) for name, t in p.tensors.items()})
    x = inside_canaries((torch.randn(1, p.cols) * scale).to(DEVICE, torch.bfloat16))
    x[0, 7] *= 1000  # one that is far larger takes the precision of its unit
    close(dot(Vector(x), p, None, tiles), x.double() @ w.double().T, TOLERANCE[torch.bfloat16])


@HERE
@pytest.mark.parametrize("encoding", INTEGERS)
def test_x_keeps_sixteen_bits(encoding: str) -> None:
    """With sums that are exact, what is lost is what was rounded: half a step of 2^-15 of the largest of 32."""
    p, w = make(encoding, 64, 1024 if FORMATS[encoding].block == 256 else odd(encoding))
    x = torch.randn(1, p.cols).to(DEVICE)
    got = dot(Vector(x), p).double()
    want = x.double() @ w.double().T
    assert float((got - want).norm() / want.norm()) <= 1e-4


@HERE
@pytest.mark.parametrize("encoding", ["q4_k", "q5_0"])
def test_a_token_is_the_same_in_a_batch(encoding: str) -> None:
    p, w = make(encoding, 37, odd(encoding))
    wide = torch.randn(8, p.cols + 40).to(DEVICE, torch.bfloat16)
    x = wide[:, 8 : 8 + p.cols]  # rows apart from each other
    got = dot(Vector(x), p)
    close(got, x.double() @ w.double().T, TOLERANCE[torch.bfloat16])
    for i in range(8):
        assert torch.equal(dot(Vector(x[i : i + 1].contiguous()), p)[0], got[i])
    assert torch.equal(linear(x[None], p)[0], got) and torch.equal(linear(x[:3], p), got[:3])


@HERE
def test_bias_and_zeros() -> None:
    p, w = make("q4_k", 37, 512)
    bias = torch.randn(37).to(DEVICE, torch.bfloat16)
    zero = torch.zeros(1, 512, device=DEVICE, dtype=torch.bfloat16)
    assert torch.equal(dot(Vector(zero), p, bias), bias[None])
    x = torch.randn(1, 512).to(DEVICE, torch.bfloat16)
    close(dot(Vector(x), p, bias), x.double() @ w.double().T + bias.double(), TOLERANCE[torch.bfloat16])


@HERE
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    p, _ = make("q6_k", 16, 512)
    x = torch.randn(1, 512).to(DEVICE, torch.bfloat16)
    x[0, 100] = bad
    assert not dot(Vector(x), p).isfinite().any()


def test_programs_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA takes 2^31 of them along the first axis, and 65535 along the second."""
    grids: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    shapes = FORMATS["q8_0"].shapes(201088, 64)
    p = Planes("q8_0", 201088, 64, {n: torch.zeros(s, dtype=t) for n, (s, t) in shapes.items()})
    monkeypatch.setattr(triton_dot, "_dot", Recorded())
    monkeypatch.setattr(triton_dot, "interpreted", lambda: False)
    monkeypatch.setattr(triton_dot, "tensor_cores", lambda device: "not here")
    dot(Vector(torch.zeros(3, 64, device=DEVICE)), p)
    assert grids == [(3 * 100544,)]


def test_tiles_of_deepseek() -> None:
    """Two warps side by side along a row, where that is a whole number of steps or there are few rows."""
    assert dot_tiles(7168, 16384, 132) == DotTiles(1, 2, 64)
    assert dot_tiles(129280, 7168, 132) == DotTiles(1, 2, 32)
    assert dot_tiles(1536, 7168, 132) == DotTiles(1, 2, 64)
    assert dot_tiles(24576, 1536, 132) == DotTiles(1, 2, 16)
    assert DotTiles(1, 2, 64).warps == 4 and DotTiles(1, 2, 16).warps == 1
