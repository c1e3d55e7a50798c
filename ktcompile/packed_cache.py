"""Packed weights on disk, so that the next start reads them as they are instead of packing again."""

import json
import math
import os
import platform
import stat
import zlib
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError, RulesError
from ktcompile.files import atomic, cache_folder
from ktcompile.version import __version__
from ktcompile.weights import WeightSource, each
from ktcompile.weights.file import ModelFile
from ktcompile.weights.json import parse_json

_MAGIC = b"ktrans-packed-1\n"
_ALIGN = 4096
_CHUNK_BYTES = 16 << 20  # read, checked and written at a time
_MAX_HEADER_BYTES = 64 << 20


class PackedCache:
    """A folder with one file a region. A file is used only if it is whole, ours, and of exactly these weights.

    The name of a file is a hash of everything that decides its bytes: the model files (sizes, times of change, samples
    of their content), the parameters, the layout, this version of ktcompile and the processor family. `notes` says, for
    a person, why something was not used; `loaded` and `saved` count files.
    """

    def __init__(self, folder: Path, source: WeightSource) -> None:
        """Make the folder, for this user alone, if it is not there; RulesError if it cannot be or others may write."""
        self.folder = folder
        self.notes: list[str] = []
        self.loaded = self.saved = 0
        try:
            folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            why = _foreign(folder.stat())
        except OSError as error:
            raise RulesError(f"packed cache {folder}: {error.strerror}") from error
        if why:
            raise RulesError(f"packed cache {folder}: {why}; packed weights are read unchecked by their meaning")
        self._fingerprint = fingerprint(source)

    def name(self, keys: Sequence[str], layout: str, details: str) -> str:
        """The file of a region: `details` is what its kernel adds (types, sizes)."""
        said = {
            "weights": self._fingerprint,
            "keys": list(keys),
            "layout": layout,
            "details": details,
            "version": __version__,
            "machine": platform.machine(),
        }
        return blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=20).hexdigest() + ".packed"

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a file, every byte checked; None if there is none that can be used, and `notes` says why."""
        path = self.folder / name
        try:
            if why := _foreign(path.lstat()):
                raise ModelFileError(f"{path}: {why}")
            found = _read(ModelFile(path), name)
            self.loaded += 1
            return found
        except FileNotFoundError:
            return None
        except (ModelFileError, OSError) as error:
            self.notes.append(f"not used: {error}")
            return None

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors (on a CPU): written beside, synced, renamed. A full disk is a note, not an error."""
        try:
            with atomic(self.folder / name) as partial:
                partial.chmod(0o600)
                _write(partial, name, tensors)
            self.saved += 1
        except OSError as error:
            self.notes.append(f"not written: {self.folder / name}: {error.strerror}")


def packed_folder(where: str | Path, model: str) -> Path:
    """The folder that a person means: `user` (cache folder of this user), `model` (beside the model), or a path."""
    if str(where) == "user":
        return cache_folder() / "packed"
    if str(where) == "model":
        path = Path(model)
        return (path if path.is_dir() else path.parent) / ".ktcompile-packed"
    return Path(where)


def fingerprint(source: WeightSource) -> str:
    """A hash of the files that a source reads; RulesError for one that reads none."""
    files: Sequence[ModelFile] = getattr(source, "files", ())
    if not files:
        raise RulesError(f"packed cache: {type(source).__name__} reads no files; there is nothing to recognise it by")
    digest = blake2b(digest_size=20)
    for file in files:
        digest.update(file.fingerprint())
    return digest.hexdigest()


def _foreign(status: os.stat_result) -> str | None:
    if status.st_uid != os.getuid():
        return f"belongs to user {status.st_uid}, not to {os.getuid()}"
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if status.st_mode & 0o022:
        return "others than its owner may write to it"
    return None


def _write(path: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    plain = {k: t.contiguous().view(-1).view(torch.uint8) for k, t in tensors.items()}
    told: dict[str, object] = {}
    offsets, end = {}, 0
    for key, tensor in plain.items():
        offsets[key] = end
        told[key] = {"shape": list(tensors[key].shape), "offset": end, "crc32": _sums(tensor)}
        end += -(-tensor.numel() // _ALIGN) * _ALIGN
    header = json.dumps({"name": name, "tensors": told}).encode()
    data = -(-(len(_MAGIC) + 8 + len(header)) // _ALIGN) * _ALIGN
    with path.open("wb") as file:
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for key, tensor in plain.items():
            file.seek(data + offsets[key])
            file.write(tensor.numpy().data)
        file.truncate(data + end)


def _sums(tensor: Tensor) -> list[int]:
    """The CRC-32 of every chunk."""
    sums = [0] * -(-tensor.numel() // _CHUNK_BYTES)

    def check(i: int) -> None:
        sums[i] = zlib.crc32(tensor[i * _CHUNK_BYTES : (i + 1) * _CHUNK_BYTES].numpy().data)

    each(check, range(len(sums)))
    return sums


def _read(file: ModelFile, name: str) -> dict[str, Tensor]:
    head = len(_MAGIC) + 8
    if file.size_bytes < head or file.read(0, len(_MAGIC)) != _MAGIC:
        raise ModelFileError(f"{file.path}: is no file of packed weights")
    length = int.from_bytes(file.read(len(_MAGIC), 8), "little")
    if length > min(_MAX_HEADER_BYTES, file.size_bytes - head):
        raise ModelFileError(f"{file.path}: header length {length} does not fit")
    header = parse_json(file.read(head, length), f"{file.path}: header")
    told = header.get("tensors")
    if header.get("name") != name or not isinstance(told, dict):
        raise ModelFileError(f"{file.path}: was written under the name {header.get('name')!r}")
    data = -(-(head + length) // _ALIGN) * _ALIGN
    return {key: _tensor(file, key, entry, data) for key, entry in told.items()}


def _tensor(file: ModelFile, key: str, entry: object, data: int) -> Tensor:
    """One uint8 tensor, read in chunks in parallel, each compared with its sum."""
    entry = entry if isinstance(entry, dict) else {}
    shape, offset, sums = entry.get("shape"), entry.get("offset"), entry.get("crc32")
    if not isinstance(shape, list) or not isinstance(sums, list) or type(offset) is not int or offset < 0:
        raise ModelFileError(f"{file.path}: {key!r} has a damaged entry")
    if not all(type(n) is int and 0 < n < 1 << 48 for n in (*shape, len(sums))):
        raise ModelFileError(f"{file.path}: {key!r} has a damaged shape")
    count = math.prod(shape)
    if data + offset + count > file.size_bytes or len(sums) != -(-count // _CHUNK_BYTES):
        raise ModelFileError(f"{file.path}: {key!r} of shape {shape} does not fit into {file.size_bytes} bytes")
    out = torch.empty(count, dtype=torch.uint8)

    def read(i: int) -> None:
        chunk = out[i * _CHUNK_BYTES : (i + 1) * _CHUNK_BYTES]
        file.into(data + offset + i * _CHUNK_BYTES, chunk)
        if zlib.crc32(chunk.numpy().data) != sums[i]:
            raise ModelFileError(f"{file.path}: {key!r} is damaged at byte {data + offset + i * _CHUNK_BYTES}")

    each(read, range(len(sums)))
    return out.view(shape)
