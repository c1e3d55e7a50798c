"""A memory-mapped file from which tensors are taken without copying."""

import math
import mmap
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError

# Private and writable, so that torch takes it as it is and a stray write never reaches the file; without a
# reservation, so that a file larger than memory can be mapped. (Python 3.11 has no name for the flag.)
_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """One file in the address space; pages are read when a tensor is."""

    def __init__(self, path: Path) -> None:
        """Map the file; ModelFileError if it cannot be opened or is empty."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, flags=_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except ValueError:
            raise ModelFileError(f"{path}: the file is empty") from None
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be opened: {error.strerror}") from error
        self.size_bytes = len(self.map)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of the file; the caller has checked that it lies inside."""
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset).reshape(shape)
