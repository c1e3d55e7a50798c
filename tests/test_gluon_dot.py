"""The Gluon kernel for a few tokens gives what `triton_dot` gives of each, where there is a GPU; it compiles anywhere.

Gluon has no interpreter: on other machines only its compilation and what is said in its place are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton_linear import DEVICE, inside_canaries, make, odd

from ktcompile.backends import gluon_dot
from ktcompile.backends.planes import FORMATS, Planes
from ktcompile.backends.triton_dot import DotTiles, dot, most_tokens, tensor_cores, vector
from ktcompile.backends.triton_mla import interpreted

WHY = tensor_cores(torch.cuda.current_device() if DEVICE == "cuda" else -1)
HERE = pytest.mark.skipif(WHY is not None, reason=str(WHY))
INTEGERS = sorted(e for e, f in FORMATS.items() if not f.float8)


@HERE
@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from(INTEGERS),
    rows=st.sampled_from([1, 5, 16, 131, 2100]),
    long=st.booleans(),
    tokens=st.integers(2, 16),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_one_after_the_other(encoding: str, rows: int, long: bool, tokens: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    p, _ = make(encoding, rows, 7168 if long else odd(encoding), seed)
    p = Planes(encoding, rows, p.cols, {name: inside_canaries(t) for name, t in p.tensors.items()})
    x = inside_canaries(torch.randn(tokens, p.cols).to(DEVICE))
    add = torch.randn(rows).to(DEVICE) if bias else None
    got, want = dot(vector(x), p, add), dot(vector(x), p, add, DotTiles(1, 2, 32))
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())


@HERE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(bad: float) -> None:
    p, _ = make("q4_k", 20, 1280)
    x = torch.randn(9, 1280).to(DEVICE)
    x[4, 700] = bad
    got = dot(vector(x), p)
    assert got[4].isnan().all() and got[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@HERE
def test_how_many() -> None:
    assert most_tokens(torch.cuda.current_device()) == gluon_dot.MOST_TOKENS


@pytest.mark.skipif(not interpreted(), reason="where there is a GPU, it is asked")
def test_the_interpreter_is_told_why() -> None:
    assert tensor_cores(-1) == "the interpreter does not know Gluon"
    assert most_tokens(-1) == 8


@pytest.mark.skipif(gluon_dot.gl is None, reason="there is no Gluon")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Every format, for 8 tokens and for 16; a unit and 8 tokens are two products, or four of half of it."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_gluon_dot as t; t.compile_for_hopper()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [e for e in INTEGERS for _ in range(2)]
    for encoding, tokens, products in lines:
        each = 4 if FORMATS[encoding].group == 16 else 2
        assert int(products) == each * gluon_dot.UNITS * int(tokens) // 8, (encoding, tokens, products)


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    compiler, targets = import_module("triton.compiler"), import_module("triton.backends.compiler")
    source = import_module("triton.experimental.gluon._runtime").GluonASTSource
    kernel = gluon_dot.products
    types = {"words": "*i32", "low": "*u8", "high": "*i32", "low_scale": "*u8", "dmin": "*fp16", "bias": "*bf16"}
    names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8"}
    for encoding in INTEGERS:
        f = FORMATS[encoding]
        shapes = f.shapes(64, 7168)
        of_planes = {name: names[shapes[name][1]] for name in ("scale", "d") if name in shapes}
        for tokens in (8, 16):
            constants = {
                "COLS": 7168, "LOW": f.low, "HIGH": f.high, "GROUP": f.group, "SUPER": f.super, "OFFSET": f.offset,
                "MINIMA": f.has_min, "BIAS": True, "TOKENS": tokens, "UNITS": gluon_dot.UNITS, "WARPS": 4,
            }  # fmt: skip
            known = types | {"scale": "*u8", "out": "*bf16"} | of_planes
            signature = {n: "constexpr" if n in constants else known.get(n, "i32") for n in kernel.arg_names}
            attributes = {
                (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n][0] == "*"
            }
            built = compiler.compile(
                source(kernel, signature, constants, attributes),
                target=targets.GPUTarget("cuda", 90, 32),
                options={"num_warps": 4},
            )
            print(encoding, tokens, built.asm["ptx"].count("mma.sync"))
