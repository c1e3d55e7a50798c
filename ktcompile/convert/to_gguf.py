"""Write a GGUF file: names by ktcompile.weights.names, types as llama.cpp mixes them, container by the gguf package."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ktcompile.convert.chunks import CHUNK_VALUES, ROW_ALIGN, Block, Chunk, Quantize, bounds, encode, spans
from ktcompile.weights import Part, WeightSource, ggml
from ktcompile.weights.gguf_header import Value
from ktcompile.weights.mixture import Role, block_type
from ktcompile.weights.names import Export, Piece, exports

FILE_TYPES = {  # llama.cpp's enum llama_ftype
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q5_0": 8,
    "q4_k": 14,
    "q4_k_m": 15,
    "q5_k": 16,
    "q6_k": 18,
    "bf16": 32,
}
"""What a GGUF file may be converted to, with its number in general.file_type."""

QUANTIZATION_VERSION = 2  # of ggml's block types
ALIGNMENT = 32

_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
_ROLES: Mapping[str, Role] = {"attn_v": "value", "attn_k": "key", "attn_output": "attention_output"}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written, and the parts of the source that already are its bytes, if so."""

    export: Export
    encoding: str
    fallback: str | None  # the type that it would have if its rows were longer
    copied: tuple[tuple[Piece, Part], ...] | None

    @property
    def name(self) -> str:
        """In the file."""
        return self.export.name

    @property
    def key(self) -> str:
        """The parameter that it comes from."""
        return self.export.key

    @property
    def values(self) -> int:
        """How many weights."""
        return math.prod(self.export.shape)

    @property
    def row_bytes(self) -> int:
        """Of its last axis."""
        return ggml.BY_NAME[self.encoding].row_bytes(self.export.shape[-1])

    @property
    def nbytes(self) -> int:
        """Without padding."""
        return math.prod(self.export.shape[:-1]) * self.row_bytes


def plan(source: WeightSource, architecture: str, fields: Mapping[str, object], to: str) -> tuple[Planned, ...]:
    """Every tensor of the file in order, from the shapes in `source` and the fields of its configuration."""
    shapes = {key: source.spec(key).shape for key in list(source.keys())}
    layers, experts = _count(fields, "num_hidden_layers"), _count(fields, *_EXPERT_COUNTS)
    planned = []
    for export in exports(architecture, shapes, fields):
        encoding, fallback = _encoding(export, to, layers, experts)
        planned.append(Planned(export, encoding, fallback, stored_as(source, export, encoding)))
    return tuple(planned)


def _count(fields: Mapping[str, object], *names: str) -> int:
    return next((value for name in names if isinstance(value := fields.get(name), int)), 0)


def _encoding(export: Export, to: str, layers: int, experts: int) -> tuple[str, str | None]:
    """The type of a tensor, and the one that it falls back from."""
    if export.exact or "norm" in export.name:
        return "f32", None
    if to in ("f32", "bf16", "f16"):
        return to, None
    match = _LAYER.match(export.name)
    layer = int(match.group(1)) if match else 0
    wanted, found = (block_type(to, _role(export.name), c, layer, layers, experts) for c in (256, export.shape[-1]))
    return found, wanted if wanted != found else None


def _role(name: str) -> Role:
    """What a tensor is, by its GGUF name."""
    if name in ("output.weight", "token_embd.weight"):
        return "head" if name == "output.weight" else "embedding"
    if ".ffn_down" in name:
        return "down"
    return _ROLES.get(_LAYER.sub("", name).removesuffix(".weight"), "other")


def stored_as(source: WeightSource, export: Export, encoding: str) -> tuple[tuple[Piece, Part], ...] | None:
    """For each piece of the tensor the part of the source with the same bytes; None if there is not one for all."""
    stored = {(bounds(part.where), part.transpose): part for part in source.parts(export.key)}
    found = []
    for piece in export.pieces:
        part = stored.get((bounds(piece.where), piece.transpose))
        if part is None or part.spec.encoding != encoding or part.spec.shape != piece.shape:
            return None
        found.append((piece, part))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ the file


def write_header(path: Path, architecture: str, metadata: Mapping[str, Value], tensors: Sequence[Planned]) -> list[int]:
    """Begin the file and give it its size; where the data of each tensor goes. Raises OSError."""
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType(ggml.BY_NAME[tensor.encoding].code)
        shape, dtype = tensor.export.shape, np.dtype(np.float32)
        writer.add_tensor_info(tensor.export.name, shape, dtype, tensor.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    end = _padded(path.stat().st_size)
    offsets = []
    for tensor in tensors:
        offsets.append(end)
        end += _padded(tensor.nbytes)
    with path.open("r+b") as file:
        file.truncate(end)  # padding is zeros
    return offsets


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """Add a value in the type that llama.cpp reads it in: u32 for counts, f32 for numbers."""
    kinds = gguf.GGUFValueType
    if isinstance(value, np.ndarray):
        if len(value):
            writer.add_key_value(key, value.tolist(), kinds.ARRAY, sub_type=kinds[value.dtype.name.upper()])
    elif isinstance(value, list):
        if value:
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=kinds.STRING)
    elif isinstance(value, bool):
        writer.add_key_value(key, value, kinds.BOOL)
    elif isinstance(value, int):
        narrow, wide = (kinds.UINT32, kinds.UINT64) if value >= 0 else (kinds.INT32, kinds.INT64)
        writer.add_key_value(key, value, narrow if -(1 << 31) <= value < 1 << 32 else wide)
    elif isinstance(value, float):
        fits = not math.isfinite(value) or abs(value) <= float(np.finfo(np.float32).max)
        writer.add_key_value(key, value, kinds.FLOAT32 if fits else kinds.FLOAT64)
    else:
        writer.add_key_value(key, value, kinds.STRING)


def chunks(
    source: WeightSource, tensors: Sequence[Planned], offsets: Sequence[int], quantize: Quantize
) -> Iterator[Chunk]:
    """The work of writing all tensors at these offsets."""
    for tensor, offset in zip(tensors, offsets, strict=True):
        yield from _chunks(source, tensor, offset, quantize)


def _chunks(source: WeightSource, tensor: Planned, offset: int, quantize: Quantize) -> Iterator[Chunk]:
    shape = tensor.export.shape
    inner = math.prod(shape[1:])
    entry_bytes = tensor.nbytes // shape[0]
    entries = [(0, shape[0])] if len(shape) == 1 else spans(shape[0], inner, 1 if len(shape) > 2 else ROW_ALIGN)
    for start, stop in entries:
        at = offset + start * entry_bytes
        if tensor.copied is not None:
            yield Chunk(tensor.name, 0, (stop - start) * inner, partial(_copied, source, tensor, start, stop, at))
            continue
        for first, last in _row_spans(tensor.export, inner):
            export = tensor.export if last is None else _narrowed(tensor.export, first, last)
            make = partial(
                _encoded, source, export, tensor.encoding, start, stop, at + first * tensor.row_bytes, quantize
            )
            yield Chunk(tensor.name, 0, (stop - start) * math.prod(export.shape[1:]), make)


def _row_spans(export: Export, inner: int) -> Iterable[tuple[int, int | None]]:
    """Ranges of rows of one matrix (of an expert), if it is large and its rows are rows of the parameter too."""
    plain = all(len(p.shape) == 3 and not p.index and not p.transpose for p in export.pieces)
    return spans(export.shape[1], export.shape[2], ROW_ALIGN) if plain and inner > CHUNK_VALUES else [(0, None)]


def _narrowed(export: Export, start: int, stop: int) -> Export:
    """Rows `start:stop` of each matrix of a tensor with three axes."""
    pieces = []
    for piece in export.pieces:
        *lead, rows, cols = piece.where
        first, pace = rows.start, rows.step or 1
        where = (*lead, slice(first + start * pace, first + (stop - 1) * pace + 1, pace), cols)
        pieces.append(replace(piece, shape=(piece.shape[0], stop - start, piece.shape[2]), where=where))
    return replace(export, shape=(export.shape[0], stop - start, export.shape[2]), pieces=tuple(pieces))


def _encoded(
    source: WeightSource, export: Export, encoding: str, start: int, stop: int, offset: int, quantize: Quantize
) -> tuple[Block, ...]:
    x = export.read(source, slice(start, stop))
    (data,) = encode(x, encoding, quantize, export.name)
    return (Block(offset, data),)


def _copied(source: WeightSource, tensor: Planned, start: int, stop: int, offset: int) -> tuple[Block, ...]:
    return (Block(offset, _copy(source, tensor, start, stop)),)


def _copy(source: WeightSource, tensor: Planned, start: int, stop: int) -> Tensor:
    """Bytes of entries of the leading axis as they are in the source: uint8 [stop - start, bytes of one]."""
    assert tensor.copied is not None
    out = torch.empty((stop - start, tensor.nbytes // tensor.export.shape[0]), dtype=torch.uint8)
    for piece, part in tensor.copied:
        lead = piece.index[0] if piece.index else slice(0, piece.shape[0])
        if isinstance(lead, int):
            if start <= lead < stop:
                out[lead - start] = _bytes(source.read(part))
            continue
        step = lead.step or 1
        first, last = max(0, -(-(start - lead.start) // step)), min(piece.shape[0], -(-(stop - lead.start) // step))
        if first < last:
            begin = lead.start + first * step - start
            cut = _bytes(source.read(part.cut(0, first, last) if last - first < piece.shape[0] else part))
            out[begin : begin + (last - first - 1) * step + 1 : step] = cut.view(last - first, -1)
    return out


def _bytes(raw: Tensor) -> Tensor:
    return raw.contiguous().view(-1).view(torch.uint8)
