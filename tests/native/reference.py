"""Routed experts in float64, random weights of every storage type, and routings, to test the kernels against."""

from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ktcompile.backends import native

TILES = ("amx", "amx_int8")
ROUTINGS = ("random", "one expert", "some experts unused", "some elsewhere")
RANDOM_BITS = ("q3_k", "q2_k", "iq4_nl", "iq4_xs", "mxfp4")
"""Types that nothing here quantises to: their blocks are random, but for scales that give weights their usual size."""
HALF_FIELDS = {"q3_k": (108,), "q2_k": (80, 82), "iq4_nl": (0,), "iq4_xs": (0,)}  # byte offsets of a block's float16


@dataclass(frozen=True)
class Source:
    """A row-major matrix as a file has it: bytes, fp8's scales, and its float64 values, not by the code under test."""

    raw: Tensor
    scale: Tensor | None
    values: Tensor


def normal(rows: int, cols: int, rng: np.random.Generator, positive: bool = False) -> Tensor:
    """float32 weights that keep the size of what they are multiplied with."""
    values = torch.from_numpy(rng.normal(0, cols**-0.5, (rows, cols)).astype(np.float32))
    return values.abs() if positive else values


def random_blocks(type: str, rows: int, cols: int, rng: np.random.Generator) -> Tensor:
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.upper()]]
    blocks = rng.integers(0, 256, (rows * cols // weights, nbytes), dtype=np.uint8)
    if type == "mxfp4":
        blocks[:, 0] = 127 + np.round(np.log2(cols**-0.5 / 2.9)) + rng.integers(-1, 2, len(blocks))  # e2m1 has 2.9
    for offset in HALF_FIELDS.get(type, ()):
        blocks[:, offset : offset + 2] = np.float16(1).reshape(1).view(np.uint8)
    if type == "q2_k":  # scale * code - minimum: codes are 1.5 on average, and so nothing is left of the mean
        blocks[:, 82:84] = np.float16(1.5).reshape(1).view(np.uint8)
    size = gguf.quants.dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType[type.upper()]).std() * cols**0.5
    for offset in HALF_FIELDS.get(type, ()):
        half = blocks[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)
        half *= rng.uniform(0.7, 1.3, half.shape) / size
        blocks[:, offset : offset + 2] = half.astype(np.float16).view(np.uint8)
    return torch.from_numpy(blocks).reshape(-1)


def decode(raw: Tensor, type: str, rows: int, cols: int, scale: Tensor | None = None) -> Tensor:
    """float64 [rows, cols] by gguf and torch. float32 holds it but for fp8, whose scale is applied in float64."""
    dense = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "fp8_block128": torch.float8_e4m3fn}
    if type in dense:
        values = raw.view(dense[type]).view(rows, cols).double()
        if scale is None:
            return values
        return values * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
    decoded = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[type.upper()])
    return torch.from_numpy(decoded).view(rows, cols).double()


def source(type: str, rows: int, cols: int, rng: np.random.Generator, positive: bool = False) -> Source:
    """Normally distributed weights in a type of native.SOURCES; random bits in those of RANDOM_BITS, never positive."""
    scale = None
    if type in RANDOM_BITS:
        raw = random_blocks(type, rows, cols, rng)
    elif type in native.QUANTIZERS:
        made = native.quantize(normal(rows, cols, rng, positive), type)
        raw, scale = made if isinstance(made, tuple) else (made, None)
    else:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[type]
        raw = normal(rows, cols, rng, positive).to(dtype)
    raw = raw.reshape(-1).view(torch.uint8)
    return Source(raw, scale, decode(raw, type, rows, cols, scale))


def packed_matrices(
    type: str, experts: int, rows: int, cols: int, rng: np.random.Generator, positive: bool
) -> tuple[Tensor, Tensor]:
    """uint8 [E, bytes] and float64 [E, rows, cols]. A lossy type's values are those that its codes stand for."""
    nbytes = native.packed_bytes(type, rows, cols)
    packed = native.empty(experts * nbytes).view(experts, nbytes)
    values = []
    for e in range(experts):
        src = "f32" if type in native.LOSSY else type
        made = source(src, rows, cols, rng, positive)
        native.pack(made.raw, src, type, rows, cols, made.scale, out=packed[e])
        values.append(native.unpack(packed[e], type, rows, cols).double() if type in native.LOSSY else made.values)
    return packed, torch.stack(values)


def activate(weights: native.MoeWeights, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up"""
    if weights.activation == "swiglu_oai":
        gate, up = gate.clamp(max=weights.limit), up.clamp(-weights.limit, weights.limit)
        return gate * torch.sigmoid(weights.alpha * gate) * (up + 1)
    if weights.activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if weights.activation == "gelu_tanh" else "none") * up


@dataclass(frozen=True)
class Layer:
    """Packed experts and their float64 values: gate, up [E, I, H], down [E, H, I]."""

    weights: native.MoeWeights
    gate: Tensor
    up: Tensor
    down: Tensor

    def expected(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """float64 [T, H]; an id of -1 is no expert, and its score is not read."""
        weights = self.weights
        y = torch.zeros(x.shape, dtype=torch.float64)
        for e in range(weights.experts):
            token, place = (ids == e).nonzero(as_tuple=True)
            rows = x[token].double()
            gate, up = rows @ self.gate[e].T, rows @ self.up[e].T
            if weights.gate_bias is not None and weights.up_bias is not None:
                gate, up = gate + weights.gate_bias[e].double(), up + weights.up_bias[e].double()
            down = activate(weights, gate, up) @ self.down[e].T
            if weights.down_bias is not None:
                down = down + weights.down_bias[e].double()
            y.index_add_(0, token, scores[token, place].double()[:, None] * down)
        return y


def layer(
    types: tuple[str, str, str],
    experts: int,
    hidden: int,
    width: int,
    activation: str = "silu",
    seed: int = 0,
    positive: bool = False,
    biases: bool = False,
    tile_tokens: int = 8,
) -> Layer:
    rng = np.random.default_rng(seed)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    made = [packed_matrices(type, experts, *shape, rng, positive) for type, shape in zip(types, shapes, strict=True)]
    bias = {}
    if biases:
        for name, (rows, _) in zip(("gate_bias", "up_bias", "down_bias"), shapes, strict=True):
            bias[name] = torch.from_numpy(rng.normal(0, 0.5, (experts, rows)).astype(np.float32))
    weights = native.MoeWeights(
        experts, hidden, width, activation, *(packed for packed, _ in made), *types, tile_tokens=tile_tokens, **bias
    )
    return Layer(weights, *(values for _, values in made))


def route(kind: str, experts: int, tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids int64 [T, k], all different in a row, and scores float32 [T, k], some negative. "one expert" has k = 1.

    "some elsewhere": a third of the ids are -1, with scores of NaN.
    """
    rng = np.random.default_rng(seed)
    if kind not in ROUTINGS:
        raise ValueError(f"no routing {kind!r}; there are {', '.join(ROUTINGS)}")
    used = {"one expert": 1, "some experts unused": max(1, experts - 2)}.get(kind, experts)
    top_k = min(top_k, used)
    ids = rng.permuted(np.tile(np.arange(experts - used, experts), (tokens, 1)), axis=1)[:, :top_k]
    scores = rng.normal(0, 1, (tokens, top_k)).astype(np.float32)
    if kind == "some elsewhere":
        elsewhere = rng.random(ids.shape) < 1 / 3
        ids, scores = np.where(elsewhere, -1, ids), np.where(elsewhere, np.float32("nan"), scores)
    return torch.from_numpy(np.ascontiguousarray(ids)), torch.from_numpy(scores)


def inputs(hidden: int, tokens: int, positive: bool = False) -> Tensor:
    """float32 [T, H]; positive ones are eighths up to 2, which no family but int8 rounds."""
    generator = torch.Generator().manual_seed(tokens)
    if positive:
        return torch.randint(1, 17, (tokens, hidden), generator=generator) / 8
    return torch.randn(tokens, hidden, generator=generator)


def family(isa: str, types: Iterable[str], tokens: int, tile_tokens: int = 8) -> str:
    """How this call rounds, of native.FAMILY: without tiles, bf16 and int8 take 16-bit activations to integer codes."""
    tiles = isa in TILES and tile_tokens > 0 and tokens > 8
    if native.FAMILY[isa] == "f32" or tiles or native.refuses("avx512_vnni", types):
        return native.FAMILY[isa]
    return "int16"


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))
