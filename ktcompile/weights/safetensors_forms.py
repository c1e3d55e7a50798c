"""How one tensor is stored in safetensors files: plain, FP8 with scales, packed int4, MXFP4 blocks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.file import Index
from ktcompile.weights.quoted import plain, quoted
from ktcompile.weights.safetensors_header import DTYPES, Stored
from ktcompile.weights.source import NATURAL, Part, TensorSpec, block_index, everywhere

Tensors = Mapping[str, Stored]

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype in NATURAL)
GROUPS = (32, 64, 128)

_QUANTISED = {"": "F8_E4M3", "_packed": "I32", "_blocks": "U8"}  # how names of quantised tensors end -> their type
_BESIDE = ("_scale_inv", "_scale", "_scales", "_shape", "_zero_point", "_g_idx")


class Form(Protocol):
    """One tensor with all that belongs to it; indices are of the stored tensor `part().name`."""

    def part(self) -> Part:
        """The tensor as a parameter of its own."""
        ...

    def beside(self) -> tuple[str, ...]:
        """Names of the other stored tensors that it is read with."""
        ...

    def read(self, index: Index) -> Tensor:
        """As `decode` takes it, read now."""
        ...

    def read_scale(self, index: Index) -> Tensor | None:
        """The scales as `decode` takes them, in fp32."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Values in F32, F16 or BF16."""

    name: str
    stored: Stored

    def part(self) -> Part:
        dtype, shape = DTYPES[self.stored.dtype], self.stored.shape
        return Part(self.name, TensorSpec(shape, dtype, NATURAL[dtype], self.stored.nbytes), everywhere(shape))

    def beside(self) -> tuple[str, ...]:
        return ()

    def read(self, index: Index) -> Tensor:
        return self.stored.read(index)

    def read_scale(self, index: Index) -> Tensor | None:
        return None


@dataclass(frozen=True, slots=True)
class Fp8:
    """`T` F8_E4M3 [..., rows, cols] with `T_scale_inv` (DeepSeek) or `T_scale` (compressed-tensors), both multiplied.

    Scales are one for each `block` x `block` values, for each row, or for all; where two of these have the same shape,
    they mean the same.
    """

    name: str
    stored: Stored
    scale_name: str
    scale: Stored
    block: int

    def part(self) -> Part:
        shape, rows, scales = self.stored.shape, self.stored.shape[:-1], self.scale.shape
        blocks = (*shape[:-2], *(-(-n // self.block) for n in shape[-2:]))
        of_rows = scales in ((*rows, 1), rows, (1,), ())
        if len(shape) < 2 or self.scale.dtype not in FLOATS or not (of_rows or scales == blocks):
            raise ModelFileError(
                f"{self.scale.file.path}: {quoted(self.scale_name)} is {self.scale.dtype} {list(scales)}; "
                f"{quoted(self.name)} {list(shape)} needs {list(blocks)} (blocks of {self.block}), {[*rows, 1]} (rows) "
                f"or one, in {', '.join(FLOATS)}"
            )
        encoding = f"fp8_block{self.block}" if scales == blocks else "fp8_row"
        spec = TensorSpec(shape, torch.float32, encoding, self.stored.nbytes + self.scale.nbytes)
        return Part(self.name, spec, everywhere(shape), scale=self.scale_name)

    def beside(self) -> tuple[str, ...]:
        return (self.scale_name,)

    def read(self, index: Index) -> Tensor:
        return self.stored.read(index)

    def read_scale(self, index: Index) -> Tensor | None:
        if self.part().spec.encoding != "fp8_row":
            return self.scale.read(block_index(index, len(self.stored.shape), self.block)).float()
        rows = self.stored.shape[:-1]
        index = index[: len(rows)]
        if math.prod(self.scale.shape) == 1:
            return self.scale.read(shape=()).float().expand(rows)[index][..., None]
        return self.scale.read(index, shape=(*rows, 1)).float()


@dataclass(frozen=True, slots=True)
class Int4:
    """`T_packed` I32 [rows, cols / 8] with `T_scale` [rows, cols / g], and `T_shape` that holds [rows, cols].

    compressed-tensors' "pack-quantized" format, 4 bits, symmetric.
    """

    name: str
    stored: Stored
    scale_name: str
    scale: Stored
    shape_name: str
    shape: Stored | None

    def part(self) -> Part:
        shape, scales = self.stored.shape, self.scale.shape
        cols = 8 * shape[-1] if shape else 0
        group = cols // scales[-1] if scales and scales[-1] and cols % scales[-1] == 0 else 0
        if len(shape) != 2 or group not in GROUPS or scales[:-1] != shape[:1] or self.scale.dtype not in FLOATS:
            raise ModelFileError(
                f"{self.scale.file.path}: {quoted(self.scale_name)} is {self.scale.dtype} {list(scales)}; "
                f"{quoted(self.name)} {list(shape)}, eight values in each, needs [rows, cols / g] "
                f"with g one of {', '.join(map(str, GROUPS))}, in {', '.join(FLOATS)}"
            )
        nbytes = self.stored.nbytes + self.scale.nbytes + (self.shape.nbytes if self.shape else 0)
        spec = TensorSpec((shape[0], cols), torch.float32, f"int4_group{group}", nbytes)
        return Part(self.name, spec, everywhere(spec.shape), scale=self.scale_name)

    def beside(self) -> tuple[str, ...]:
        return (self.scale_name, self.shape_name) if self.shape else (self.scale_name,)

    def read(self, index: Index) -> Tensor:
        """int32; ModelFileError if the value of `T_shape` is another. (Opening a model reads no values.)"""
        want = list(self.part().spec.shape)
        if self.shape and (found := _two_integers(self.shape)) != want:
            raise ModelFileError(
                f"{self.shape.file.path}: {quoted(self.shape_name)} is {found}; {quoted(self.name)} "
                f"{list(self.stored.shape)} holds {want}"
            )
        return self.stored.read(_leading(index, 1, self.name))

    def read_scale(self, index: Index) -> Tensor | None:
        return self.scale.read(_leading(index, 1, self.name)).float()


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """`T_blocks` U8 [E, rows, cols / 32, 16] with `T_scales` U8 [E, rows, cols / 32], as gpt-oss ships.

    Byte i of a block holds value 2 i in its low half and 2 i + 1 in its high half. The parameter is [E, cols, rows].
    """

    name: str
    stored: Stored
    scale_name: str
    scale: Stored

    def part(self) -> Part:
        shape, scales = self.stored.shape, self.scale.shape
        if len(shape) != 4 or shape[3] != 16 or scales != shape[:3] or self.scale.dtype != "U8":
            raise ModelFileError(
                f"{self.scale.file.path}: {quoted(self.scale_name)} is {self.scale.dtype} {list(scales)}; "
                f"{quoted(self.name)} {list(shape)} needs U8 [E, rows, blocks] and has itself to be "
                "[E, rows, blocks, 16]"
            )
        experts, rows, cols = shape[0], shape[1], 32 * shape[2]
        spec = TensorSpec((experts, rows, cols), torch.float32, "mxfp4", self.stored.nbytes + self.scale.nbytes)
        return Part(self.name, spec, everywhere((experts, cols, rows)), transpose=True)

    def beside(self) -> tuple[str, ...]:
        return (self.scale_name,)

    def read(self, index: Index) -> Tensor:
        """ggml's blocks, uint8 [..., rows, 17 * blocks]: the scale, then 16 bytes with values i and i + 16 in byte i.

        ModelFileError for a scale of 255: it is no number.
        """
        index = _leading(index, 2, self.name)
        scales = self.scale.read(index)
        if (scales == 255).any():
            raise ModelFileError(
                f"{self.scale.file.path}: {quoted(self.scale_name)} has a scale of 255, which is no number"
            )
        first, second = self.stored.read(index).chunk(2, -1)  # values 0..15 and 16..31
        even, odd = first & 15 | second << 4, first >> 4 | second & 0xF0
        return torch.cat([scales[..., None], torch.stack([even, odd], -1).flatten(-2)], -1).flatten(-2)

    def read_scale(self, index: Index) -> Tensor | None:
        return None


def tensor_of(name: str, tensors: Tensors) -> str | None:
    """Which tensor a stored one holds, in whatever form; None if it is only the scale or shape of another."""
    if name.endswith(_BESIDE):
        of = next(name.removesuffix(e) for e in _BESIDE if name.endswith(e))
        return None if any(_is(of + ending, ending, tensors) for ending in _QUANTISED) else name
    if name.endswith(("_packed", "_blocks")):
        ending = name[-7:]
        return name.removesuffix(ending) if _is(name, ending, tensors) else name
    return name


def form_of(name: str, tensors: Tensors, block: int) -> Form:
    """The form of a stored tensor; ModelFileError if it is not known or something that belongs to it is missing."""
    stored = tensors[name]
    if stored.dtype in FLOATS:
        return Plain(name, stored)
    tensor = tensor_of(name, tensors) or name
    if name == tensor + "_packed":
        for ending, why in (("_zero_point", "only symmetric integers"), ("_g_idx", "only groups in order")):
            if tensor + ending in tensors:
                raise ModelFileError(
                    f"{stored.file.path}: {quoted(name)} has a {quoted(tensor + ending)}; {why} are known"
                )
        scale, shape = tensor + "_scale", tensor + "_shape"
        return Int4(name, stored, scale, _partner(name, scale, tensors), shape, tensors.get(shape))
    if name == tensor + "_blocks":
        return Mxfp4(name, stored, tensor + "_scales", _partner(name, tensor + "_scales", tensors))
    if stored.dtype == "F8_E4M3":
        scale = next((tensor + e for e in ("_scale_inv", "_scale") if tensor + e in tensors), tensor + "_scale_inv")
        return Fp8(name, stored, scale, _partner(name, scale, tensors), block)
    raise ModelFileError(
        f"{stored.file.path}: {quoted(name)} is {stored.dtype}; known are {', '.join(FLOATS)}, F8_E4M3, "
        "I32 named '*_packed' and U8 named '*_blocks'"
    )


def _is(name: str, ending: str, tensors: Tensors) -> bool:
    return name in tensors and tensors[name].dtype == _QUANTISED[ending]


def _partner(name: str, wanted: str, tensors: Tensors) -> Stored:
    if wanted not in tensors:
        stored = tensors[name]
        raise ModelFileError(
            f"{stored.file.path}: {quoted(name)} is {stored.dtype}, but there is no {quoted(wanted)} for it"
        )
    return tensors[wanted]


def _two_integers(shape: Stored) -> object:
    """What a `T_shape` holds, or what it is if that is not known."""
    known = shape.dtype in ("I32", "I64") and shape.shape == (2,)
    return shape.read().tolist() if known else f"{shape.dtype} {list(shape.shape)}"


def _leading(index: Index, axes: int, name: str) -> Index:
    """The index of the leading axes, those before columns, which are stored several in one and cannot be cut."""
    if any(entry != slice(0, None) for entry in index[axes:]):
        raise ValueError(f"{plain(name)}: index {index} cuts columns that are stored together")
    return index[:axes]
