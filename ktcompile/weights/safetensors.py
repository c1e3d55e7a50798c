"""Weights in safetensors files, as Hugging Face repositories hold them: plain, FP8, packed int4 and MXFP4."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.collection import no_collection
from ktcompile.weights.file import ModelFile
from ktcompile.weights.quoted import quoted
from ktcompile.weights.safetensors_forms import Form, form_of, tensor_of
from ktcompile.weights.safetensors_header import Stored, read_header, shards
from ktcompile.weights.source import Part, TensorSpec, combine, missing

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.")
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight", re.DOTALL)
_PLACES = {  # projection of one expert -> the parameter it is a piece of, and which piece; w1, w3, w2 are Mixtral's
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w2": ("down_proj", 0),
}
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_WHOLE = (-1, 0)  # the place of a tensor that is a parameter by itself
_MIXTRAL = re.compile(r".*\.block_sparse_moe\.experts\.\d{1,6}\.w1\.weight(_packed)?", re.DOTALL)
_NO_PARAMETER = (
    ".rotary_emb.inv_freq",
    *(f".{what}_scale" for what in ("input", "output", "activation", "k", "q", "v")),
)
"""A table that the model computes itself; scales of activations and caches, which are not quantised here."""


class SafetensorsSource:
    """A folder with safetensors shards or one file; opening reads headers only.

    Parameters have the names and shapes of transformers 5: experts stored one by one appear as `experts.gate_up_proj`
    [E, 2I, H], gate first, and `experts.down_proj` [E, H, I]; Mixtral's `block_sparse_moe` is `mlp`.
    What is not plain is known by the names of its tensors:
    - `T` F8_E4M3 with `T_scale_inv` or `T_scale`: "fp8_block<b>" with a scale for each b x b values (DeepSeek),
      "fp8_row" with one for each row or for all of them (compressed-tensors).
    - `T_packed` I32 [rows, cols / 8] with `T_scale` [rows, cols / g] and `T_shape`: "int4_group<g>"
      (compressed-tensors, Kimi-K2).
    - `T_blocks` U8 [E, rows, cols / 32, 16] with `T_scales` U8 [E, rows, cols / 32]: "mxfp4" of a parameter
      [E, cols, rows] (gpt-oss).
    """

    def __init__(self, path: str | Path, *, block: int = 128, layers: int | None = None) -> None:
        """Open a folder (index or single file) or a .safetensors file.

        `block` is the side of FP8 scale blocks; layers from number `layers` on (multi-token prediction) are left out of
        `keys` and reported by `unused`, but can still be asked for.
        Raises ModelFileError for missing shards, paths that leave the folder, damaged headers and a parameter that is
        there twice.
        """
        self.path = Path(path)
        self._block = block
        self._stored: dict[str, Stored] = {}
        self._strays: list[str] = []  # stored, but not in the index
        self._names: dict[str, dict[tuple[int, int], str]] = {}  # parameter -> (expert, piece) -> stored tensor
        with no_collection():
            self._read_headers()
            self._is_mixtral = any(".w1." in name and _MIXTRAL.fullmatch(name) for name in self._stored)
            for name in self._stored:
                self._add(name)
        self._forms: dict[str, Form] = {}  # of tensors that were asked for; at most one each, as of the parts
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._keys = tuple(key for key in self._names if layers is None or _layer(key) < layers)

    @property
    def files(self) -> Sequence[ModelFile]:
        """The open files."""
        return tuple({id(stored.file): stored.file for stored in self._stored.values()}.values())

    def keys(self) -> Iterable[str]:
        """Names of the parameters, experts fused, without the layers beyond `layers`."""
        return self._keys

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype, encoding and stored bytes of a whole parameter; ModelFileError if there is none."""
        if key not in self._specs:
            self._specs[key] = combine(key, self.parts(key))
        return self._specs[key]

    def parts(self, key: str) -> tuple[Part, ...]:
        """The stored pieces of a parameter: 2 E for a gate_up_proj of single experts, E for down_proj, else one.

        Raises ModelFileError if there is none, it cannot be decoded, or its tensors do not fit together.
        """
        if key not in self._names:
            raise missing(key, str(self.path), self._names)
        if key not in self._parts:
            found = self._names[key]
            whole = _WHOLE in found
            self._parts[key] = (self._form(found[_WHOLE]).part(),) if whole else self._fused(key, found)
        return self._parts[key]

    def read(self, part: Part) -> Tensor:
        """The part as `decode` takes it, read now; MXFP4 in ggml's blocks.

        Raises ModelFileError for a `weight_shape` that contradicts the header and an MXFP4 scale that is no number.
        """
        return self._form(part.name).read(part.index)

    def read_scale(self, part: Part) -> Tensor | None:
        """The scales of a part as `decode` takes them, in fp32; None for encodings without."""
        return self._form(part.name).read_scale(part.index)

    def unused(self) -> tuple[str, ...]:
        """Stored tensors that no parameter of `keys` reads, such as those of a multi-token-prediction layer."""
        used: set[str] = set()
        for key in self._keys:
            for part in self.parts(key):
                used.update((part.name, *self._form(part.name).beside()))
        return (*(name for name in self._stored if name not in used), *self._strays)

    def _read_headers(self) -> None:
        for shard, listed in shards(self.path).items():
            found = read_header(ModelFile(shard))
            absent = sorted(listed - found.keys()) if listed is not None else []
            if absent:
                raise ModelFileError(
                    f"{shard}: lacks {len(absent)} tensors that the index promises, e.g. {quoted(absent[0])}"
                )
            if listed is None or len(listed) == len(found):
                self._stored |= found
                continue
            self._stored |= {name: stored for name, stored in found.items() if name in listed}
            self._strays += [name for name in found if name not in listed]

    def _add(self, name: str) -> None:
        """Enter a stored tensor under the parameter that it belongs to."""
        key = tensor_of(name, self._stored)
        if key is None or key.endswith(_NO_PARAMETER):
            return
        place = _WHOLE
        if self._is_mixtral:
            key = key.replace(".block_sparse_moe.", ".mlp.")
        if ".experts." in key and (match := _EXPERT.fullmatch(key)):
            parameter, piece = _PLACES[match[3]]
            key, place = f"{match[1]}.{parameter}", (int(match[2]), piece)
        found = self._names.setdefault(key, {})
        if place in found or (found and _WHOLE in (place, *found)):
            other = found.get(place, next(iter(found.values())))
            both = f"{quoted(other)} and in {quoted(name)}"
            raise ModelFileError(f"{self.path}: {quoted(key)} is stored twice, in {both}")
        found[place] = name

    def _fused(self, key: str, found: Mapping[tuple[int, int], str]) -> tuple[Part, ...]:
        prefix, _, kind = key.rpartition(".")
        projections = _PROJECTIONS[kind]
        places = list(itertools.product(range(max(found)[0] + 1), range(len(projections))))
        if (absent := next((place for place in places if place not in found), None)) is not None:
            name = f"{prefix}.{absent[0]}.{projections[absent[1]]}.weight"
            raise ModelFileError(f"{self.path}: {quoted(name)} is missing; other experts are there")
        parts: list[Part] = []
        for expert, piece in places:
            part = self._form(found[expert, piece]).part()
            first = parts[0] if parts else part
            if part.spec.shape != first.spec.shape or len(first.spec.shape) != 2:
                raise ModelFileError(
                    f"{self.path}: {quoted(part.name)} has shape {list(part.spec.shape)}, {quoted(first.name)} "
                    f"{list(first.spec.shape)}; experts are matrices of one shape"
                )
            spec = first.spec if part.spec == first.spec else part.spec  # one object for all: there may be 46,000
            rows, cols = spec.shape
            where = (slice(expert, expert + 1), slice(piece * rows, (piece + 1) * rows), slice(0, cols))
            parts.append(Part(part.name, spec, where, part.index, part.transpose, part.scale))
        return tuple(parts)

    def _form(self, name: str) -> Form:
        if name not in self._forms:
            self._forms[name] = form_of(name, self._stored, self._block)
        return self._forms[name]


def _layer(key: str) -> int:
    match = _LAYER.match(key)
    return int(match.group(1)) if match else -1
