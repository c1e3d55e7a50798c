"""A few tokens times a matrix of K-quants on tensor cores, in integers, for GPUs from Ampere on, in Gluon.

`triton_dot` defines the product and takes a pass over the matrix for each token. Here 32 columns of 16 rows are one
product of the tensor cores, `mma.m16n8k32`, with eight columns: the high and the low bytes of four tokens. All that a
step needs of the matrix and of x is copied to shared memory some steps ahead, so that memory always has work, and goes
from there to the very thread that the tensor cores want it in: a thread holds four columns of each half of a unit, for
two rows, and these lie in one word of the plane `low`. Hence Gluon, Triton with layouts in our hands.

x is integers of 16 bits with one step for 256 columns, so that all of a block of a K-quant is added up in integers.
What is lost is 2^-16 of the largest of 256 values, still far below the rounding of bfloat16. A token's result is the
same to the bit alone and in a batch. Gluon may change from one Triton to the next, so `triton_dot` runs the kernel
once and looks at what it gives.
"""

# ruff: noqa: RUF005 (the compiler of kernels does not know `(*a, b)`)
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktcompile.backends.planes import Planes
from ktcompile.backends.triton_language import (
    async_copy,
    constexpr,
    constexpr_function,
    gl,
    gluon_jit,
    jit,
    tensor,
    tl,
)
from ktcompile.backends.triton_mla import Processors

SUPER = 256
"""Columns of a warp a step: what shares `d` in these formats."""

X_WORDS, SUM_WORDS = 128, 32
"""int32 words of a token's 256 columns: bytes; sums of 8 units, of their first and second halves, a step, 7 unused."""

MOST_VALUE = 32639
"""An integer of x at most, so that its high byte, of a low one from -128 to 127, is at most 127."""

if async_copy is not None:
    _load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # until Triton 3.6
    _commit, _wait = async_copy.commit_group, async_copy.wait_group
    _barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@jit
def _quantize(
    x: tensor,  # [tokens, COLS]
    x_stride: tensor,
    words: tensor,  # [tokens, COLS / 256, 128]
    sums: tensor,  # [tokens, COLS / 256, 32]
    COLS: constexpr,
) -> None:
    """Program (256 columns, token): integers of 16 bits, a step for all.

    Bytes lie as `[unit / 2, high or low, thread, unit % 2, half, 4]`: as threads load them, 16 bytes each.
    """
    x += tl.program_id(1).to(tl.int64) * x_stride + tl.program_id(0) * 256
    words += (tl.program_id(1) * (COLS // 256) + tl.program_id(0)) * 128
    sums += (tl.program_id(1) * (COLS // 256) + tl.program_id(0)) * 32
    unit = tl.arange(0, 8)[:, None, None]
    half = tl.arange(0, 2)[None, :, None]
    column = tl.arange(0, 16)[None, None, :]
    v = tl.load(x + unit * 32 + half * 16 + column).to(tl.float32)
    most = tl.max(tl.max(tl.max(tl.abs(v), 2), 1), 0)
    step = most / 32639.0 + tl.sum(tl.sum(tl.sum(v - v, 2), 1), 0)  # no number where a value is none: products show it
    n = tl.floor(v * (32639.0 / tl.maximum(most, 1e-30)) + 0.5).to(tl.int32)
    high = (n + 128) >> 8  # at most 127, with a low byte from -128 to 127
    at = words.to(tl.pointer_type(tl.int8)) + unit // 2 * 128 + column // 4 * 16 + unit % 2 * 8 + half * 4 + column % 4
    tl.store(at, high.to(tl.int8))
    tl.store(at + 64, (n - high * 256).to(tl.int8))
    halves = tl.sum(n, 2)
    tl.store(sums + tl.arange(0, 8), tl.sum(halves, 1))
    tl.store(sums + 8 + tl.arange(0, 2)[None, :] * 8 + tl.arange(0, 8)[:, None], halves)
    tl.store(sums.to(tl.pointer_type(tl.float32)) + 24, step)


@constexpr_function
def _laid(registers, lanes, rows, words, row_warp, rw, kw):  # type: ignore[no-untyped-def]
    """Of shared memory `[rows, kw * words]`, what a thread takes: `words` a warp of the columns, then warps of rows."""
    across = [[0, words << i] for i in range(kw.bit_length() - 1)]
    down = [[row_warp << i, 0] for i in range(rw.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, across + down, [], [rows, kw * words])


@gluon_jit
def _mma32(a0: tensor, a1: tensor, a2: tensor, a3: tensor, b0: tensor, b1: tensor) -> tensor:
    """16 x 32 unsigned bytes times 32 x 8 signed ones, of a thread: rows 0 and 8 from its own, two columns each."""
    return gl.inline_asm_elementwise(
        "{ .reg .s32 z; mov.s32 z, 0; mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {z, z, z, z}; }",
        "=r,=r,=r,=r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _mma16(a0: tensor, a1: tensor, b0: tensor) -> tensor:
    """16 x 16 unsigned bytes times 16 x 8 signed ones, likewise."""
    return gl.inline_asm_elementwise(
        "{ .reg .s32 z; mov.s32 z, 0; mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5}, {$6}, {z, z, z, z}; }",
        "=r,=r,=r,=r,r,r,r", [a0, a1, b0],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _fetch(
    matrix: tensor,  # [rows, columns]
    row: tensor,  # where the rows of `to` begin, [R]
    wanted: tensor,  # [R]
    to: tensor,  # [R, C] shared
    step: tensor,
    LAYOUT: constexpr,
    columns: tensor,  # of the matrix
) -> None:
    C: constexpr = to.shape[1]
    at = step * C + gl.arange(0, C, gl.SliceLayout(0, LAYOUT))[None, :]
    _load(to, matrix + row[:, None] * columns + at, mask=(at < columns) & wanted[:, None])


@gluon_jit
def _fetch_rows(
    plane: tensor, top: tensor, rows: tensor, to: tensor, step: tensor, LAYOUT: constexpr, columns: tensor
) -> None:
    """Of a plane: of rows that there are not, the last one again."""
    row = gl.minimum(top + gl.arange(0, to.shape[0], gl.SliceLayout(1, LAYOUT)), rows - 1)
    _fetch(plane, row, row >= 0, to, step, LAYOUT, columns)


@gluon_jit
def _fetch_tokens(
    x: tensor, first: tensor, tokens: tensor, to: tensor, step: tensor, LAYOUT: constexpr, columns: tensor
) -> None:
    """Of x: of tokens that there are not, nothing."""
    token = first + gl.arange(0, to.shape[0], gl.SliceLayout(1, LAYOUT))
    _fetch(x, token, token < tokens, to, step, LAYOUT, columns)


@gluon_jit
def _of_2(v: tensor, LAYOUT: constexpr) -> tensor:
    a, b = gl.split(v)
    return gl.convert_layout(a, LAYOUT, assert_trivial=True), gl.convert_layout(b, LAYOUT, assert_trivial=True)


@gluon_jit
def _of_4(v: tensor, LAYOUT: constexpr) -> tensor:
    """Tensors out of the last axes `[2, 2]`, in order: `split` takes the last axis, the least digit."""
    a, b = gl.split(v)
    a0, a1 = _of_2(a, LAYOUT)
    b0, b1 = _of_2(b, LAYOUT)
    return a0, b0, a1, b1


@gluon_jit
def _of_8(v: tensor, LAYOUT: constexpr) -> tensor:
    a, b = gl.split(v)
    a0, a1, a2, a3 = _of_4(a, LAYOUT)
    b0, b1, b2, b3 = _of_4(b, LAYOUT)
    return a0, b0, a1, b1, a2, b2, a3, b3


@gluon_jit
def _of_16(v: tensor, LAYOUT: constexpr) -> tensor:
    a, b = gl.split(v)
    a0, a1, a2, a3, a4, a5, a6, a7 = _of_8(a, LAYOUT)
    b0, b1, b2, b3, b4, b5, b6, b7 = _of_8(b, LAYOUT)
    return a0, b0, a1, b1, a2, b2, a3, b3, a4, b4, a5, b5, a6, b6, a7, b7


@gluon_jit
def _halves(low: tensor, high: tensor, HIGH: constexpr, RW: constexpr, KW: constexpr, M: constexpr) -> tensor:
    """Bytes of the first and of the second half of units: 8 units of row g, then of row g + 8."""
    ROW: constexpr = gl.SliceLayout(4, M)
    words = _of_16(gl.permute(gl.reshape(low, [RW, 2, 4, 2, KW, 2, 2, 2, 4]), [0, 4, 2, 3, 8, 1, 5, 6, 7]), M)
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, M)))))
    t = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 0), 1), 2), 3)
    bits, more = words, words
    if HIGH == 1:
        bits = _of_16(gl.permute(gl.reshape(high, [RW, 2, 4, 2, KW, 2, 2, 2]), [0, 4, 2, 3, 1, 5, 6, 7]), ROW)
    if HIGH == 2:
        v = gl.permute(gl.reshape(high, [RW, 2, 4, 2, KW, 2, 2, 2, 2]), [0, 4, 2, 3, 1, 5, 6, 7, 8])
        v, w = gl.split(v)
        bits, more = _of_16(v, ROW), _of_16(w, ROW)
    first: tensor = ()
    second: tensor = ()
    for i in gl.static_range(16):
        a = words[i] & 0x0F0F0F0F
        b = (words[i] >> 4) & 0x0F0F0F0F
        if HIGH == 1:
            one = gl.expand_dims(bits[i], 4) >> t
            a |= (one & 0x01010101) << 4
            b |= one & 0x10101010
        if HIGH == 2:
            a |= ((gl.expand_dims(bits[i], 4) >> (2 * t)) & 0x03030303) << 4
            b |= ((gl.expand_dims(more[i], 4) >> (2 * t)) & 0x03030303) << 4
        first, second = first + (a,), second + (b,)
    return first, second


@gluon_jit
def _byte(word: tensor, i: constexpr, SIGNED: constexpr) -> tensor:
    found = (word << (24 - 8 * i)) >> 24 if SIGNED else (word >> (8 * i)) & 255
    return gl.expand_dims(found, 4)


@gluon_jit
def _scales(tile: tensor, GROUP: constexpr, RW: constexpr, KW: constexpr, M: constexpr) -> tensor:
    """Words of scales of row g and of row g + 8: two each, or four where 16 columns share a scale."""
    ROW: constexpr = gl.SliceLayout(4, M)
    if GROUP == 16:
        v = gl.permute(gl.reshape(tile, [RW, 2, 4, 2, KW, 2, 2]), [0, 4, 2, 3, 1, 5, 6])
        a0, a1, a2, a3, b0, b1, b2, b3 = _of_8(v, ROW)
        found: tensor = (a0, a1, a2, a3), (b0, b1, b2, b3)
    else:
        v = gl.permute(gl.reshape(tile, [RW, 2, 4, 2, KW, 2]), [0, 4, 2, 3, 1, 5])
        a0, a1, b0, b1 = _of_4(v, ROW)
        found = (a0, a1), (b0, b1)
    return found


@gluon_jit
def _factors(tile: tensor, RW: constexpr, KW: constexpr, M: constexpr) -> tensor:
    """d or dmin of row g and of row g + 8."""
    a, b = _of_2(gl.permute(gl.reshape(tile, [RW, 2, 4, 2, KW]), [0, 4, 2, 3, 1]), gl.SliceLayout(4, M))
    return gl.expand_dims(a.to(gl.float32), 4), gl.expand_dims(b.to(gl.float32), 4)


@gluon_jit
def _of_token(v: tensor) -> tensor:
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(v, 0), 2), 3)


@gluon_jit
def _group(
    t: tensor,  # totals of rows g and g + 8
    t8: tensor,
    bytes_: tensor,  # of four tokens, or one: [TOKENS, KW * 128]
    sums: tensor,  # [TOKENS, KW * 32]
    inside: tensor,
    codes: tensor,  # words of first halves of 8 units of row g and 8 of row g + 8; of second halves
    factors: tensor,  # of both rows: words of scales, words of minima, d, dmin
    GROUP: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    KW: constexpr,
    M: constexpr,
) -> tensor:
    """256 columns times four tokens: integers throughout, of which none needs more than 31 bits, then one scaling.

    A thread has bytes of token g // 2, high ones or low ones by g % 2, and sums of token t.
    """
    N: constexpr = bytes_.shape[0]
    v = gl.permute(gl.reshape(bytes_, [N, KW, 2, 2, 2, 4, 2, 2]), [1, 0, 4, 5, 2, 3, 6, 7])
    x = _of_16(v, gl.SliceLayout(0, M))
    T: constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, M)))
    v = gl.permute(gl.reshape(sums, [N, KW, 2, 2, 2, 2, 2]), [1, 0, 4, 5, 6, 2, 3])
    v, w = gl.split(v)
    whole, second = gl.split(v)
    first, rest = gl.split(w)
    step, _1, _2, _3, _4, _5, _6, _7 = _of_8(rest, T)
    step = _of_token(step).to(gl.float32, bitcast=True)
    if GROUP == 16:
        x_first, x_second = _of_8(first, T), _of_8(second, T)
    else:
        x_first, x_second = _of_8(whole, T), ()
    a, b = codes
    s, s8, m, m8, d, d8, dmin, dmin8 = factors
    none = gl.full(t.shape, 0, gl.int32, M)
    h, l, o, h8, l8, o8 = none, none, none, none, none, none
    for u in gl.static_range(8):
        x0 = gl.expand_dims(x[2 * u], 0)
        x1 = gl.expand_dims(x[2 * u + 1], 0)
        if GROUP == 16:
            c0, c1, c2, c3 = _mma16(a[u], a[u + 8], x0)
            e0, e1, e2, e3 = _mma16(b[u], b[u + 8], x1)
            k, k8 = _byte(s[u // 2], 2 * u % 4, True), _byte(s8[u // 2], 2 * u % 4, True)
            n, n8 = _byte(s[u // 2], 2 * u % 4 + 1, True), _byte(s8[u // 2], 2 * u % 4 + 1, True)
            h += k * c0 + n * e0
            l += k * c1 + n * e1
            o += k * _of_token(x_first[u]) + n * _of_token(x_second[u])
            h8 += k8 * c2 + n8 * e2
            l8 += k8 * c3 + n8 * e3
            o8 += k8 * _of_token(x_first[u]) + n8 * _of_token(x_second[u])
        else:
            c0, c1, c2, c3 = _mma32(a[u], a[u + 8], b[u], b[u + 8], x0, x1)
            k, k8 = _byte(s[u // 4], u % 4, False), _byte(s8[u // 4], u % 4, False)
            h += k * c0
            l += k * c1
            h8 += k8 * c2
            l8 += k8 * c3
            if MINIMA:
                o += _byte(m[u // 4], u % 4, False) * _of_token(x_first[u])
                o8 += _byte(m8[u // 4], u % 4, False) * _of_token(x_first[u])
    v = d * (h.to(gl.float32) * 256.0 + l.to(gl.float32))
    v8 = d8 * (h8.to(gl.float32) * 256.0 + l8.to(gl.float32))
    if MINIMA:
        v -= dmin * o.to(gl.float32)
        v8 -= dmin8 * o8.to(gl.float32)
    if OFFSET:
        v -= d * (o.to(gl.float32) * OFFSET)
        v8 -= d8 * (o8.to(gl.float32) * OFFSET)
    return t + gl.where(inside, step * v, 0.0), t8 + gl.where(inside, step * v8, 0.0)


@gluon_jit
def _store(
    total: tensor, row: tensor, token: tensor, out: tensor, bias: tensor, rows: tensor, tokens: tensor, BIAS: constexpr,
    RW: constexpr,
) -> None:  # fmt: skip
    """The sum over the warps of a row; `row` and `token` are the first ones."""
    found = gl.reshape(gl.sum(total, 1), [RW * 32])
    i = gl.arange(0, RW * 32, found.type.layout)
    row = row + i // 32 * 16 + i % 32 // 4
    token = token + i % 4
    if BIAS:
        found += gl.load(bias + row, mask=row < rows, other=0.0).to(gl.float32)
    to = out + token.to(gl.int64) * rows + row
    gl.store(to, found.to(out.dtype.element_ty), mask=(token < tokens) & (row < rows))


@gluon_jit
def products(
    words: tensor,  # x, as `_quantize` leaves it
    sums: tensor,
    low: tensor,  # planes; `high`, `low_scale` and `dmin` are others again where there are none
    high: tensor,
    scale: tensor,
    low_scale: tensor,
    d: tensor,
    dmin: tensor,
    bias: tensor,  # [rows], or unused
    out: tensor,  # [tokens, rows]
    rows: tensor,
    tokens: tensor,
    pairs: tensor,  # columns / 512
    HIGH: constexpr,
    GROUP: constexpr,
    OFFSET: constexpr,
    MINIMA: constexpr,
    BIAS: constexpr,
    TOKENS: constexpr,  # 1, 4, 8 or 16
    RW: constexpr,  # warps along the rows, 16 each
    KW: constexpr,  # warps along the columns, 256 each a step
    STAGES: constexpr,  # steps in shared memory
) -> None:
    """Program (TOKENS tokens, 16 * RW rows).

    What a thread holds is of shape `[RW, KW, 4, 2, 4]`, in layout M one of it each: the warp, g // 2, g % 2 and t,
    where the tensor cores want rows g and g + 8 of the matrix and columns 2 t and 2 t + 1 of x.
    """
    R: constexpr = 16 * RW
    N: constexpr = min(TOKENS, 4)
    GROUPS: constexpr = TOKENS // N
    S: constexpr = 4 if GROUP == 16 else 2  # words of scales
    H: constexpr = 8 * max(HIGH, 1)
    M: constexpr = gl.BlockedLayout([1, 1, 1, 1, 1], [1, 1, 4, 2, 4], [RW, KW, 1, 1, 1], [4, 3, 2, 1, 0])
    by_row: constexpr = gl.BlockedLayout([1, 4], [1, 32], [RW * KW, 1], [1, 0])
    along: constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, RW * KW], [1, 0])
    short: constexpr = gl.BlockedLayout([1, 4], [32 * 4 // (KW * S), KW * S // 4], [RW * KW, 1], [1, 0])
    of_halves: constexpr = gl.BlockedLayout([1, KW], [32, 1], [RW * KW, 1], [1, 0])
    of_bits: constexpr = gl.BlockedLayout([1, 4], [32 * 4 // (KW * H), KW * H // 4], [RW * KW, 1], [1, 0])
    of_x: constexpr = along if N == 1 else by_row
    swizzled: constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    plain: constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    swizzled4: constexpr = gl.SwizzledSharedLayout(4, 1, 4, [1, 0])

    PAIR: constexpr = [[1, 0], [2, 0]] if N == 4 else [[0, 0], [0, 0]]
    LANES: constexpr = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    to_low: constexpr = _laid(
        [[0, 4], [0, 8], [0, 16], [8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], R, 32, 16, RW, KW
    )
    BITS: constexpr = [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]] if HIGH == 2 else [[0, 1], [0, 2], [0, 4], [8, 0]]
    to_high: constexpr = _laid(BITS, LANES, R, H, 16, RW, KW)
    to_scale: constexpr = _laid([[0, 1], [0, 2], [8, 0]] if S == 4 else [[0, 1], [8, 0]], LANES, R, S, 16, RW, KW)
    to_factor: constexpr = _laid([[8, 0]], LANES, R, 1, 16, RW, KW)
    to_x: constexpr = _laid([[0, 1], [0, 2], [0, 32], [0, 64]], [[0, 4], [0, 8], [0, 16]] + PAIR, N, 128, 0, RW, KW)
    to_sums: constexpr = _laid(
        [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], PAIR + [[0, 0], [0, 0], [0, 0]], N, 32, 0, RW, KW
    )

    supers = pairs * 2  # so that the compiler knows that it is even
    first = gl.program_id(0) * TOKENS
    top = gl.program_id(1) * R
    low = low.to(gl.pointer_type(gl.int32))
    scale = scale.to(gl.pointer_type(gl.int32))
    low_scale = low_scale.to(gl.pointer_type(gl.int32))
    lows = gl.allocate_shared_memory(gl.int32, [STAGES, R, KW * 32], swizzled)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, R, KW * S], plain)
    factors = gl.allocate_shared_memory(gl.float16, [STAGES, R, KW], plain)
    xs = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, N, KW * 128], plain)
    summed = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, N, KW * 32], swizzled4)
    if HIGH:
        highs = gl.allocate_shared_memory(gl.int32, [STAGES, R, KW * H], swizzled)
    if MINIMA:
        minima = gl.allocate_shared_memory(gl.int32, [STAGES, R, KW * S], plain)
        least = gl.allocate_shared_memory(gl.float16, [STAGES, R, KW], plain)

    which = gl.arange(0, RW * KW * 32, gl.BlockedLayout([1], [32], [RW * KW], [0])) // 32 % KW
    warp = gl.convert_layout(gl.reshape(which, [RW, KW, 4, 2, 4]), M, assert_trivial=True)
    zero = gl.full([RW, KW, 4, 2, 4], 0.0, gl.float32, M)
    totals: tensor = ()
    for _ in gl.static_range(2 * GROUPS):
        totals = totals + (zero,)
    for begin in range(1 - STAGES, (supers + KW - 1) // KW):
        ahead = begin + STAGES - 1
        slot = ahead % STAGES
        if begin >= 0:
            _wait(STAGES - 2)
            _barrier()
        _fetch_rows(low, top, rows, lows.index(slot), ahead, by_row, supers * 32)
        _fetch_rows(scale, top, rows, scales.index(slot), ahead, short, supers * S)
        _fetch_rows(d, top, rows, factors.index(slot), ahead, of_halves, supers)
        if HIGH:
            _fetch_rows(high, top, rows, highs.index(slot), ahead, of_bits, supers * H)
        if MINIMA:
            _fetch_rows(low_scale, top, rows, minima.index(slot), ahead, short, supers * S)
            _fetch_rows(dmin, top, rows, least.index(slot), ahead, of_halves, supers)
        for k in gl.static_range(GROUPS):
            _fetch_tokens(words, first + 4 * k, tokens, xs.index(slot * GROUPS + k), ahead, of_x, supers * 128)
            _fetch_tokens(sums, first + 4 * k, tokens, summed.index(slot * GROUPS + k), ahead, of_x, supers * 32)
        _commit()
        if begin >= 0:
            slot = begin % STAGES
            bits = lows.index(slot).load(to_low)
            more = bits
            if HIGH:
                more = highs.index(slot).load(to_high)
            codes = _halves(bits, more, HIGH, RW, KW, M)
            s, s8 = _scales(scales.index(slot).load(to_scale), GROUP, RW, KW, M)
            f, f8 = _factors(factors.index(slot).load(to_factor), RW, KW, M)
            m, m8, e, e8 = s, s8, f, f8
            if MINIMA:
                m, m8 = _scales(minima.index(slot).load(to_scale), GROUP, RW, KW, M)
                e, e8 = _factors(least.index(slot).load(to_factor), RW, KW, M)
            inside = begin * KW + warp < supers
            new: tensor = ()
            for k in gl.static_range(GROUPS):
                a, b = _group(
                    totals[2 * k], totals[2 * k + 1], xs.index(slot * GROUPS + k).load(to_x),
                    summed.index(slot * GROUPS + k).load(to_sums), inside, codes, (s, s8, m, m8, f, f8, e, e8),
                    GROUP, OFFSET, MINIMA, KW, M,
                )  # fmt: skip
                new = new + (a, b)
            totals = new
    for k in gl.static_range(GROUPS):
        _store(totals[2 * k], top, first + 4 * k, out, bias, rows, tokens, BIAS, RW)
        _store(totals[2 * k + 1], top + 8, first + 4 * k, out, bias, rows, tokens, BIAS, RW)


# --------------------------------------------------------------------------------------------------------- launches

ENCODINGS = ("q4_k", "q5_k", "q6_k")

MOST_TOKENS = 32
"""So many are sooner done here than with weights made floats."""


LARGE_SHARED = 160 << 10
"""Bytes of shared memory a block, as of compute capability 8.0, 9.0 and 10.0; 8.6, 8.9 and 12.0 have 99 KiB."""


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts its work. `col_warps` decides the order of sums, so it depends on the matrix alone."""

    row_warps: int  # 1, 2 or 4
    col_warps: int  # 2, 4 or 8
    stages: int

    @property
    def rows(self) -> int:
        return 16 * self.row_warps


def choose_tiles(rows: int, cols: int, tokens: int, processors: Processors) -> Tiles:
    """For a matrix and so many tokens: of seven the fastest on an H200 for nearly all of V3's matrices, at worst 16 %
    slower (`bench_linear.py --sweep`).

    Many blocks a multiprocessor hide the latency of memory; where there are few rows, more steps ahead do, if shared
    memory has room for them.
    """
    if cols <= 8 * SUPER:
        return Tiles(2, 2, 2)
    deep = 8 if processors.shared_bytes >= LARGE_SHARED else 4
    return Tiles(1, 4, 3 if rows < 32 * processors.count and tokens <= deep else 2)


def together(tokens: int, shared_bytes: int) -> int:
    """Tokens a program: all up to 16, or 8 where shared memory is small."""
    most = 16 if shared_bytes >= LARGE_SHARED else 8
    return next((n for n in (1, 4, 8) if tokens <= n), most)


def fits(p: Planes) -> bool:
    """Whether a matrix is of a format and a width that the kernel is written for."""
    return p.encoding in ENCODINGS and p.cols % (2 * SUPER) == 0 and p.rows > 0 and p.tensors["low"].numel() < 1 << 33


def integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [tokens, cols]`, cols a multiple of 512 and neighbours, as the kernel takes it."""
    tokens, cols = x.shape
    words = torch.empty(tokens, cols // SUPER * X_WORDS, dtype=torch.int32, device=x.device)
    sums = torch.empty(tokens, cols // SUPER * SUM_WORDS, dtype=torch.int32, device=x.device)
    with torch.cuda.device(x.get_device()):
        _quantize[(cols // SUPER, tokens)](x, x.stride(0), words, sums, COLS=cols, num_warps=1)
    return words, sums


def dot(
    x: tuple[Tensor, Tensor],
    p: Planes,
    dtype: torch.dtype,
    processors: Processors,
    bias: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`[tokens, rows]` of type `dtype`. `x`: as `integers` gives it."""
    f, tokens = p.format, x[0].shape[0]
    out = torch.empty(tokens, p.rows, dtype=dtype, device=x[0].device)
    t = tiles or choose_tiles(p.rows, p.cols, tokens, processors)
    at_once = together(tokens, processors.shared_bytes)
    with torch.cuda.device(out.get_device()):
        products[(-(-tokens // at_once), -(-p.rows // t.rows))](
            *x, *p.all, out if bias is None else bias, out, p.rows, tokens, p.cols // (2 * SUPER), HIGH=f.high,
            GROUP=f.group, OFFSET=f.offset, MINIMA=f.has_min, BIAS=bias is not None, TOKENS=at_once, RW=t.row_warps,
            KW=t.col_warps, STAGES=t.stages, num_warps=t.row_warps * t.col_warps,
        )  # fmt: skip
    return out
