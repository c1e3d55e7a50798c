"""mla on a GPU: the Triton kernels of `triton_mla`, with weights in planes, decoded once, or kept encoded."""

from typing import Any

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import native
from ktcompile.backends.encoded import decoded, decoding_bytes, encoded_bytes, pack_encoded, wasteful
from ktcompile.backends.planes import Planes
from ktcompile.backends.reference import Reference
from ktcompile.backends.triton_linear import (
    dequantize,
    linear,
    pack_planes,
    planes_bytes,
    planes_refuses,
    products_bytes,
    shared,
    weight_of,
)
from ktcompile.backends.triton_mla import mla, mla_attend, unavailable
from ktcompile.kernel import CONTEXT, TOKENS
from ktcompile.ops.mla import role
from ktcompile.symbols import PAGE, Sizes, concrete, nbytes

PARTIAL_ROWS = 256 * 64
"""Most rows of partial results: a program of 64 rows for each of 256 multiprocessors, more than any GPU has."""


def attention_bytes(region: Region, sizes: Sizes) -> int:
    """Bytes of everything that `mla` makes in one call, its result included: some of it is let go earlier."""
    shape, roles = region.binding.shape, region.binding.roles
    hidden, table = (value_of(region.inputs[roles[r]]) for r in ("hidden", "page_table"))
    heads, size, pages = int(shape.heads), int(hidden.element_size()), concrete(table.shape[1], sizes)
    tokens = nbytes(hidden, sizes) // (int(hidden.shape[-1]) * size)
    context = PAGE * (pages if isinstance(pages, int) else 1)
    inside = heads * int(shape.rope + 2 * shape.lora + 2 * shape.v)
    partial = min(PARTIAL_ROWS, tokens * heads * max(1, context // 32))  # a part has two steps of 16 keys at least
    return products_bytes(region, tokens, size) + tokens * inside * size + 4 * partial * int(shape.lora + 1)


class TritonMLA(Kernel):
    """Paged, split-KV, ragged latent attention in Triton; projections through torch. Weights decoded once."""

    name = "triton"
    op = "mla"
    device = "cuda"
    layout = "plain"

    def attend(self, *args: Any, **options: Any) -> Tensor:
        """`mla_attend`, or what a subclass has instead of it."""
        return mla_attend(*args, **options)

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        if not torch.cuda.is_available():
            return None
        device = target[region.device or target.main.name].torch
        pool = value_of(region.inputs[region.binding.roles["pool"]])
        if device.type == "cuda" and pool.dtype == torch.uint8 and torch.cuda.get_device_capability(device) < (8, 9):
            return f"Triton converts FP8 from compute capability 8.9 on; {region.device} has less"
        return unavailable()

    def packed_bytes(self, region: Region) -> int:
        return Reference().packed_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        return attention_bytes(region, sizes)

    def cost(self, region: Region, target: Target) -> Cost:
        shape, tokens = region.binding.shape, TOKENS
        weights = self.packed_bytes(region)
        width = shape.lora + shape.rope
        elements = sum(int(value_of(w).numel()) for w in region.weights.values())
        pool = value_of(region.inputs[region.binding.roles["pool"]])
        return Cost(
            weights + CONTEXT * pool.shape[-1] * pool.element_size(),
            2 * tokens * elements + 2 * tokens * (CONTEXT + tokens) * shape.heads * (width + shape.lora),
        )

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return Reference().pack(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        weights = {role(leaf): packed.tensors[leaf] for leaf in region.leaves}
        hidden, cos, sin, *cache = inputs
        return mla(hidden, cos, sin, weights, region.shape, *cache, attend=self.attend)


class TritonMLAEncoded(TritonMLA):
    """The same with weights in the file's encoding, decoded at each call: for those that would not fit decoded."""

    name = "triton_encoded"
    layout = "encoded"
    quantizes = native.QUANTIZERS

    def refuses(self, region: Region, target: Target) -> str | None:
        return super().refuses(region, target) or wasteful(region, target)

    def packed_bytes(self, region: Region) -> int:
        return encoded_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        return max(decoding_bytes(region), region.decoded_bytes + attention_bytes(region, sizes))

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return pack_encoded(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        weights = {role(leaf): decoded(packed, leaf) for leaf in region.leaves}
        hidden, cos, sin, *cache = inputs
        return mla(hidden, cos, sin, weights, region.shape, *cache, attend=self.attend)


class TritonMLAPlanes(TritonMLA):
    """The same with projections from the bits of the file (`triton_linear`); kv_b, which is absorbed, as values."""

    name = "triton_planes"
    layout = "planes"
    quantizes = native.QUANTIZERS

    def refuses(self, region: Region, target: Target) -> str | None:
        return super().refuses(region, target) or planes_refuses(region)

    def packed_bytes(self, region: Region) -> int:
        return planes_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        up = sum(int(value_of(w).nbytes) for leaf, w in region.weights.items() if role(leaf) == "kv_b_proj")
        return up + attention_bytes(region, sizes)

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return pack_planes(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        hidden, cos, sin, *cache = inputs
        weights = {role(leaf): weight_of(packed, leaf) for leaf in region.leaves}
        up = weights["kv_b_proj"]
        if isinstance(up, Planes):
            weights["kv_b_proj"] = dequantize(up, hidden.dtype)
        given = (hidden, cos, sin, weights, region.shape, *cache)
        return mla(*given, project=linear, share=shared, attend=self.attend)
