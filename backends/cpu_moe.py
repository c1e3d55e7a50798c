"""Routed experts on the CPU through csrc/: one kernel an instruction set, all of them over one packed layout."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ktcompile import Call, Cost, Kernel, Packed, Parts, Region, Target, value_of
from ktcompile.backends import native
from ktcompile.backends.reference import plain_cost
from ktcompile.backends.tile_tokens import tile_tokens
from ktcompile.kernel import TOKENS, Prepared
from ktcompile.ops.moe import PARAMETERS, MoeShape
from ktcompile.symbols import Sizes, nbytes
from ktcompile.target import cpu_features, default_threads
from ktcompile.weights import Part, WeightSource, decode, each, pieces, values
from ktcompile.weights.source import NATURAL_DTYPES

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


def _size(shape: MoeShape, matrix: str) -> tuple[int, int]:
    """Rows and columns of an expert's gate, up or down."""
    return (shape.hidden, shape.width) if matrix == "down" else (shape.width, shape.hidden)


def matrices(region: Region) -> dict[str, str]:
    """The packed type of gate, up and down; remembered on the region, since every kernel asks."""
    known: dict[str, str] | None = region.node.meta.get("moe_types")
    if known is not None:
        return known
    weights, compute, known = region.weights, _compute(region), {}
    for matrix, leaf in PARAMETERS.items():
        node = weights[leaf]
        source: WeightSource | None = node.meta.get("source")
        if leaf in region.quantized:
            types = {region.quantized[leaf]}
        elif source is None:
            types = {stored_as(str(node.meta["encoding"]), compute)}
        else:
            parts = _upright(source.parts(node.meta["weight"]), leaf in region.binding.turned)
            rows = _range(region.binding.shape.rows(matrix))
            found = {(p.spec.encoding, p.transpose) for p in parts if _common(_range(p.where[1]), rows)}
            # Blocks along the other axis are decoded to be transposed.
            types = {stored_as("" if t and e not in NATURAL_DTYPES else e, compute) for e, t in found}
        known[matrix] = types.pop() if len(types) == 1 else "f32"
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
        return native.refuses(self.isa, matrices(region).values())

    def packed_bytes(self, region: Region) -> int:
        shape, types = region.binding.shape, matrices(region)
        expert = sum(native.packed_bytes(types[m], *_size(shape, m)) for m in PARAMETERS)
        biases = 4 * sum(_size(shape, m)[0] for m in PARAMETERS) if shape.clamp else 0
        return int(shape.experts) * (expert + biases)

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        shape, result = region.binding.shape, value_of(region.node)
        made = nbytes(result, sizes)
        tokens = made // (int(result.element_size()) * int(shape.hidden))
        # x and y in fp32, x as the kernel reads it, and what every chosen expert has between its two products.
        return made + 4 * tokens * int(3 * shape.hidden + shape.top_k * shape.width)

    def cost(self, region: Region, target: Target) -> Cost:
        whole, shape = plain_cost(region, self.packed_bytes(region)), region.binding.shape
        if shape.share is None:
            return whole
        part = 1 - shape.share.fraction(TOKENS, shape)
        return Cost(part * whole.nbytes, part * whole.flops)

    def cache_key(self, region: Region) -> str | None:
        shape = region.binding.shape  # what else it says decides no byte: top_k, and rates that each start measures
        return f"{shape.experts} of {shape.hidden} x {shape.width}, clamp {shape.clamp is not None}, {matrices(region)}"

    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        types, threads = matrices(region), target[region.home or ""].threads
        packed = {m: _pack(parts, m, region, types[m], threads) for m in PARAMETERS}
        if region.binding.shape.clamp:
            packed |= {f"{m}_bias": _bias(parts, m, region.binding.shape) for m in PARAMETERS}
        return self.restore(packed, region, target)

    def restore(self, tensors: Mapping[str, Tensor], region: Region, target: Target) -> Packed:
        shape, types = region.binding.shape, matrices(region)
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
        if shape.clamp:
            weights = replace(
                weights,
                alpha=shape.clamp.alpha,
                limit=shape.clamp.limit,
                gate_bias=tensors["gate_bias"].view(torch.float32),
                up_bias=tensors["up_bias"].view(torch.float32),
                down_bias=tensors["down_bias"].view(torch.float32),
            )
        # The packed bytes are those of every phase, whose kernels may differ: each has its own count.
        taking = [isa for isa in native.FAMILY if native.refuses(isa, weights.types) is None]
        by_isa = {isa: replace(weights, tile_tokens=tile_tokens(isa, weights.types)) for isa in taking}
        return Packed(
            self.layout,
            tensors,
            (by_isa, shared_pool(target[region.home or ""].threads or default_threads())),
        )

    def prepare(
        self, packed: Packed, region: Call, tokens: int, pinned: bool, after: Prepared | None = None
    ) -> Prepared | None:
        by_isa, pool = packed.shape
        weights, top_k = by_isa[self.isa], region.shape.top_k
        elsewhere = partial(_elsewhere, region.shape)
        sizes = ((tokens, weights.hidden), (tokens, top_k), (tokens, top_k))
        if isinstance(after, native.Submission) and tuple(tuple(i.shape) for i in after.inputs) == sizes:
            return native.Submission(pool, self.isa, weights, *after.inputs, after.out, elsewhere=elsewhere)
        x, y = (torch.zeros(tokens, weights.hidden, pin_memory=pinned) for _ in range(2))
        ids = torch.zeros(tokens, top_k, dtype=torch.int64, pin_memory=pinned)
        ids += torch.arange(top_k)
        scores = torch.zeros(tokens, top_k, pin_memory=pinned)
        return native.Submission(pool, self.isa, weights, x, ids, scores, y, elsewhere=elsewhere)

    def counting(self, packed: Packed) -> native.Pool:
        pool: native.Pool = packed.shape[1]
        return pool

    def __call__(self, packed: Packed, region: Call, *inputs: Any) -> Tensor:
        x, ids, scores = inputs
        by_isa, pool = packed.shape
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
        if count := _elsewhere(region.shape, len(ids)):
            ids = torch.where(ids < count, -1, ids)
        y = native.moe(pool, self.isa, by_isa[self.isa], rows, ids.contiguous(), scores.to(torch.float32).contiguous())
        return y.to(x.dtype).view(x.shape)


def _elsewhere(shape: MoeShape, tokens: int) -> int:
    """Experts below this are not this region's in a step of so many tokens."""
    return shape.share.streamed(tokens, shape) if shape.share else 0


def _bias(parts: Parts, matrix: str, shape: MoeShape) -> Tensor:
    """The bytes of float32 `[E, rows]`, as a cache keeps them."""
    found = values(parts.source, parts[f"{PARAMETERS[matrix]}_bias"])
    return found[:, shape.rows(matrix)].contiguous().view(torch.uint8)


def _pack(parts: Parts, matrix: str, region: Region, dst: str, threads: int) -> Tensor:
    """One of gate, up, down of all experts, `[E, bytes]`: pieces are read and packed into place in parallel."""
    leaf, shape = PARAMETERS[matrix], region.binding.shape
    key, turned, quantized = parts[leaf], leaf in region.binding.turned, leaf in region.quantized
    rows, cols = _size(shape, matrix)
    lines = shape.rows(matrix)
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
        span = piece.where[1].start, piece.where[1].stop
        raw = raw.reshape(len(experts), -1, raw.shape[-1])
        scale = None if scale is None else scale.reshape(len(experts), -1, scale.shape[-1])
        for i, expert in enumerate(experts):
            put(raw[i], encoding, None if scale is None else scale[i].float().contiguous(), expert, span)

    def decoded(expert: int) -> None:
        across = slice(lines.start, lines.stop), slice(0, cols)
        where = slice(expert, expert + 1), *(reversed(across) if turned else across)
        # bf16 where that is what it becomes: half the memory for a whole expert.
        dtype, encoding = (torch.bfloat16, "bf16") if dst == "bf16" else (torch.float32, "f32")
        found = values(parts.source, key, dtype, where=where)[0]
        put((found.mT if turned else found)[:: lines.step].contiguous(), encoding, None, expert, (0, rows))

    whole, apart = _split(_upright(parts.source.parts(key), turned), lines)
    align = 128 if dst == "fp8_block128" else native.GROUP_ROWS
    each(convert, (piece for part in whole for piece in pieces(part, rows=align)), threads)
    each(decoded, apart, threads)
    return out


def _upright(parts: Sequence[Part], turned: bool) -> Sequence[Part]:
    """The parts of a parameter [E, in, out] as those of one that is [E, out, in]."""
    if not turned:
        return parts
    return [replace(p, where=(p.where[0], p.where[2], p.where[1]), transpose=not p.transpose) for p in parts]


def _range(span: slice) -> range:
    return range(span.start, span.stop, span.step or 1)


def _common(a: range, b: range) -> range:
    """The numbers in both, of which one step divides the other."""
    fine, coarse = (a, b) if a.step < b.step else (b, a)
    if (coarse.start - fine.start) % fine.step:
        return range(0)
    first = max(a.start, b.start)
    return range(first + (coarse.start - first) % coarse.step, min(a.stop, b.stop), coarse.step)


def _split(parts: Sequence[Part], lines: slice) -> tuple[list[Part], list[int]]:
    """The parts of a matrix (these rows of a parameter) that can be packed as stored; and the experts that cannot.

    Those are stored transposed, lack rows between others, have scale blocks that reach over the first row, or are cut
    within a group of packed rows. The parts' `where` is of the matrix.
    """
    whole: list[Part] = []
    apart: set[int] = set()
    rows = _range(lines)
    for part in parts:
        stored = _range(part.where[1])
        common = _common(stored, rows)
        if not common:
            continue
        begin, end = rows.index(common[0]), rows.index(common[-1]) + 1
        first, last, every = stored.index(common[0]), stored.index(common[-1]) + 1, common.step // stored.step
        plain = not part.transpose and all(part.where[axis].step in (None, 1) for axis in (0, 2))
        is_fp8 = part.spec.encoding == "fp8_block128"
        known = part.scale is None or (is_fp8 and first % 128 == 0 and every == 1)
        unit = 128 if is_fp8 else native.GROUP_ROWS
        fits = common.step == rows.step and begin % unit == 0 and (end % unit == 0 or end == len(rows))
        if not plain or not known or not fits:
            apart.update(range(part.where[0].start, part.where[0].stop))
            continue
        piece = part if len(common) == len(stored) else part.cut(len(part.spec.shape) - 2, first, last, every)
        whole.append(replace(piece, where=(part.where[0], slice(begin, end), part.where[2])))
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
    """AMX tiles in int8, for int8 weights; activations in 8 bits, in groups of up to 1024. Only if asked."""

    name = isa = "amx_int8"
    lossy = "experts' activations in 8 bits (amx_int8)"
