"""Routed experts on the CPU through csrc/: one kernel an instruction set, all of them over one packed layout."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import native
from ktcompile.backends.reference import plain_cost
from ktcompile.backends.tile_tokens import tile_tokens
from ktcompile.target import cpu_features
from ktcompile.weights import Part, WeightSource, decode, each, pieces, values

_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_NEEDS = {
    "scalar": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": _AVX512,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512_bf16": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "amx": _AVX512 | {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"},
    "amx_int8": _AVX512 | {"avx512_vnni", "amx_tile", "amx_int8"},
}
_MATRICES = ("gate", "up", "down")


@cache
def shared_pool(count: int) -> native.Pool:
    """The process's pool of `count` threads; parked when idle. Calls of several models take turns."""
    return native.Pool(count)


def stored_as(encoding: str, compute: torch.dtype) -> str:
    """The type that a matrix is packed as: its own where a kernel reads that, else the nearest that loses nothing.

    With bf16 compute, values that are rounded to bf16 anyway are stored so.
    """
    if encoding in native.TYPES and encoding != "f32":
        return encoding
    return "f32" if compute == torch.float32 else "bf16"


def _leaf(matrix: str) -> str:
    """The parameter that gate, up or down is in."""
    return "down_proj" if matrix == "down" else "gate_up_proj"


def _matrices(region: Region) -> dict[str, str]:
    """The packed type of gate, up and down; remembered on the region, since every kernel asks."""
    known: dict[str, str] | None = region.node.meta.get("moe_types")
    if known is None:
        weights = region.weights
        compute = _compute(region)
        width = region.binding.shape.width
        known = {}
        for name in _MATRICES:
            node = weights[_leaf(name)]
            source: WeightSource | None = node.meta.get("source")
            if source is None:
                found = {str(node.meta["encoding"])}
            else:
                span = {"gate": (0, width), "up": (width, 2 * width)}.get(name)
                parts = source.parts(node.meta["weight"])
                found = {
                    p.spec.encoding
                    for p in parts
                    if span is None or (p.where[-2].start < span[1] and p.where[-2].stop > span[0])
                }
            wanted = region.quantized.get(_leaf(name))
            types = {wanted} if wanted else {stored_as(e, compute) for e in found}
            known[name] = types.pop() if len(types) == 1 else "f32"
        region.node.meta["moe_types"] = known
    return known


def _compute(region: Region) -> torch.dtype:
    dtype: torch.dtype = value_of(region.inputs[region.binding.roles["x"]]).dtype
    return dtype


class CpuMoe(Kernel):
    """Routed experts by one instruction set. Sums are fp32; FAMILY says how activations and weights are rounded."""

    op = "moe"
    device = "cpu"
    layout = "tiles"
    reads = native.TYPES
    quantizes = tuple(t for t in native.TYPES if t in (*native.QUANTIZERS, *native.LOSSY))
    isa: ClassVar[str]

    def missing(self) -> str | None:
        try:
            return native.isas()[self.isa]
        except ImportError:
            return "ktcompile._native is not built; run `make` (it needs gcc and the Python headers)"

    def refuses(self, region: Region, target: Target) -> str | None:
        features = target[region.device or ""].features
        if lacking := sorted(_NEEDS[self.isa] - features):
            return f"the CPU has no {', '.join(lacking)}"
        if features == cpu_features() and (why := self.missing()):
            return why
        family = native.FAMILY[self.isa]
        compute = _compute(region)
        if family in ("bf16", "int16") and compute == torch.float32:
            return f"it computes in {family}, this model in fp32; --dtype bf16 allows it"
        return native.refuses(self.isa, _matrices(region).values())

    def packed_bytes(self, region: Region) -> int:
        shape, types = region.binding.shape, _matrices(region)
        sizes = {
            "gate": (shape.width, shape.hidden),
            "up": (shape.width, shape.hidden),
            "down": (shape.hidden, shape.width),
        }
        return int(shape.experts) * sum(native.packed_bytes(types[m], *sizes[m]) for m in _MATRICES)

    def cost(self, region: Region, target: Target) -> Cost:
        return plain_cost(region, self.packed_bytes(region))

    def cache_key(self, region: Region) -> str | None:
        return f"{region.binding.shape} {_matrices(region)}"

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        shape, types = region.binding.shape, _matrices(region)
        threads = target[region.home or ""].threads
        quantized = {m: _leaf(m) in region.quantized for m in _MATRICES}
        packed = {m: _pack(parts, m, shape, types[m], threads, quantized[m]) for m in _MATRICES}
        return self.restore(packed, region, target)

    def restore(self, tensors: Mapping[str, Tensor], region: Region, target: Target) -> Packed:
        shape, types = region.binding.shape, _matrices(region)
        weights = native.MoeWeights(
            shape.experts,
            shape.hidden,
            shape.width,
            shape.activation,
            tensors["gate"],
            tensors["up"],
            tensors["down"],
            types["gate"],
            types["up"],
            types["down"],
            tile_tokens=0,
        )
        # The packed bytes are those of every phase, whose kernels may differ: each has its own count.
        taking = [isa for isa in native.FAMILY if native.refuses(isa, weights.types) is None]
        by_isa = {isa: replace(weights, tile_tokens=tile_tokens(isa, weights.types)) for isa in taking}
        return Packed(
            self.layout,
            tensors,
            (by_isa, shared_pool(target[region.home or ""].threads or len(os.sched_getaffinity(0)))),
        )

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        x, ids, scores = inputs
        by_isa, pool = packed.shape
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
        y = native.moe(pool, self.isa, by_isa[self.isa], rows, ids.contiguous(), scores.to(torch.float32).contiguous())
        return y.to(x.dtype).view(x.shape)


def _pack(parts: Parts, matrix: str, shape: Any, dst: str, threads: int, quantized: bool) -> Tensor:
    """One of gate, up, down of all experts, `[E, bytes]`: pieces are read and packed into place in parallel."""
    key = parts[_leaf(matrix)]
    rows, cols = (shape.hidden, shape.width) if matrix == "down" else (shape.width, shape.hidden)
    first = shape.width if matrix == "up" else 0
    nbytes = native.packed_bytes(dst, rows, cols)
    out = native.empty(shape.experts * nbytes).view(shape.experts, nbytes)

    def put(raw: Tensor, encoding: str, scale: Tensor | None, expert: int, span: tuple[int, int]) -> None:
        """Rows `span` of an expert's matrix, stored so."""
        if quantized and encoding != dst and dst not in native.LOSSY:
            count = span[1] - span[0]
            packed = native.pack(raw, encoding, "f32", count, cols, scale)
            wide = native.unpack(packed, "f32", count, cols)
            made = native.quantize(wide, dst)
            raw, scale = made if isinstance(made, tuple) else (made, None)
            encoding = dst
        native.pack(raw.contiguous(), encoding, dst, rows, cols, scale, out[expert], span)

    def convert(piece: Part) -> None:
        raw, scale = parts.source.read(piece), parts.source.read_scale(piece)
        encoding = piece.spec.encoding
        if encoding not in native.SOURCES:
            raw, scale = decode(raw, encoding, scale), None
            encoding = "f32" if raw.dtype == torch.float32 else encoding
        experts = range(piece.where[0].start, piece.where[0].stop)
        span = (piece.where[1].start - first, piece.where[1].stop - first)
        raw = raw.reshape(len(experts), -1, raw.shape[-1])
        scale = None if scale is None else scale.reshape(len(experts), -1, scale.shape[-1])
        for i, expert in enumerate(experts):
            put(raw[i], encoding, None if scale is None else scale[i].float().contiguous(), expert, span)

    def decoded(where: tuple[slice, ...]) -> None:
        found = values(parts.source, key, where=where)[0]
        put(found, "f32", None, where[0].start, (0, rows))

    whole, apart = _split(parts.source.parts(key), first, rows)
    align = 128 if dst == "fp8_block128" else native.GROUP_ROWS
    each(convert, (piece for part in whole for piece in pieces(part, rows=align)), threads)
    lines, across = slice(first, first + rows), slice(0, cols)
    each(decoded, ((slice(e, e + 1), lines, across) for e in apart), threads)
    return out


def _split(parts: Sequence[Part], first: int, rows: int) -> tuple[list[Part], list[int]]:
    """The parts of `rows` rows from `first` that can be packed as stored; and the experts that cannot.

    Those are stored transposed, have rows that alternate with others, or scale blocks that reach over the first row, or
    are cut within a group of packed rows.
    """
    whole: list[Part] = []
    apart: set[int] = set()
    for part in parts:
        span = part.where[1]
        begin, end = max(span.start, first), min(span.stop, first + rows)
        if begin >= end:
            continue
        plain = not part.transpose and all((w.step or 1) == 1 for w in part.where)
        known = part.scale is None or (part.spec.encoding == "fp8_block128" and (begin - span.start) % 128 == 0)
        unit = 128 if part.spec.encoding == "fp8_block128" else native.GROUP_ROWS
        fits = (begin - first) % unit == 0 and ((end - first) % unit == 0 or end == first + rows)
        if not plain or not known or not fits:
            apart.update(range(part.where[0].start, part.where[0].stop))
        elif (begin, end) == (span.start, span.stop):
            whole.append(part)
        else:
            whole.append(part.cut(len(part.spec.shape) - 2, begin - span.start, end - span.start))
    return [p for p in whole if p.where[0].start not in apart], sorted(apart)


class Scalar(CpuMoe):
    """Plain C: the definition of the others. Any CPU, fp32."""

    name = isa = "scalar"


class Avx2(CpuMoe):
    """AVX2 and FMA, fp32 activations."""

    name = isa = "avx2"


class Avx512(CpuMoe):
    """AVX-512, fp32 activations."""

    name = isa = "avx512"


class Avx512Vnni(CpuMoe):
    """AVX-512 with integer products: activations in 16 bits, a scale every 32; only for weights that are integers."""

    name = isa = "avx512_vnni"


class Avx512Bf16(CpuMoe):
    """AVX-512 with bf16 products: activations rounded to bf16, or to 16-bit integers where weights are integers."""

    name = isa = "avx512_bf16"


class Amx(CpuMoe):
    """AMX tiles in bf16, weights rounded to it; experts with few tokens as `avx512_bf16`."""

    name = isa = "amx"


class AmxInt8(CpuMoe):
    """AMX tiles in int8, for int8 weights; activations in 8 bits, a scale for 256. Lossy: only if a rules file asks."""

    name = isa = "amx_int8"
    lossy = "experts' activations in 8 bits (amx_int8)"
