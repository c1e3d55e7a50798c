"""Routed experts in float64, random weights of every storage type, and routings, to test the kernels against."""

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ktcompile.backends import native

GGML = {"q8_0": "Q8_0", "q5_0": "Q5_0", "q4_k": "Q4_K", "q6_k": "Q6_K"}
ROUTINGS = ("random", "one expert", "some experts unused")
HALF_FIELDS = {"q8_0": (0,), "q5_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}  # byte offsets of float16 fields of a block
HALF_SCALE = {"q8_0": 1e-3, "q5_0": 6e-3, "q4_k": 2e-4, "q6_k": 6e-5}  # makes weights of about 0.1


def random_raw(type: str, rows: int, cols: int, rng: np.random.Generator, positive: bool = False) -> Tensor:
    """The bytes of a random valid [rows, cols] matrix, uint8; positive: no weight below 0 (dense and q8_0)."""
    if type in ("f32", "bf16"):
        values = torch.from_numpy(rng.normal(0, 0.1, (rows, cols)).astype(np.float32))
        values = values.abs() if positive else values
        return (values if type == "f32" else values.to(torch.bfloat16)).reshape(-1).view(torch.uint8)
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[GGML[type]]]
    blocks = rng.integers(0, 256, (rows * cols // weights, nbytes), dtype=np.uint8)
    if positive:
        blocks &= 0x7F
    for offset in HALF_FIELDS[type]:
        scale = (rng.uniform(0.2, 1, len(blocks)) * HALF_SCALE[type]).astype(np.float16)
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(blocks).reshape(-1)


def values(raw: Tensor, type: str, rows: int, cols: int) -> Tensor:
    """float64 [rows, cols], decoded by gguf and torch, not by the code under test."""
    if type in ("f32", "bf16"):
        return raw.view(torch.float32 if type == "f32" else torch.bfloat16).view(rows, cols).double()
    decoded = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[GGML[type]])
    return torch.from_numpy(decoded).view(rows, cols).double()


def act(name: str, v: Tensor) -> Tensor:
    if name == "silu":
        return functional.silu(v)
    return functional.gelu(v, approximate="tanh" if name == "gelu_tanh" else "none")


@dataclass(frozen=True)
class Layer:
    """Packed experts and their float64 values: gate, up [E, I, H], down [E, H, I]."""

    weights: native.MoeWeights
    gate: Tensor
    up: Tensor
    down: Tensor

    def expected(self, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """float64 [T, H]"""
        y = torch.zeros(x.shape, dtype=torch.float64)
        for e in range(self.weights.experts):
            token, place = (ids == e).nonzero(as_tuple=True)
            rows = x[token].double()
            hidden = act(self.weights.activation, rows @ self.gate[e].T) * (rows @ self.up[e].T)
            y.index_add_(0, token, scores[token, place].double()[:, None] * (hidden @ self.down[e].T))
        return y


def layer(
    types: tuple[str, str, str],
    experts: int,
    hidden: int,
    width: int,
    activation: str = "silu",
    seed: int = 0,
    positive: bool = False,
) -> Layer:
    rng = np.random.default_rng(seed)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    raw = [
        torch.stack([random_raw(type, *shape, rng, positive) for _ in range(experts)])
        for type, shape in zip(types, shapes, strict=True)
    ]
    exact = [
        torch.stack([values(row, type, *shape) for row in matrix])
        for matrix, type, shape in zip(raw, types, shapes, strict=True)
    ]
    return Layer(native.MoeWeights(experts, hidden, width, activation, *raw, *types), *exact)


def route(kind: str, experts: int, tokens: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids int64 [T, k], with repeats within a row, and scores float32 [T, k], some negative."""
    rng = np.random.default_rng(seed)
    used = {"random": experts, "one expert": 1, "some experts unused": max(1, experts - 2)}[kind]
    ids = rng.integers(0, used, (tokens, top_k)) + (experts - used)
    return torch.from_numpy(ids), torch.from_numpy(rng.normal(0, 1, (tokens, top_k)).astype(np.float32))


def error(got: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))
