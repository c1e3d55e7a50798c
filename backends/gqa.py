"""gqa on a GPU: the Triton kernels of `triton_gqa`, with weights in planes or decoded once."""

from typing import Any

import sympy
import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import native
from ktcompile.backends.reference import Reference
from ktcompile.backends.triton_gqa import gqa
from ktcompile.backends.triton_linear import linear, pack_planes, planes_bytes, planes_refuses, shared, weight_of
from ktcompile.backends.triton_mla import unavailable
from ktcompile.kernel import CONTEXT, TOKENS
from ktcompile.ops.mla import role
from ktcompile.symbols import PAGE, Sizes, concrete

MAX_DIM = 256
"""Elements of a head: a program holds a block of keys, one of values and its result."""

PARTIAL_ROWS = 256 * 64
"""Most rows of partial results: a program of 64 rows for each of 256 multiprocessors, more than any GPU has."""


def attention_bytes(region: Region, sizes: Sizes) -> int:
    """Bytes of everything that `gqa` makes in one call, its result included: some of it is let go earlier."""
    shape, roles = region.binding.shape, region.binding.roles
    hidden, table = (value_of(region.inputs[roles[r]]) for r in ("hidden", "page_table"))
    found = concrete(hidden.shape[-2], sizes), concrete(table.shape[1], sizes)
    tokens, pages = (n if isinstance(n, int) else 1 for n in found)
    inside = (3 * shape.heads + 2 * shape.kv_heads) * shape.dim  # as projected, rotated and mixed; keys and values
    partial = min(PARTIAL_ROWS, tokens * shape.heads * max(1, pages * PAGE // 32))  # a part has two steps of 16 keys
    return int(tokens * (inside + int(hidden.shape[-1])) * hidden.element_size() + partial * 4 * (shape.dim + 1))


class TritonGQA(Kernel):
    """Paged, split-KV, ragged attention in Triton; projections through torch. Weights decoded once."""

    name = "triton_gqa"
    op = "gqa"
    device = "cuda"
    layout = "plain"

    def missing(self) -> str | None:
        return unavailable()

    def refuses(self, region: Region, target: Target) -> str | None:
        if (dim := region.binding.shape.dim) > MAX_DIM:
            return f"heads of {dim} elements; at most {MAX_DIM}"
        return unavailable() if torch.cuda.is_available() else None

    def packed_bytes(self, region: Region) -> int:
        return Reference().packed_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        return attention_bytes(region, sizes)

    def cost(self, region: Region, target: Target) -> Cost:
        shape, tokens = region.binding.shape, TOKENS
        elements = sum(int(value_of(w).numel()) for w in region.weights.values())
        pool = value_of(region.inputs[region.binding.roles["pool"]])
        context = CONTEXT if shape.window is None else sympy.Min(CONTEXT, shape.window)
        return Cost(
            self.packed_bytes(region) + context * 2 * shape.kv_heads * shape.dim * pool.element_size(),
            2 * tokens * elements + 4 * tokens * (context + tokens) * shape.heads * shape.dim,
        )

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return Reference().pack(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        weights = {role(leaf): packed.tensors[leaf] for leaf in region.leaves}
        hidden, cos, sin, *cache = inputs
        return gqa(hidden, cos, sin, weights, region.shape, *cache)


class TritonGQAPlanes(TritonGQA):
    """The same with projections from the bits of the file."""

    name = "triton_gqa_planes"
    layout = "planes"
    quantizes = native.QUANTIZERS

    def refuses(self, region: Region, target: Target) -> str | None:
        return super().refuses(region, target) or planes_refuses(region)

    def packed_bytes(self, region: Region) -> int:
        return planes_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        largest = max(int(value_of(w).nbytes) for w in region.weights.values())  # decoded, for many tokens
        return largest + attention_bytes(region, sizes)

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return pack_planes(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        weights = {role(leaf): weight_of(packed, leaf) for leaf in region.leaves}
        hidden, cos, sin, *cache = inputs
        return gqa(hidden, cos, sin, weights, region.shape, *cache, project=linear, share=shared)
