"""How stored tensors make up a parameter: one description for reading and for writing.

A form says which blocks (`Piece`) of which stored tensors are which blocks of the parameter. Reading takes the shapes
of the stored tensors, writing the shape of the parameter; what follows from them is the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from ktcompile.errors import ModelFileError
from ktcompile.weights.source import everywhere

Shape = tuple[int, ...]

MAX_COUNT = 65_536  # heads or experts: two pieces each


@dataclass(frozen=True)
class Sizes:
    """Counts that shapes alone do not tell; 0 where the model does not say."""

    heads: int = 0
    kv_heads: int = 0
    experts: int = 0
    nope: int = 0  # rows of a head's key without position (MLA)
    layers: int | None = None  # without those for multi-token prediction
    nextn: int = 0  # layers for multi-token prediction, after the others

    @classmethod
    def stored(cls, architecture: str, metadata: Mapping[str, object], where: str) -> "Sizes":
        """From the metadata of the file `where`; ModelFileError for a count that is no sensible integer."""

        def count(name: str, most: int = MAX_COUNT) -> int:
            key = f"{architecture}.{name}"
            value = metadata.get(key, 0)
            if type(value) is not int or not 0 <= value <= most:
                raise ModelFileError(f"{where}: {key} is {str(value)[:80]!r}; an integer from 0 to {most} is needed")
            return value

        heads = count("attention.head_count")
        blocks, nextn = count("block_count", 1_000_000), count("nextn_predict_layers", 1_000_000)
        return cls(
            heads=heads,
            kv_heads=count("attention.head_count_kv") or heads,
            experts=count("expert_count"),
            layers=max(0, blocks - nextn) if blocks else None,
            nextn=nextn,
        )

    @classmethod
    def of_config(cls, fields: Mapping[str, object]) -> "Sizes":
        """From the fields of a Hugging Face config."""

        def count(*names: str) -> int:
            found = (fields.get(name) for name in names)
            return next((value for value in found if type(value) is int), 0)

        return cls(
            heads=count("num_attention_heads"),
            kv_heads=count("num_key_value_heads", "num_attention_heads"),
            experts=count("n_routed_experts", "num_experts", "num_local_experts"),
            nope=count("qk_nope_head_dim"),
        )


@dataclass(frozen=True)
class Piece:
    """A block of a parameter, and the block of a stored tensor that has its values."""

    name: str
    shape: Shape  # as stored: after `index`, before `transpose`
    where: tuple[slice, ...]  # of the parameter
    index: tuple[int | slice, ...] = ()  # of the leading axis of the stored tensor; () = all of it
    transpose: bool = False  # swap the last two axes after reading


@dataclass(frozen=True)
class Form(ABC):
    """Stored tensors that make up a parameter. In names, `{L}` stands for the layer and `{E}` for each expert."""

    names: tuple[str, ...]

    def named(self, layer: str, sizes: Sizes) -> Iterator[str]:
        """The names of one layer, made one at a time: a hostile file counts experts that it does not have."""
        return (name.replace("{L}", layer) for name in self.names)

    def at(self, layer: str, sizes: Sizes) -> Self:
        """The form with the names of one layer."""
        return replace(self, names=tuple(self.named(layer, sizes)))

    @abstractmethod
    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """Shapes of the stored tensors, in the order of `names`; ValueError if the parameter cannot be one of these."""

    @abstractmethod
    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """What makes up the parameter, from the shapes of the tensors; ValueError if they do not fit together."""


@dataclass(frozen=True)
class Rows(Form):
    """Stored tensors one after the other along the rows (the last axis but one); one tensor is the parameter itself."""

    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """All have as many rows."""
        count = len(self.names)
        if count == 1:
            return (parameter,)
        if len(parameter) < 2 or parameter[-2] % count:
            raise ValueError(f"shape {parameter} does not split into {count} along the rows")
        return ((*parameter[:-2], parameter[-2] // count, parameter[-1]),) * count

    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """One for each tensor."""
        if len(stored) == 1:
            return (Piece(self.names[0], stored[0], everywhere(stored[0])),)
        first = stored[0]
        if any(len(s) < 2 or s[:-2] != first[:-2] or s[-1] != first[-1] for s in stored):
            raise ValueError(f"{self.names} have shapes {stored}, which do not stack along the rows")
        out = []
        row = 0
        for name, shape in zip(self.names, stored, strict=True):
            where = everywhere(shape)
            out.append(Piece(name, shape, (*where[:-2], slice(row, row + shape[-2]), where[-1])))
            row += shape[-2]
        return tuple(out)


@dataclass(frozen=True)
class OneRow(Form):
    """A parameter [1, n] that llama.cpp stores as [n]; files with [1, n] exist."""

    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """The row."""
        if len(parameter) != 2 or parameter[0] != 1:
            raise ValueError(f"shape {parameter}: one row is needed")
        return (parameter[1:],)

    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """The row."""
        (shape,) = stored
        if len(shape) == 1:
            return (Piece(self.names[0], shape, everywhere((1, *shape))),)
        if len(shape) != 2 or shape[0] != 1:
            raise ValueError(f"{self.names[0]} has shape {shape}, one row is needed")
        return (Piece(self.names[0], shape, everywhere(shape)),)


@dataclass(frozen=True)
class Rotated(Form):
    """Rows of each head in the order of ggml's rotary embedding, which turns neighbours: 0, d/2, 1, d/2 + 1, …

    Hugging Face turns row i of a head with row i + d/2; llama.cpp's converter permutes for `llama` alone.
    """

    count: Literal["heads", "kv_heads"] = "heads"

    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """The same."""
        return (parameter,)

    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """Two for each head: its even rows as stored are the first half of the parameter's, its odd ones the second."""
        (shape,) = stored
        heads = sizes.heads if self.count == "heads" else sizes.kv_heads
        if not heads or len(shape) != 2 or shape[0] % (2 * heads):
            raise ValueError(f"{self.names[0]} has shape {shape}, rows for {heads} heads of even size are needed")
        width = shape[0] // heads
        half = (width // 2, shape[1])
        out = []
        for first in range(0, shape[0], width):
            for odd in (0, 1):
                row = first + odd * half[0]
                where = (slice(row, row + half[0]), slice(0, shape[1]))
                out.append(Piece(self.names[0], half, where, (slice(first + odd, first + width, 2),)))
        return tuple(out)


@dataclass(frozen=True)
class KeyValueHeads(Form):
    """MLA's kv_b_proj [heads * (nope + v), lora] from k_b [heads, lora, nope] and v_b [heads, v, lora].

    For each head first its keys, transposed, then its values (llama.cpp splits and transposes them for absorption).
    """

    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """Of k_b and v_b."""
        heads, nope = sizes.heads, sizes.nope
        if len(parameter) != 2 or not heads or parameter[0] % heads or not 0 < nope < parameter[0] // heads:
            raise ValueError(f"shape {parameter} does not split into {heads} heads with keys of {nope}")
        rows, lora = parameter
        return (heads, lora, nope), (heads, rows // heads - nope, lora)

    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """Two for each head."""
        k, v = stored
        key, value = self.names
        matching = len(k) == len(v) == 3 and k[:2] == (v[0], v[2])
        if not matching or k[0] > MAX_COUNT:
            raise ValueError(
                f"{key} {k} and {value} {v}: must be [heads, lora, nope] and [heads, v, lora] with at most "
                f"{MAX_COUNT} heads"
            )
        heads, lora, nope = k
        out = []
        cols = slice(0, lora)
        for head in range(heads):
            row = head * (nope + v[1])
            out.append(Piece(key, (lora, nope), (slice(row, row + nope), cols), (head,), transpose=True))
            out.append(Piece(value, (v[1], lora), (slice(row + nope, row + nope + v[1]), cols), (head,)))
        return tuple(out)


@dataclass(frozen=True)
class EachExpert(Form):
    """Experts as files from before 2024-04 have them: one tensor [rows, cols] for each, or gate and up for each."""

    def named(self, layer: str, sizes: Sizes) -> Iterator[str]:
        """The names of one layer, expert by expert."""
        names = [name.replace("{L}", layer) for name in self.names]
        return (name.replace("{E}", str(expert)) for expert in range(sizes.experts) for name in names)

    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """Of each expert's tensors."""
        if len(parameter) != 3 or parameter[0] != sizes.experts or parameter[1] % self._each(sizes):
            raise ValueError(f"shape {parameter} does not split into {sizes.experts} experts")
        return ((parameter[1] // self._each(sizes), parameter[2]),) * len(self.names)

    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """One for each tensor."""
        shape = stored[0]
        if len(shape) != 2 or any(s != shape for s in stored):
            other = next((n, s) for n, s in zip(self.names, stored, strict=True) if len(s) != 2 or s != shape)
            raise ValueError(f"{other[0]} has shape {other[1]}, {self.names[0]} {shape}; they do not stack")
        rows, cols = shape
        out = []
        for i, name in enumerate(self.names):
            expert, part = divmod(i, self._each(sizes))
            where = (slice(expert, expert + 1), slice(part * rows, (part + 1) * rows), slice(0, cols))
            out.append(Piece(name, shape, where))
        return tuple(out)

    def _each(self, sizes: Sizes) -> int:
        return len(self.names) // sizes.experts


@dataclass(frozen=True)
class Columns(Form):
    """Stored tensors whose last axis alternates in the parameter's: gate and up of gpt-oss; one alone is all of it.

    `transpose`: stored are [experts, out, in], the parameter is [experts, in, out].
    """

    transpose: bool = False

    def shapes(self, parameter: Shape, sizes: Sizes) -> tuple[Shape, ...]:
        """All the same."""
        count = len(self.names)
        if len(parameter) < 2 or parameter[-1] % count:
            raise ValueError(f"shape {parameter} does not split into {count} along the columns")
        *lead, rows, cols = (*parameter[:-1], parameter[-1] // count)
        return ((*lead, cols, rows) if self.transpose else (*lead, rows, cols),) * count

    def pieces(self, stored: tuple[Shape, ...], sizes: Sizes) -> tuple[Piece, ...]:
        """One for each tensor."""
        shape = stored[0]
        if len(shape) < 2 or any(s != shape for s in stored):
            raise ValueError(f"{self.names} have shapes {stored}, which must be the same, of two axes or more")
        *lead, rows, cols = shape
        rows, cols = (cols, rows) if self.transpose else (rows, cols)
        count = len(stored)
        out = []
        for i, name in enumerate(self.names):
            across = slice(i, (cols - 1) * count + i + 1, count) if count > 1 else slice(0, cols)
            out.append(Piece(name, shape, (*everywhere((*lead, rows)), across), transpose=self.transpose))
        return tuple(out)
