"""Tensors of a file whose layout is known before a weight is read, written a chunk at a time by several threads."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights import each
from ktcompile.weights.quoted import plain

CHUNK_VALUES = 2 << 20  # decoded at a time by a thread, unless a row is longer
ROW_ALIGN = 128  # where chunks of rows may begin: at a scale block of FP8
WORKING_BYTES = 1 << 30  # of all threads together
VALUE_BYTES = 12  # of a chunk in work: fp32 as decoded and as ordered, and what is written

Progress = Callable[[str, int, int], None]
"""Called with the name of a tensor, bytes done and bytes in all; by several threads, one at a time."""


class Quantize(Protocol):
    """Rounds fp32 rows [rows, cols], finite, to block types: bytes as in a file, for "fp8_block128" with scales."""

    def __call__(self, x: Tensor, dst: str) -> Tensor | tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Block:
    """Bytes, and where in the file they go."""

    offset: int
    data: Tensor  # contiguous, of any dtype


@dataclass(frozen=True)
class Chunk:
    """A piece of work: `make` reads and encodes `values` weights of a tensor."""

    name: str
    file: int  # number in the list of files
    values: int
    make: Callable[[], tuple[Block, ...]]


def write(
    files: Sequence[Path], chunks: Callable[[], Iterable[Chunk]], total_bytes: int, threads: int, progress: Progress
) -> None:
    """Do all chunks, into files that exist. At most WORKING_BYTES, or one chunk, are in memory. Raises OSError.

    `chunks` is called twice: a large model has some hundred thousand, which are not kept.
    """
    largest = max((chunk.values for chunk in chunks()), default=1) * VALUE_BYTES
    lock = threading.Lock()
    done = 0
    handles: list[int] = []

    def work(chunk: Chunk) -> None:
        nonlocal done
        written = sum(_put(handles[chunk.file], block) for block in chunk.make())
        with lock:
            done += written
            progress(chunk.name, done, total_bytes)

    at_once = torch.get_num_threads()
    torch.set_num_threads(1)  # chunks are the parallel work; torch's own threads would only fight over the cores
    try:
        handles += [os.open(path, os.O_WRONLY) for path in files]
        each(work, chunks(), max(1, min(threads, WORKING_BYTES // largest)))
    finally:
        torch.set_num_threads(at_once)
        for handle in handles:
            os.close(handle)


def _put(handle: int, block: Block) -> int:
    """Write all bytes of a block, and give their number."""
    left = memoryview(block.data.view(-1).view(torch.uint8).numpy().data)
    offset = block.offset
    while left:
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count
    return block.data.nbytes


def spans(rows: int, row_values: int, align: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows with about CHUNK_VALUES values each, beginning at a multiple of `align`."""
    step = max(1, CHUNK_VALUES // max(1, row_values) // align) * align
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def encode(x: Tensor, encoding: str, quantize: Quantize, name: str) -> tuple[Tensor, ...]:
    """fp32 [..., cols] as it is stored: one tensor, for "fp8_block128" (two axes only) its bytes and its scales.

    ModelFileError names the tensor if a value does not fit the encoding.
    """
    if encoding == "f32":
        return (x,)
    if encoding == "bf16":
        return (x.to(torch.bfloat16),)
    if encoding == "f16":
        return (_half(x, name),)
    try:
        found = quantize(x.reshape(-1, x.shape[-1]), encoding)
    except ValueError as error:
        raise ModelFileError(f"{plain(name)}: cannot be written as {encoding}: {error}") from error
    return found if isinstance(found, tuple) else (found,)


def _half(x: Tensor, name: str) -> Tensor:
    half = x.to(torch.float16)
    lost = torch.isinf(half) & torch.isfinite(x)
    if lost.any():
        raise ModelFileError(f"{plain(name)}: {x[lost][0].item():g} does not fit f16, which ends at 65504; use bf16")
    return half


Bounds = tuple[tuple[int, int, int], ...]


def bounds(where: tuple[slice, ...]) -> Bounds:
    """Slices with start and stop as a key of a dict."""
    return tuple((w.start, w.stop, w.step or 1) for w in where)
