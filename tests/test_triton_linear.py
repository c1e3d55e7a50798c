"""The Triton linears agree with the decoders of `encoded`, in Triton's interpreter or on a GPU (see test_triton_mla).

`test_compiles_for_hopper` compiles every kernel as launched, which needs no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_triton_mla import Recorder
from torch import Tensor, fx
from torch.nn import functional

from ktcompile import Call, Device, Parts, Region, Target
from ktcompile.backends import native, triton_dot
from ktcompile.backends import triton_linear as kernels
from ktcompile.backends.encoded import DECODERS, decode_rows
from ktcompile.backends.planes import FORMATS, Planes, planes
from ktcompile.backends.triton_language import triton
from ktcompile.backends.triton_linear import VectorTiles
from ktcompile.backends.triton_mla import Processors
from ktcompile.ops.base import Binding
from ktcompile.weights import GGUFSource, SafetensorsSource, decode, values

DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available() else "cpu"
HERE = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # of |got - want| / |want|
ALL = pytest.mark.parametrize("encoding", sorted(FORMATS))


def make(encoding: str, rows: int, cols: int, seed: int = 0) -> tuple[Planes, Tensor]:
    """A random matrix in planes, and its values in float32."""
    generator = torch.Generator().manual_seed(seed)
    if FORMATS[encoding].beside:
        raw = torch.randint(-(1 << 31), 1 << 31, (rows, cols // 8), generator=generator).int()
        scale = torch.rand(rows, cols // FORMATS[encoding].group, generator=generator) / 8
        scale = scale.to(torch.float16 if encoding == "int4_group64" else torch.bfloat16).float()
        tensors = planes(raw.to(DEVICE), encoding, scale.to(DEVICE))
        return Planes(encoding, rows, cols, tensors), decode(raw, encoding, scale).to(DEVICE)
    w = torch.randn(rows, cols, generator=generator)
    made = native.quantize(w, encoding)
    raw, scale = made if isinstance(made, tuple) else (made, None)
    want = decode_rows(raw, encoding) if encoding in DECODERS else decode(raw, encoding, scale)
    tensors = planes(raw.to(DEVICE), encoding, None if scale is None else scale.to(DEVICE), cols)
    return Planes(encoding, rows, cols, tensors), want.to(DEVICE)


def odd(encoding: str) -> int:
    """A number of columns that is no multiple of what a kernel takes at a time."""
    return {256: 768, 128: 384, 64: 320, 32: 352, 1: 200}[FORMATS[encoding].block]


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    off = float((got.double() - want.double()).norm() / want.double().norm())
    assert off <= tolerance, f"off by {off:.1e}"


def inside_canaries(t: Tensor) -> Tensor:
    """The same values between bytes that would show if they were read: NaN, or the largest codes."""
    padded = torch.empty(t.numel() + 256, dtype=t.dtype, device=t.device)
    padded.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)
    padded[128:-128] = t.flatten()
    return padded[128:-128].view(t.shape)


@HERE
@ALL
@pytest.mark.parametrize("rows", [1, 131])
def test_planes_are_exact(encoding: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcompile.backends.planes.CHUNK_VALUES", 5000)  # in many pieces
    cols = odd(encoding)
    p, want = make(encoding, rows, cols)
    got = kernels.dequantize(p, torch.float32)
    assert torch.equal(got, want) if DEVICE == "cpu" else torch.allclose(got, want, 1e-6, 1e-6)
    close(kernels.dequantize(p), want, 2**-7)
    assert p.nbytes == FORMATS[encoding].nbytes(rows, cols)


@pytest.mark.parametrize("encoding", sorted(set(FORMATS) & set(DECODERS)))
def test_planes_are_as_small_as_the_file(encoding: str) -> None:
    f = FORMATS[encoding]
    assert f.nbytes(7168, 2048) <= 1.03 * (7168 * 2048 // f.block * f.block_bytes)


@HERE
@ALL
@pytest.mark.parametrize("tokens", [1, 3, 9, 16, 17])
def test_linear(encoding: str, tokens: int) -> None:
    torch.manual_seed(tokens)
    p, w = make(encoding, 131, odd(encoding))
    p = Planes(encoding, p.rows, p.cols, {name: inside_canaries(t) for name, t in p.tensors.items()})
    bias = torch.randn(131).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float32) if tokens == 1 else (torch.bfloat16,):
        x = inside_canaries(torch.randn(tokens, p.cols).to(DEVICE, dtype))
        want = functional.linear(x.double(), w.double(), bias.to(dtype).double())
        close(kernels.linear(x, p, bias.to(dtype)), want, TOLERANCE[dtype])


@HERE
@pytest.mark.parametrize("encoding", ["q4_k", "fp8_block128"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_a_result_of_more_bits(encoding: str, tokens: int) -> None:
    """In float32 what is lost is what was rounded before: weights where they are made of the type of x."""
    p, w = make(encoding, 131, odd(encoding))
    x, bias = torch.randn(tokens, p.cols).to(DEVICE, torch.bfloat16), torch.randn(131).to(DEVICE, torch.bfloat16)
    got = kernels.linear(x, p, bias, torch.float32)
    assert got.dtype == torch.float32 and got.shape == (tokens, 131)
    if tokens:
        decoded = kernels.dequantize(p) if tokens > kernels.GEMM_TOKENS else w
        close(got, functional.linear(x.double(), decoded.double(), bias.double()), 4e-3)
        assert not torch.equal(got, got.bfloat16().float())
    plain = kernels.linear(x, w.bfloat16(), bias, torch.float32)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, (x.double() @ w.bfloat16().double().T + bias).float(), rtol=1e-4, atol=1e-4)


@HERE
@pytest.mark.parametrize("encoding", ["q6_k", "q5_0", "fp8_block128"])
def test_a_large_matrix_is_decoded_in_parts(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 rows 256, and then 44."""
    p, _ = make(encoding, 300, 256)
    x, bias = torch.randn(40, 256).to(DEVICE, torch.bfloat16), torch.randn(300).to(DEVICE, torch.bfloat16)
    want = [kernels.linear(x, p, bias), kernels.linear(x, p, None, torch.float32)]
    monkeypatch.setattr(kernels, "DECODED_BYTES", 300 * 256 * 2 - 1)
    made: list[tuple[int, ...]] = []
    whole = kernels.dequantize

    def seen(*args: Any) -> Tensor:
        made.append(tuple((values := whole(*args)).shape))
        return values

    monkeypatch.setattr(kernels, "dequantize", seen)
    got = [kernels.linear(x, p, bias), kernels.linear(x, p, None, torch.float32)]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
    assert made == [(256, 256), (44, 256)] * 2


@HERE
@pytest.mark.parametrize("encoding", ["q4_k", "q6_k", "fp8_block128"])
@pytest.mark.parametrize(
    "tiles", [VectorTiles(1, 2, 32), VectorTiles(4, 1, 64), VectorTiles(1, 1, 128), VectorTiles(2, 2, 64)], ids=str
)
def test_any_tiles(encoding: str, tiles: VectorTiles) -> None:
    p, w = make(encoding, 37, 1280)
    x = torch.randn(1, 1280).to(DEVICE)
    close(kernels._vector(x, p, None, tiles), x.double() @ w.double().T, 1e-5)


def test_tiles_of_deepseek() -> None:
    """Of many rows a warp has two, of few one; short rows share what is made of x."""
    assert kernels.vector_tiles(7168, 16384, 132) == VectorTiles(1, 2, 32)
    assert kernels.vector_tiles(1536, 7168, 132) == VectorTiles(1, 1, 32)
    assert kernels.vector_tiles(24576, 1536, 132) == VectorTiles(4, 1, 64)
    assert VectorTiles(2, 1, 128).warps == 4


@HERE
@pytest.mark.parametrize("tokens", [1, 3, 9, 17])
def test_any_strides(tokens: int) -> None:
    p, w = make("q4_0", 40, 96)
    x = torch.randn(96, tokens).to(DEVICE, torch.float16).T
    close(kernels.linear(x, p), x.double() @ w.double().T, 1e-2)
    wide = torch.full((tokens, 200), float("nan"), dtype=torch.float16, device=DEVICE)
    wide[:, :96] = x
    close(kernels.linear(wide[None, :, :96], p), (x.double() @ w.double().T)[None], 1e-2)
    assert kernels.linear(x[:0], p).shape == (0, 40)
    assert torch.equal(kernels.linear(x, w.half()), functional.linear(x, w.half()))


@HERE
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_gated(activation: str, tokens: int) -> None:
    gate, up, down = make("q4_k", 96, 256, 1), make("q8_0", 96, 256, 2), make("q5_0", 256, 96, 3)
    x = torch.randn(tokens, 256).to(DEVICE, torch.bfloat16) / 16
    act = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    }[activation]
    h = act(x.double() @ gate[1].double().T) * (x.double() @ up[1].double().T)
    close(kernels.gated(x, gate[0], up[0], down[0], activation), h @ down[1].double().T, 2e-2)


@HERE
def test_refusals() -> None:
    p, _ = make("q4_0", 8, 64)
    with pytest.raises(ValueError, match=r"x must be floating \[\.\.\., 64\]"):
        kernels.linear(torch.zeros(1, 32), p)
    with pytest.raises(ValueError, match="no planes for 'iq4_xs'"):
        planes(torch.zeros(1, 136, dtype=torch.uint8), "iq4_xs")
    with pytest.raises(ValueError, match=r"q4_0 rows must be bytes \[N, n \* 18\]"):
        planes(torch.zeros(1, 17, dtype=torch.uint8), "q4_0")
    with pytest.raises(ValueError, match="FP8 weights are NaN"):
        planes(torch.full((1, 32), 255, dtype=torch.uint8), "fp8_block128", torch.ones(1, 1))
    int4 = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"int4_group64 needs \[2, 1\], not None"):
        planes(int4, "int4_group64")
    for bad in (0.1, float("nan")):
        with pytest.raises(ValueError, match="neither bfloat16 nor float16"):
            planes(int4, "int4_group64", torch.tensor([[1.0], [bad]]))
    with pytest.raises(ValueError, match="no activation 'relu'"):
        kernels.gated(torch.zeros(1, 64), p, p, p, "relu")


# ---------------------------------------------------------------------------------------------------------- regions

GGUF = GGUFSource(str(files("ktcompile.assets") / "tiny-deepseek-v3-Q4_K_M.gguf"))
TARGET = Target((Device(f"{DEVICE}:1" if DEVICE == "cpu" else "cuda:0", "cuda", 1 << 30, 1e12),))


def int4_folder(path: Path, group: int, dtype: torch.dtype) -> SafetensorsSource:
    """An MLP of 128 columns, 256 rows a half, as compressed-tensors packs it."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (rows, cols) in {"gate": (256, 128), "up": (256, 128), "down": (128, 256)}.items():
        at = f"model.layers.0.mlp.{name}_proj.weight_"
        packed = torch.randint(-(1 << 31), 1 << 31, (rows, cols // 8), generator=generator).int()
        tensors[at + "packed"] = packed
        tensors[at + "scale"] = (torch.rand(rows, cols // group, generator=generator) / 32).to(dtype)
        tensors[at + "shape"] = torch.tensor([rows, cols])
    save_file(tensors, path / "model.safetensors")
    return SafetensorsSource(path)


@dataclass(frozen=True)
class Case:
    region: Region
    parts: Parts


def case(keys: dict[str, str], shape: Any = None, quantized: dict[str, str] | None = None, source: Any = GGUF) -> Case:
    """A region with these weights, by leaf."""
    graph = fx.Graph()
    nodes = []
    for i, key in enumerate(keys.values()):
        spec, node = source.spec(key), graph.placeholder(f"w{i}")
        val = torch.empty(spec.shape, dtype=torch.bfloat16, device="meta")
        node.meta.update(val=val, weight=key, nbytes=spec.nbytes, encoding=spec.encoding, source=source)
        nodes.append(node)
    root = torch.nn.Module()
    root.add_module("body", torch.nn.Identity())
    call = graph.call_module("body", tuple(nodes))
    call.meta.update(path="region", cls="Region", op="mlp", binding=Binding({}, shape), leaves=tuple(keys))
    call.meta.update(device=TARGET.devices[0].name)
    call.meta.update(quantized=quantized or {})
    graph.output(call)
    region = Region(next(n for n in fx.GraphModule(root, graph).graph.nodes if n.op == "call_module"))
    region.node.meta.update(call.meta)
    return Case(region, Parts(source, keys))


MLP = {f"{n}_proj.weight": f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


@HERE
@pytest.mark.parametrize("quantized", [{}, {"up_proj.weight": "fp8_block128"}, {"down_proj.weight": "q8_0"}], ids=str)
def test_mlp_region(quantized: dict[str, str]) -> None:
    made = case(MLP, "silu", quantized)
    kernel = kernels.TritonMLP()
    assert kernel.refuses(made.region, TARGET) is None
    packed = kernel.pack(made.parts, made.region, TARGET)
    assert packed.nbytes == kernel.packed_bytes(made.region)
    gate, up, down = (values(GGUF, key).to(DEVICE) for key in MLP.values())
    x = torch.randn(3, gate.shape[1]).to(DEVICE, torch.bfloat16)
    want = functional.linear(functional.silu(x.float() @ gate.T) * (x.float() @ up.T), down)
    got = kernel(packed, Call("region", "mlp", "silu", None, tuple(MLP)), x)
    close(got, want, 5e-2 if "up_proj.weight" in quantized else 2e-2)


@HERE
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 20])
def test_mlp_of_int4_groups(tmp_path: Path, group: int, tokens: int) -> None:
    """From a folder of compressed-tensors to the product, in the bits of the file."""
    source = int4_folder(tmp_path, group, torch.bfloat16)
    made = case(MLP, "silu", source=source)
    kernel = kernels.TritonMLP()
    assert kernel.refuses(made.region, TARGET) is None
    packed = kernel.pack(made.parts, made.region, TARGET)
    stored = sum(source.spec(key).nbytes - 16 for key in MLP.values())  # each has a shape of 16 bytes beside it
    assert packed.nbytes == kernel.packed_bytes(made.region) == stored
    gate, up, down = (values(source, key).to(DEVICE) for key in MLP.values())
    x = torch.randn(tokens, 128).to(DEVICE, torch.bfloat16)
    want = functional.linear(functional.silu(x.float() @ gate.T) * (x.float() @ up.T), down)
    close(kernel(packed, Call("region", "mlp", "silu", None, tuple(MLP)), x), want, 2e-2)


def test_int4_groups_with_scales_of_four_bytes_are_decoded(tmp_path: Path) -> None:
    made = case(MLP, "silu", source=int4_folder(tmp_path, 32, torch.float32))
    assert kernels.TritonMLP().refuses(made.region, TARGET) == "none of its weights is quantised as a whole"


@HERE
def test_linear_region() -> None:
    made = case({"weight": "model.layers.0.mlp.down_proj.weight"})
    kernel = kernels.TritonLinear()
    packed = kernel.pack(made.parts, made.region, TARGET)
    assert packed.nbytes == kernel.packed_bytes(made.region)
    weight = kernels.weight_of(packed, "weight")
    assert isinstance(weight, Planes)
    x = torch.randn(1, weight.cols).to(DEVICE)
    got = kernel(packed, Call("region", "linear", None, None, ("weight",)), x)
    close(got, x @ values(GGUF, "model.layers.0.mlp.down_proj.weight").to(DEVICE).T, 1e-5)


def test_what_regions_refuse() -> None:
    norm = case({"weight": "model.norm.weight"})
    assert kernels.TritonLinear().refuses(norm.region, TARGET) == "none of its weights is quantised as a whole"
    assert kernels.planes_bytes(norm.region) == 2 * GGUF.spec("model.norm.weight").shape[0]
    why = kernels.TritonMLP().refuses(case(MLP, "relu").region, TARGET)
    assert why == "its activation is relu, not silu, gelu, gelu_tanh"
    turned = case(MLP, "silu")
    turned.region.node.meta["binding"] = Binding({}, "silu", frozenset({"up_proj.weight"}))
    assert kernels.planes_refuses(turned.region) == "up_proj.weight are stored with rows for columns"


# --------------------------------------------------------------------------------------------------------- compiler


@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_compiles_for_hopper(tmp_path: Path) -> None:
    """Every kernel in every format, as a step of one token and one of a few launch it."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_triton_linear as t; t.compile_for_hopper()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    few = ["_gemm", "_add_splits", "_dequantize"]
    each = [name for f in FORMATS.values() for name in (*(["_gemv"] if f.float8 else ["_quantize", "_dot"]), *few)]
    assert [line.split()[0] for line in lines] == each + ["_activate"] * 3, lines
    found = [line.split() for line in lines]
    assert all(mma in ("wgmma", "mma") for name, _, mma in found if name == "_gemm"), lines
    assert all(int(shared) <= 227 << 10 for _, shared, _ in found), lines


def compile_for_hopper() -> None:
    """The body of `test_compiles_for_hopper`, for a process in which Triton does not interpret."""
    here: Any = kernels
    for name in ("_gemv", "_gemm", "_add_splits", "_dequantize", "_activate"):
        setattr(here, name, Recorder(getattr(here, name)))
    for name in ("_quantize", "_dot"):
        setattr(triton_dot, name, Recorder(getattr(triton_dot, name)))
    triton_dot.interpreted = lambda: False
    here.unavailable = lambda: None
    here.interpreted = lambda: False
    here.processors_of = lambda device: Processors(132, 227 << 10)
    bias = torch.zeros(1536, dtype=torch.bfloat16)
    for encoding, f in FORMATS.items():
        empty = {n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in f.shapes(1536, 7168).items()}
        p = Planes(encoding, 1536, 7168, empty)
        kernels.linear(torch.zeros(1, 7168, dtype=torch.bfloat16), p, bias)
        kernels.linear(torch.zeros(12, 7168, dtype=torch.bfloat16), p, bias)
        kernels.dequantize(p)
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    plain = torch.zeros(64, 64, dtype=torch.bfloat16)
    for activation in kernels.ACTIVATIONS:
        kernels.gated(x, plain, plain, plain, activation)
