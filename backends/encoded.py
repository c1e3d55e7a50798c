"""encoded: any region on a GPU, its weights kept in the encoding of the model file and decoded at each call."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, regions, value_of
from ktcompile.backends import native
from ktcompile.backends.reference import code_bytes, plain_cost
from ktcompile.graph import remembered
from ktcompile.symbols import Sizes, nbytes
from ktcompile.verify import gib, used
from ktcompile.weights import Part, TensorSpec, WeightSource, decode, each, size_of, values
from ktcompile.weights.source import block_values

# ------------------------------------------------------------------------------------------------ decoders
# uint8 blocks [n, block bytes] to float32 [n, block values], on any device. Formats: ggml-quants.c of llama.cpp.
# They compute in place: of temporaries as large as the result there is one.


def _half(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float()  # [n, 1]


def _nibbles(raw: Tensor) -> Tensor:
    """`[..., b]` bytes to `[..., 2, b]`: low halves, then high halves."""
    return torch.stack([raw & 15, raw >> 4], -2)


def _bits(raw: Tensor) -> Tensor:
    """`[n, 4]` bytes to their 32 bits, lowest first."""
    return (raw[..., None] >> torch.arange(8, device=raw.device, dtype=torch.uint8) & 1).flatten(-2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].view(torch.int8).float().mul_(_half(b[:, :2]))


def _q4_0(b: Tensor) -> Tensor:
    return _nibbles(b[:, 2:]).flatten(1).float().sub_(8).mul_(_half(b[:, :2]))


def _q5_0(b: Tensor) -> Tensor:
    q = (_nibbles(b[:, 6:]).flatten(1) | _bits(b[:, 2:6]) << 4).float()
    return q.sub_(16).mul_(_half(b[:, :2]))


def _scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit minima of a K block, `[n, 8]` each."""
    d, m, dm = raw.view(-1, 3, 4).unbind(1)
    scale = torch.cat([d & 63, dm & 15 | d >> 2 & 48], -1)
    low = torch.cat([m & 63, dm >> 4 | m >> 2 & 48], -1)
    return scale.float(), low.float()


def _q4_k(b: Tensor) -> Tensor:
    scale, low = _scales(b[:, 4:16])
    q = _nibbles(b[:, 16:].view(-1, 4, 32)).flatten(1, 2).float()  # [n, 8, 32]
    return q.mul_((_half(b[:, :2]) * scale)[..., None]).sub_((_half(b[:, 2:4]) * low)[..., None]).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scale, low = _scales(b[:, 4:16])
    shifts = torch.arange(8, device=b.device, dtype=torch.uint8)[:, None]
    high = (b[:, None, 16:48] >> shifts & 1) << 4  # [n, 8, 32]
    q = (_nibbles(b[:, 48:].view(-1, 4, 32)).flatten(1, 2) | high).float()
    return q.mul_((_half(b[:, :2]) * scale)[..., None]).sub_((_half(b[:, 2:4]) * low)[..., None]).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    shifts = torch.tensor([0, 2, 4, 6], device=b.device, dtype=torch.uint8)[:, None]
    high = (b[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3).flatten(1, 2).view(-1, 4, 64)
    q = (_nibbles(b[:, :128].view(-1, 2, 64)).flatten(1, 2) | high << 4).view(torch.int8).float().sub_(32)  # [n, 4, 64]
    scale = b[:, 192:208].contiguous().view(torch.int8).float()
    return q.view(-1, 16, 16).mul_((_half(b[:, 208:210]) * scale)[..., None]).flatten(1)


DECODERS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "q4_0": (18, _q4_0),
    "q5_0": (22, _q5_0),
    "q8_0": (34, _q8_0),
    "q4_k": (144, _q4_k),
    "q5_k": (176, _q5_k),
    "q6_k": (210, _q6_k),
}
"""Encoding -> (bytes a block, decoder)."""


CHUNK_BLOCKS = 1 << 16
"""Blocks decoded at a time: 16 M values of a K type."""


def decode_rows(raw: Tensor, encoding: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode uint8 `[..., row bytes]` to `[..., cols]` of `dtype`, where `raw` is; temporaries are of one chunk."""
    size, blocks = DECODERS[encoding]
    flat = raw.reshape(-1, size)
    first = blocks(flat[:1] if len(flat) else flat)
    out = torch.empty(len(flat), first.shape[1], dtype=dtype, device=raw.device)
    for at in range(0, len(flat), CHUNK_BLOCKS):
        out[at : at + CHUNK_BLOCKS] = blocks(flat[at : at + CHUNK_BLOCKS])
    return out.view(*raw.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------ weights kept encoded


def keepable(source: WeightSource | None, key: str) -> bool:
    """Whether a parameter can stay encoded: as stored, in at most two parts, block-quantised or FP8."""
    if source is None:
        return False
    parts = source.parts(key)
    return (
        len(parts) <= 2
        and not any(p.transpose for p in parts)
        and all(p.spec.encoding in DECODERS or p.spec.encoding.startswith("fp8_block") for p in parts)
    )


def encoded_bytes(region: Region) -> int:
    """Bytes of a region's weights with everything that can stay encoded left so, or quantised if that is asked for."""
    total = 0
    for leaf, node in region.weights.items():
        if leaf in region.quantized:
            total += region.weight_bytes(leaf)
            continue
        stays = keepable(node.meta.get("source"), node.meta["weight"])
        total += int(node.meta["nbytes"]) if stays else int(value_of(node).nbytes)
    return total


def wasteful(region: Region, target: Target) -> str | None:
    """Why a region's weights should rather be decoded once, or None."""
    if region.quantized:
        return None
    if not any(keepable(w.meta.get("source"), w.meta["weight"]) for w in region.weights.values()):
        return "none of its weights is quantised as a whole"
    home = str(region.home)
    memo = remembered(region.graph_module)
    if ("decoded", home) not in memo:
        nodes = {w for r in regions(region.graph_module) if r.home == home for w in r.weights.values()}
        cache = used(region.graph_module).get(home, {}).get("cache", 0)
        memo["decoded", home] = sum(int(value_of(w).nbytes) for w in nodes), cache
    weights, cache = memo["decoded", home]
    room = (target[home].capacity - target[home].reserved - cache) * 4 // 5  # the rest is for activations
    return f"decoded, all weights of {home} are {gib(weights)} and fit" if weights <= room else None


def pack_encoded(parts: Parts, region: Region, target: Target) -> Packed:
    """Weights on the region's home: raw parts (`leaf/0`, `leaf/1`, and `…/scale`) where they can stay, else decoded."""
    device = target[region.home or ""].torch
    tensors: dict[str, Tensor] = {}
    plan: dict[str, tuple[Part, ...]] = {}
    for leaf, key in parts.keys.items():
        if leaf in region.quantized:
            plan[leaf] = _quantized(parts.source, key, region.quantized[leaf], f"{leaf}/0", tensors, device)
            continue
        if not keepable(parts.source, key):
            tensors[leaf] = values(parts.source, key, value_of(region.weights[leaf]).dtype).to(device)
            continue
        plan[leaf] = parts.source.parts(key)
        for i, part in enumerate(plan[leaf]):
            tensors[f"{leaf}/{i}"] = parts.source.read(part).to(device)
            scale = parts.source.read_scale(part)
            if scale is not None:
                tensors[f"{leaf}/{i}/scale"] = scale.to(device)
    dtypes = {leaf: value_of(node).dtype for leaf, node in region.weights.items()}
    return Packed("encoded", tensors, (plan, dtypes))


def _quantized(
    source: WeightSource, key: str, encoding: str, name: str, tensors: dict[str, Tensor], device: torch.device
) -> tuple[Part, ...]:
    """Quantise a whole parameter on the CPU, a few rows at a time in parallel; its part, as if it were stored so."""
    shape = source.spec(key).shape
    *leading, rows, cols = shape
    is_fp8 = encoding not in DECODERS
    width = cols if is_fp8 else size_of((1, cols), encoding)
    out = torch.empty(*leading, rows, width, dtype=torch.uint8)
    scales = torch.empty(*leading, -(-rows // 128), -(-cols // 128))

    def convert(at: tuple[tuple[int, ...], int]) -> None:
        matrix, first = at
        last = min(first + 128, rows)
        lead = [slice(i, i + 1) for i in matrix]
        found = values(source, key, where=(*lead, slice(first, last), slice(0, cols))).view(last - first, cols)
        made = native.quantize(found, encoding)
        if isinstance(made, tuple):
            scales[matrix][first // 128] = made[1][0]
            made = made[0].view(torch.uint8)
        out[matrix][first:last] = made

    each(convert, itertools.product(itertools.product(*map(range, leading)), range(0, rows, 128)))
    tensors[name] = (out.view(torch.float8_e4m3fn) if is_fp8 else out).to(device)
    if is_fp8:
        tensors[f"{name}/scale"] = scales.to(device)
    spec = TensorSpec(shape, torch.float32, encoding, size_of(shape, encoding))
    return (Part(key, spec, tuple(slice(0, n) for n in shape), scale=key if is_fp8 else None),)


def decoded(packed: Packed, leaf: str) -> Tensor:
    """One weight in the compute type, decoded now if it is kept encoded."""
    plan, dtypes = packed.shape
    if leaf not in plan:
        return packed.tensors[leaf]
    parts = plan[leaf]
    if len(parts) == 1:
        return _decode(packed, f"{leaf}/0", parts[0], dtypes[leaf])
    shape = [max(p.where[axis].stop for p in parts) for axis in range(len(parts[0].where))]
    out = torch.empty(shape, dtype=dtypes[leaf], device=packed.tensors[f"{leaf}/0"].device)
    for i, part in enumerate(parts):
        place = out[part.where]
        place.copy_(_decode(packed, f"{leaf}/{i}", part, dtypes[leaf]).view(place.shape))
    return out


def _decode(packed: Packed, name: str, part: Part, dtype: torch.dtype) -> Tensor:
    """The values of one part."""
    raw = packed.tensors[name]
    if part.scale is None:
        return decode_rows(raw, part.spec.encoding, dtype)
    return decode(raw, part.spec.encoding, packed.tensors[f"{name}/scale"]).to(dtype)


DECODING_BYTES, FP8_DECODING_BYTES = 7, 12
"""Temporaries for each value that is decoded at a time: q6_k's, the most of the decoders here, and those of FP8."""


def decoding_bytes(region: Region) -> int:
    """Most bytes that decoding all of a region's weights allocates, the values included. FP8 is decoded as a whole."""
    kept = total = 0
    for leaf, node in region.weights.items():
        source = node.meta.get("source")
        if leaf not in region.quantized and not keepable(source, node.meta["weight"]):
            continue
        codes = [region.quantized[leaf]] if leaf in region.quantized else str(node.meta["encoding"]).split("+")
        count = int(value_of(node).numel())
        chunks = [
            DECODING_BYTES * min(count, CHUNK_BLOCKS * block_values(c)) if c in DECODERS else FP8_DECODING_BYTES * count
            for c in codes
        ]
        kept += int(value_of(node).nbytes)
        total = max(total, kept + max(chunks))
    return total


class Encoded(Kernel):
    """Decodes, then runs the captured code: slow, and as small as the file. For weights that would not fit decoded."""

    name = "encoded"
    op = "*"
    device = "cuda"
    layout = "encoded"
    quantizes = native.QUANTIZERS

    def refuses(self, region: Region, target: Target) -> str | None:
        for leaf, encoding in region.quantized.items():
            cols = value_of(region.weights[leaf]).shape[-1]
            if encoding in DECODERS and cols % block_values(encoding):
                return f"rows of {leaf} have {cols} values, no multiple of {encoding}'s {block_values(encoding)}"
        return wasteful(region, target)

    def packed_bytes(self, region: Region) -> int:
        return encoded_bytes(region)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        results = value_of(region.node)
        if region.op == "embed":  # decodes the rows that it looks up
            return nbytes(results, sizes) * (3 + DECODING_BYTES // int(results.element_size()))
        return max(decoding_bytes(region), code_bytes(region, sizes) + region.decoded_bytes)

    def cost(self, region: Region, target: Target) -> Cost:
        cost = plain_cost(region, self.packed_bytes(region))
        if region.op == "embed":
            return cost
        return Cost(cost.nbytes + 2 * region.decoded_bytes, cost.flops)  # decoded values are written and read

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        return pack_encoded(parts, region, target)

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Any:
        if region.op == "embed" and "weight/0" in packed.tensors and "weight/0/scale" not in packed.tensors:
            return _rows(packed, *inputs)
        return region.body(*inputs, *(decoded(packed, leaf) for leaf in region.leaves))


def _rows(packed: Packed, ids: Tensor) -> Tensor:
    """Rows of an encoded table: only those are decoded. A table is one part without scales in every known file."""
    plan, dtypes = packed.shape
    (part,) = plan["weight"]
    return decode_rows(packed.tensors["weight/0"][ids], part.spec.encoding, dtypes["weight"])
