"""A parameter as stored: its parts, their encodings, and the one decoder that every kernel is compared with."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights import ggml

NATURAL = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}  # dtypes that are their own encoding

_CHUNK_VALUES = 1 << 20  # decoded at a time: 4 MiB of fp32, a few times that in temporaries


@dataclass(frozen=True)
class TensorSpec:
    """Shape and encoding of a tensor whose bytes need not be in memory.

    `dtype` is that of the decoded values; `nbytes` counts what is stored, scales included.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: str  # "f32", "f16", "bf16", "fp8_block128", "q4_k", …; several joined by "+"
    nbytes: int


@dataclass(frozen=True)
class Part:
    """One stored tensor, or an indexed piece of one, and where in a parameter it goes.

    `spec.shape` is the shape as stored: after `index`, before `transpose`. `where` has a slice with explicit
    start and stop for every dimension of the parameter; leading dimensions of size one may be missing in the part.
    """

    name: str
    spec: TensorSpec
    where: tuple[slice, ...]
    index: tuple[int | slice, ...] = ()  # of the stored tensor; () = all of it
    transpose: bool = False  # swap the last two axes after reading
    scale: str | None = None  # name of the stored scales


class WeightSource(Protocol):
    """Weights by Hugging Face parameter name; only `read` and `read_scale` touch tensor bytes."""

    def keys(self) -> Iterable[str]:
        """Names of the parameters that the model has here."""
        ...

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype, encoding and stored bytes of a whole parameter; ModelFileError if there is none."""
        ...

    def parts(self, key: str) -> tuple[Part, ...]:
        """The stored pieces that make up a parameter; ModelFileError with near matches if there is none."""
        ...

    def read(self, part: Part) -> Tensor:
        """A memory-mapped view of the raw encoding: uint8 [..., rows, row_bytes] for block types, else `natural`."""
        ...

    def read_scale(self, part: Part) -> Tensor | None:
        """The scales of a part, [..., row_blocks, col_blocks], or None if its encoding has none beside it."""
        ...


def values(source: WeightSource, key: str, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """Decode a whole parameter: fp32 arithmetic, then a cast to `dtype`, or into `out` in its own dtype.

    Working memory beside the result is a few MiB whatever the size of the parameter.
    Raises ModelFileError for an unknown key, ValueError if `out` has another shape.
    """
    shape = source.spec(key).shape
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    if tuple(out.shape) != shape:
        raise ValueError(f"{key}: out has shape {tuple(out.shape)}, the parameter {shape}")
    with torch.no_grad():
        for part in source.parts(key):
            target = out[part.where]
            if part.transpose:
                target = target.transpose(-2, -1)
            while target.dim() > len(part.spec.shape):
                target = target.squeeze(0)
            _decode_into(target, source.read(part), part.spec.encoding, source.read_scale(part))
    return out


def encoding(source: WeightSource, key: str) -> str:
    """How a parameter is stored: "q4_k", or "q4_k+q6_k" if its parts differ."""
    return source.spec(key).encoding


def stored_bytes(source: WeightSource, key: str) -> int:
    """Bytes that a parameter takes in the file, scales included."""
    return source.spec(key).nbytes


def decode(raw: Tensor, encoding: str, scale: Tensor | None = None) -> Tensor:
    """Decode raw rows to fp32: [..., rows, row_bytes] of a block type or [..., rows, cols] of any other.

    `scale` is [..., ceil(rows / b), ceil(cols / b)] for "fp8_block<b>": value = fp8 * scale of its block.
    """
    if scale is not None:
        block = fp8_block(encoding)
        rows, cols = raw.shape[-2:]
        wide = scale.float().repeat_interleave(block, -2)[..., :rows, :]
        return raw.float() * wide.repeat_interleave(block, -1)[..., :cols]
    if encoding in ggml.BY_NAME and raw.dtype == torch.uint8:
        return torch.from_numpy(ggml.BY_NAME[encoding].decode(raw.numpy()))
    return raw.to(torch.float32)


def fp8_block(encoding: str) -> int:
    """Side of the square scale blocks of "fp8_block<b>"."""
    return int(encoding.removeprefix("fp8_block"))


def combine(key: str, parts: Sequence[Part]) -> TensorSpec:
    """Spec of the parameter that the parts make up; ModelFileError if they leave a hole or lie over each other."""
    shape = tuple(max(w.stop for w in axis) for axis in zip(*(p.where for p in parts), strict=True))
    covered = sum(math.prod(p.spec.shape) for p in parts)
    if covered != math.prod(shape):
        raise ModelFileError(
            f"{key}: its {len(parts)} stored tensors hold {covered} values, "
            f"shape {list(shape)} needs {math.prod(shape)}"
        )
    dtype = parts[0].spec.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.spec.dtype)
    names = dict.fromkeys(p.spec.encoding for p in parts)
    return TensorSpec(shape, dtype, "+".join(names), sum(p.spec.nbytes for p in parts))


def everywhere(shape: Iterable[int]) -> tuple[slice, ...]:
    """Slices with explicit bounds that select all of `shape`."""
    return tuple(slice(0, n) for n in shape)


def missing(key: str, where: str, known: Iterable[str]) -> ModelFileError:
    """The error for a parameter that a source does not have, with the closest names that it has."""
    near = difflib.get_close_matches(key, list(known), n=3, cutoff=0.6)
    hint = f"; near matches: {', '.join(near)}" if near else ""
    return ModelFileError(f"{where}: no parameter {key!r}{hint}")


def _decode_into(target: Tensor, raw: Tensor, encoding: str, scale: Tensor | None) -> None:
    """Decode `raw` into `target` of the same leading shape, a bounded number of values at a time."""
    if raw.dim() > 2:
        for i in range(raw.shape[0]):
            _decode_into(target[i], raw[i], encoding, None if scale is None else scale[i])
        return
    if raw.dim() < 2:
        target.copy_(decode(raw, encoding))
        return
    step = max(1, _CHUNK_VALUES // max(1, target.shape[-1]))
    if scale is not None:  # chunks begin where scale blocks do
        block = fp8_block(encoding)
        step = max(1, step // block) * block
    for start in range(0, raw.shape[0], step):
        rows = slice(start, start + step)
        part = None if scale is None else scale[start // block : -(-(start + step) // block)]
        target[rows].copy_(decode(raw[rows], encoding, part))
