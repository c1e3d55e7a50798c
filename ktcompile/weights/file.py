"""A model file that is read piece by piece, never mapped: what goes wrong while reading is an error, not a signal."""

import math
import os
import stat
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError

Index = tuple[int | slice, ...]


class ModelFile:
    """One open file. Every read checks that the file still is what it was when its header was read.

    Threads may read at the same time. A file that is replaced by renaming another over it stays readable as it was.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; ModelFileError if that fails or it is empty."""
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise ModelFileError(f"{path}: is no regular file")
            self._state = self._stat()
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be opened: {error.strerror}") from error
        self.size_bytes = self._state[0]
        if self.size_bytes == 0:
            raise ModelFileError(f"{path}: the file is empty")

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, all of them; ModelFileError if the file became shorter or was written to."""
        return self._bytes(offset, count).numpy().tobytes()

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype, index: Index = ()) -> Tensor:
        """`stored[index]` of the row-major tensor `stored` at `offset`, in memory of its own.

        `index` has integers and slices with a positive step; only the bytes between the first and the last row that it
        asks for are read. The caller has checked that the tensor lies inside the file.
        """
        width = torch.empty((), dtype=dtype).element_size()
        kept: list[int] = []  # axes of size one that a slice leaves
        sizes, rest = list(shape), list(index)
        while rest and sizes:  # an axis of which one entry is wanted only moves the offset
            entry = rest[0]
            first, last, _ = entry.indices(sizes[0]) if isinstance(entry, slice) else (entry, entry + 1, 1)
            if last - first != 1:
                break
            offset += first * math.prod(sizes[1:]) * width
            kept += [1] if isinstance(entry, slice) else []
            del sizes[0], rest[0]
        if rest and sizes and isinstance(rest[0], slice):
            first, last, step = rest[0].indices(sizes[0])
            offset += first * math.prod(sizes[1:]) * width
            sizes[0] = max(0, last - first)
            rest[0] = slice(0, sizes[0], step)
        raw = self._bytes(offset, math.prod(sizes) * width)
        found = raw.view(dtype).reshape(sizes)[tuple(rest)]
        return found.reshape((*kept, *found.shape))

    def into(self, offset: int, out: Tensor) -> None:
        """Fill `out`, contiguous uint8 on the CPU, with the bytes from `offset` on; errors as for `read`."""
        count = out.numel()
        if not count:
            return
        try:
            if self._stat() != self._state:
                raise ModelFileError(f"{self.path}: was written to after it was opened; open the model again")
            view = out.numpy().data
            done = 0
            while done < count:
                got = os.preadv(self._file.fileno(), [view[done:]], offset + done)
                if not got:
                    raise ModelFileError(
                        f"{self.path}: byte {offset + done}: the file ends here; {count} bytes from byte {offset} "
                        "are needed: it became shorter after it was opened"
                    )
                done += got
        except OSError as error:
            raise ModelFileError(f"{self.path}: byte {offset}: cannot be read: {error.strerror}") from error

    def fingerprint(self) -> bytes:
        """A hash of its size, time of change, first bytes and 64 samples of the rest."""
        digest = blake2b(repr(self._state).encode(), digest_size=20)
        digest.update(self.read(0, min(self.size_bytes, 64 << 10)))
        for i in range(64):
            offset = self.size_bytes * i // 64
            digest.update(self.read(offset, min(4096, self.size_bytes - offset)))
        return digest.digest()

    def _bytes(self, offset: int, count: int) -> Tensor:
        out = torch.empty(count, dtype=torch.uint8)
        self.into(offset, out)
        return out

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to does not block."""
    return os.open(path, flags | os.O_NONBLOCK)
