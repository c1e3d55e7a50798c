"""norm on a GPU in one launch: RMSNorm, one Triton program a row.

The op is defined in `ktcompile/ops/plain.py` (`rms_norm`); this agrees with it up to the order of one sum. Nothing
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


@jit
def _rms_norm(
    x: tensor,  # [rows, H]
    row_stride: tensor,
    weight: tensor,  # [H]
    eps: tensor,
    offset: tensor,
    out: tensor,  # [rows, H], contiguous
    H: constexpr,
    H_PAD: constexpr,
    LATE: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, H_PAD)
    v = tl.load(x + row * row_stride + i, mask=i < H, other=0.0).to(tl.float32)
    w = tl.load(weight + i, mask=i < H, other=0.0).to(tl.float32) + offset
    v = v * tl.rsqrt(tl.sum(v * v, 0) / H + eps)
    if not LATE:  # both are rounded as torch would, then multiplied in float32, which is exact
        v = v.to(x.dtype.element_ty).to(tl.float32)
        w = w.to(weight.dtype.element_ty).to(tl.float32)
    tl.store(out + row * H + i, (w * v).to(out.dtype.element_ty), mask=i < H)


MAX_WIDTH = 1 << 16
"""Values a row: a program holds it all in registers."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, late: bool = False) -> Tensor:
    """RMSNorm of `x [..., H]`, `weight [H]`: as `ktrans::rms_norm`, in one launch. H is at most MAX_WIDTH.

    Rows may be strided; `x` is copied only if they cannot be seen as `[rows, H]` with neighbouring values.
    """
    width = weight.shape[0]
    if width > MAX_WIDTH or x.numel() % max(1, width) or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous [H], H up to {MAX_WIDTH}, not {list(weight.shape)}")
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    dtype = x.dtype if late else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    padded = 1 << (width - 1).bit_length()
    with torch.cuda.device(x.get_device()):
        _rms_norm[(rows.shape[0],)](
            rows, rows.stride(0), weight, eps, offset, out,
            H=width, H_PAD=padded, LATE=late, num_warps=min(16, max(1, padded // 512)),
        )  # fmt: skip
    return out


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

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        (x,) = inputs
        shape = region.shape
        return rms_norm(x, packed.tensors["weight"], shape.eps, shape.offset, shape.late)


__all__ = ["MAX_WIDTH", "TritonNorm", "interpreted", "rms_norm"]
