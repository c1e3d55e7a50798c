"""A design for a few tokens times a Q4_K matrix that the product does not have: tensor cores, codes laid anew.

    python benchmarks/bench_mma_dot.py

32 columns of 16 rows are one product `mma.m16n8k32` of integers with 8 columns: the high and the low bytes of four
tokens. Of each 64 bytes of codes, four units of 32 columns, a thread needs the same four bytes of each; here those lie
together (`relaid`), so that a thread loads them at once. x is made integers with a scale for 256 columns, so that what
belongs to a unit is added up in integers. Beside it `us` of `triton_dot`, which takes a pass a token. JSON lines;
`error` is |got - want| / |want| against the product of decoded weights in float32.
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch
from bench_linear import COLD_BYTES, make
from gpu_timing import copy_gb_s, graph_us
from torch import Tensor

from ktcompile.backends.planes import Planes
from ktcompile.backends.triton_dot import dot, vector
from ktcompile.backends.triton_language import constexpr, gl, gluon_jit, tensor
from ktcompile.backends.triton_linear import dequantize
from ktcompile.backends.triton_mla import interpreted, unavailable

SHAPES = (("o_proj", 7168, 16384), ("q_b_proj", 24576, 1536), ("dense gate", 18432, 7168), ("shared gate", 2048, 7168))


@gluon_jit
def _four(p: tensor) -> tensor:
    return gl.inline_asm_elementwise(
        "ld.global.nc.v4.u32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [p.to(gl.int64)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon_jit
def _two(p: tensor) -> tensor:
    return gl.inline_asm_elementwise(
        "ld.global.nc.v2.u32 {$0, $1}, [$2];", "=r,=r,l", [p.to(gl.int64)], dtype=(gl.int32, gl.int32), is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon_jit
def _unit(
    w: tensor, v: tensor, b0: tensor, b1: tensor, scale: tensor, scale8: tensor, least: tensor, least8: tensor,
    sum_x: tensor, U: constexpr, h: tensor, l: tensor, m: tensor, h8: tensor, l8: tensor, m8: tensor,
) -> tensor:  # fmt: skip
    """One unit of rows g and g + 8, added to what came before: high bytes, low bytes, minima."""
    c0, c1, c2, c3 = gl.inline_asm_elementwise(
        "{ .reg .s32 z; mov.s32 z, 0; mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {z, z, z, z}; }",
        "=r,=r,=r,=r,r,r,r,r,r,r",
        [w & 0x0F0F0F0F, v & 0x0F0F0F0F, (w >> 4) & 0x0F0F0F0F, (v >> 4) & 0x0F0F0F0F, b0, b1],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    s = (scale >> (8 * U)) & 255
    s8 = (scale8 >> (8 * U)) & 255
    m += ((least >> (8 * U)) & 255) * sum_x
    m8 += ((least8 >> (8 * U)) & 255) * sum_x
    return h + s * c0, l + s * c1, m, h8 + s8 * c2, l8 + s8 * c3, m8


@gluon_jit
def _dot(
    words: tensor, sums: tensor, steps: tensor, low: tensor, scale: tensor, low_scale: tensor, d: tensor, dmin: tensor,
    out: tensor, rows: tensor, tokens: tensor, COLS: constexpr, WARPS: constexpr,
) -> None:  # fmt: skip
    """Program: 16 rows; a warp takes 256 columns of them at a time. WARPS divides COLS / 256; at most four tokens."""
    layout: constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    SUPERS: constexpr = COLS // 256
    thread = gl.arange(0, 32 * WARPS, layout)
    g = thread % 32 // 4
    t = thread % 4
    warp = thread // 32
    row = gl.minimum(gl.program_id(0) * 16 + g, rows - 1)
    row8 = gl.minimum(gl.program_id(0) * 16 + g + 8, rows - 1)
    token = gl.minimum(t, tokens - 1)
    codes = low + row.to(gl.int64) * (COLS // 2) + warp * 128 + t * 16
    codes8 = low + row8.to(gl.int64) * (COLS // 2) + warp * 128 + t * 16
    at = row.to(gl.int64) * (COLS // 32) + warp * 8
    at8 = row8.to(gl.int64) * (COLS // 32) + warp * 8
    x = words + ((gl.minimum(g // 2, tokens - 1) * SUPERS + warp) * 2 + g % 2) * 64 + t * 16
    of_x = sums + (token * SUPERS + warp) * 8
    step_x = steps + token * SUPERS + warp
    none = gl.full([32 * WARPS], 0, gl.int32, layout)
    total = gl.full([32 * WARPS], 0.0, gl.float32, layout)
    total8 = total
    for step in range(0, SUPERS, WARPS):
        a0, a1, a2, a3 = _four(codes + step * 128)
        a4, a5, a6, a7 = _four(codes + step * 128 + 64)
        c0, c1, c2, c3 = _four(codes8 + step * 128)
        c4, c5, c6, c7 = _four(codes8 + step * 128 + 64)
        s0, s1 = _two(scale + at + step * 8)
        s2, s3 = _two(scale + at8 + step * 8)
        m0, m1 = _two(low_scale + at + step * 8)
        m2, m3 = _two(low_scale + at8 + step * 8)
        b0, b1, b2, b3 = _four(x + step * 128)
        b4, b5, b6, b7 = _four(x + step * 128 + 4)
        b8, b9, b10, b11 = _four(x + step * 128 + 8)
        b12, b13, b14, b15 = _four(x + step * 128 + 12)
        x0, x1, x2, x3 = _four(of_x + step * 8)
        x4, x5, x6, x7 = _four(of_x + step * 8 + 4)
        sx = gl.load(step_x + step)
        h, l, m, h8, l8, m8 = none, none, none, none, none, none
        h, l, m, h8, l8, m8 = _unit(a0, c0, b0, b1, s0, s2, m0, m2, x0, 0, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a1, c1, b2, b3, s0, s2, m0, m2, x1, 1, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a2, c2, b4, b5, s0, s2, m0, m2, x2, 2, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a3, c3, b6, b7, s0, s2, m0, m2, x3, 3, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a4, c4, b8, b9, s1, s3, m1, m3, x4, 0, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a5, c5, b10, b11, s1, s3, m1, m3, x5, 1, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a6, c6, b12, b13, s1, s3, m1, m3, x6, 2, h, l, m, h8, l8, m8)
        h, l, m, h8, l8, m8 = _unit(a7, c7, b14, b15, s1, s3, m1, m3, x7, 3, h, l, m, h8, l8, m8)
        here = row * SUPERS + warp + step
        here8 = row8 * SUPERS + warp + step
        value = h.to(gl.float32) * 256.0 + l.to(gl.float32)
        value8 = h8.to(gl.float32) * 256.0 + l8.to(gl.float32)
        total += sx * (gl.load(d + here).to(gl.float32) * value - gl.load(dmin + here).to(gl.float32) * m)
        total8 += sx * (gl.load(d + here8).to(gl.float32) * value8 - gl.load(dmin + here8).to(gl.float32) * m8)
    _store(total, gl.program_id(0) * 16, out, rows, tokens, WARPS)
    _store(total8, gl.program_id(0) * 16 + 8, out, rows, tokens, WARPS)


@gluon_jit
def _store(total: tensor, row: tensor, out: tensor, rows: tensor, tokens: tensor, WARPS: constexpr) -> None:
    found = gl.sum(gl.reshape(total, [WARPS, 32]), 0)
    lane = gl.arange(0, 32, found.type.layout)
    row = row + lane // 4
    to = out + lane % 4 * rows + row
    gl.store(to, found.to(out.dtype.element_ty), mask=(lane % 4 < tokens) & (row < rows))


def relaid(p: Planes) -> Tensor:
    """The plane `low`: of each 64 bytes, byte 4 t + b of unit u goes to 16 t + 4 u + b."""
    groups = p.tensors["low"].view(torch.uint8).view(p.rows, p.cols // 128, 4, 4, 4)
    return groups.transpose(2, 3).contiguous().view(p.rows, p.cols // 2)


def integers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens as words `[token, 256 columns, high or low, thread, unit, half]`, sums of units, and steps."""
    tokens, cols = x.shape
    v = x.float().view(tokens, cols // 256, 256)
    step = v.abs().amax(-1) / 32639.0  # so that the high byte, of a low one from -128 to 127, is at most 127
    n = torch.round(v / step.clamp(min=1e-30)[..., None]).to(torch.int32)
    high = (n + 128) >> 8
    parts = torch.stack([high, n - high * 256], 2).to(torch.int8).view(tokens, cols // 256, 2, 8, 2, 4, 4)
    words = parts.permute(0, 1, 2, 5, 3, 4, 6).contiguous().view(torch.int32).view(tokens, -1)
    return words, n.view(tokens, cols // 256, 8, 32).sum(-1).to(torch.int32), step


def main() -> int:
    why = None if torch.cuda.is_available() else "no CUDA device here"
    why = why or unavailable() or ("TRITON_INTERPRET is set" if interpreted() else None)
    if why is not None or gl is None:
        print(f"bench_mma_dot: {why or 'this Triton has no Gluon'}, nothing to measure", file=sys.stderr)
        return 0
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    copy = copy_gb_s(scratch)
    print(json.dumps({"bench": "copy", "GB/s": round(copy), "device": torch.cuda.get_device_name()}), flush=True)
    for name, rows, cols in SHAPES:
        several = [make(rows, cols, "q4_k") for _ in range(COLD_BYTES * 16 // (rows * cols * 9) + 1)]
        codes = [relaid(p) for p in several]
        want = dequantize(several[0], torch.float32)
        for tokens in (1, 2, 4):
            x = torch.randn(tokens, cols, device="cuda", dtype=torch.bfloat16)
            words, v = integers(x), vector(x)
            out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)

            def one(p: Planes, low: Tensor, warps: int, words=words, out=out, rows=rows, tokens=tokens) -> None:  # type: ignore[no-untyped-def]
                found = [p.tensors[n] for n in ("scale", "low_scale", "d", "dmin")]
                _dot[(-(-rows // 16),)](
                    *words, low, *found, out, rows, tokens, COLS=p.cols, WARPS=warps, num_warps=warps
                )

            def each(warps: int, one=one, several=several, codes=codes) -> None:  # type: ignore[no-untyped-def]
                for p, low in zip(several, codes, strict=True):
                    one(p, low, warps)

            row = {"bench": name, "tokens": tokens}
            row["triton_dot_us"] = round(graph_us(lambda: [dot(v, p) for p in several], scratch) / len(several), 1)  # noqa: B023
            for warps in (w for w in (1, 2, 4, 8) if cols // 256 % w == 0):
                one(several[0], codes[0], warps)
                off = float((out.float() - x.float() @ want.T).norm() / (x.float() @ want.T).norm())
                us = graph_us(partial(each, warps), scratch) / len(several)
                row[f"{warps} warps"] = {
                    "us": round(us, 1), "of_copy": round(several[0].nbytes / us / 1e3 / copy, 3),
                    "error": float(f"{off:.1e}"),
                }  # fmt: skip
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
