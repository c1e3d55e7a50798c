"""Two to sixteen tokens times a matrix in planes: the tensor cores multiply integers, from the bits as they lie.

The products are those of `triton_dot`, of the same integers; sums of floats come in another order. There every token is
a pass over the matrix. Here 32 columns of 16 rows are one product of the tensor cores (`mma.m16n8k32`) with the high
bytes of eight tokens, and one with their low bytes. A thread's part of it are four columns of each half of a unit, for
two rows, and those lie in one word of the plane `low` for each row: nothing goes from thread to thread. Hence Gluon,
Triton with layouts in our hands, and assembly: a value here is a register of each thread.
"""

from __future__ import annotations

from ktcompile.backends.triton_language import constexpr, gl, gluon_jit, tensor

ROWS, UNITS = 16, 4
"""Of a program, and of a warp a step: 32 columns each."""

MOST_TOKENS = 16


@gluon_jit
def _mma32(a0: tensor, a1: tensor, a2: tensor, a3: tensor, b0: tensor, b1: tensor, SIGNED: constexpr) -> tensor:
    """16 x 32 unsigned bytes times 32 x 8 bytes: int32, of rows 0 and 8 from the lane's, two columns each."""
    TYPE: constexpr = "s8" if SIGNED else "u8"
    return gl.inline_asm_elementwise(
        "{ .reg .s32 z; mov.s32 z, 0; mma.sync.aligned.m16n8k32.row.col.s32.u8." + TYPE + ".s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {z, z, z, z}; }",
        "=r,=r,=r,=r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _mma16(a0: tensor, a1: tensor, b0: tensor, SIGNED: constexpr) -> tensor:
    """16 x 16 unsigned bytes times 16 x 8 bytes, likewise."""
    TYPE: constexpr = "s8" if SIGNED else "u8"
    return gl.inline_asm_elementwise(
        "{ .reg .s32 z; mov.s32 z, 0; mma.sync.aligned.m16n8k16.row.col.s32.u8." + TYPE + ".s32 "
        "{$0, $1, $2, $3}, {$4, $5}, {$6}, {z, z, z, z}; }",
        "=r,=r,=r,=r,r,r,r", [a0, a1, b0],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _row(
    low: tensor, high: tensor, scale: tensor, low_scale: tensor, d: tensor, dmin: tensor,
    row: tensor, unit: tensor, t: tensor,
    COLS: constexpr, LOW: constexpr, HIGH: constexpr, GROUP: constexpr, SUPER: constexpr, OFFSET: constexpr,
    MINIMA: constexpr,
) -> tensor:  # fmt: skip
    """A thread's codes of a unit of one row, as words of bytes of both halves; their factors; what is subtracted."""
    ALL: constexpr = (COLS + 31) // 32
    word = low.to(gl.pointer_type(gl.int32)) + row * (ALL * LOW) + unit * LOW + t
    a = gl.load(word)
    if LOW == 8:
        b = gl.load(word + 4)
    else:
        b = (a >> 4) & 0x0F0F0F0F
        a = a & 0x0F0F0F0F
    if HIGH == 1:
        bits = gl.load(high + row * ALL + unit) >> t
        a |= (bits & 0x01010101) << 4
        b |= bits & 0x10101010
    if HIGH == 2:
        at = high + row * (ALL * 2) + unit * 2
        a |= ((gl.load(at) >> (2 * t)) & 0x03030303) << 4
        b |= ((gl.load(at + 1) >> (2 * t)) & 0x03030303) << 4
    at = row * (COLS // SUPER) + unit * 32 // SUPER
    first = gl.load(d + at).to(gl.float32)
    second = first
    if GROUP == 16:
        second = first * gl.load(scale + row * (COLS // 16) + unit * 2 + 1).to(gl.float32)
        first *= gl.load(scale + row * (COLS // 16) + unit * 2).to(gl.float32)
    elif SUPER != GROUP:
        first *= gl.load(scale + row * (COLS // GROUP) + unit * 32 // GROUP).to(gl.float32)
    off = first * OFFSET
    if MINIMA:
        least = gl.load(dmin + at).to(gl.float32)
        off += least * gl.load(low_scale + row * (COLS // GROUP) + unit * 32 // GROUP).to(gl.float32)
    return a, b, first, second, off


@gluon_jit
def _one(total: tensor, high: tensor, low: tensor, factor: tensor, off: tensor, step: tensor, sum_x: tensor) -> tensor:
    return total + (factor * ((high * 256 + low).to(gl.float32) * step) - off * sum_x)


@gluon_jit
def _of_x(floats: tensor, unit: tensor, inside: tensor, ALL: constexpr) -> tensor:
    """A token's scale in a unit, and the sums of its halves; zeros for a unit that there is not."""
    step = gl.where(inside, gl.load(floats + unit), 0.0)
    a = gl.where(inside, gl.load(floats + (ALL + unit * 2)), 0.0)
    b = gl.where(inside, gl.load(floats + (ALL + 1 + unit * 2)), 0.0)
    return step, a, b


@gluon_jit
def _eight(
    t0: tensor, t1: tensor, t2: tensor, t3: tensor,  # totals of (row, token): (0, 0), (0, 1), (8, 0), (8, 1)
    words: tensor, token: tensor, tokens: tensor, unit: tensor, inside: tensor, g: tensor, t: tensor,
    a: tensor, b: tensor, first: tensor, second: tensor, off: tensor,
    a8: tensor, b8: tensor, first8: tensor, second8: tensor, off8: tensor,
    COLS: constexpr, GROUP: constexpr, OFFSET: constexpr,
) -> tensor:  # fmt: skip
    """A unit for the eight tokens from `token` on; of those that there are not, the last one's again."""
    ALL: constexpr = (COLS + 31) // 32
    mine = words + gl.minimum(token + g, tokens - 1) * (ALL * 19) + unit * 8 + t
    h0 = gl.load(mine)
    h1 = gl.load(mine + 4)
    l0 = gl.load(mine + ALL * 8)
    l1 = gl.load(mine + (ALL * 8 + 4))
    floats = words.to(gl.pointer_type(gl.float32)) + ALL * 16
    x0 = floats + gl.minimum(token + 2 * t, tokens - 1) * (ALL * 19)
    x1 = floats + gl.minimum(token + 2 * t + 1, tokens - 1) * (ALL * 19)
    step0, a0, b0 = _of_x(x0, unit, inside, ALL)
    step1, a1, b1 = _of_x(x1, unit, inside, ALL)
    if GROUP == 16:
        p0, p1, p2, p3 = _mma16(a, a8, h0, True)
        q0, q1, q2, q3 = _mma16(a, a8, l0, False)
        t0 = _one(t0, p0, q0, first, first * OFFSET, step0, a0)
        t1 = _one(t1, p1, q1, first, first * OFFSET, step1, a1)
        t2 = _one(t2, p2, q2, first8, first8 * OFFSET, step0, a0)
        t3 = _one(t3, p3, q3, first8, first8 * OFFSET, step1, a1)
        p0, p1, p2, p3 = _mma16(b, b8, h1, True)
        q0, q1, q2, q3 = _mma16(b, b8, l1, False)
        t0 = _one(t0, p0, q0, second, second * OFFSET, step0, b0)
        t1 = _one(t1, p1, q1, second, second * OFFSET, step1, b1)
        t2 = _one(t2, p2, q2, second8, second8 * OFFSET, step0, b0)
        t3 = _one(t3, p3, q3, second8, second8 * OFFSET, step1, b1)
    else:
        p0, p1, p2, p3 = _mma32(a, a8, b, b8, h0, h1, True)
        q0, q1, q2, q3 = _mma32(a, a8, b, b8, l0, l1, False)
        t0 = _one(t0, p0, q0, first, off, step0, a0 + b0)
        t1 = _one(t1, p1, q1, first, off, step1, a1 + b1)
        t2 = _one(t2, p2, q2, first8, off8, step0, a0 + b0)
        t3 = _one(t3, p3, q3, first8, off8, step1, a1 + b1)
    return t0, t1, t2, t3


@gluon_jit
def _store(
    total: tensor, token: tensor, row: tensor, out: tensor, bias: tensor, rows: tensor, tokens: tensor,
    BIAS: constexpr, WARPS: constexpr,
) -> None:  # fmt: skip
    """The sum over the warps; `token` and `row` say where a thread's part of it belongs, less those of its lane."""
    found = gl.sum(gl.reshape(total, [WARPS, 32]), 0)
    lane = gl.arange(0, 32, found.type.layout)
    row = row + lane // 4
    token = token + lane % 4 * 2
    ok = (row < rows) & (token < tokens)
    if BIAS:
        found += gl.load(bias + row, mask=row < rows, other=0.0).to(gl.float32)
    gl.store(out + token.to(gl.int64) * rows + row, found.to(out.dtype.element_ty), mask=ok)


@gluon_jit
def products(
    words: tensor,  # x, as `triton_dot._quantize` leaves it
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
    TOKENS: constexpr,  # 8 or 16, at least `tokens`
    UNITS: constexpr,
    WARPS: constexpr,
) -> None:
    """Program: 16 rows. Warps share the columns, UNITS units of 32 at a time."""
    layout: constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    ALL: constexpr = (COLS + 31) // 32
    thread = gl.arange(0, 32 * WARPS, layout)
    g = thread % 32 // 4
    t = thread % 4
    warp = thread // 32
    top = gl.program_id(0) * 16
    row = gl.minimum(top + g, rows - 1)
    row8 = gl.minimum(top + g + 8, rows - 1)
    zero = gl.full([32 * WARPS], 0.0, gl.float32, layout)
    t0, t1, t2, t3 = zero, zero, zero, zero
    u0, u1, u2, u3 = zero, zero, zero, zero
    for begin in range(0, ALL, UNITS * WARPS):
        for i in gl.static_range(UNITS):
            unit = begin + warp * UNITS + i
            inside = unit < ALL
            unit = gl.where(inside, unit, 0)
            a, b, first, second, off = _row(
                low, high, scale, low_scale, d, dmin, row, unit, t, COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA
            )
            a8, b8, first8, second8, off8 = _row(
                low, high, scale, low_scale, d, dmin, row8, unit, t, COLS, LOW, HIGH, GROUP, SUPER, OFFSET, MINIMA
            )
            t0, t1, t2, t3 = _eight(
                t0, t1, t2, t3, words, 0, tokens, unit, inside, g, t,
                a, b, first, second, off, a8, b8, first8, second8, off8, COLS, GROUP, OFFSET,
            )  # fmt: skip
            if TOKENS == 16:
                u0, u1, u2, u3 = _eight(
                    u0, u1, u2, u3, words, 8, tokens, unit, inside, g, t,
                    a, b, first, second, off, a8, b8, first8, second8, off8, COLS, GROUP, OFFSET,
                )  # fmt: skip
    _store(t0, 0, top, out, bias, rows, tokens, BIAS, WARPS)
    _store(t1, 1, top, out, bias, rows, tokens, BIAS, WARPS)
    _store(t2, 0, top + 8, out, bias, rows, tokens, BIAS, WARPS)
    _store(t3, 1, top + 8, out, bias, rows, tokens, BIAS, WARPS)
    if TOKENS == 16:
        _store(u0, 8, top, out, bias, rows, tokens, BIAS, WARPS)
        _store(u1, 9, top, out, bias, rows, tokens, BIAS, WARPS)
        _store(u2, 8, top + 8, out, bias, rows, tokens, BIAS, WARPS)
        _store(u3, 9, top + 8, out, bias, rows, tokens, BIAS, WARPS)
