"""The block encodings of ggml: sizes and decoders, bit for bit those of the gguf package.

Each decoder takes blocks as uint8 [n, block_bytes] and returns fp32 [n, block_values]. `d` is a block's scale, `m` or
`dmin` its offset, `q` the integers; low nibbles of a byte belong to the first half of a group, high ones to the second.
Source: ggml-quants.c (llama.cpp) and gguf/quants.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """One ggml tensor type: `block_values` consecutive values of a row are stored in `block_bytes` bytes."""

    code: int  # number in the file
    name: str
    block_values: int
    block_bytes: int
    blocks: Callable[[Bytes], Floats]

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values, a multiple of block_values."""
        return cols // self.block_values * self.block_bytes

    def decode(self, raw: Bytes) -> Floats:
        """Decode rows: uint8 [..., row_bytes] -> fp32 [..., cols]."""
        cols = raw.shape[-1] // self.block_bytes * self.block_values
        with np.errstate(all="ignore"):  # a damaged scale may be Inf or NaN; that is data here, not an error
            return self.blocks(raw.reshape(-1, self.block_bytes)).reshape(*raw.shape[:-1], cols)


def _half(raw: Bytes) -> Floats:
    """Two bytes a block -> [n, 1]."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Bytes, group: int) -> Bytes:
    """[n, bytes] -> [n, 2 * bytes]: of every `group` bytes first the low nibbles, then the high ones."""
    split = raw.reshape(len(raw), -1, 1, group) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return (split & np.uint8(15)).reshape(len(raw), -1)


def _bits(raw: Bytes) -> Bytes:
    """Four bytes a block -> its 32 bits, lowest first."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little")


def _f32(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float32)


def _f16(raw: Bytes) -> Floats:
    return _half(raw)


def _bf16(raw: Bytes) -> Floats:
    return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(raw: Bytes) -> Floats:
    q = _nibbles(raw[:, 2:], 16).astype(np.int8) - np.int8(8)
    return _half(raw[:, :2]) * q.astype(np.float32)


def _q4_1(raw: Bytes) -> Floats:
    d, m = _half(raw[:, :2]), _half(raw[:, 2:4])
    return d * _nibbles(raw[:, 4:], 16).astype(np.float32) + m


def _q5_0(raw: Bytes) -> Floats:
    q = (_nibbles(raw[:, 6:], 16) | (_bits(raw[:, 2:6]) << np.uint8(4))).astype(np.int8) - np.int8(16)
    return _half(raw[:, :2]) * q.astype(np.float32)


def _q5_1(raw: Bytes) -> Floats:
    d, m = _half(raw[:, :2]), _half(raw[:, 2:4])
    q = _nibbles(raw[:, 8:], 16) | (_bits(raw[:, 4:8]) << np.uint8(4))
    return d * q.astype(np.float32) + m


def _q8_0(raw: Bytes) -> Floats:
    return _half(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def _scales_and_mins(raw: Bytes) -> tuple[Floats, Floats]:
    """Header of Q4_K and Q5_K, 16 bytes -> d * scale and dmin * min, [n, 8, 1] each.

    After d and dmin come 12 bytes with eight 6-bit scales and eight 6-bit mins: four of each whole in the low bits
    of bytes 0-3 and 4-7; the others' low nibbles in bytes 8-11, their two high bits on top of bytes 0-7.
    """
    low, mid, top = np.split(raw[:, 4:16], 3, axis=-1)
    scale = np.concatenate([low & 0x3F, (top & 0x0F) | ((low >> 2) & 0x30)], axis=-1).astype(np.float32)
    least = np.concatenate([mid & 0x3F, (top >> 4) | ((mid >> 2) & 0x30)], axis=-1).astype(np.float32)
    return (_half(raw[:, :2]) * scale)[..., None], (_half(raw[:, 2:4]) * least)[..., None]


def _q4_k(raw: Bytes) -> Floats:
    d, m = _scales_and_mins(raw)
    q = _nibbles(raw[:, 16:], 32).reshape(-1, 8, 32)
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def _q5_k(raw: Bytes) -> Floats:
    d, m = _scales_and_mins(raw)
    high = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)  # bit g of byte i: value i of group g
    q = _nibbles(raw[:, 48:], 32).reshape(-1, 8, 32) | ((high & np.uint8(1)) << np.uint8(4))
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def _q6_k(raw: Bytes) -> Floats:
    low = _nibbles(raw[:, :128], 64).reshape(-1, 8, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    q = (low | ((high & np.uint8(3)).reshape(-1, 8, 32) << np.uint8(4))).astype(np.int8) - np.int8(32)
    d = (_half(raw[:, 208:210]) * raw[:, 192:208].view(np.int8).astype(np.float32))[..., None]
    return (d * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


TYPES = (
    BlockType(0, "f32", 1, 4, _f32),
    BlockType(1, "f16", 1, 2, _f16),
    BlockType(2, "q4_0", 32, 18, _q4_0),
    BlockType(3, "q4_1", 32, 20, _q4_1),
    BlockType(6, "q5_0", 32, 22, _q5_0),
    BlockType(7, "q5_1", 32, 24, _q5_1),
    BlockType(8, "q8_0", 32, 34, _q8_0),
    BlockType(12, "q4_k", 256, 144, _q4_k),
    BlockType(13, "q5_k", 256, 176, _q5_k),
    BlockType(14, "q6_k", 256, 210, _q6_k),
    BlockType(30, "bf16", 1, 2, _bf16),
)
BY_CODE = {t.code: t for t in TYPES}
BY_NAME = {t.name: t for t in TYPES}
