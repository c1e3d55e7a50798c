"""A tensor of a GGUF file to write: its values, some rows at a time, from the parameter that it is part of."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktcompile.weights.names.forms import Piece, Shape
from ktcompile.weights.source import WeightSource, values


@dataclass(frozen=True)
class Export:
    """A tensor of a GGUF file to write, and the parameter that its values come from."""

    name: str
    shape: Shape
    key: str
    pieces: tuple[Piece, ...] = field(repr=False)

    @property
    def exact(self) -> bool:
        """Whether llama.cpp wants it in f32: vectors, biases and routers, which it never quantises."""
        return len(self.shape) == 1 or not self.name.endswith(".weight") or ".ffn_gate_inp" in self.name

    def read(self, source: WeightSource, rows: slice) -> Tensor:
        """float32 values of `rows` of the leading axis (experts or heads of three axes), decoding little more."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"{self.name}: rows {rows} have a step; a range is needed")
        out = torch.empty((max(0, stop - start), *self.shape[1:]))
        blocks = [block for piece in self.pieces if (block := _needed(piece, start, stop)) is not None]
        if not blocks:
            return out
        # Decoded at once: heads lie close together, while a source decodes whole chunks for each of them.
        around = tuple(
            slice(min(w.start for w in axis), max(w.stop for w in axis))
            for axis in zip(*(b.where for b in blocks), strict=True)
        )
        found = values(source, self.key, where=around)
        for block in blocks:
            inside = found[
                tuple(
                    slice(w.start - a.start, w.stop - a.start, w.step) for w, a in zip(block.where, around, strict=True)
                )
            ]
            inside = inside.transpose(-2, -1) if block.transpose else inside
            target = out[block.rows]
            target.copy_(inside.reshape(target.shape))
        return out


@dataclass(frozen=True)
class _Block:
    """What some rows of a stored tensor need of a parameter, and which of these rows it is."""

    where: tuple[slice, ...]
    rows: int | slice
    transpose: bool


def _needed(piece: Piece, start: int, stop: int) -> _Block | None:
    """What of a piece lies in the rows `start:stop` of its tensor; None if nothing."""
    lead = piece.index[0] if piece.index else slice(0, piece.shape[0])
    if isinstance(lead, int):
        return _Block(piece.where, lead - start, piece.transpose) if start <= lead < stop else None
    step = lead.step or 1
    first = max(0, -(-(start - lead.start) // step))
    last = min(piece.shape[0], -(-(stop - lead.start) // step))
    if first >= last:
        return None
    rank = len(piece.shape)
    axis = len(piece.where) - (1 if piece.transpose and rank == 2 else rank)
    where = list(piece.where)
    where[axis] = _range(where[axis], first, last)
    rows = _range(slice(lead.start - start, None, step), first, last)
    return _Block(tuple(where), rows, piece.transpose)


def _range(of: slice, first: int, last: int) -> slice:
    """The entries `first:last` of a slice."""
    step = of.step or 1
    return slice(of.start + first * step, of.start + (last - 1) * step + 1, step)
