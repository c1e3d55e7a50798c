"""What a conversion wrote, how fast, and what was lost in it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ktcompile.convert import to_gguf, to_safetensors
from ktcompile.weights import GGUFSource, SafetensorsSource, WeightSource
from ktcompile.weights.quoted import plain

Planned = to_gguf.Planned | to_safetensors.Planned

_EXACT = {"f32", "bf16", "f16"}  # a step to or from them loses little or nothing


@dataclass(frozen=True)
class Report:
    """What was written. `notes` say what was rounded twice, fell back to another type or was left out."""

    path: Path
    bytes_in: int
    bytes_out: int
    weights: int
    seconds: float
    types: Mapping[str, int]  # encoding -> tensors
    copied: int  # tensors whose bytes are those of the source
    notes: tuple[str, ...]

    @property
    def bits(self) -> float:
        """Bits per weight of the whole, header and tokenizer included."""
        return 8 * self.bytes_out / max(1, self.weights)

    def text(self) -> str:
        """The figures on one line, the types and each note on lines of their own."""
        seconds = max(self.seconds, 1e-9)
        speed = f"read {self.bytes_in / seconds / 1e9:.2f} GB/s, wrote {self.bytes_out / seconds / 1e9:.2f} GB/s"
        sizes = f"{size(self.bytes_in)} -> {size(self.bytes_out)}"
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
        return "\n".join(
            (
                f"{self.path}: {sizes} in {self.seconds:.1f} s: {speed}; {self.bits:.2f} bits per weight",
                f"tensors: {types}; {self.copied} copied as they were",
                *self.notes,
            )
        )


def notes(source: WeightSource, tensors: Sequence[Planned]) -> Iterator[str]:
    """What a user should know about the result."""
    twice: Counter[tuple[str, str]] = Counter()
    fallen: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        before = source.spec(tensor.key).encoding
        if tensor.copied is None and not {before, tensor.encoding} & _EXACT:
            twice[before, tensor.encoding] += 1
        if tensor.fallback is not None:
            fallen[tensor.fallback, tensor.encoding] += 1
    if twice:
        yield f"rounded a second time, from an encoding that had lost precision already: {_list(twice, 'to')}"
    if fallen:
        yield f"rows do not divide into blocks, another type is used: {_list(fallen, 'as')}"
    left = tuple(source.unused()) if isinstance(source, GGUFSource | SafetensorsSource) else ()
    if left:
        yield f"left out, since no parameter of the model reads them: {len(left)} stored tensors, e.g. {plain(left[0])}"


def _list(pairs: Mapping[tuple[str, str], int], word: str) -> str:
    return ", ".join(f"{count} {old} {word} {new}" for (old, new), count in sorted(pairs.items()))


def size(count: int) -> str:
    """Bytes as people say them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"
