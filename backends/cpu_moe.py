"""Routed experts on the CPU through csrc/: one kernel an instruction set, all of them over one packed layout."""

import os
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import native
from ktcompile.backends.reference import plain_cost
from ktcompile.target import cpu_features
from ktcompile.weights import WeightSource, decode

_NEEDS = {
    "scalar": frozenset[str](),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "avx512_bf16": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    "avx512_vnni": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
    "amx": frozenset({"avx512f", "avx512bw", "amx_tile", "amx_bf16"}),
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


def _matrices(region: Region) -> dict[str, str]:
    """The packed type of gate, up and down; remembered on the region, since every kernel asks."""
    known: dict[str, str] | None = region.node.meta.get("moe_types")
    if known is None:
        weights = region.weights
        compute = _compute(region)
        width = region.binding.shape.width
        known = {}
        for name in _MATRICES:
            node = weights["down_proj" if name == "down" else "gate_up_proj"]
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
            types = {stored_as(e, compute) for e in found}
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
    layout = "rows"
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
        if family == "bf16" and compute == torch.float32:
            return "it computes in bf16, this model in fp32; --dtype bf16 allows it"
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

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        shape, types = region.binding.shape, _matrices(region)
        packed = {m: _pack(parts, m, shape, types[m]) for m in _MATRICES}
        weights = native.MoeWeights(
            shape.experts,
            shape.hidden,
            shape.width,
            shape.activation,
            packed["gate"],
            packed["up"],
            packed["down"],
            types["gate"],
            types["up"],
            types["down"],
        )
        return Packed(
            self.layout,
            packed,
            (weights, shared_pool(target[region.home or ""].threads or len(os.sched_getaffinity(0)))),
        )

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        x, ids, scores = inputs
        weights, pool = packed.shape
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
        y = native.moe(pool, self.isa, weights, rows, ids.contiguous(), scores.to(torch.float32).contiguous())
        return y.to(x.dtype).view(x.shape)


def _pack(parts: Parts, matrix: str, shape: Any, dst: str) -> Tensor:
    """One of gate, up, down of all experts, `[E, bytes]`, each stored part read once and converted into its place."""
    key = parts["down_proj" if matrix == "down" else "gate_up_proj"]
    rows, cols = (shape.hidden, shape.width) if matrix == "down" else (shape.width, shape.hidden)
    first = shape.width if matrix == "up" else 0
    out = torch.empty(shape.experts, native.packed_bytes(dst, rows, cols), dtype=torch.uint8)
    row_bytes = out.shape[1] // rows
    for part in parts.source.parts(key):
        experts, span = part.where[0], part.where[1]
        begin, end = max(span.start, first), min(span.stop, first + rows)
        if begin >= end:
            continue
        raw, scale = parts.source.read(part), parts.source.read_scale(part)
        if part.transpose:
            raw = raw.transpose(-2, -1)
        raw = raw.reshape(-1, *raw.shape[-2:])  # [experts of the part, rows, ...]
        scale = None if scale is None else scale.reshape(-1, *scale.shape[-2:])
        for i, expert in enumerate(range(experts.start, experts.stop)):
            lines = slice(begin - span.start, end - span.start)
            place = out[expert, (begin - first) * row_bytes : (end - first) * row_bytes]
            _convert(raw[i, lines], part.spec.encoding, dst, None if scale is None else scale[i], lines, cols, place)
    return out


def _convert(raw: Tensor, encoding: str, dst: str, scale: Tensor | None, lines: slice, cols: int, out: Tensor) -> None:
    rows = raw.shape[0]
    if scale is not None and (encoding != "fp8_block128" or lines.start % 128):
        raise ValueError(f"cannot pack {encoding} from row {lines.start}: scale blocks of 128 rows must stay whole")
    if encoding in native.SOURCES:
        at = None if scale is None else scale[lines.start // 128 : -(-lines.stop // 128)].float().contiguous()
        native.pack(raw.contiguous(), encoding, dst, rows, cols, at, out)
        return
    native.pack(decode(raw, encoding, scale).contiguous(), "f32", dst, rows, cols, None, out)


class Scalar(CpuMoe):
    """Plain C: the definition of the others. Any CPU, fp32."""

    name = isa = "scalar"


class Avx2(CpuMoe):
    """AVX2 and FMA, fp32 activations."""

    name = isa = "avx2"


class Avx512(CpuMoe):
    """AVX-512, fp32 activations."""

    name = isa = "avx512"


class Avx512Bf16(CpuMoe):
    """AVX-512 with bf16 products: activations and weights rounded to bf16."""

    name = isa = "avx512_bf16"


class Avx512Vnni(CpuMoe):
    """AVX-512 with int8 products: activations in 8 bits, a scale every 32. Lossy: only if a rules file lists it."""

    name = isa = "avx512_vnni"
    lossy = "experts' activations in 8 bits (avx512_vnni)"


class Amx(CpuMoe):
    """AMX tiles: activations and weights rounded to bf16."""

    name = isa = "amx"
