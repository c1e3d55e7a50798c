"""A parameter as stored: its parts, their encodings, and the one decoder that every kernel is compared with."""

import bisect
import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights import ggml
from ktcompile.weights.file import Index
from ktcompile.weights.quoted import plain, quoted

NATURAL = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # dtypes that are their own encoding
NATURAL_DTYPES = {name: dtype for dtype, name in NATURAL.items()}

CHUNK_VALUES = 1 << 20  # decoded at a time: 4 MiB of fp32, a few times that in temporaries


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and encoding of a tensor whose bytes need not be in memory.

    `dtype` is that of the decoded values; `nbytes` counts what is stored, scales included.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: str  # "f32", "bf16", "fp8_block128", "fp8_row", "int4_group32", "q4_k", …; several joined by "+"
    nbytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor, or an indexed piece of one, and where in a parameter it goes.

    `spec.shape` is the shape as stored: after `index`, before `transpose`. `where` has a slice with explicit
    start and stop for every dimension of the parameter; leading dimensions of size one may be missing in the part.
    Slices of both may have a step: rows of two stored tensors then alternate in the parameter.
    """

    name: str
    spec: TensorSpec
    where: tuple[slice, ...]
    index: Index = ()  # of the stored tensor; () = all of it
    transpose: bool = False  # swap the last two axes after reading
    scale: str | None = None  # name of the stored scales

    def cut(self, axis: int, start: int, stop: int, every: int = 1) -> "Part":
        """The piece `start:stop:every` along an axis of `spec.shape`.

        Columns (the last axis) can be cut only in encodings of single values; rows, and columns of FP8 blocks, begin at
        a scale block.
        """
        shape = self.spec.shape
        size = shape[axis]
        index = list(self.index)
        at = _position(index, axis)
        taken = index[at]
        begin, step = (taken.start or 0, taken.step or 1) if isinstance(taken, slice) else (0, 1)
        count = len(range(start, stop, every))
        last = start + (count - 1) * every
        index[at] = slice(begin + start * step, begin + last * step + 1, step * every)
        rank = len(shape)
        swapped = {rank - 1: rank - 2, rank - 2: rank - 1} if self.transpose else {}
        target = len(self.where) - rank + swapped.get(axis, axis)
        where = list(self.where)
        first, pace = where[target].start, where[target].step or 1
        where[target] = slice(first + start * pace, first + last * pace + 1, pace * every)
        nbytes = (self.spec.nbytes * stop // size - self.spec.nbytes * start // size) // every
        spec = replace(self.spec, shape=(*shape[:axis], count, *shape[axis + 1 :]), nbytes=nbytes)
        return replace(self, spec=spec, where=tuple(where), index=tuple(index))


class WeightSource(Protocol):
    """Weights by Hugging Face parameter name; only `read` and `read_scale` touch tensor bytes."""

    def keys(self) -> Iterable[str]:
        """Names of the parameters that the model has here."""
        ...

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype, encoding and stored bytes of a whole parameter; ModelFileError if there is none."""
        ...

    def parts(self, key: str) -> tuple[Part, ...]:
        """The stored pieces that make up a parameter; ModelFileError with near matches if there is none.

        They are in order along the first axis: neither start nor stop of `where[0]` falls from one to the next.
        """
        ...

    def read(self, part: Part) -> Tensor:
        """The raw encoding, read now: uint8 [..., rows, row_bytes] for block types, else what `decode` says."""
        ...

    def read_scale(self, part: Part) -> Tensor | None:
        """The scales of a part as `decode` says, or None if its encoding has none beside it."""
        ...


def values(
    source: WeightSource,
    key: str,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    where: tuple[slice, ...] | None = None,
) -> Tensor:
    """Decode a parameter: fp32 arithmetic, then a cast to `dtype`, or into `out` in its own dtype.

    `where`: only this block of it, a slice with start and stop for every dimension. Working memory beside the result is
    a few MiB whatever the size of the parameter.
    Raises ModelFileError for an unknown key and for parts that leave a hole, ValueError if `out` has another shape.
    """
    where = where or everywhere(source.spec(key).shape)
    shape = tuple(w.stop - w.start for w in where)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    if tuple(out.shape) != shape:
        raise ValueError(f"{plain(key)}: out has shape {tuple(out.shape)}, the parameter {shape}")
    found_values = 0
    with torch.no_grad():
        for part in _near(source.parts(key), where):
            near = restricted(part, where)
            for piece in () if near is None else pieces(near):
                place = _overlap(piece.where, where)
                if place is None:
                    continue
                inside, outside = place
                found = decode(source.read(piece), piece.spec.encoding, source.read_scale(piece))
                found = found.transpose(-2, -1) if piece.transpose else found
                block = out[outside]
                block.copy_(found[inside[len(inside) - found.dim() :]])
                found_values += block.numel()
    if found_values != out.numel():
        raise ModelFileError(f"{plain(key)}: the stored tensors hold {found_values} of {out.numel()} values asked for")
    return out


def _near(parts: Sequence[Part], where: tuple[slice, ...]) -> Sequence[Part]:
    """The parts that the block `where` may need, found without a look at each: of 512 for experts it needs two."""
    if not where:
        return parts
    first = bisect.bisect_right(parts, where[0].start, key=lambda part: part.where[0].stop)
    last = bisect.bisect_left(parts, where[0].stop, key=lambda part: part.where[0].start)
    return parts[first:last]


def pieces(part: Part, most: int = CHUNK_VALUES, rows: int = 1) -> Iterator[Part]:
    """The part cut along its leading axes into pieces of at most `most` values, or one row (of scale blocks) each.

    Cuts between rows are at multiples of `rows`, a power of two.
    """
    shape = part.spec.shape
    if math.prod(shape) <= most or len(shape) < 2:
        yield part
        return
    if len(shape) > 2:
        inner = math.prod(shape[1:])
        step = max(1, most // inner)
    else:
        align = max(rows, row_align(part.spec.encoding))
        step = max(1, most // shape[1] // align) * align
    for start in range(0, shape[0], step):
        piece = part.cut(0, start, min(start + step, shape[0]))
        yield from pieces(_without_first(piece), most, rows) if len(shape) > 2 and inner > most else (piece,)


def _without_first(part: Part) -> Part:
    """The same part with its leading axis of size one taken away."""
    at = _position(index := list(part.index), 0)
    taken = index[at]
    assert isinstance(taken, slice)
    index[at] = taken.start
    return replace(part, spec=replace(part.spec, shape=part.spec.shape[1:]), index=tuple(index))


def _position(index: list[int | slice], axis: int) -> int:
    """Which entry of `index` (extended if it is too short) selects along `axis` of what it selects."""
    kept = -1
    for at, entry in enumerate(index):
        kept += isinstance(entry, slice)
        if kept == axis:
            return at
    index += [slice(0, None)] * (axis - kept)
    return len(index) - 1


def restricted(part: Part, where: tuple[slice, ...]) -> Part | None:
    """The part without what the block `where` does not need of all axes but the last (of rows, whole scale blocks)."""
    place = _overlap(part.where, where)
    if place is None:
        return None
    rank = len(part.spec.shape)
    for axis in range(rank - 1):
        is_rows = axis == rank - 2
        span = place[0][len(part.where) - rank + axis + (is_rows and part.transpose)]
        align = row_align(part.spec.encoding) if is_rows else 1
        start, stop = span.start // align * align, min(-(-span.stop // align) * align, part.spec.shape[axis])
        if stop - start < part.spec.shape[axis]:
            part = part.cut(axis, start, stop)
    return part


def _overlap(piece: tuple[slice, ...], where: tuple[slice, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What two blocks of a parameter share: as slices of the piece, and of `where`; None if nothing."""
    inside, outside = [], []
    for mine, wanted in zip(piece, where, strict=True):
        step = mine.step or 1
        first = max(0, -(-(wanted.start - mine.start) // step))
        last = min(len(range(mine.start, mine.stop, step)), -(-(wanted.stop - mine.start) // step))
        if first >= last:
            return None
        inside.append(slice(first, last))
        begin = mine.start + first * step - wanted.start
        outside.append(slice(begin, begin + (last - first - 1) * step + 1, step))
    return tuple(inside), tuple(outside)


def block_index(index: Index, rank: int, block: int) -> Index:
    """The index of the scales [..., row blocks, column blocks] that belongs to an index of a tensor of that rank."""
    out: list[int | slice] = []
    for axis, entry in enumerate(index):
        if axis < rank - 2:
            out.append(entry)
            continue
        if not isinstance(entry, slice) or (entry.start or 0) % block or (entry.step or 1) != 1:
            raise ValueError(f"index {index}: blocks of {block} with one scale cannot be cut there")
        out.append(slice((entry.start or 0) // block, None if entry.stop is None else -(-entry.stop // block)))
    return tuple(out)


def encoding(source: WeightSource, key: str) -> str:
    """How a parameter is stored: "q4_k", or "q4_k+q6_k" if its parts differ."""
    return source.spec(key).encoding


def stored_bytes(source: WeightSource, key: str) -> int:
    """Bytes that a parameter takes in the file, scales included."""
    return source.spec(key).nbytes


def decode(raw: Tensor, encoding: str, scale: Tensor | None = None) -> Tensor:
    """Decode raw rows to fp32: [..., rows, row_bytes] of a block type or [..., rows, cols] of any other.

    `scale` goes with these: value = stored * its scale, rounded once.
    - "fp8_block<b>": [..., ceil(rows / b), ceil(cols / b)], one for each square block of b x b.
    - "fp8_row": [..., rows, 1], one for each row.
    - "int4_group<g>": [..., rows, cols / g]; raw is int32 [..., rows, cols / 8] with eight values in each, the first in
      the lowest four bits, stored = those bits - 8 (compressed-tensors' "pack-quantized").
    """
    if scale is None:
        if encoding in ggml.BY_NAME and raw.dtype == torch.uint8:
            return torch.from_numpy(ggml.BY_NAME[encoding].decode(raw.numpy()))
        return raw.to(torch.float32)
    scale = scale.float()
    if encoding == "fp8_row":
        return raw.float() * scale
    if encoding.startswith("int4_group"):
        pairs = raw.contiguous().view(torch.uint8)
        stored = torch.stack((pairs & 15, pairs >> 4), -1).view(torch.int8).flatten(-2) - 8  # [..., rows, cols]
        return (stored.float().view(*scale.shape, int4_group(encoding)) * scale[..., None]).flatten(-2)
    block = fp8_block(encoding)
    rows, cols = raw.shape[-2:]
    wide = scale.repeat_interleave(block, -2)[..., :rows, :]
    return raw.float() * wide.repeat_interleave(block, -1)[..., :cols]


def fp8_block(encoding: str) -> int:
    """Side of the square scale blocks of "fp8_block<b>"."""
    return int(encoding.removeprefix("fp8_block"))


def row_align(encoding: str) -> int:
    """Rows can be cut at multiples of this."""
    return fp8_block(encoding) if encoding.startswith("fp8_block") else 1


def int4_group(encoding: str) -> int:
    """Values of a row that share a scale in "int4_group<g>"."""
    return int(encoding.removeprefix("int4_group"))


def combine(key: str, parts: Sequence[Part]) -> TensorSpec:
    """Spec of the parameter that the parts make up; ModelFileError if they leave a hole or lie over each other."""
    shape = tuple(max(w.stop for w in axis) for axis in zip(*(p.where for p in parts), strict=True))
    covered = sum(math.prod(p.spec.shape) for p in parts)
    if covered != math.prod(shape):
        raise ModelFileError(
            f"{plain(key)}: its {len(parts)} stored tensors hold {covered} values, "
            f"shape {list(shape)} needs {math.prod(shape)}"
        )
    dtype = parts[0].spec.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.spec.dtype)
    names = dict.fromkeys(p.spec.encoding for p in parts)
    return TensorSpec(shape, dtype, "+".join(names), sum(p.spec.nbytes for p in parts))


ROUNDED = {"int8_row": 1, "int4_64": 64, "int4_128": 128}
"""Encodings of no file, made while weights are packed: a float32 scale a row, a float16 scale for so many weights."""


def block_values(encoding: str) -> int:
    """The rows of a block encoding, or one of `ROUNDED`, are a multiple of this."""
    return ROUNDED[encoding] if encoding in ROUNDED else ggml.BY_NAME[encoding].block_values


def size_of(shape: Sequence[int], encoding: str) -> int:
    """Bytes of a tensor of that shape in a natural, block, FP8 or rounded encoding, scales included."""
    count = math.prod(shape)
    if encoding in ROUNDED:
        return count + 4 * count // shape[-1] if encoding == "int8_row" else count // 2 + 2 * count // ROUNDED[encoding]
    if encoding.startswith("fp8_block"):
        block = fp8_block(encoding)
        return count + 4 * math.prod(shape[:-2]) * -(-shape[-2] // block) * -(-shape[-1] // block)
    return count // shape[-1] * ggml.BY_NAME[encoding].row_bytes(shape[-1])


def everywhere(shape: Iterable[int]) -> tuple[slice, ...]:
    """Slices with explicit bounds that select all of `shape`."""
    return tuple(slice(0, n) for n in shape)


def missing(key: str, where: str, known: Iterable[str]) -> ModelFileError:
    """The error for a parameter that a source does not have, with the closest names that it has."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    hint = f"; near matches: {', '.join(map(plain, near))}" if near else ""
    return ModelFileError(f"{where}: no parameter {quoted(key)}{hint}")
