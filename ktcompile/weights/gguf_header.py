"""Read the header of a GGUF file, trusting nothing in it.

Every count, length, type, dimension and offset is checked against the bytes that are really there before anything is
allocated for it, so a hostile file costs at most the limits below. Layout: github.com/ggml-org/ggml, docs/gguf.md.
"""

import itertools
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from ktcompile.errors import ModelFileError
from ktcompile.weights import ggml
from ktcompile.weights.file import ModelFile
from ktcompile.weights.quoted import plain, quoted

Value = int | float | bool | str | list[str] | NDArray[np.generic]

MAX_ENTRIES = 65_536  # metadata keys; real files have about 60
MAX_TENSORS = 16_384  # a file of a 671B model has at most 1,100
MAX_STRINGS = 1 << 20  # in all arrays of the file; a vocabulary of 262k with its merges has 777k
MAX_HEADER_BYTES = 32 << 20  # the same vocabulary takes 16 MB
MAX_MEMORY_BYTES = 88 << 20  # of metadata once read; the same vocabulary takes 75 MB, as Python has it
MAX_NAME_BYTES = 1_024  # ggml allows 64 for a tensor
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
_READ_BYTES = 1 << 18  # at a time, at least

_SCALARS = {  # code in the file -> (name, struct format)
    0: ("uint8", "<B"),
    1: ("int8", "<b"),
    2: ("uint16", "<H"),
    3: ("int16", "<h"),
    4: ("uint32", "<I"),
    5: ("int32", "<i"),
    6: ("float32", "<f"),
    7: ("bool", "<B"),
    10: ("uint64", "<Q"),
    11: ("int64", "<q"),
    12: ("float64", "<d"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header describes it; `offset` counts from the start of the file, shape is rows first."""

    name: str
    type: ggml.BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself: metadata by key and tensors by name."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, Stored]


def read_header(file: ModelFile) -> Header:
    """Parse and check the header; ModelFileError names the file, the byte offset and the field.

    float32 metadata is given as the shortest decimal that rounds to it: 1e-06, not 9.99999997e-07.
    """
    cursor = _Cursor(file)
    _check_magic(cursor)
    tensor_count = cursor.count("tensor_count", MAX_TENSORS, least_bytes=24)
    entry_count = cursor.count("metadata_kv_count", MAX_ENTRIES, least_bytes=13)
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        start = cursor.pos
        key = cursor.string("metadata key", MAX_NAME_BYTES)
        if key in metadata:
            cursor.fail("metadata key", f"{quoted(key)} occurs twice", start)
        metadata[key] = cursor.value(plain(key))
    alignment = _alignment(cursor, metadata)
    infos = [_tensor_info(cursor, alignment) for _ in range(tensor_count)]
    data = -(-cursor.pos // alignment) * alignment
    return Header(metadata, _place(cursor, infos, data))


def _check_magic(cursor: "_Cursor") -> None:
    magic = cursor.take(4, "magic")
    if magic in (b"FUGG", b"fugg"):
        cursor.fail("magic", "a big-endian file; only little-endian GGUF is read", 0)
    if magic != b"GGUF":
        cursor.fail("magic", f"{magic!r} is not b'GGUF'; this is no GGUF file", 0)
    version = cursor.number("<I", "version")
    if version & 0xFFFF == 0 and version:
        cursor.fail("version", "a big-endian file; only little-endian GGUF is read", 4)
    if version not in (2, 3):
        cursor.fail("version", f"{version} is not known; versions 2 and 3 are", 4)


def _alignment(cursor: "_Cursor", metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    good = isinstance(value, int) and 0 < value <= 1 << 20 and value & (value - 1) == 0
    if not good or isinstance(value, bool):
        cursor.fail("general.alignment", f"{repr(value)[:80]} is not a power of two between 1 and 2^20")
    return cast(int, value)


@dataclass(frozen=True)
class _Info:
    stored: Stored  # its offset still counts from the start of the data
    field_pos: int  # where in the header its offset stands


def _tensor_info(cursor: "_Cursor", alignment: int) -> _Info:
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    field = f"tensor {quoted(name)}"
    dim_count = cursor.number("<I", f"{field}: number of dimensions")
    if not 1 <= dim_count <= MAX_DIMS:
        cursor.fail(field, f"{dim_count} dimensions; 1 to {MAX_DIMS} are allowed", cursor.pos - 4)
    start = cursor.pos
    dims = struct.unpack(f"<{dim_count}Q", cursor.take(8 * dim_count, f"{field}: dimensions"))
    if 0 in dims or math.prod(dims) >= 1 << 62:
        cursor.fail(field, f"dimensions {list(dims)}: each must be at least 1 and their product below 2^62", start)
    code = int(cursor.number("<I", f"{field}: type"))
    kind = ggml.BY_CODE.get(code)
    if kind is None:
        known = ", ".join(f"{t.name} ({t.code})" for t in ggml.TYPES)
        cursor.fail(field, f"type {code} cannot be decoded; known are {known}", cursor.pos - 4)
    if dims[0] % kind.block_values:
        cursor.fail(field, f"rows of {dims[0]} values are no multiple of {kind.name}'s {kind.block_values}", start)
    pos = cursor.pos
    offset = int(cursor.number("<Q", f"{field}: offset"))
    if offset % alignment:
        cursor.fail(field, f"offset {offset} is no multiple of the alignment {alignment}", pos)
    nbytes = kind.row_bytes(dims[0]) * math.prod(dims[1:])
    return _Info(Stored(name, kind, tuple(reversed(dims)), offset, nbytes), pos)


def _place(cursor: "_Cursor", infos: list[_Info], data: int) -> dict[str, Stored]:
    """Tensors with offsets from the start of the file, checked to lie inside it and beside each other."""
    tensors: dict[str, Stored] = {}
    for info in infos:
        t = info.stored
        if t.name in tensors:
            cursor.fail(f"tensor {quoted(t.name)}", "occurs twice", info.field_pos)
        end = data + t.offset + t.nbytes
        if end > cursor.size:
            why = f"ends at byte {end}, the file at {cursor.size}: cut off or damaged"
            cursor.fail(f"tensor {quoted(t.name)}", why, info.field_pos)
        tensors[t.name] = Stored(t.name, t.type, t.shape, data + t.offset, t.nbytes)
    ordered = sorted(infos, key=lambda info: info.stored.offset)
    for before, after in itertools.pairwise(ordered):
        if before.stored.offset + before.stored.nbytes > after.stored.offset:
            cursor.fail(
                f"tensor {quoted(after.stored.name)}",
                f"offset {after.stored.offset} lies inside tensor {quoted(before.stored.name)}",
                after.field_pos,
            )
    return tensors


class _Cursor:
    """A position in the header; every step is checked against what is left."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.pos = 0
        self.size = file.size_bytes
        self.limit = min(file.size_bytes, MAX_HEADER_BYTES)
        self.strings_left = MAX_STRINGS
        self.memory_left = MAX_MEMORY_BYTES
        self.data = b""  # a piece of the file, from byte `base` on
        self.base = 0

    def fail(self, field: str, why: str, pos: int | None = None) -> NoReturn:
        raise ModelFileError(f"{self.file.path}: byte {self.pos if pos is None else pos}: {field}: {why}")

    def need(self, count: int, field: str) -> None:
        """`count` bytes from here are in `data`, or an error."""
        if self.pos + count <= self.base + len(self.data):
            return
        if count <= self.limit - self.pos:
            self.data = self.file.read(self.pos, min(max(count, _READ_BYTES), self.limit - self.pos))
            self.base = self.pos
            return
        what = "the file ends" if self.limit == self.size else f"a header may have {MAX_HEADER_BYTES} bytes"
        self.fail(field, f"needs {count} bytes, {self.limit - self.pos} are left ({what} at byte {self.limit})")

    def charge(self, nbytes: int, field: str, pos: int) -> None:
        """Memory that a value will take; many short strings take far more of it than of the file."""
        self.memory_left -= nbytes
        if self.memory_left < 0:
            self.fail(field, f"metadata of more than {MAX_MEMORY_BYTES} bytes in memory", pos)

    def take(self, count: int, field: str) -> bytes:
        self.need(count, field)
        start = self.pos - self.base
        self.pos += count
        return self.data[start : start + count]

    def number(self, form: str, field: str) -> int:
        size = struct.calcsize(form)
        self.need(size, field)
        start = self.pos - self.base
        self.pos += size
        return cast(int, struct.unpack_from(form, self.data, start)[0])

    def count(self, field: str, most: int, least_bytes: int) -> int:
        """A 64-bit count of things that take at least `least_bytes` each."""
        start = self.pos
        count = self.number("<Q", field)
        if count > most:
            self.fail(field, f"{count} is more than the {most} allowed", start)
        if count * least_bytes > self.limit - self.pos:
            self.fail(field, f"{count} need {count * least_bytes} bytes, {self.limit - self.pos} are left", start)
        return count

    def string(self, field: str, most: int = MAX_HEADER_BYTES) -> str:
        start = self.pos
        length = self.number("<Q", f"{field}: length")
        if length > most:
            self.fail(field, f"length {length} is more than the {most} bytes allowed", start)
        raw = self.take(length, field)
        self.charge(length if raw.isascii() else 4 * length, field, start)
        return self.decoded(raw, field, start)

    def decoded(self, raw: bytes, field: str, start: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(field, f"is not UTF-8 ({error.reason} at its byte {error.start})", start)

    def strings(self, field: str, count: int) -> list[str]:
        """An array of strings: the loop of `string` without its calls, since a vocabulary has hundreds of thousands."""
        found: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        while len(found) < count:
            self.need(8, f"{field}: length")
            start = self.pos
            data, base, end, batch = self.data, self.base, len(self.data), len(found)
            at = start - base
            while len(found) < count and at + 8 <= end:
                after = at + 8 + length_at(data, at)[0]
                if after > end:
                    break
                found.append(self.decoded(data[at + 8 : after], field, base + at))
                at = after
            self.pos = base + at
            self.charge(sum(map(sys.getsizeof, found[batch:])) + 8 * (len(found) - batch), field, start)
            if len(found) < count and self.pos == start:  # longer than what is in memory, or than the file
                found.append(self.string(field))
        return found

    def value(self, key: str) -> Value:
        """The value of a metadata entry; `key` is its name for messages."""
        code = self.number("<I", f"{key}: type")
        if code == _STRING:
            return self.string(key)
        if code == _ARRAY:
            return self.array(key)
        if code not in _SCALARS:
            self.fail(key, f"value type {code} is not known; 0 to 12 are", self.pos - 4)
        return self.scalar(key, code)

    def scalar(self, key: str, code: int) -> Value:
        name, form = _SCALARS[code]
        value = self.number(form, key)
        if name == "bool":
            if value > 1:
                self.fail(key, f"{value} is not a bool; 0 and 1 are", self.pos - 1)
            return bool(value)
        return float(str(np.float32(value))) if name == "float32" else value

    def array(self, key: str) -> Value:
        code = self.number("<I", f"{key}: element type")
        if code == _ARRAY:
            self.fail(key, "an array of arrays; arrays of numbers or strings are read", self.pos - 4)
        if code != _STRING and code not in _SCALARS:
            self.fail(key, f"element type {code} is not known; 0 to 12 are", self.pos - 4)
        if code == _STRING:
            count = self.count(f"{key}: length", self.strings_left, least_bytes=8)
            self.strings_left -= count
            return self.strings(key, count)
        form = _SCALARS[code][1]
        size = struct.calcsize(form)
        start = self.pos
        count = self.count(f"{key}: length", MAX_HEADER_BYTES, least_bytes=size)
        self.charge(2 * count * size, key, start)
        return np.frombuffer(self.take(count * size, key), dtype=np.dtype(form.replace("b", "i1").replace("B", "u1")))
