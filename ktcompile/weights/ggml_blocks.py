"""Decoders of ggml's blocks, bit for bit those of the gguf package.

Each takes blocks as uint8 [n, block_bytes] and returns fp32 [n, block_values]. `d` is a block's scale, `m` or `dmin`
its offset, `q` the integers; low nibbles of a byte belong to the first half of a group, high ones to the second. The
order of the multiplications is part of the format: another one rounds differently.
Source: ggml-common.h and ggml-quants.c (llama.cpp), gguf/quants.py.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktcompile.weights import ggml_grids

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def f16(raw: Bytes) -> Floats:
    """Two bytes a block -> [n, 1]: also the scale of most other types."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Bytes, group: int) -> Bytes:
    """[n, bytes] -> [n, 2 * bytes]: of every `group` bytes first the low nibbles, then the high ones."""
    split = raw.reshape(len(raw), -1, 1, group) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    return (split & np.uint8(15)).reshape(len(raw), -1)


def _pairs(raw: Bytes) -> Bytes:
    """[n, bytes] -> [n, 4 * bytes]: of every 32 bytes first the lowest two bits, then the next two, and so on."""
    split = raw.reshape(len(raw), -1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return (split & np.uint8(3)).reshape(len(raw), -1)


def _bits(raw: Bytes) -> Bytes:
    """[n, bytes] -> [n, 8 * bytes]: the bits of each byte, lowest first."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=-1, bitorder="little")


def _fields(raw: Bytes, shifts: list[int], mask: int) -> Bytes:
    """[n, bytes] -> [n, len(shifts) * bytes]: of each byte a field at each of `shifts`."""
    split = raw[:, :, None] >> np.array(shifts, np.uint8)
    return (split & np.uint8(mask)).reshape(len(raw), -1)


def _words(raw: Bytes, dtype: type[np.uint16] | type[np.uint32]) -> NDArray[np.uint32]:
    """Little-endian words [n, words], as uint32."""
    return np.ascontiguousarray(raw).view(np.dtype(dtype).newbyteorder("<")).astype(np.uint32)


def f32(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view(np.float32)


def bf16(raw: Bytes) -> Floats:
    return (np.ascontiguousarray(raw).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def q4_0(raw: Bytes) -> Floats:
    q = _nibbles(raw[:, 2:], 16).astype(np.int8) - np.int8(8)
    return f16(raw[:, :2]) * q.astype(np.float32)


def q4_1(raw: Bytes) -> Floats:
    d, m = f16(raw[:, :2]), f16(raw[:, 2:4])
    return d * _nibbles(raw[:, 4:], 16).astype(np.float32) + m


def q5_0(raw: Bytes) -> Floats:
    q = (_nibbles(raw[:, 6:], 16) | (_bits(raw[:, 2:6]) << np.uint8(4))).astype(np.int8) - np.int8(16)
    return f16(raw[:, :2]) * q.astype(np.float32)


def q5_1(raw: Bytes) -> Floats:
    d, m = f16(raw[:, :2]), f16(raw[:, 2:4])
    q = _nibbles(raw[:, 8:], 16) | (_bits(raw[:, 4:8]) << np.uint8(4))
    return d * q.astype(np.float32) + m


def q8_0(raw: Bytes) -> Floats:
    return f16(raw[:, :2]) * raw[:, 2:].view(np.int8).astype(np.float32)


def _scales_and_mins(raw: Bytes) -> tuple[Floats, Floats]:
    """Header of Q4_K and Q5_K, 16 bytes -> d * scale and dmin * min, [n, 8, 1] each.

    After d and dmin come 12 bytes with eight 6-bit scales and eight 6-bit mins: four of each whole in the low bits
    of bytes 0-3 and 4-7; the others' low nibbles in bytes 8-11, their two high bits on top of bytes 0-7.
    """
    low, mid, top = np.split(raw[:, 4:16], 3, axis=-1)
    scale = np.concatenate([low & 0x3F, (top & 0x0F) | ((low >> 2) & 0x30)], axis=-1).astype(np.float32)
    least = np.concatenate([mid & 0x3F, (top >> 4) | ((mid >> 2) & 0x30)], axis=-1).astype(np.float32)
    return (f16(raw[:, :2]) * scale)[..., None], (f16(raw[:, 2:4]) * least)[..., None]


def q4_k(raw: Bytes) -> Floats:
    d, m = _scales_and_mins(raw)
    q = _nibbles(raw[:, 16:], 32).reshape(-1, 8, 32)
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def q5_k(raw: Bytes) -> Floats:
    d, m = _scales_and_mins(raw)
    high = raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)  # bit g of byte i: value i of group g
    q = _nibbles(raw[:, 48:], 32).reshape(-1, 8, 32) | ((high & np.uint8(1)) << np.uint8(4))
    return (d * q.astype(np.float32) - m).reshape(-1, 256)


def q6_k(raw: Bytes) -> Floats:
    low = _nibbles(raw[:, :128], 64).reshape(-1, 8, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    q = (low | ((high & np.uint8(3)).reshape(-1, 8, 32) << np.uint8(4))).astype(np.int8) - np.int8(32)
    d = (f16(raw[:, 208:210]) * raw[:, 192:208].view(np.int8).astype(np.float32))[..., None]
    return (d * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def q2_k(raw: Bytes) -> Floats:
    d = f16(raw[:, 80:82]) * (raw[:, :16] & 15).astype(np.float32)
    m = f16(raw[:, 82:84]) * (raw[:, :16] >> 4).astype(np.float32)
    q = _pairs(raw[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    return (d[..., None] * q - m[..., None]).reshape(-1, 256)


def q3_k(raw: Bytes) -> Floats:
    """Scales are 6 bits: low nibbles of 12 bytes' first eight (then their high ones), two bits each from the last four.

    The third bit of a value is stored inverted, as a subtraction of four.
    """
    low = _nibbles(raw[:, 96:104], 8)
    high = raw[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    scale = (low | ((high & np.uint8(3)).reshape(-1, 16) << np.uint8(4))).astype(np.int8) - np.int8(32)
    d = f16(raw[:, 108:110]) * scale.astype(np.float32)
    third = raw[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)  # bit g of byte i: value i of group g
    q = _pairs(raw[:, 32:96]) | ((third & np.uint8(1)) << np.uint8(2)).reshape(-1, 256)
    q = q.astype(np.int8) - np.int8(4)
    return (d[..., None] * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def tq1_0(raw: Bytes) -> Floats:
    """Five digits of -1, 0, 1 a byte, a fraction in base three: 3^k times the byte, modulo 256, starts with digit k."""
    digits = np.array([1, 3, 9, 27, 81], np.uint8).reshape(1, 5, 1)
    q = [raw[:, None, :32] * digits, raw[:, None, 32:48] * digits, raw[:, None, 48:52] * digits[:, :4]]
    whole = np.concatenate([part.reshape(len(raw), -1) for part in q], axis=-1).astype(np.uint16)
    return f16(raw[:, 52:54]) * (((whole * 3) >> 8).astype(np.int8) - np.int8(1)).astype(np.float32)


def tq2_0(raw: Bytes) -> Floats:
    return f16(raw[:, 64:66]) * (_pairs(raw[:, :64]).astype(np.int8) - np.int8(1)).astype(np.float32)


# Twice the values of e2m1, so that they are whole; the scales below are halved for it.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_HALF_E8M0 = (2.0 ** (np.arange(256) - 128)).astype(np.float32)  # 0 and 1 are subnormal; there is no NaN here


def _half_ue4m3() -> Floats:
    """Half of each unsigned e4m3 value, by byte; the top bit does not count. ggml has 0 for 0x7f, a NaN."""
    exponent, mantissa = np.arange(256) >> 3 & 15, np.arange(256) & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    value[0x7F] = 0
    return (value / 2).astype(np.float32)


_HALF_UE4M3 = _half_ue4m3()


def mxfp4(raw: Bytes) -> Floats:
    return _HALF_E8M0.take(raw[:, :1]) * _E2M1.take(_nibbles(raw[:, 1:], 16))


def nvfp4(raw: Bytes) -> Floats:
    """Four scales, then four groups of 16 values."""
    q = _E2M1.take(_nibbles(raw[:, 4:], 8)).reshape(-1, 4, 16)
    return (_HALF_UE4M3.take(raw[:, :4])[..., None] * q).reshape(-1, 64)


def iq4_nl(raw: Bytes) -> Floats:
    return f16(raw[:, :2]) * _NONLINEAR.take(_nibbles(raw[:, 2:], 16))


def iq4_xs(raw: Bytes) -> Floats:
    """Scales are 6 bits for each 32 values: two bits of a 16-bit word, then nibbles."""
    high = _fields(raw[:, 2:4], [0, 2, 4, 6], 3)
    scale = (_fields(raw[:, 4:8], [0, 4], 15) | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    d = f16(raw[:, :2]) * scale.astype(np.float32)
    return (d[..., None] * _NONLINEAR.take(_nibbles(raw[:, 8:], 16)).reshape(-1, 8, 32)).reshape(-1, 256)


# Signs of eight values, by byte: -1 where a bit is set, lowest bit first. Where only seven bits are stored, the eighth
# makes the number of set bits even.
_SIGNS = 1 - 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=-1, bitorder="little").astype(np.float32)
_EVEN_SIGNS = np.concatenate([_SIGNS[:128, :7], _SIGNS[:128].prod(axis=-1, keepdims=True)], axis=-1)


def _scaled(d: Floats, grid: Floats, sign: Floats) -> Floats:
    """d [n, groups] times signed points [n * points, ...], whose order of values is that of the block."""
    points = grid.reshape(*d.shape, -1)
    points *= sign.reshape(points.shape)
    points *= d[..., None]
    return points.reshape(len(d), -1)


def iq2_xxs(raw: Bytes) -> Floats:
    """For each 32 values: four grid bytes, then a word of four times seven signs and a 4-bit scale."""
    words = _words(raw[:, 2:], np.uint32).reshape(-1, 8, 2)
    scale = (words[..., 1] >> 28).astype(np.float32)
    d = f16(raw[:, :2]) * (np.float32(0.5) + scale) * np.float32(0.25)
    index = raw[:, 2:].reshape(-1, 8, 8)[..., :4]
    return _scaled(d, ggml_grids.IQ2_XXS.take(index, axis=0), _word_signs(words[..., 1]))


def _word_signs(words: NDArray[np.uint32]) -> Floats:
    """Four times seven signs in the low bits of each word -> [..., 4, 8]."""
    return _EVEN_SIGNS.take((words[..., None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127), axis=0)


def iq2_xs(raw: Bytes) -> Floats:
    """For each 8 values a word of nine grid bits and seven signs; for each 16 values a 4-bit scale."""
    words = _words(raw[:, 2:66], np.uint16)
    d = f16(raw[:, :2]) * (np.float32(0.5) + _fields(raw[:, 66:], [0, 4], 15)) * np.float32(0.25)
    return _scaled(d, ggml_grids.IQ2_XS.take(words & np.uint32(511), axis=0), _EVEN_SIGNS.take(words >> 9, axis=0))


def iq2_s(raw: Bytes) -> Floats:
    """Ten grid bits for each 8 values, the top two apart; eight signs; for each 16 values a 4-bit scale."""
    index = raw[:, 2:34] | _fields(raw[:, 66:74], [0, 2, 4, 6], 3).astype(np.uint16) << np.uint16(8)
    d = f16(raw[:, :2]) * (np.float32(0.5) + _fields(raw[:, 74:], [0, 4], 15)) * np.float32(0.25)
    return _scaled(d, ggml_grids.IQ2_S.take(index, axis=0), _SIGNS.take(raw[:, 34:66], axis=0))


def iq3_xxs(raw: Bytes) -> Floats:
    """A grid byte for each 4 values; then for each 32 values a word of four times seven signs and a 4-bit scale."""
    words = _words(raw[:, 66:], np.uint32)
    d = f16(raw[:, :2]) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return _scaled(d, ggml_grids.IQ3_XXS.take(raw[:, 2:66], axis=0), _word_signs(words))


def iq3_s(raw: Bytes) -> Floats:
    """Nine grid bits for each 4 values, the top one apart; eight signs a byte; for each 32 values a 4-bit scale."""
    index = raw[:, 2:66] | _bits(raw[:, 66:74]).astype(np.uint16) << np.uint16(8)
    d = f16(raw[:, :2]) * (1 + 2 * _fields(raw[:, 106:], [0, 4], 15))
    return _scaled(d, ggml_grids.IQ3_S.take(index, axis=0), _SIGNS.take(raw[:, 74:106], axis=0))


# Grid points of IQ1 moved up an eighth, then moved down an eighth.
_IQ1 = np.concatenate([ggml_grids.IQ1_S + np.float32(0.125), ggml_grids.IQ1_S - np.float32(0.125)])


def iq1_s(raw: Bytes) -> Floats:
    """Eleven grid bits for each 8 values; for each 32 values a word of their top bits, a 3-bit scale and the shift."""
    words = _words(raw[:, 34:], np.uint16)
    d = f16(raw[:, :2]) * (2 * ((words >> 12) & 7) + 1).astype(np.float32)
    top = (words[..., None] >> np.array([0, 3, 6, 9], np.uint32)) & np.uint32(7)
    index = raw[:, 2:34] | ((top << 8) | ((words >> 15) << 11)[..., None]).reshape(-1, 32)
    return _shifted(d, index)


def iq1_m(raw: Bytes) -> Floats:
    """As IQ1_S, with a shift for each 8 values and a scale for each 16; `d` is the top nibbles of four scale words."""
    words = _words(raw[:, 48:], np.uint16)
    nibbles = words >> 12
    half = (nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12).astype(np.uint16)
    scale = ((words[..., None] >> np.array([0, 3, 6, 9], np.uint32)) & np.uint32(7)).reshape(-1, 16)
    top = _fields(raw[:, 32:48], [0, 4], 15).astype(np.uint16)  # three bits of the grid, then the shift
    d = half.view(np.float16).astype(np.float32)[:, None] * (2 * scale + 1).astype(np.float32)
    return _shifted(d, raw[:, :32] | top << np.uint16(8))


def _shifted(d: Floats, index: NDArray[np.integer[Any]]) -> Floats:
    """d [n, groups] times the shifted points of `index` [n, 32] -> [n, 256]."""
    points = _IQ1.take(index, axis=0).reshape(*d.shape, -1)
    points *= d[..., None]
    return points.reshape(-1, 256)
