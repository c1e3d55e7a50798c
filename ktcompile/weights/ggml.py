"""The block encodings of ggml: every type that the gguf package can decode, with its sizes and its decoder.

A type in `TYPES` is all that it takes to read it: the header parser looks codes up in BY_CODE and refuses the others,
sources look names up in BY_NAME.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ktcompile.weights import ggml_blocks
from ktcompile.weights.ggml_blocks import Bytes, Floats

PIECE_VALUES = 1 << 16
"""Decoded at a time: a decoder's temporaries, a few times this in fp32, then stay in the cache."""


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

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_values

    def decode(self, raw: Bytes) -> Floats:
        """Decode rows: uint8 [..., row_bytes] -> fp32 [..., cols], new memory. Works on PIECE_VALUES at a time."""
        cols = raw.shape[-1] // self.block_bytes * self.block_values
        blocks = raw.reshape(-1, self.block_bytes)
        out = np.empty((len(blocks), self.block_values), np.float32)
        step = PIECE_VALUES // self.block_values
        with np.errstate(all="ignore"):  # a damaged scale may be Inf or NaN; that is data here, not an error
            for start in range(0, len(blocks), step):
                out[start : start + step] = self.blocks(blocks[start : start + step])
        return out.reshape(*raw.shape[:-1], cols)


TYPES = (
    BlockType(0, "f32", 1, 4, ggml_blocks.f32),
    BlockType(1, "f16", 1, 2, ggml_blocks.f16),
    BlockType(2, "q4_0", 32, 18, ggml_blocks.q4_0),
    BlockType(3, "q4_1", 32, 20, ggml_blocks.q4_1),
    BlockType(6, "q5_0", 32, 22, ggml_blocks.q5_0),
    BlockType(7, "q5_1", 32, 24, ggml_blocks.q5_1),
    BlockType(8, "q8_0", 32, 34, ggml_blocks.q8_0),
    BlockType(10, "q2_k", 256, 84, ggml_blocks.q2_k),
    BlockType(11, "q3_k", 256, 110, ggml_blocks.q3_k),
    BlockType(12, "q4_k", 256, 144, ggml_blocks.q4_k),
    BlockType(13, "q5_k", 256, 176, ggml_blocks.q5_k),
    BlockType(14, "q6_k", 256, 210, ggml_blocks.q6_k),
    BlockType(16, "iq2_xxs", 256, 66, ggml_blocks.iq2_xxs),
    BlockType(17, "iq2_xs", 256, 74, ggml_blocks.iq2_xs),
    BlockType(18, "iq3_xxs", 256, 98, ggml_blocks.iq3_xxs),
    BlockType(19, "iq1_s", 256, 50, ggml_blocks.iq1_s),
    BlockType(20, "iq4_nl", 32, 18, ggml_blocks.iq4_nl),
    BlockType(21, "iq3_s", 256, 110, ggml_blocks.iq3_s),
    BlockType(22, "iq2_s", 256, 82, ggml_blocks.iq2_s),
    BlockType(23, "iq4_xs", 256, 136, ggml_blocks.iq4_xs),
    BlockType(29, "iq1_m", 256, 56, ggml_blocks.iq1_m),
    BlockType(30, "bf16", 1, 2, ggml_blocks.bf16),
    BlockType(34, "tq1_0", 256, 54, ggml_blocks.tq1_0),
    BlockType(35, "tq2_0", 256, 66, ggml_blocks.tq2_0),
    BlockType(39, "mxfp4", 32, 17, ggml_blocks.mxfp4),
    BlockType(40, "nvfp4", 64, 36, ggml_blocks.nvfp4),
)
BY_CODE = {t.code: t for t in TYPES}
BY_NAME = {t.name: t for t in TYPES}
