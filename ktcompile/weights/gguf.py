"""Weights in GGUF files, quantised by llama.cpp, under the names of the Hugging Face model."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.file import ModelFile
from ktcompile.weights.gguf_header import Stored, Value, read_header
from ktcompile.weights.names import ARCHITECTURES, Form, KeyValueHeads, Stacked
from ktcompile.weights.source import Part, TensorSpec, combine, everywhere, missing

MAX_HEADS = 65_536  # two parts each
_NATURAL = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")


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
        for shard in _shards(self.path):
            file = ModelFile(shard)
            header = read_header(file)
            metadata = header.metadata if metadata is None else metadata
            for name, stored in header.tensors.items():
                if name in self._stored:
                    raise ModelFileError(f"{shard}: tensor {name!r} is also in {self._stored[name][0].path.name}")
                self._stored[name] = (file, stored)
        self.metadata = metadata or {}
        self.architecture = self._architecture()
        self._forms = self._find_forms()

    def keys(self) -> Iterable[str]:
        """Names of the parameters whose tensors are all in the file."""
        return self._forms.keys()

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype, encoding and stored bytes of a whole parameter; ModelFileError if there is none."""
        return combine(key, self.parts(key))

    def parts(self, key: str) -> tuple[Part, ...]:
        """The stored pieces of a parameter: two for gate_up_proj, two per head for a split kv_b_proj, else one."""
        if key not in self._forms:
            raise missing(key, str(self.path), self._forms)
        form = self._forms[key]
        if isinstance(form, KeyValueHeads):
            return self._heads(form)
        return self._stack(key, form.names)

    def read(self, part: Part) -> Tensor:
        """The part as stored, read now: uint8 [..., rows, row_bytes] for block types, else f32, f16 or bf16."""
        file, stored = self._stored[part.name]
        dtype = _NATURAL.get(stored.type.name)
        if dtype is not None:
            return file.tensor(stored.offset, stored.shape, dtype, part.index)
        shape = (*stored.shape[:-1], stored.type.row_bytes(stored.shape[-1]))
        return file.tensor(stored.offset, shape, torch.uint8, part.index)

    def read_scale(self, part: Part) -> Tensor | None:
        """None: ggml keeps scales inside its blocks."""
        return None

    def unused(self) -> tuple[str, ...]:
        """Stored tensors that no parameter reads."""
        used = {name for form in self._forms.values() for name in form.names}
        return tuple(name for name in self._stored if name not in used)

    def _architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ModelFileError(
                f"{self.path}: general.architecture is {name!r}; known are {', '.join(sorted(ARCHITECTURES))}"
            )
        return name

    def _find_forms(self) -> dict[str, Form]:
        """For every parameter the first form whose tensors are all stored, in order of the layers."""
        layers = sorted({int(m.group(1)) for name in self._stored if (m := _BLOCK.match(name))})
        table = ARCHITECTURES[self.architecture]
        found: dict[str, Form] = {}
        for layer in layers:
            for key, forms in table.items():
                if "{L}" in key:
                    self._find(found, key, forms, str(layer))
        for key, forms in table.items():
            if "{L}" not in key:
                self._find(found, key, forms, "")
        return found

    def _find(self, found: dict[str, Form], key: str, forms: tuple[Form, ...], layer: str) -> None:
        for form in forms:
            names = tuple(name.replace("{L}", layer) for name in form.names)
            if not all(name in self._stored for name in names):
                continue
            is_heads = isinstance(form, KeyValueHeads)
            found[key.replace("{L}", layer)] = KeyValueHeads(*names) if is_heads else Stacked(names)
            return

    def _piece(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        """Spec of a piece of a stored tensor with whole rows."""
        kind = self._stored[name][1].type
        rows = 1
        for n in shape[:-1]:
            rows *= n
        return TensorSpec(shape, _NATURAL.get(kind.name, torch.float32), kind.name, rows * kind.row_bytes(shape[-1]))

    def _stack(self, key: str, names: tuple[str, ...]) -> tuple[Part, ...]:
        shapes = [self._stored[name][1].shape for name in names]
        if len(names) > 1 and any(len(s) < 2 or s[:-2] != shapes[0][:-2] or s[-1] != shapes[0][-1] for s in shapes):
            raise ModelFileError(f"{self.path}: {key}: {names} have shapes {shapes}, which do not stack along the rows")
        parts = []
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            where = everywhere(shape)
            if len(names) > 1:
                where = (*where[:-2], slice(row, row + shape[-2]), where[-1])
                row += shape[-2]
            parts.append(Part(name, self._piece(name, shape), where))
        return tuple(parts)

    def _heads(self, form: KeyValueHeads) -> tuple[Part, ...]:
        k_shape, v_shape = (self._stored[name][1].shape for name in form.names)
        matching = len(k_shape) == len(v_shape) == 3 and k_shape[:2] == (v_shape[0], v_shape[2])
        if not matching or k_shape[0] > MAX_HEADS:
            raise ModelFileError(
                f"{self.path}: {form.key} {k_shape} and {form.value} {v_shape}: must be [heads, lora, nope] and "
                f"[heads, v, lora] with at most {MAX_HEADS} heads"
            )
        heads, lora, nope = k_shape
        v = v_shape[1]
        key_spec, value_spec = self._piece(form.key, (lora, nope)), self._piece(form.value, (v, lora))
        parts = []
        for head in range(heads):
            row = head * (nope + v)
            cols = slice(0, lora)
            parts.append(Part(form.key, key_spec, (slice(row, row + nope), cols), (head,), transpose=True))
            parts.append(Part(form.value, value_spec, (slice(row + nope, row + nope + v), cols), (head,)))
        return tuple(parts)


def _shards(path: Path) -> list[Path]:
    """All files of a split model in order, or the one file."""
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    stem, _, count = match.groups()
    paths = [path.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    absent = [p.name for p in paths if not p.is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ModelFileError(f"{path}: the model has {len(paths)} files; missing: {', '.join(absent[:3])}{more}")
    return paths
