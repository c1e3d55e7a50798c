"""Weights in GGUF files, quantised by llama.cpp, under the names of the Hugging Face model."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.file import ModelFile
from ktcompile.weights.gguf_header import Stored, Value, read_header
from ktcompile.weights.names import ARCHITECTURES, Sizes, absent, find_forms
from ktcompile.weights.quoted import listed, plain, quoted
from ktcompile.weights.source import NATURAL_DTYPES, Part, TensorSpec, combine, missing, size_of

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GGUFSource:
    """One GGUF file or all files of a split one; opening reads headers only.

    `metadata` is the header's (the first file's), as read_header gives it.
    """

    metadata: Mapping[str, Value]

    def __init__(self, path: str | Path) -> None:
        """Open a .gguf file; of a split one any file `-0000N-of-0000M`.

        Raises ModelFileError if a file is missing or damaged, or the architecture is not known.
        """
        self.path = Path(path)
        self._stored: dict[str, tuple[ModelFile, Stored]] = {}
        metadata: Mapping[str, Value] | None = None
        for shard in shards(self.path):
            file = ModelFile(shard)
            header = read_header(file)
            metadata = header.metadata if metadata is None else metadata
            for name, stored in header.tensors.items():
                if name in self._stored:
                    other = plain(self._stored[name][0].path.name)
                    raise ModelFileError(f"{shard}: tensor {quoted(name)} is also in {other}")
                self._stored[name] = (file, stored)
        self.metadata = metadata or {}
        self.architecture = self._architecture()
        self._sizes = Sizes.stored(self.architecture, self.metadata, str(self.path))
        self._forms = find_forms(self.architecture, self._stored, self._sizes)
        self._parts: dict[str, tuple[Part, ...]] = {}  # of the parameters that were asked for
        self._specs: dict[str, TensorSpec] = {}

    @property
    def files(self) -> Sequence[ModelFile]:
        """The open files, in order."""
        return tuple({id(file): file for file, _ in self._stored.values()}.values())

    def keys(self) -> Iterable[str]:
        """Names of the parameters whose tensors are all in the file."""
        return self._forms.keys()

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype, encoding and stored bytes of a whole parameter; ModelFileError if there is none."""
        if key not in self._specs:
            self._specs[key] = combine(key, self.parts(key))
        return self._specs[key]

    def parts(self, key: str) -> tuple[Part, ...]:
        """The stored pieces of a parameter: two for gate_up_proj, two a head for some of attention, else mostly one."""
        if key not in self._forms:
            raise self._missing(key)
        if key not in self._parts:
            self._parts[key] = self._made(key)
        return self._parts[key]

    def read(self, part: Part) -> Tensor:
        """The part as stored, read now: uint8 [..., rows, row_bytes] for block types, else f32, f16 or bf16."""
        file, stored = self._stored[part.name]
        dtype = NATURAL_DTYPES.get(stored.type.name)
        if dtype is not None:
            return file.tensor(stored.offset, stored.shape, dtype, part.index)
        shape = (*stored.shape[:-1], stored.type.row_bytes(stored.shape[-1]))
        return file.tensor(stored.offset, shape, torch.uint8, part.index)

    def read_scale(self, part: Part) -> Tensor | None:
        """None: ggml keeps scales inside its blocks."""
        return None

    def stored(self) -> Collection[str]:
        """Names of all tensors in the file."""
        return self._stored.keys()

    def unused(self) -> tuple[str, ...]:
        """Stored tensors that no parameter reads."""
        used = {name for form in self._forms.values() for name in form.names}
        return tuple(name for name in self._stored if name not in used)

    def _made(self, key: str) -> tuple[Part, ...]:
        form = self._forms[key]
        try:
            pieces = form.pieces(tuple(self._stored[name][1].shape for name in form.names), self._sizes)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {key}: {error}") from error
        return tuple(Part(p.name, self._piece(p.name, p.shape), p.where, p.index, p.transpose) for p in pieces)

    def _architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            shown = quoted(name) if isinstance(name, str) else str(name)[:80]
            raise ModelFileError(
                f"{self.path}: general.architecture is {shown}; known are {', '.join(sorted(ARCHITECTURES))}"
            )
        return name

    def _missing(self, key: str) -> ModelFileError:
        """The error for a parameter that is not all here, naming the tensors that it lacks."""
        lacking = absent(self.architecture, key, self._stored, self._sizes)
        if not lacking:
            return missing(key, str(self.path), self._forms)
        return ModelFileError(f"{self.path}: no parameter {quoted(key)}: the file lacks {listed(lacking)}")

    def _piece(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """Spec of a piece of a stored tensor with whole rows."""
        kind = self._stored[name][1].type
        dtype = NATURAL_DTYPES.get(kind.name, torch.float32)
        return TensorSpec(shape, dtype, kind.name, size_of(shape, kind.name))


def shards(path: Path) -> list[Path]:
    """All files of a split model in order, or the one file."""
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    names = [f"{stem}-{i:05d}-of-{count}.gguf" for i in range(1, int(count) + 1)]
    if path.name not in names:
        raise ModelFileError(f"{path}: the name says file {int(match[2])} of {int(count)}")
    try:
        there = set(os.listdir(path.parent))
    except OSError:  # files that cannot be listed may still be opened
        there = set(names)
    absent = [name for name in names if name not in there or not os.path.isfile(os.path.join(path.parent, name))]
    if absent:
        raise ModelFileError(f"{path}: the model has {len(names)} files; missing: {listed(absent)}")
    return [path.with_name(name) for name in names]
