"""Few tokens times a matrix in planes, in integers: four products an instruction instead of one.

x becomes integers of 16 bits with a scale for each unit of 32 columns, kept as two bytes (high signed, low not), once
for all matrices that it meets; codes are bytes as they come out of the planes by a shift and a mask. `dp4a` multiplies
four codes with four bytes and adds; a unit's sum is scaled once. The rounding of x, 2^-16 of the largest of its 32, is
far below that of bfloat16. In float32 the same loop takes more instructions than the memory leaves time for.

Tokens are computed by programs of their own, side by side so that they share what the caches have of the matrix: a
token's result is the same to the bit alone and in a batch. Where `gluon_dot` can, it takes K-quants, on tensor cores.
Nothing here waits for the device. Without Triton this module still imports.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from ktcompile.backends import gluon_dot
from ktcompile.backends.planes import FORMATS, UNIT, Planes
from ktcompile.backends.triton_language import constexpr, gl, jit, tensor, tl
from ktcompile.backends.triton_mla import interpreted, processors_of

# ---------------------------------------------------------------------------------------------------------- kernels
# Of x as integers there are, by units, in one buffer of int32: 8 words of high bytes, then of all units 8 words of low
# bytes, then a scale, then the sums of both halves (float32).

_WORDS = 19  # of x a unit


@jit
def _quantize(
    x: tensor,  # [tokens, COLS]
    x_stride: tensor,
    words: tensor,  # [tokens, 19 * units]
    COLS: constexpr,
    UNITS: constexpr,
) -> None:
    """Program (UNITS units, token). Where a value is not finite, a unit's scale is not: products show it."""
    ALL: constexpr = (COLS + 31) // 32
    x += tl.program_id(1).to(tl.int64) * x_stride
    words += tl.program_id(1) * (ALL * 19)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    column = unit[:, None, None] * 32 + tl.arange(0, 2)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    v = tl.load(x + column, mask=column < COLS, other=0.0).to(tl.float32)
    most = tl.max(tl.max(tl.abs(v), 2), 1)
    scale = most / 32767.0 + tl.sum(tl.sum(v - v, 2), 1)
    inverse = 32767.0 / tl.maximum(most, 1e-30)
    n = tl.floor(v * inverse[:, None, None] + 0.5).to(tl.int32)
    inside = unit < ALL
    at = words.to(tl.pointer_type(tl.int8)) + column
    tl.store(at, (n >> 8).to(tl.int8), mask=inside[:, None, None])
    tl.store(at + ALL * 32, (n & 255).to(tl.uint8).to(tl.int8, bitcast=True), mask=inside[:, None, None])
    floats = words.to(tl.pointer_type(tl.float32)) + ALL * 16
    tl.store(floats + unit, scale, mask=inside)
    half = ALL + unit[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(floats + half, tl.sum(n, 2).to(tl.float32) * scale[:, None], mask=inside[:, None])


@jit
def _byte(word: tensor, i: constexpr, SIGNED: constexpr) -> tensor:
    found = (word >> (8 * i)) & 255
    if SIGNED:
        found = (found ^ 128) - 128
    return found


@jit
def _dp4a(codes: tensor, x: tensor, add: tensor, SIGNED: constexpr, EMULATE: constexpr) -> tensor:
    """`add` plus four unsigned bytes of `codes` times four bytes of `x`."""
    if EMULATE:
        for i in tl.static_range(4):
            add = add + _byte(codes, i, False) * _byte(x, i, SIGNED)
        return add
    if SIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, add], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, add], dtype=tl.int32, is_pure=True, pack=1
    )


@jit
def _products(
    a: tensor,  # [ROWS, WARP_ROWS, UNITS, 4] words of codes
    x_high: tensor,  # [1, WARP_ROWS, UNITS, 4] words
    x_low: tensor,
    high: tensor,  # what is added to
    low: tensor,
    EMULATE: constexpr,
) -> tensor:
    """Of 16 columns, by words: `high` plus codes times high bytes of x, `low` plus codes times low bytes."""
    return _dp4a(a, x_high, high, True, EMULATE), _dp4a(a, x_low, low, False, EMULATE)


@jit
def _joined(high: tensor, low: tensor) -> tensor:
    """The sum over the words: int32, at most 255 * 2^15 * 32."""
    return tl.sum(high, 3) * 256 + tl.sum(low, 3)


@jit
def _load(
    low: tensor,
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    at: tensor,  # [ROWS, WARP_ROWS, 1]
    unit: tensor,  # [UNITS]
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    MINIMA: constexpr,
) -> tensor:
    """All there is of a unit of each row, as stored; what the format has not is one of the others again."""
    ALL: constexpr = (COLS + 31) // 32
    inside = unit < ALL
    # Not a mask: a thread shall load the scales of its own unit, not a vector of its neighbours'.
    safe = tl.where(inside, unit, 0)[None, None, :]
    word = low.to(tl.pointer_type(tl.int32)) + (at * (ALL * LOW) + (unit * LOW)[None, None, :])[:, :, :, None]
    word += tl.arange(0, 4)[None, None, None, :]
    a = tl.load(word, mask=inside[None, None, :, None], other=0)
    b = a
    if LOW == 8:
        b = tl.load(word + 4, mask=inside[None, None, :, None], other=0)
    super_at = at * (COLS // SUPER) + safe * 32 // SUPER
    factor = tl.load(d + super_at)
    minimum = factor
    if MINIMA:
        minimum = tl.load(dmin + super_at)
    if HIGH == 1:
        bits_a = tl.load(high + at * ALL + safe)
        bits_b = bits_a
    elif HIGH == 2:
        bits_a = tl.load(high + at * (ALL * 2) + safe * 2)
        bits_b = tl.load(high + at * (ALL * 2) + safe * 2 + 1)
    else:
        bits_a = safe
        bits_b = safe
    if GROUP == 16:  # two scales a unit
        first = tl.load(scale + at * (COLS // 16) + safe * 2)
        second = tl.load(scale + at * (COLS // 16) + safe * 2 + 1)
    elif SUPER != GROUP:
        first = tl.load(scale + at * (COLS // GROUP) + safe * 32 // GROUP)
        second = tl.load(low_scale + at * (COLS // GROUP) + safe * 32 // GROUP)
    else:
        first = factor
        second = factor
    return a, b, bits_a, bits_b, factor, minimum, first, second


@jit
def _dot(
    words: tensor,  # x, as `_quantize` leaves it
    low: tensor,
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    bias: tensor,  # [rows], or unused
    out: tensor,  # [tokens, rows]
    rows: tensor,
    tokens: tensor,
    COLS: constexpr,
    LOW: constexpr,
    HIGH: constexpr,
    GROUP: constexpr,
    SUPER: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    BIAS: constexpr,
    ROWS: constexpr,
    WARP_ROWS: constexpr,
    UNITS: constexpr,
    EMULATE: constexpr,
) -> None:
    """Program block * tokens + token, for a block of ROWS * WARP_ROWS rows; it is one axis, since others end at 65535.

    A thread has one unit of ROWS rows at a time: 16 bytes a load, and all that belongs to it, so that nothing crosses
    threads before the end of the loop. The next step's unit is loaded before this one's is multiplied: memory has work
    all the time.

    Shapes are chosen for that: the compiler gives a thread up to 16 bytes along the last axis, a warp up to 32 units,
    the other warps WARP_ROWS. x has an axis WARP_ROWS too, else it would be spread over all warps.
    """
    ALL: constexpr = (COLS + 31) // 32
    token, block = tl.program_id(0) % tokens, tl.program_id(0) // tokens
    words += token * (ALL * 19)
    out += token.to(tl.int64) * rows
    zero = tl.zeros([WARP_ROWS], tl.int32)[None, :, None]
    row = block * (ROWS * WARP_ROWS) + tl.arange(0, ROWS)[:, None] * WARP_ROWS
    row = row + tl.arange(0, WARP_ROWS)[None, :]  # [ROWS, WARP_ROWS]
    at = tl.minimum(row, rows - 1)[:, :, None]  # the last row again instead of one beyond
    total = tl.zeros([ROWS, WARP_ROWS, UNITS], tl.float32)
    four = tl.arange(0, 4)[None, None, None, :]
    floats = words.to(tl.pointer_type(tl.float32)) + ALL * 16
    a, b, bits_a, bits_b, factor, minimum, first, second = _load(
        low, high, scale, low_scale, d, dmin, at, tl.arange(0, UNITS), COLS, LOW, HIGH, GROUP, SUPER, MINIMA
    )
    for begin in range(0, ALL, UNITS):
        next_a, next_b, next_bits_a, next_bits_b, next_factor, next_minimum, next_first, next_second = _load(
            low, high, scale, low_scale, d, dmin, at, begin + UNITS + tl.arange(0, UNITS),
            COLS, LOW, HIGH, GROUP, SUPER, MINIMA,
        )  # fmt: skip
        unit = begin + tl.arange(0, UNITS)
        inside = (unit < ALL)[None, None, :]
        ok = inside[:, :, :, None]
        if LOW == 4:
            b = (a >> 4) & 0x0F0F0F0F
            a = a & 0x0F0F0F0F
        if HIGH == 1:
            bits = bits_a[:, :, :, None] >> four
            a |= (bits & 0x01010101) << 4
            b |= bits & 0x10101010
        if HIGH == 2:
            a |= ((bits_a[:, :, :, None] >> (2 * four)) & 0x03030303) << 4
            b |= ((bits_b[:, :, :, None] >> (2 * four)) & 0x03030303) << 4

        of_x = words + (zero + (unit * 8)[None, None, :])[:, :, :, None] + four
        none = tl.zeros_like(a)
        high_a, low_a = _products(
            a, tl.load(of_x, mask=ok, other=0), tl.load(of_x + ALL * 8, mask=ok, other=0), none, none, EMULATE
        )
        x_high, x_low = tl.load(of_x + 4, mask=ok, other=0), tl.load(of_x + (ALL * 8 + 4), mask=ok, other=0)

        of_unit = zero + tl.where(inside, unit[None, None, :], 0)  # [1, WARP_ROWS, UNITS]; see `_load`
        step = tl.where(inside, tl.load(floats + of_unit), 0.0)
        sum_a = tl.where(inside, tl.load(floats + ALL + of_unit * 2), 0.0)
        sum_b = tl.where(inside, tl.load(floats + (ALL + 1) + of_unit * 2), 0.0)
        if GROUP == 16:
            high_b, low_b = _products(b, x_high, x_low, none, none, EMULATE)
            product = first.to(tl.float32) * (_joined(high_a, low_a).to(tl.float32) * step - OFFSET * sum_a)
            product += second.to(tl.float32) * (_joined(high_b, low_b).to(tl.float32) * step - OFFSET * sum_b)
            total += factor.to(tl.float32) * product
        else:
            high_b, low_b = _products(b, x_high, x_low, high_a, low_a, EMULATE)
            sum_x = sum_a + sum_b
            product = factor.to(tl.float32) * (_joined(high_b, low_b).to(tl.float32) * step - OFFSET * sum_x)
            if SUPER != GROUP:
                product *= first.to(tl.float32)
            if MINIMA:
                product -= minimum.to(tl.float32) * second.to(tl.float32) * sum_x
            total += product
        a, b, bits_a, bits_b = next_a, next_b, next_bits_a, next_bits_b
        factor, minimum, first, second = next_factor, next_minimum, next_first, next_second
    result = tl.sum(total, 2)
    if BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


# --------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Vector:
    """Tokens, `x [tokens, cols]` with neighbouring columns, and their integers for all matrices in planes they meet.

    Those are made when a matrix asks for them: of two kinds, since `gluon_dot` wants them in its own order.
    """

    x: Tensor

    @cached_property
    def words(self) -> Tensor:
        """As `_dot` takes them."""
        tokens, cols = self.x.shape
        units = -(-cols // UNIT)
        words = torch.empty(tokens, units * _WORDS, dtype=torch.int32, device=self.x.device)
        block = 16
        with torch.cuda.device(self.x.get_device()):
            _quantize[(-(-units // block), tokens)](
                self.x, self.x.stride(0), words, COLS=cols, UNITS=block, num_warps=4
            )
        return words

    @cached_property
    def integers(self) -> tuple[Tensor, Tensor]:
        """As `gluon_dot` takes them."""
        return gluon_dot.integers(self.x)


@dataclass(frozen=True)
class DotTiles:
    """How `_dot` cuts its work; any choice gives the same answer up to the order of sums, at another speed."""

    rows: int  # a thread
    warp_rows: int
    units: int  # a step: 16, or a multiple of 32; more than 32 puts warps side by side along the columns

    @property
    def warps(self) -> int:
        """So many that a thread has one unit of `rows` rows."""
        return max(1, self.warp_rows * self.units // 32)


INTERPRETED = DotTiles(16, 8, 64)
"""The interpreter takes as long for a small program as for a large one."""


def dot_tiles(rows: int, cols: int, count: int) -> DotTiles:
    """Tiles for a matrix, by rows, columns and multiprocessors: the best of 18 on an H200, or within 8 % of it.

    A row has a warp, or two; where it is no whole number of steps and there are many, the steps are shorter.
    """
    units = -(-cols // UNIT)
    if units % 32 and units <= 64:
        return DotTiles(1, 2, 16)
    return DotTiles(1, 2, 64 if units % 64 == 0 or rows < 32 * count else 32)


MOST_TOKENS = 8
"""So many tokens, each a pass of its own over the matrix, are sooner done than with weights made floats."""


def most_tokens(p: Planes, device: int) -> int:
    """How many tokens `dot` is for, with this matrix, on the CUDA device of this index."""
    if p.format.float8:
        return 0
    return gluon_dot.MOST_TOKENS if gluon_dot.fits(p) and tensor_cores(device) is None else MOST_TOKENS


@cache
def tensor_cores(device: int) -> str | None:
    """Why `gluon_dot` cannot run on the CUDA device of this index, or None: it is tried, once, which takes seconds."""
    if gl is None:
        return "this Triton has no Gluon"
    if device < 0:
        return "the interpreter does not know Gluon"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it is for compute capability 8.0 and more, this is {capability[0]}.{capability[1]}"
    draw, here = torch.Generator().manual_seed(0), torch.device("cuda", device)
    x = Vector(torch.randn(3, 2560, generator=draw).to(here))
    for encoding in ("q4_k", "q6_k"):  # both kinds of products
        made = {}
        for name, (shape, dtype) in FORMATS[encoding].shapes(24, 2560).items():
            made[name] = torch.randint(1, 50, shape, generator=draw).to(here, dtype)
        p = Planes(encoding, 24, 2560, made)
        want = dot(x, p, tiles=DotTiles(1, 2, 32))
        try:
            got = gluon_dot.dot(x.integers, p, x.x.dtype, processors_of(device))
        except Exception as failed:  # of a compiler that may be any
            return f"it does not compile: {str(failed).strip().splitlines()[-1:]}"
        off = float((got - want).norm() / want.norm())
        if not off < 1e-3:
            return f"its result is off by {off:.1e}"
    return None


def dot(
    x: Vector,
    p: Planes,
    bias: Tensor | None = None,
    tiles: DotTiles | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`[tokens, rows]` in type `dtype`, else that of x. Not for FP8, which has no integers.

    Up to `most_tokens`, else it takes long. With `tiles` the kernel here runs, not `gluon_dot`.
    """
    f, low = p.format, p.tensors["low"]
    if low.numel() >= 1 << 33:  # offsets are int32, in words
        raise ValueError(f"a matrix of {low.numel()} bytes; dot takes less than 8 GiB")
    processors, dtype = processors_of(low.get_device()), dtype or x.x.dtype
    if tiles is None and gluon_dot.fits(p) and tensor_cores(low.get_device()) is None:
        return gluon_dot.dot(x.integers, p, dtype, processors, bias)
    words, tokens = x.words, x.x.shape[0]
    out = torch.empty(tokens, p.rows, dtype=dtype, device=low.device)
    t = tiles or (INTERPRETED if interpreted() else dot_tiles(p.rows, p.cols, processors.count))
    grid = (tokens * -(-p.rows // (t.rows * t.warp_rows)),)
    with torch.cuda.device(out.get_device()):
        _dot[grid](
            words, *p.all, out if bias is None else bias, out, p.rows, tokens, BIAS=bias is not None,
            COLS=p.cols, LOW=f.low, HIGH=f.high, GROUP=f.group, SUPER=f.super, OFFSET=f.offset, MINIMA=f.has_min,
            ROWS=t.rows, WARP_ROWS=t.warp_rows, UNITS=t.units, EMULATE=interpreted(), num_warps=t.warps,
        )  # fmt: skip
    return out
