"""mla on a GPU: the Triton kernels of `triton_mla`, with weights in planes, decoded once, or kept encoded.

Prompts are computed in the expanded form (`triton_mla_expanded`) where that is less work, unless a rules file says
`choose-kernels: {absorb: true}`. Every kernel of the op here has both forms and chooses between them at each step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.nn import functional

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
from ktcompile.backends.triton_mla_expanded import attend_expanded, expanded_bytes, expands
from ktcompile.kernel import CONTEXT, TOKENS
from ktcompile.ops.mla import MLAShape, role
from ktcompile.symbols import PAGE, Sizes, concrete, nbytes

PARTIAL_ROWS = 256 * 64
"""Most rows of partial results: a program of 64 rows for each of 256 multiprocessors, more than any GPU has."""


def attention_bytes(region: Region, sizes: Sizes) -> int:
    """Bytes of everything that `mla` makes in one call, its result included: some of it is let go earlier.

    Of the two forms the larger, as a step of so many tokens may be in either.
    """
    shape, roles = region.binding.shape, region.binding.roles
    hidden, table = (value_of(region.inputs[roles[r]]) for r in ("hidden", "page_table"))
    heads, size, pages = int(shape.heads), int(hidden.element_size()), concrete(table.shape[1], sizes)
    tokens = nbytes(hidden, sizes) // (int(hidden.shape[-1]) * size)
    context = PAGE * (pages if isinstance(pages, int) else 1)
    partial = min(PARTIAL_ROWS, tokens * heads * max(1, context // 32))  # a part has two steps of 16 keys at least
    form = tokens * heads * int(2 * shape.lora + 2 * shape.v) * size + 4 * partial * int(shape.lora + 1)
    if tokens > 1 and not shape.absorb:
        form = max(form, expanded_bytes(tokens, 1, context, shape, size))
    return products_bytes(region, tokens, size) + tokens * heads * int(shape.rope) * size + form


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device, or None: it is no such device, or it is imagined."""
    is_here = device.type == "cuda" and torch.cuda.is_available() and device.index < torch.cuda.device_count()
    return torch.cuda.get_device_capability(device) if is_here else None


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
        has = capability(device)
        if has is not None and has < (8, 9) and pool.dtype == torch.uint8:
            return f"Triton converts FP8 from compute capability 8.9 on; {region.device} has less"
        return unavailable()

    def packed_bytes(self, region: Region) -> int:
        return Reference().packed_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        return attention_bytes(region, sizes)

    def cost(self, region: Region, target: Target) -> Cost:
        shape, tokens = region.binding.shape, TOKENS
        weights = self.packed_bytes(region)
        elements = sum(int(value_of(w).numel()) for w in region.weights.values())
        pool = value_of(region.inputs[region.binding.roles["pool"]])
        pairs = tokens * (CONTEXT + tokens) * shape.heads
        attention = pairs * (2 * shape.lora + shape.rope)
        if not shape.absorb:  # what is stored is expanded; the step's own rows count as products with kv_b
            up = CONTEXT * shape.heads * shape.lora * (shape.nope + shape.v)
            attention = sympy.Min(attention, pairs * (shape.nope + shape.rope + shape.v) + up)
        return Cost(weights + CONTEXT * pool.shape[-1] * pool.element_size(), 2 * tokens * elements + 2 * attention)

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return Reference().pack(parts, region, target)

    def run(
        self,
        weights: Mapping[str, Any],
        shape: MLAShape,
        inputs: Sequence[Tensor],
        project: Callable[[Any, Any, Tensor | None], Tensor] = functional.linear,
        share: Callable[[Tensor], Any] = torch.Tensor.detach,
    ) -> Tensor:
        """`mla` in the form that is less work, from `inputs` in the order of the op's roles."""
        hidden, cos, sin, pool, page_table, seq_len, query_start = inputs
        tokens, (requests, pages) = hidden.numel() // hidden.shape[-1], page_table.shape
        return mla(
            hidden,
            cos,
            sin,
            weights,
            shape,
            pool,
            page_table,
            seq_len,
            query_start,
            project=project,
            share=share,
            attend=self.attend,
            expanded=attend_expanded if expands(tokens, requests, pages * pool.shape[1], shape) else None,
        )

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        return self.run({role(leaf): packed.tensors[leaf] for leaf in region.leaves}, region.shape, inputs)


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
        return self.run({role(leaf): decoded(packed, leaf) for leaf in region.leaves}, region.shape, inputs)


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
        weights = {role(leaf): weight_of(packed, leaf) for leaf in region.leaves}
        up = weights["kv_b_proj"]
        if isinstance(up, Planes):
            weights["kv_b_proj"] = dequantize(up, inputs[0].dtype)
        return self.run(weights, region.shape, inputs, linear, shared)
