"""Which tensors a safetensors model has and where their bytes lie: the index, the shards and their headers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.file import Index, ModelFile
from ktcompile.weights.json import load_json, parse_json
from ktcompile.weights.quoted import listed, quoted

MAX_HEADER_BYTES = 32 << 20  # a shard of a 671B model has 100 KB
MAX_INDEX_BYTES = 128 << 20  # 671B: 9 MB
INDEX = "model.safetensors.index.json"

DTYPES = {  # name in the file -> dtype to read as
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_BITS = {"BOOL": 8, "F4": 4, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
_BITS |= {"F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a header describes it; `offset` counts from the start of the file."""

    file: ModelFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self, index: Index = (), shape: tuple[int, ...] | None = None) -> Tensor:
        """`stored[index]`, read now; `shape` is another one of as many values. Only for the types in DTYPES."""
        return self.file.tensor(self.offset, self.shape if shape is None else shape, DTYPES[self.dtype], index)


def shards(path: Path) -> dict[Path, set[str] | None]:
    """Files of a model with the tensors that the index says are in them (None without an index)."""
    if path.is_file():
        return {path: None}
    if not path.is_dir():
        raise ModelFileError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        return _index(path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = f"{len(files)} safetensors files, but no {INDEX}" if files else "no safetensors file"
        raise ModelFileError(f"{path}: {names}; a folder needs one file, or shards with an index")
    return {files[0]: None}


def _index(path: Path) -> dict[Path, set[str] | None]:
    content = load_json(path, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{path}: weight_map: must be an object that gives a file for every tensor")
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or (file not in names and not _is_name(file)):
            raise ModelFileError(
                f"{path}: weight_map: {quoted(tensor)} is in {quoted(str(file))}; "
                "shards are *.safetensors files in the same folder, with printable names"
            )
        names.setdefault(file, set()).add(tensor)
    absent = [file for file in names if not (path.parent / file).is_file()]
    if absent:
        raise ModelFileError(f"{path}: {len(absent)} of {len(names)} shards are missing: {listed(absent)}")
    return {path.parent / file: tensors for file, tensors in names.items()}


def _is_name(file: str) -> bool:
    """Whether it can be that of a shard: a path would leave the folder, a control character reach the terminal."""
    return file.endswith(".safetensors") and file.isprintable() and "/" not in file and "\\" not in file


def read_header(file: ModelFile) -> dict[str, Stored]:
    """Check and parse the header of one file: 8 bytes of length, JSON, data without holes or overlaps."""
    if file.size_bytes < 8:
        raise ModelFileError(f"{file.path}: {file.size_bytes} bytes; a safetensors file has at least 8")
    length = int.from_bytes(file.read(0, 8), "little")
    most = min(MAX_HEADER_BYTES, file.size_bytes - 8)
    if length > most:
        raise ModelFileError(
            f"{file.path}: byte 0: header length {length}; the file leaves {file.size_bytes - 8} bytes "
            f"and {MAX_HEADER_BYTES} are allowed"
        )
    header = parse_json(file.read(8, length), f"{file.path}: header")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _entry(file, name, info, data) for name, info in header.items()}
    end = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise ModelFileError(
                f"{file.path}: {quoted(name)} begins at byte {stored.offset}, the tensor before it ends at {end}"
            )
        end = stored.offset + stored.nbytes
    if end != file.size_bytes:
        raise ModelFileError(f"{file.path}: the last tensor ends at byte {end}, the file at {file.size_bytes}")
    return tensors


def _entry(file: ModelFile, name: str, info: object, data: int) -> Stored:
    if not isinstance(info, dict):
        raise _wrong(file, name, "must be an object with dtype, shape and data_offsets")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _wrong(file, name, f"dtype {quoted(str(dtype))} is not known; {', '.join(_BITS)} are")
    if not isinstance(shape, list) or len(shape) > 8 or not set(map(type, shape)) <= {int}:
        raise _wrong(file, name, f"shape {str(shape)[:200]} must be a list of at most 8 sizes")
    if shape and not 0 <= min(shape) <= max(shape) < 1 << 62:
        raise _wrong(file, name, f"shape {str(shape)[:200]}: sizes from 0 to 2^62 are allowed")
    if not isinstance(offsets, list) or len(offsets) != 2 or not type(offsets[0]) is type(offsets[1]) is int:
        raise _wrong(file, name, f"data_offsets {str(offsets)[:200]} must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= file.size_bytes - data:
        why = f"must be in order and end by {file.size_bytes - data}: cut off or damaged"
        raise _wrong(file, name, f"data_offsets {str(offsets)[:200]} {why}")
    if 8 * (end - begin) != (bits := math.prod(shape) * _BITS[dtype]):
        raise _wrong(file, name, f"{dtype} {shape} takes {bits} bits, its data {8 * (end - begin)}")
    return Stored(file, dtype, tuple(shape), data + begin, end - begin)


def _wrong(file: ModelFile, name: str, why: str) -> ModelFileError:
    """The error for a tensor of the header."""
    return ModelFileError(f"{file.path}: header: {quoted(name)}: {why}")
