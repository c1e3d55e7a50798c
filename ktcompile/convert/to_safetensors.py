"""Write a folder of safetensors files: names as Hugging Face repositories have them, sharded, with an index.

A file is 8 bytes of length, a JSON header, and the data without gaps (github.com/huggingface/safetensors, Format).
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from ktcompile.convert.chunks import Block, Bounds, Chunk, Quantize, bounds, encode, spans
from ktcompile.weights import Part, WeightSource, values
from ktcompile.weights.mixture import is_exact
from ktcompile.weights.safetensors_header import INDEX

TARGETS = ("fp8", "bf16-safetensors")
"""What a folder of safetensors may be converted to."""

SHARD_BYTES = 5_000_000_000

FP8 = "fp8_block128"
FP8_BLOCK = 128

_DTYPES = {"f32": ("F32", 4), "f16": ("F16", 2), "bf16": ("BF16", 2), FP8: ("F8_E4M3", 1)}
_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Entry:
    """A tensor in a header; `size` is the bytes of one of its values."""

    name: str
    dtype: str
    size: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.size * math.prod(self.shape)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: a block of a parameter, with scales beside it if it is FP8."""

    key: str
    where: tuple[slice, ...]  # of the parameter; leading axes of size one may be missing in `entry`
    encoding: str
    entry: Entry
    scale: Entry | None
    copied: Part | None  # the part of the source with the same bytes
    fallback: None = None

    @property
    def name(self) -> str:
        """In the file."""
        return self.entry.name

    @property
    def values(self) -> int:
        """How many weights."""
        return math.prod(self.entry.shape)

    @property
    def nbytes(self) -> int:
        """With its scales."""
        return self.entry.nbytes + (self.scale.nbytes if self.scale else 0)


def plan(source: WeightSource, to: str, model_type: str) -> tuple[Planned, ...]:
    """Every tensor of the folder, from the shapes in `source`.

    Fused experts become `experts.N.gate_proj.weight` and so on, as all models but gpt-oss ship them; Mixtral has names
    of its own.
    """
    out = []
    for key in list(source.keys()):
        encoding = _encoding(source, key, to)
        stored = _stored_as(source, key, encoding)
        for name, where, shape in _tensors(key, source.spec(key).shape, model_type):
            scale = None
            if encoding == FP8:
                blocks = (-(-n // FP8_BLOCK) for n in shape[-2:])
                scale = Entry(f"{name}_scale_inv", "F32", 4, (*shape[:-2], *blocks))
            entry = Entry(name, *_DTYPES[encoding], shape)
            out.append(Planned(key, where, encoding, entry, scale, stored.get(bounds(where))))
    return tuple(out)


def _encoding(source: WeightSource, key: str, to: str) -> str:
    spec = source.spec(key)
    if is_exact(key, spec.shape):
        return spec.encoding if spec.encoding in ("f32", "f16", "bf16") else "f32"
    if to == "fp8" and "embed" not in key and "lm_head" not in key:
        return FP8
    return "bf16"


def _tensors(
    key: str, shape: tuple[int, ...], model_type: str
) -> Iterator[tuple[str, tuple[slice, ...], tuple[int, ...]]]:
    """Names, blocks and shapes of the stored tensors that make up a parameter."""
    prefix, _, kind = key.rpartition(".")
    if model_type == "gpt_oss" or not prefix.endswith(".experts") or kind not in _EXPERTS or len(shape) != 3:
        yield _named(key, model_type), tuple(slice(0, n) for n in shape), shape
        return
    count, rows, cols = shape
    kinds = _EXPERTS[kind]
    rows //= len(kinds)
    for expert, (at, name) in itertools.product(range(count), enumerate(kinds)):
        where = (slice(expert, expert + 1), slice(at * rows, (at + 1) * rows), slice(0, cols))
        yield _named(f"{prefix}.{expert}.{name}.weight", model_type), where, (rows, cols)


def _named(name: str, model_type: str) -> str:
    if model_type != "mixtral":
        return name
    return ".".join(_MIXTRAL.get(word, word) for word in name.split("."))


def _stored_as(source: WeightSource, key: str, encoding: str) -> dict[Bounds, Part]:
    """Parts of the source in this encoding as they would be written, by their place in the parameter."""
    parts = (p for p in source.parts(key) if p.spec.encoding == encoding and not p.transpose and len(p.spec.shape) < 4)
    return {bounds(part.where): part for part in parts}


# ------------------------------------------------------------------------------------------------ the files


@dataclass(frozen=True)
class Shard:
    """A file: its header, and where in it the data of each tensor goes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def layout(tensors: Sequence[Planned], shard_bytes: int) -> tuple[Shard, ...]:
    """Files of at most `shard_bytes` of data each, or of one tensor; scales lie beside their tensor."""
    groups: list[list[Entry]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.nbytes > shard_bytes:
            groups.append([])
            used = 0
        groups[-1] += [tensor.entry] if tensor.scale is None else [tensor.entry, tensor.scale]
        used += tensor.nbytes
    count = len(groups)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return tuple(
        shard(n, group) for n, group in zip(names if count > 1 else ["model.safetensors"], groups, strict=True)
    )


def shard(name: str, entries: Iterable[Entry]) -> Shard:
    """The header of a file with these tensors, large values first, so that each lies at a multiple of its size."""
    ordered = sorted(entries, key=lambda entry: -entry.size)
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for entry in ordered:
        begins[entry.name] = end
        end += entry.nbytes
        offsets = [begins[entry.name], end]
        content[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(name, header, {n: len(header) + at for n, at in begins.items()}, len(header) + end)


def create(folder: Path, shards: Sequence[Shard]) -> None:
    """The files with their headers and sizes, and the index if there are several. Raises OSError."""
    for item in shards:
        with (folder / item.name).open("wb") as file:
            file.write(item.header)
            file.truncate(item.nbytes)
    if len(shards) == 1:
        return
    total = sum(item.nbytes - len(item.header) for item in shards)
    index = {"metadata": {"total_size": total}, "weight_map": {n: item.name for item in shards for n in item.offsets}}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def chunks(
    source: WeightSource, tensors: Sequence[Planned], shards: Sequence[Shard], quantize: Quantize
) -> Iterator[Chunk]:
    """The work of writing all tensors into these files."""
    places = {name: (i, at) for i, item in enumerate(shards) for name, at in item.offsets.items()}
    for tensor in tensors:
        file, offset = places[tensor.entry.name]
        scale_offset = places[tensor.scale.name][1] if tensor.scale else 0
        for piece in _pieces(tensor, offset, scale_offset):
            make = partial(_make, source, tensor, piece, quantize)
            yield Chunk(tensor.entry.name, file, math.prod(w.stop - w.start for w in piece.where), make)


@dataclass(frozen=True)
class _Piece:
    """Rows of one matrix of a tensor, or a vector, and where their bytes and scales go."""

    where: tuple[slice, ...]  # of the parameter
    number: int  # of the matrix
    start: int  # first row
    stop: int
    offset: int
    scale_offset: int


def _pieces(tensor: Planned, offset: int, scale_offset: int) -> Iterator[_Piece]:
    if len(tensor.where) < 2:
        yield _Piece(tensor.where, 0, 0, 1, offset, scale_offset)
        return
    *lead, own_rows, own_cols = tensor.where
    rows, cols = tensor.entry.shape[-2:]
    row_bytes, scale_row_bytes = cols * tensor.entry.size, -(-cols // FP8_BLOCK) * 4
    for number, at in enumerate(itertools.product(*(range(w.start, w.stop) for w in lead))):
        outer = tuple(slice(i, i + 1) for i in at)
        for start, stop in spans(rows, cols, FP8_BLOCK):
            row = number * rows + start
            scale_row = number * -(-rows // FP8_BLOCK) + start // FP8_BLOCK
            yield _Piece(
                (*outer, slice(own_rows.start + start, own_rows.start + stop), own_cols),
                number,
                start,
                stop,
                offset + row * row_bytes,
                scale_offset + scale_row * scale_row_bytes,
            )


def _make(source: WeightSource, tensor: Planned, piece: _Piece, quantize: Quantize) -> tuple[Block, ...]:
    if tensor.copied is not None:
        found = _copy(source, tensor.copied, piece)
    else:
        x = values(source, tensor.key, where=piece.where)
        found = encode(x, tensor.encoding, quantize, tensor.entry.name)
    return tuple(Block(at, data) for at, data in zip((piece.offset, piece.scale_offset), found, strict=False))


def _copy(source: WeightSource, part: Part, piece: _Piece) -> tuple[Tensor, ...]:
    """Bytes and scales of the piece as they are in the source."""
    rank = len(part.spec.shape)
    if rank == 3:
        part = part.cut(0, piece.number, piece.number + 1)
    if rank > 1:
        part = part.cut(rank - 2, piece.start, piece.stop)
    scale = source.read_scale(part)
    return (source.read(part).contiguous(), *(() if scale is None else (scale.float().contiguous(),)))
