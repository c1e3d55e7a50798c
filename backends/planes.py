"""Quantised matrices in planes: the bits of the file, repacked once for a GPU.

A GGUF block mixes scales and codes at odd offsets; a GPU wants 16 bytes a thread. So a matrix is kept as planes, each
a contiguous tensor. All are made of units of 32 columns, for every encoding:

    low        4 bits: 16 bytes a unit, byte i has column i in its low and column 16 + i in its high half
               8 bits: 32 bytes a unit, a byte a column
    high       of columns 4 k + b (k, b from 0 to 3) and 16 more: 1 bit: an int32 a unit, bits k and 4 + k of byte b;
               2 bits: two int32, the bits from 2 k on of byte b. So those of four columns come by one shift and mask
    scale      a byte for `group` columns (FP8: a float32 for 128 x 128 values), low_scale likewise for minima
    d, dmin    float16 for `super` columns (int4 groups: d is a group's scale, bfloat16 or float16)

    value = d * scale * (code - offset) - dmin * low_scale
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 32
"""Columns a unit."""


@dataclass(frozen=True)
class Format:
    """How an encoding lies in planes."""

    low: int  # bits a code in the plane `low`: 4 or 8
    high: int  # bits more in the plane `high`: 0, 1 or 2
    group: int  # columns that share a scale: 16, 32, 64 or 128
    super: int  # columns that share d; = group if there is no plane `scale`
    has_min: bool
    offset: int  # what is subtracted from a code
    block_bytes: int  # in the file
    block: int  # columns of these
    float8: bool = False  # codes are e4m3, scales float32 for group x group values; no d
    beside: bool = False  # scales lie beside the codes in the file, [rows, cols / group], and become d

    @property
    def scaled(self) -> bool:
        """Whether there is a plane `scale` of bytes."""
        return self.super != self.group

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and type of every plane of a matrix."""
        units = -(-cols // UNIT)
        found = {"low": ((rows, units * 4 * self.low), torch.uint8)}
        if self.high:
            found["high"] = ((rows, units * self.high), torch.int32)
        if self.float8:
            found["scale"] = ((-(-rows // self.group), -(-cols // self.group)), torch.float32)
            return found
        if self.scaled:
            found["scale"] = ((rows, cols // self.group), torch.uint8 if self.has_min else torch.int8)
        if self.has_min:
            found["low_scale"] = ((rows, cols // self.group), torch.uint8)
            found["dmin"] = ((rows, cols // self.super), torch.float16)
        found["d"] = ((rows, cols // self.super), torch.bfloat16 if self.beside else torch.float16)
        return found

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of all planes of a matrix."""
        return sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in self.shapes(rows, cols).values())


FORMATS: dict[str, Format] = {
    "q4_k": Format(4, 0, 32, 256, True, 0, 144, 256),
    "q5_k": Format(4, 1, 32, 256, True, 0, 176, 256),
    "q6_k": Format(4, 2, 16, 256, False, 32, 210, 256),
    "q8_0": Format(8, 0, 32, 32, False, 128, 34, 32),
    "q5_0": Format(4, 1, 32, 32, False, 16, 22, 32),
    "q4_0": Format(4, 0, 32, 32, False, 8, 18, 32),
    **{f"int4_group{g}": Format(4, 0, g, g, False, 8, g // 2, g, beside=True) for g in (32, 64, 128)},
    "fp8_block128": Format(8, 0, 128, 128, False, 0, 1, 1, float8=True),
}
"""Encoding -> its planes. At most 2.8 % (q4_k) more than the file: its 6-bit scales take a byte each."""


PLANES = ("low", "high", "scale", "low_scale", "d", "dmin")


@dataclass(frozen=True)
class Planes:
    """A matrix `[rows, cols]` in planes, on one device."""

    encoding: str
    rows: int
    cols: int
    tensors: Mapping[str, Tensor]

    @property
    def format(self) -> Format:
        return FORMATS[self.encoding]

    @property
    def all(self) -> tuple[Tensor, ...]:
        """Those of `PLANES`, as kernels take them; `low` instead of one that the format has not."""
        return tuple(self.tensors.get(name, self.tensors["low"]) for name in PLANES)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def part(self, first: int, rows: int) -> "Planes":
        """At most so many `rows` from row `first` on, a multiple of 128, without a copy."""
        last, lines = min(first + rows, self.rows), {}
        for name, tensor in self.tensors.items():
            each = self.format.group if self.format.float8 and name == "scale" else 1  # rows that share one
            lines[name] = tensor[first // each : -(-last // each)]
        return Planes(self.encoding, last - first, self.cols, lines)


CHUNK_VALUES = 1 << 24
"""Values repacked at a time; temporaries are a few times as many bytes."""


def planes(raw: Tensor, encoding: str, scale: Tensor | None = None, cols: int | None = None) -> dict[str, Tensor]:
    """Planes of rows as stored, `[N, row bytes]` in one byte an element, where `raw` is; every bit is kept.

    int4 groups are int32, as `ktcompile.weights.decode` takes them. `scale`: float32, for "fp8_block128"
    `[ceil(N / 128), ceil(K / 128)]`, for int4 groups `[N, K / group]`, of values that two bytes held. `cols`: K, where
    it is not all of the rows. ValueError names an encoding that has no planes, rows that are not whole blocks, scales
    of another shape or of four bytes, and FP8 codes that are NaN (the kernels' decoding has none).
    """
    if encoding not in FORMATS:
        raise ValueError(f"no planes for {encoding!r}; there are some for {', '.join(FORMATS)}")
    f = FORMATS[encoding]
    if f.beside and raw.dtype == torch.int32:
        raw = raw.contiguous().view(torch.uint8)
    if raw.dim() != 2 or raw.element_size() != 1 or raw.shape[1] % f.block_bytes:
        raise ValueError(f"{encoding} rows must be bytes [N, n * {f.block_bytes}], not {list(raw.shape)} {raw.dtype}")
    rows, cols = raw.shape[0], cols or raw.shape[1] // f.block_bytes * f.block
    shapes = f.shapes(rows, cols)
    into = "d" if f.beside else "scale"
    has_scale = f.float8 or f.beside
    if (scale is not None) != has_scale or (scale is not None and tuple(scale.shape) != shapes[into][0]):
        want = list(shapes[into][0]) if has_scale else "no scales"
        raise ValueError(f"{encoding} needs {want}, not {None if scale is None else list(scale.shape)}")
    out = {name: torch.empty(shape, dtype=dtype, device=raw.device) for name, (shape, dtype) in shapes.items()}
    if scale is not None:
        out[into] = _two_bytes(scale) if f.beside else out[into].copy_(scale)
    step = max(1, CHUNK_VALUES // max(1, cols))
    for at in range(0, rows, step):
        part = raw[at : at + step].contiguous().view(torch.uint8)
        for name, made in _repack(part, encoding).items():
            to = out[name][at : at + step]
            if made.shape[1] != to.shape[1]:  # FP8 rows that are no whole units
                to.zero_()
            to[:, : made.shape[1]] = made
    return out


def _repack(raw: Tensor, encoding: str) -> dict[str, Tensor]:
    """Planes of a few rows, uint8 `[n, row bytes]`; of FP8 without its scales and padding."""
    n, f = raw.shape[0], FORMATS[encoding]
    if f.float8:
        if bool(((raw & 0x7F) == 0x7F).any()):
            raise ValueError("FP8 weights are NaN")
        return {"low": raw}
    if f.beside:  # byte i has columns 2 i and 2 i + 1
        codes = torch.stack([raw & 15, raw >> 4], -1).view(n, -1, 2, 16)
        return {"low": (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)}
    b = raw.view(n, -1, f.block_bytes)
    if encoding == "q8_0":
        return {"low": (b[..., 2:] ^ 0x80).flatten(1), "d": _halves(b[..., :2])}
    out: dict[str, Tensor] = {}
    if encoding in ("q4_0", "q5_0"):  # a block is a unit, its nibbles lie as in `low`
        out = {"low": b[..., -16:].flatten(1), "d": _halves(b[..., :2])}
        if encoding == "q5_0":
            out["high"] = _single(b[..., 2:6, None] >> torch.arange(8, device=raw.device, dtype=torch.uint8) & 1)
        return out
    shifts = torch.arange(8, device=raw.device, dtype=torch.uint8)
    if encoding == "q6_k":
        low = _nibbles(b[..., :128].reshape(n, -1, 2, 64))  # [n, blocks, 2, 2, 64]
        pairs = b[..., 128:192].reshape(n, -1, 2, 1, 32) >> (2 * shifts[:4, None]) & 3  # [n, blocks, 2, 4, 32]
        out = {"scale": b[..., 192:208].flatten(1).view(torch.int8), "d": _halves(b[..., 208:210])}
        pairs = pairs.reshape(n, -1, 4, 4) << 2 * shifts[:4, None]  # [n, halves of units, k, b]
        out["high"] = pairs.sum(-2, dtype=torch.uint8).view(torch.int32).flatten(1)
    else:
        low = _nibbles(b[..., -128:].reshape(n, -1, 4, 32))  # [n, blocks, 4, 2, 32]
        lo, hi, mixed = b[..., 4:16].reshape(n, -1, 3, 4).unbind(2)
        out = {
            "scale": torch.cat([lo & 63, mixed & 15 | lo >> 2 & 48], -1).flatten(1),
            "low_scale": torch.cat([hi & 63, mixed >> 4 | hi >> 2 & 48], -1).flatten(1),
            "d": _halves(b[..., :2]),
            "dmin": _halves(b[..., 2:4]),
        }
        if encoding == "q5_k":
            out["high"] = _single(b[..., None, 16:48] >> shifts[:, None] & 1)
    codes = low.reshape(n, -1, 2, 16)
    out["low"] = (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)
    return out


def _two_bytes(scale: Tensor) -> Tensor:
    """float32 scales in the type of two bytes that they came from, exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale, scale.to(dtype).float()):
            return scale.to(dtype)
    raise ValueError("scales of int4 groups are neither bfloat16 nor float16, or not all numbers")


def _single(bits: Tensor) -> Tensor:
    """Bits of columns, `[n, ...]` in their order, as the plane `high` of one bit."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    eight = bits.reshape(len(bits), -1, 8, 4) << shifts[:, None]  # [n, units, 4 half + k, b]
    return eight.sum(-2, dtype=torch.uint8).view(torch.int32).flatten(1)


def _halves(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).flatten(1)


def _nibbles(raw: Tensor) -> Tensor:
    """`[..., b]` bytes to `[..., 2, b]`: low halves, then high halves."""
    return torch.stack([raw & 15, raw >> 4], -2)
