"""linear and mlp on a GPU from weights in the bits of the file: Triton kernels over planes, repacked once.

Four ways to multiply, by the number of tokens: `dot` of triton_dot (few, in integers), `_gemv` (one, in float32: where
x has 32 bits or codes are FP8), `_gemm` (weights rounded to the type of x in registers, tensor cores), and `dequantize`
with torch's product. Nothing here waits for the device or reads a value on the host, so all but packing can be captured
in a CUDA graph. Without Triton this module still imports; `unavailable()` of `triton_mla` says why nothing in it can
run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import gluon_dot, native
from ktcompile.backends.encoded import _quantized
from ktcompile.backends.planes import FORMATS, PLANES, UNIT, Planes, planes
from ktcompile.backends.reference import plain_cost
from ktcompile.backends.triton_dot import Vector, dot, most_tokens
from ktcompile.backends.triton_language import constexpr, jit, tensor, tl
from ktcompile.backends.triton_mla import _power_of_two, interpreted, processors_of, unavailable
from ktcompile.ops.plain import LinearShape
from ktcompile.ops.plain import linear as plain_linear
from ktcompile.symbols import Sizes, nbytes
from ktcompile.weights import Part, WeightSource, values

# ---------------------------------------------------------------------------------------------------------- kernels
# Every kernel takes the same planes and the same constants of the format. What a format has not is never loaded: its
# pointer is that of `low`. K is a constant: there are few per model, and every offset is then known.


@jit
def _factors(
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    row: tensor,  # int64, any shape that broadcasts with `unit`
    unit: tensor,
    HALF: constexpr,  # of the unit: they differ where a group has 16 columns
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    FLOAT8: constexpr,
) -> tensor:
    """What codes are multiplied with, and what is subtracted from the product: float32."""
    if FLOAT8:
        at = (row // GROUP) * ((COLS + GROUP - 1) // GROUP) + unit * 32 // GROUP
        factor = tl.load(scale + at)
        return factor, tl.zeros_like(factor)
    at = row * (COLS // SUPER) + unit * 32 // SUPER
    factor = tl.load(d + at).to(tl.float32)
    minimum = tl.zeros_like(factor)
    if SUPER != GROUP:
        group = row * (COLS // GROUP) + (unit * 32 + HALF * 16) // GROUP
        factor *= tl.load(scale + group).to(tl.float32)
        if MINIMA:
            minimum = tl.load(dmin + at).to(tl.float32) * tl.load(low_scale + group).to(tl.float32)
    return factor, minimum


@jit
def _float8(code: tensor) -> tensor:
    """e4m3 as a float32, divided by 256: the bits of a half whose exponent has a larger bias. Exact; knows no NaN."""
    code = code.to(tl.int16)
    return (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _code(low: tensor, word: tensor, i: tensor, HALF: constexpr, LOW: constexpr, HIGH: constexpr) -> tensor:
    """The codes of columns `i` (0 to 15) of a half unit: int32. `word` is this half's high bits, if there are any."""
    code = low.to(tl.int32)
    if LOW == 4:
        code = (code >> (4 * HALF)) & 15
    if HIGH == 1:
        code |= ((word >> (8 * (i & 3) + (i >> 2) + 4 * HALF)) & 1) << 4
    if HIGH == 2:
        code |= ((word >> (8 * (i & 3) + 2 * (i >> 2))) & 3) << 4
    return code


@jit
def _partial(low: tensor, word: tensor, i: tensor, x: tensor, HALF: constexpr, LOW: constexpr, HIGH: constexpr,
             FLOAT8: constexpr) -> tensor:  # fmt: skip
    """The sum of x times code over the last axis; of integer codes, x times (1 + code / 2^bits).

    An integer becomes a float without a conversion: its bits are put into the mantissa of 1.
    """
    if FLOAT8:
        return tl.sum(_float8(low) * x, 3)
    code = _code(low, word, i, HALF, LOW, HIGH) << (23 - LOW - HIGH)
    return tl.sum((code | 0x3F800000).to(tl.float32, bitcast=True) * x, 3)


@jit
def _eight(x: tensor, unit: tensor, inside: tensor, zero: tensor, FIRST: constexpr, COLS: constexpr) -> tensor:
    """Eight columns of x in each unit, from column FIRST of it: float32 [1, WARP_ROWS, UNITS, 8]."""
    column = zero[:, None, None] + (unit * 32 + FIRST)[None, :, None] + tl.arange(0, 8)[None, None, :]
    if COLS % 32 == 0:
        found = tl.load(x + column, mask=inside[None, :, None], other=0.0)
    else:
        found = tl.load(x + column, mask=column < COLS, other=0.0)
    return found.to(tl.float32)[None, :, :, :]


@jit
def _halve(low: tensor, ROWS: constexpr, WARP_ROWS: constexpr, UNITS: constexpr) -> tensor:
    """[..., 16] to its first and its last 8: neighbours stay in one thread."""
    return tl.split(tl.permute(tl.reshape(low, (ROWS, WARP_ROWS, UNITS, 2, 8)), (0, 1, 2, 4, 3)))


@jit
def _gemv(
    x: tensor,  # [COLS]
    low: tensor,
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    bias: tensor,  # [rows], or unused
    out: tensor,  # [rows]
    rows: tensor,
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    FLOAT8: constexpr,
    BIAS: constexpr,
    ROWS: constexpr,
    WARP_ROWS: constexpr,
    UNITS: constexpr,
) -> None:
    """A program sums ROWS * WARP_ROWS rows. A thread has one unit of ROWS rows at a time: 16 bytes a load, and all
    that belongs to it, so that nothing crosses threads before the end of the loop.

    Shapes are chosen for that: the compiler gives a thread up to 16 bytes along the last axis, a warp 32 units, the
    other warps UNITS, then WARP_ROWS. x has an axis WARP_ROWS too, else it would be spread over all warps.
    """
    i = tl.arange(0, 8)[None, None, None, :]
    zero = tl.zeros([WARP_ROWS], tl.int32)
    row = tl.program_id(0) * (ROWS * WARP_ROWS) + tl.arange(0, ROWS)[:, None] * WARP_ROWS
    row = row + tl.arange(0, WARP_ROWS)[None, :]  # [ROWS, WARP_ROWS]
    at = tl.minimum(row, rows - 1).to(tl.int64)[:, :, None]  # the last row again instead of one beyond
    total = tl.zeros([ROWS, WARP_ROWS, UNITS], tl.float32)
    ALL: constexpr = (COLS + 31) // 32
    WIDTH: constexpr = 4 * LOW  # bytes a unit of `low`
    for first in range(0, ALL, UNITS):
        unit = first + tl.arange(0, UNITS)
        inside = unit < ALL
        byte = (at * (ALL * WIDTH) + (unit * WIDTH)[None, None, :])[:, :, :, None]
        byte = byte + tl.arange(0, 16)[None, None, None, :]
        ok = inside[None, None, :, None]
        # Not a mask: a thread shall load the scales of its own unit, not a vector of its neighbours'.
        safe = tl.where(inside, unit, 0)[None, None, :]
        a0, a1 = _halve(tl.load(low + byte, mask=ok, other=0), ROWS, WARP_ROWS, UNITS)
        b0, b1 = a0, a1
        if LOW == 8:
            b0, b1 = _halve(tl.load(low + byte + 16, mask=ok, other=0), ROWS, WARP_ROWS, UNITS)
        word_a = tl.zeros([ROWS, WARP_ROWS, UNITS, 1], tl.int32)
        word_b = word_a
        if HIGH > 0:
            word_a = tl.load(high + at * (ALL * HIGH) + safe * HIGH)[:, :, :, None]
            word_b = word_a
        if HIGH == 2:
            word_b = tl.load(high + at * (ALL * HIGH) + safe * HIGH + 1)[:, :, :, None]

        xa0 = _eight(x, unit, inside, zero, 0, COLS)
        xa1 = _eight(x, unit, inside, zero, 8, COLS)
        xb0 = _eight(x, unit, inside, zero, 16, COLS)
        xb1 = _eight(x, unit, inside, zero, 24, COLS)
        dot_a = _partial(a0, word_a, i, xa0, 0, LOW, HIGH, FLOAT8)
        dot_a += _partial(a1, word_a, i + 8, xa1, 0, LOW, HIGH, FLOAT8)
        dot_b = _partial(b0, word_b, i, xb0, 1, LOW, HIGH, FLOAT8)
        dot_b += _partial(b1, word_b, i + 8, xb1, 1, LOW, HIGH, FLOAT8)
        # Of as many rows as the products, all but one of which fall away: a sum of x alone would be spread over warps.
        whole: constexpr = (ROWS, WARP_ROWS, UNITS, 8)
        sum_a = tl.sum(tl.broadcast_to(xa0, whole), 3) + tl.sum(tl.broadcast_to(xa1, whole), 3)
        sum_b = tl.sum(tl.broadcast_to(xb0, whole), 3) + tl.sum(tl.broadcast_to(xb1, whole), 3)

        factor, minimum = _factors(
            scale, low_scale, d, dmin, at, safe, 0, COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA, FLOAT8
        )
        CODES: constexpr = 256 if FLOAT8 else 2 ** (LOW + HIGH)
        if FLOAT8:
            total += factor * ((dot_a + dot_b) * CODES)
        elif GROUP == 16:
            factor_b, minimum = _factors(
                scale, low_scale, d, dmin, at, safe, 1, COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA, FLOAT8
            )
            total += factor * (dot_a * CODES - sum_a * (CODES + OFFSET))
            total += factor_b * (dot_b * CODES - sum_b * (CODES + OFFSET))
        else:
            dot = dot_a + dot_b
            product = dot * CODES - (sum_a + sum_b) * (CODES + OFFSET)
            total += factor * product
            if MINIMA:
                # The sum of x once more (OFFSET is 0 here), by way of what is at hand: with a second reader the
                # compiler spreads its sums over threads and passes them through shared memory, with barriers.
                total -= minimum * (dot - product * (1.0 / CODES))
    result = tl.sum(total, 2)
    if BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


@jit
def _decoded(
    low: tensor,
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    row: tensor,  # [ROWS] int64, inside the matrix
    unit: tensor,  # [UNITS]
    HALF: constexpr,
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    FLOAT8: constexpr,
) -> tensor:
    """The values of half a unit: float32 [ROWS, UNITS, 16]. Units beyond the matrix are some others."""
    ALL: constexpr = (COLS + 31) // 32
    WIDTH: constexpr = 4 * LOW
    i = tl.arange(0, 16)[None, None, :]
    safe = tl.where(unit < ALL, unit, 0)
    byte = row[:, None, None] * (ALL * WIDTH) + (safe * WIDTH)[None, :, None] + i
    if LOW == 8:
        byte += 16 * HALF
    codes = tl.load(low + byte)
    factor, minimum = _factors(
        scale, low_scale, d, dmin, row[:, None], safe[None, :], HALF,
        COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA, FLOAT8,
    )  # fmt: skip
    if FLOAT8:
        return _float8(codes) * 256.0 * factor[:, :, None]
    word = tl.zeros([1, 1, 1], tl.int32)
    if HIGH > 0:
        at = row[:, None] * (ALL * HIGH) + (safe * HIGH)[None, :]
        if HIGH == 2:
            at += HALF
        word = tl.load(high + at)[:, :, None]
    value = (_code(codes, word, i, HALF, LOW, HIGH) - OFFSET).to(tl.float32) * factor[:, :, None]
    if MINIMA:
        value -= minimum[:, :, None]
    return value


@jit
def _gemm(
    x: tensor,  # [tokens, COLS]
    x_stride: tensor,
    low: tensor,
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    partial: tensor,  # [SPLITS, tokens, rows] float32, or the result
    bias: tensor,
    rows: tensor,
    tokens: tensor,
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    FLOAT8: constexpr,
    BIAS: constexpr,
    ROWS: constexpr,
    UNITS: constexpr,
    TOKENS: constexpr,
    SPLITS: constexpr,
    UPCAST: constexpr,
) -> None:
    """Program (block of ROWS rows, split): up to TOKENS tokens, over one part of the columns.

    The order of columns does not matter to a product: it runs over the first halves of UNITS units, then the second.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, rows - 1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    split = tl.program_id(1)
    ALL: constexpr = (COLS + 31) // 32
    PART: constexpr = ((ALL + UNITS - 1) // UNITS + SPLITS - 1) // SPLITS * UNITS  # units a split
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    j = tl.arange(0, UNITS * 16)
    for step in range(0, PART, UNITS):
        first = split * PART + step
        unit = first + tl.arange(0, UNITS)
        for HALF in tl.static_range(2):
            w = _decoded(
                low, high, scale, low_scale, d, dmin, at, unit, HALF,
                COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA, FLOAT8,
            )  # fmt: skip
            column = (first + j // 16) * 32 + HALF * 16 + j % 16
            ok = (column < COLS)[:, None] & (token < tokens)[None, :]
            here = tl.load(x + token.to(tl.int64)[None, :] * x_stride + column[:, None], mask=ok, other=0.0)
            w = tl.reshape(w, (ROWS, UNITS * 16))
            if UPCAST:
                total = tl.dot(w, here.to(tl.float32), acc=total, input_precision="ieee")
            else:
                total = tl.dot(w.to(here.dtype), here, acc=total)
    if BIAS:
        add = tl.load(bias + at).to(tl.float32)
        total += tl.where(split == 0, add, 0.0)[:, None]
    to = partial + (split.to(tl.int64) * tokens + token)[None, :] * rows + row[:, None]
    tl.store(to, total.to(partial.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])


@jit
def _add_splits(partial: tensor, out: tensor, n: tensor, SPLITS: constexpr, BLOCK: constexpr) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial + s * n + i, mask=i < n, other=0.0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < n)


@jit
def _dequantize(
    low: tensor,
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    out: tensor,  # [rows, COLS]
    rows: tensor,
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    FLOAT8: constexpr,
    ROWS: constexpr,
    UNITS: constexpr,
) -> None:
    """Program (block of rows, block of units)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, rows - 1).to(tl.int64)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    for HALF in tl.static_range(2):
        value = _decoded(
            low, high, scale, low_scale, d, dmin, at, unit, HALF,
            COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA, FLOAT8,
        )  # fmt: skip
        column = (unit * 32 + HALF * 16)[None, :, None] + tl.arange(0, 16)[None, None, :]
        ok = (row < rows)[:, None, None] & (column < COLS)
        tl.store(out + at[:, None, None] * COLS + column, value.to(out.dtype.element_ty), mask=ok)


@jit
def _activate(
    gate: tensor,
    up: tensor,
    out: tensor,
    n: tensor,
    ACTIVATION: constexpr,
    BLOCK: constexpr,
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < n, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        g = g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        g = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:  # tanh(z) = 2 sigmoid(2 z) - 1
        g = g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    tl.store(out + i, (g * u).to(out.dtype.element_ty), mask=i < n)


# --------------------------------------------------------------------------------------------------------- launches

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

GEMM_TOKENS = 16
"""From 2 to so many tokens weights are decoded in registers: the tensor cores' smallest tile has room for 16, and a
decoded copy would be written and read again, 7 times the bytes of 4-bit weights. Beyond, a product over a decoded copy
is bound by arithmetic soon, and torch's is better at that."""

DECODED_BYTES = 256 << 20
"""At most so much of a matrix is a decoded copy at a time. Only heads are more: DeepSeek-V3's is 1.9 GB in bf16."""

PARTIAL_SUMS = 4 * 64 * 256
"""Most partial sums a token: 64 rows of four programs on each of 256 multiprocessors, more than any GPU has."""


def _constants(p: Planes) -> dict[str, Any]:
    f = p.format
    return {
        "COLS": p.cols, "LOW": f.low, "HIGH": f.high, "GROUP": f.group, "SUPER": f.super, "OFFSET": f.offset,
        "MINIMA": f.has_min, "FLOAT8": f.float8,
    }  # fmt: skip


def _check(p: Planes, x: Tensor | None = None) -> None:
    why = unavailable()
    if why is not None:
        raise RuntimeError(f"Triton linears cannot run: {why}")
    if x is not None and (x.shape[-1] != p.cols or not x.is_floating_point()):
        raise ValueError(f"x must be floating [..., {p.cols}], not {list(x.shape)} {x.dtype}")


def dequantize(p: Planes, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values `[rows, cols]`: computed in float32, rounded once to `dtype`. RuntimeError without a GPU."""
    _check(p)
    out = torch.empty(p.rows, p.cols, dtype=dtype, device=p.tensors["low"].device)
    if out.numel() == 0:
        return out
    units = -(-p.cols // UNIT)
    block = min(32, _power_of_two(units))
    rows = 128 // block if not interpreted() else 64
    grid = (-(-p.rows // rows), -(-units // block))
    with torch.cuda.device(out.get_device()):
        _dequantize[grid](*p.all, out, p.rows, **_constants(p), ROWS=rows, UNITS=block, num_warps=4)
    return out


@dataclass(frozen=True)
class VectorTiles:
    """How `_gemv` cuts its work; any choice gives the same answer up to the order of sums, at another speed."""

    rows: int  # a thread
    warp_rows: int
    units: int  # a step; a multiple of 32 puts warps side by side along the columns

    @property
    def warps(self) -> int:
        """So many that a thread has one unit of `rows` rows."""
        return max(1, self.warp_rows * self.units // 32)


def vector_tiles(rows: int, cols: int, count: int) -> VectorTiles:
    """Tiles for one token, by rows, columns and multiprocessors.

    The fastest of 32 on an H100 for five shapes in Q4_K and Q6_K, or within 4 % of it: a warp for each row, or two rows
    where there are many; with short rows a thread has several, which share what is made of x.
    """
    if cols <= 64 * UNIT:
        return VectorTiles(4, 1, 64)
    return VectorTiles(1, 2 if rows >= count * 32 else 1, 32)


def _vector(
    x: Tensor, p: Planes, bias: Tensor | None, tiles: VectorTiles | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """One token, `x [1, cols]`."""
    out = torch.empty(1, p.rows, dtype=dtype or x.dtype, device=x.device)
    t = tiles or vector_tiles(p.rows, p.cols, processors_of(x.get_device()).count)
    grid = (-(-p.rows // (t.rows * t.warp_rows)),)
    with torch.cuda.device(x.get_device()):
        _gemv[grid](
            x, *p.all, out if bias is None else bias, out, p.rows, **_constants(p), BIAS=bias is not None,
            ROWS=t.rows, WARP_ROWS=t.warp_rows, UNITS=t.units, num_warps=t.warps,
        )  # fmt: skip
    return out


def _few(x: Tensor, p: Planes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """2 to GEMM_TOKENS tokens, `x [tokens, cols]` with neighbouring columns, of 16 bits."""
    tokens, rows, units = x.shape[0], 64, 8
    blocks, steps = -(-p.rows // rows), -(-p.cols // (UNIT * units))
    splits = min(16, steps, max(1, 4 * processors_of(x.get_device()).count // blocks))  # four programs a processor
    splits = 1 << splits.bit_length() - 1  # few variants to compile
    out = torch.empty(tokens, p.rows, dtype=dtype, device=x.device)
    partial = out if splits == 1 else torch.empty(splits, tokens, p.rows, device=x.device)
    with torch.cuda.device(x.get_device()):
        _gemm[(blocks, splits)](
            x, x.stride(0), *p.all, partial, out if bias is None else bias, p.rows, tokens, **_constants(p),
            BIAS=bias is not None, ROWS=rows, UNITS=units, TOKENS=16, SPLITS=splits, UPCAST=interpreted(), num_warps=4,
        )  # fmt: skip
        if splits > 1:
            n = out.numel()
            _add_splits[(-(-n // 512),)](partial, out, n, SPLITS=splits, BLOCK=512)
    return out


def _many(x: Tensor, p: Planes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Over a decoded copy, `x [tokens, cols]`."""
    if p.rows * p.cols * x.itemsize <= DECODED_BYTES:
        return plain_linear(x, dequantize(p, x.dtype), bias, dtype)
    step = max(128, DECODED_BYTES // (p.cols * x.itemsize) // 128 * 128)
    out = torch.empty(x.shape[0], p.rows, dtype=dtype, device=x.device)
    for at in range(0, p.rows, step):
        add = None if bias is None else bias[at : at + step]
        out[:, at : at + step] = plain_linear(x, dequantize(p.part(at, step), x.dtype), add, dtype)
    return out


def shared(x: Tensor) -> Tensor | Vector:
    """`x [..., K]` for several calls of `linear`: what they all would make of it is made once."""
    flat = x.reshape(-1, x.shape[-1])
    if not 0 < flat.shape[0] <= gluon_dot.MOST_TOKENS or x.itemsize != 2:
        return x
    return Vector(flat if flat.stride(1) == 1 else flat.contiguous())


def linear(
    x: Tensor | Vector, weight: Planes | Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`x [..., K]` times a weight `[N, K]` in planes, plus `bias [N]`: `[..., N]` in type `dtype`, else that of x.

    Sums are in float32, of few tokens of 16 bits in integers (`triton_dot`); of more the weights are rounded to the
    type of x. A plain weight is torch's. `x`: also what `shared` made of it; the result is then `[tokens, N]`.
    Which kernel runs depends on shapes alone. RuntimeError without a GPU, ValueError if the shapes do not fit.
    """
    words = None
    if isinstance(x, Vector):
        words, x = x, x.x
    dtype = dtype or x.dtype
    if isinstance(weight, Tensor):
        return plain_linear(x, weight, bias, dtype)
    _check(weight, x)
    if bias is not None and (bias.shape != (weight.rows,) or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous [{weight.rows}], not {list(bias.shape)}")
    flat = x.reshape(-1, weight.cols)
    tokens = flat.shape[0]
    shape = (*x.shape[:-1], weight.rows)
    if tokens == 0 or weight.rows == 0:
        return x.new_empty(shape, dtype=dtype)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if x.itemsize == 2 and tokens <= most_tokens(weight, x.get_device()):
        return dot(words or Vector(flat), weight, bias, dtype=dtype).view(shape)
    if tokens == 1:
        return _vector(flat, weight, bias, dtype=dtype).view(shape)
    if tokens <= GEMM_TOKENS and x.itemsize == 2:  # float32 has no tensor cores of its own
        return _few(flat, weight, bias, dtype).view(shape)
    made = None if bias is None else bias.to(dtype)
    return _many(flat, weight, made, dtype).view(shape)


def gated(
    x: Tensor, gate: Planes | Tensor, up: Planes | Tensor, down: Planes | Tensor, activation: str = "silu"
) -> Tensor:
    """An MLP, `down(act(gate x) * up x)`: `x [..., H]` to `[..., H]`. ValueError for an unknown `activation`.

    Each product is rounded to the type of x, the activation is computed in float32.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    both = shared(x) if isinstance(gate, Planes) and isinstance(up, Planes) else x
    g, u = linear(both, gate).contiguous(), linear(both, up).contiguous()
    h = torch.empty_like(g)
    n = h.numel()
    if n:
        with torch.cuda.device(h.get_device()):
            _activate[(-(-n // 1024),)](g, u, h, n, ACTIVATION=activation, BLOCK=1024)
    return linear(h, down).view(x.shape)


# ---------------------------------------------------------------------------------------------------------- regions


def keepable(source: WeightSource | None, key: str) -> Part | None:
    """The one stored tensor that is all of a matrix, as stored, in an encoding that has planes; None if none is.

    Scales of int4 groups become a plane in the two bytes that they have in nearly all files; float32 ones do not.
    """
    parts = source.parts(key) if source is not None else ()
    if len(parts) != 1:
        return None
    (part,) = parts
    shape = tuple(w.stop - w.start for w in part.where)
    whole = len(shape) == 2 and part.spec.shape == shape and all(w.step in (None, 1) for w in part.where)
    if not whole or part.spec.encoding not in FORMATS or part.transpose:
        return None
    f = FORMATS[part.spec.encoding]
    return None if f.beside and part.spec.nbytes >= f.nbytes(*shape) + 2 * shape[0] * shape[1] // f.group else part


def _encoding(region: Region, leaf: str) -> str | None:
    """The encoding in which a weight of a region is kept in planes, or None."""
    if leaf in region.quantized:
        return region.quantized[leaf]
    node = region.weights[leaf]
    part = keepable(node.meta.get("source"), node.meta.get("weight", leaf))
    return part.spec.encoding if part else None


def planes_refuses(region: Region) -> str | None:
    """Why the weights of a region cannot be, or should not be, kept in planes; None if they can."""
    for leaf, encoding in region.quantized.items():
        shape = tuple(value_of(region.weights[leaf]).shape)
        if encoding not in FORMATS or len(shape) != 2:
            return f"{leaf} {list(shape)} as {encoding} has no planes"
        if shape[1] % FORMATS[encoding].block:
            return f"rows of {leaf} have {shape[1]} values, no multiple of {encoding}'s {FORMATS[encoding].block}"
    if region.binding is not None and region.binding.turned:
        return f"{', '.join(sorted(region.binding.turned))} are stored with rows for columns"
    if not any(_encoding(region, leaf) for leaf in region.weights):
        return "none of its weights is quantised as a whole"
    return None


def planes_bytes(region: Region) -> int:
    """Bytes that `pack_planes` will allocate."""
    total = 0
    for leaf, node in region.weights.items():
        encoding, value = _encoding(region, leaf), value_of(node)
        total += FORMATS[encoding].nbytes(*map(int, value.shape)) if encoding else int(value.nbytes)
    return total


def products_bytes(region: Region, tokens: int, size: int) -> int:
    """Most bytes that the products with a region's matrices make, for `tokens` tokens of `size` bytes a value.

    All results, and beside them what is decoded of the largest matrix, with its part of the result if it is a part, or
    the partial sums of few tokens. Those in float32 have no kernel for few.
    """
    matrices = [value_of(w) for w in region.weights.values() if value_of(w).dim() == 2]
    results = tokens * size * sum(int(m.shape[0]) for m in matrices)
    decoded = max((size * int(m.numel()) for m in matrices), default=0)
    decoded = decoded if decoded <= DECODED_BYTES else DECODED_BYTES + results
    if tokens > GEMM_TOKENS:
        return results + decoded
    partial = 4 * tokens * max((min(16 * int(m.shape[0]), PARTIAL_SUMS) for m in matrices), default=0)
    return results + (partial if tokens == 1 or size == 2 else max(partial, decoded))


def pack_planes(parts: Parts, region: Region, target: Target) -> Packed:
    """Weights on the region's home: `leaf/plane` where they are quantised as a whole, else `leaf` in the compute type.

    `shape` of the result maps a leaf in planes to its encoding, rows and columns.
    """
    device = target[region.home or ""].torch
    tensors: dict[str, Tensor] = {}
    kept: dict[str, tuple[str, int, int]] = {}
    for leaf, key in parts.keys.items():
        value = value_of(region.weights[leaf])
        part = keepable(parts.source, key)
        scale: Tensor | None = None
        if leaf in region.quantized:
            made: dict[str, Tensor] = {}
            (part,) = _quantized(parts.source, key, region.quantized[leaf], leaf, made, device)
            raw, scale = made[leaf], made.get(f"{leaf}/scale")
        elif part is not None:
            raw, scale = parts.source.read(part).to(device), parts.source.read_scale(part)
        else:
            tensors[leaf] = values(parts.source, key, value.dtype).to(device)
            continue
        rows, cols = map(int, value.shape)
        kept[leaf] = (part.spec.encoding, rows, cols)
        made = planes(raw, part.spec.encoding, None if scale is None else scale.to(device), cols)
        tensors |= {f"{leaf}/{name}": t for name, t in made.items()}
    return Packed("planes", tensors, kept)


def weight_of(packed: Packed, leaf: str) -> Planes | Tensor:
    """A weight as `pack_planes` left it: for `linear`."""
    if leaf not in packed.shape:
        return packed.tensors[leaf]
    found = {name: packed.tensors[at] for name in PLANES if (at := f"{leaf}/{name}") in packed.tensors}
    encoding, rows, cols = packed.shape[leaf]
    return Planes(encoding, rows, cols, found)


class TritonLinear(Kernel):
    """A linear from weights in the bits of the file: a step of few tokens reads only these."""

    name = "triton_linear"
    op = "linear"
    device = "cuda"
    layout = "planes"
    quantizes = native.QUANTIZERS

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        return (unavailable() if torch.cuda.is_available() else None) or planes_refuses(region)

    def packed_bytes(self, region: Region) -> int:
        return planes_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        x = value_of(region.inputs[0])
        size = int(x.element_size())
        tokens = nbytes(x, sizes) // (int(x.shape[-1]) * size)
        size = max(size, int(value_of(region.node).element_size()))
        inside = tokens * size * max(int(value_of(w).shape[-1]) for w in region.weights.values())  # the gated halves
        return products_bytes(region, tokens, size) + inside

    def cost(self, region: Region, target: Target) -> Cost:
        return plain_cost(region, self.packed_bytes(region))

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return pack_planes(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        (x,) = inputs
        shape: LinearShape | None = region.shape
        dtype = x.dtype if shape is None else shape.dtype
        return linear(x, weight_of(packed, "weight"), packed.tensors.get("bias"), dtype)


class TritonMLP(TritonLinear):
    """A gated MLP, likewise; the product of its halves in one launch."""

    name = "triton_mlp"
    op = "mlp"

    def refuses(self, region: Region, target: Target) -> str | None:
        if region.binding.shape not in ACTIVATIONS:
            return f"its activation is {region.binding.shape or 'unknown'}, not {', '.join(ACTIVATIONS)}"
        return super().refuses(region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        (x,) = inputs
        gate, up, down = (weight_of(packed, f"{name}_proj.weight") for name in ("gate", "up", "down"))
        return gated(x, gate, up, down, region.shape)
