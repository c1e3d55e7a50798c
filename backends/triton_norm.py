"""norm on a GPU in one launch: RMSNorm, one Triton program a row, with the residual sum before it where it reads one.

The ops are defined in `ktcompile/ops/plain.py` (`rms_norm`, `add_rms_norm`); this agrees with them up to the order of
one sum. Nothing
waits for the device, so a step can be captured in a CUDA graph. Without Triton this module still imports.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target
from ktcompile.backends.reference import Reference
from ktcompile.backends.triton_language import constexpr, jit, tensor, tl
from ktcompile.backends.triton_mla import interpreted, unavailable
from ktcompile.ops.plain import norm_type, sum_type


@jit
def _rms_norm(
    x: tensor,  # [rows, H]
    row_stride: tensor,
    r: tensor,  # [rows, H]: added to x, or unused
    r_stride: tensor,
    total: tensor,  # [rows, H], contiguous: the sum, or unused; of the type that values are rounded to
    weight: tensor,  # [H]
    eps: tensor,
    offset: tensor,
    out: tensor,  # [rows, H], contiguous
    H: constexpr,
    H_PAD: constexpr,
    LATE: constexpr,
    ADD: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, H_PAD)
    v = tl.load(x + row * row_stride + i, mask=i < H, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(r + row * r_stride + i, mask=i < H, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * H + i, rounded, mask=i < H)
        v = rounded.to(tl.float32)
    w = tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32) + offset
    v = v * tl.rsqrt(tl.sum(v * v, 0) / H + eps)
    if not LATE:  # both are rounded as torch would, then multiplied in float32, which is exact
        v = v.to(total.dtype.element_ty).to(tl.float32)
        w = w.to(weight.dtype.element_ty).to(tl.float32)
    tl.store(out + row * H + i, (w * v).to(out.dtype.element_ty), mask=i < H)


MAX_WIDTH = 1 << 16
"""Values a row: a program holds it all in registers."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, late: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """RMSNorm of `x [..., H]`, `weight [H]`: as `ktrans::rms_norm`, in one launch. H is at most MAX_WIDTH.

    Rows may be strided; `x` is copied only if they cannot be seen as `[rows, H]` with neighbouring values.
    """
    return _normed(x, None, weight, eps, offset, late, dtype)[1]


def add_rms_norm(
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    late: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`x + r`, both `[..., H]`, and its RMSNorm: `ktrans::add_rms_norm` in one launch. Else as above."""
    if x.shape != r.shape:
        raise ValueError(f"x is {list(x.shape)} and r {list(r.shape)}: both must be one")
    return _normed(x, r, weight, eps, offset, late, dtype)


def _rows(x: Tensor, width: int) -> Tensor:
    """As `[rows, width]` with neighbouring values, a copy only if it must be."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _normed(
    x: Tensor, r: Tensor | None, weight: Tensor, eps: float, offset: float, late: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The sum, which is x where there is no r, and its norm."""
    width = weight.shape[0]
    if width > MAX_WIDTH or x.numel() % max(1, width) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [H], H up to {MAX_WIDTH}, not {list(weight.shape)}")
    rows = _rows(x, width)
    total = x if r is None else torch.empty(x.shape, dtype=sum_type(x.dtype, r.dtype, dtype), device=x.device)
    added = rows if r is None else _rows(r, width)
    out = torch.empty(x.shape, dtype=norm_type(total.dtype, weight.dtype, late, dtype), device=x.device)
    if out.numel() == 0:
        return total, out
    padded = 1 << (width - 1).bit_length()
    with torch.cuda.device(x.get_device()):
        _rms_norm[(rows.shape[0],)](
            rows, rows.stride(0), added, added.stride(0), total, weight, eps, offset, out,
            H=width, H_PAD=padded, LATE=late, ADD=r is not None, num_warps=min(16, max(1, padded // 512)),
        )  # fmt: skip
    return total, out


class TritonNorm(Kernel):
    """RMSNorm in one launch instead of six. Takes no LayerNorm and no norm without a weight."""

    name = "triton_norm"
    op = "norm"
    device = "cuda"
    layout = "plain"

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        if region.binding.shape is None:
            return "its captured code is not that of an RMSNorm with a weight"
        if region.matrix_shape("weight")[0] > MAX_WIDTH:
            return f"rows of {region.matrix_shape('weight')[0]} values; at most {MAX_WIDTH}"
        return unavailable() if torch.cuda.is_available() else None

    def packed_bytes(self, region: Region) -> int:
        return Reference().packed_bytes(region)

    def cost(self, region: Region, target: Target) -> Cost:
        return Reference().cost(region, target)

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return Reference().pack(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Any:
        (x,) = inputs
        shape = region.shape
        return rms_norm(x, packed.tensors["weight"], shape.eps, shape.offset, shape.late, shape.dtype)


class TritonAddNorm(TritonNorm):
    """A sum of two values and its RMSNorm, likewise: both are returned."""

    name = "triton_add_norm"
    op = "add_norm"

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, r = inputs
        shape = region.shape
        return add_rms_norm(x, r, packed.tensors["weight"], shape.eps, shape.offset, shape.late, shape.dtype)


__all__ = ["MAX_WIDTH", "TritonAddNorm", "TritonNorm", "add_rms_norm", "interpreted", "rms_norm"]
