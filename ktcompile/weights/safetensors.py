"""Weights in safetensors files, as Hugging Face repositories hold them, with DeepSeek's block-scaled FP8."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ktcompile.errors import ModelFileError
from ktcompile.weights.file import Index, ModelFile
from ktcompile.weights.json import load_json, parse_json
from ktcompile.weights.source import NATURAL, Part, TensorSpec, block_index, combine, everywhere, missing

MAX_HEADER_BYTES = 32 << 20  # a shard of a 671B model has 100 KB
MAX_INDEX_BYTES = 128 << 20  # 671B: 9 MB
INDEX = "model.safetensors.index.json"

_DTYPES = {  # name in the file -> (dtype to read as, bytes)
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
}
_BITS = {"BOOL": 8, "F4": 4, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
_BITS |= {"F8_E5M2": 8, "F8_E8M0": 8, "F64": 64, "C64": 64, **{name: 8 * size for name, (_, size) in _DTYPES.items()}}
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(gate_proj|up_proj|down_proj)\.weight", re.DOTALL)
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d{1,6})\.")
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class _Stored:
    """A tensor as a header describes it; `offset` counts from the start of the file."""

    file: ModelFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsSource:
    """A folder with safetensors shards or one file; opening reads headers only.

    Per-expert tensors appear as the fused parameters of transformers: `experts.gate_up_proj` [E, 2I, H], gate first,
    and `experts.down_proj` [E, H, I].
    """

    def __init__(self, path: str | Path, *, block: int = 128, layers: int | None = None) -> None:
        """Open a folder (index or single file) or a .safetensors file.

        `block` is the side of FP8 scale blocks; layers from number `layers` on (multi-token prediction) are left out of
        `keys` and reported by `unused`, but can still be asked for.
        Raises ModelFileError for missing shards, paths that leave the folder and damaged headers.
        """
        self.path = Path(path)
        self._block = block
        self._stored: dict[str, _Stored] = {}
        self._strays: list[str] = []  # stored, but not in the index
        for shard, listed in _shards(self.path).items():
            found = _read_header(ModelFile(shard))
            absent = sorted(listed - found.keys()) if listed is not None else []
            if absent:
                raise ModelFileError(
                    f"{shard}: lacks {len(absent)} tensors that the index promises, e.g. {absent[0]!r}"
                )
            for name, stored in found.items():
                if listed is not None and name not in listed:
                    self._strays.append(name)
                    continue
                self._stored[name] = stored
        self._experts: dict[str, dict[int, set[str]]] = {}
        self._names: dict[str, None] = {}  # parameter names in file order
        for name in self._stored:
            self._add(name)
        self._keys = tuple(key for key in self._names if layers is None or _layer(key) < layers)

    def keys(self) -> Iterable[str]:
        """Names of the parameters, experts fused, without the layers beyond `layers`."""
        return self._keys

    def spec(self, key: str) -> TensorSpec:
        """Shape, dtype, encoding and stored bytes of a whole parameter; ModelFileError if there is none."""
        return combine(key, self.parts(key))

    def parts(self, key: str) -> tuple[Part, ...]:
        """The stored pieces of a parameter: 2 E for a fused gate_up_proj, E for down_proj, else one."""
        if key not in self._names:
            raise missing(key, str(self.path), self._names)
        if key in self._stored:
            spec, scale = self._piece(key)
            return (Part(key, spec, everywhere(spec.shape), scale=scale),)
        prefix, _, kind = key.rpartition(".")
        return self._fused(prefix, ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",))

    def read(self, part: Part) -> Tensor:
        """The values of the part in their own dtype, read now; FP8 as torch.float8_e4m3fn."""
        return self._read(part.name, part.index)

    def read_scale(self, part: Part) -> Tensor | None:
        """The fp32 scales of an FP8 part, [..., ceil(rows / block), ceil(cols / block)]; None for other encodings."""
        if part.scale is None:
            return None
        return self._read(part.scale, block_index(part.index, len(self._stored[part.name].shape), self._block))

    def unused(self) -> tuple[str, ...]:
        """Stored tensors that no parameter of `keys` reads, such as those of a multi-token-prediction layer."""
        used: set[str] = set()
        for key in self._keys:
            for part in self.parts(key):
                used.update((part.name, part.scale or part.name))
        return (*(name for name in self._stored if name not in used), *self._strays)

    def _add(self, name: str) -> None:
        """Enter a stored tensor under the parameter that it belongs to."""
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._stored:
            return
        match = _EXPERT.fullmatch(name)
        if not match:
            self._names[name] = None
            return
        prefix, number, kind = match.groups()
        self._experts.setdefault(prefix, {}).setdefault(int(number), set()).add(kind)
        self._names[f"{prefix}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"] = None

    def _fused(self, prefix: str, kinds: tuple[str, ...]) -> tuple[Part, ...]:
        experts = self._experts[prefix]
        for expert, kind in itertools.product(range(max(experts) + 1), kinds):
            if kind not in experts.get(expert, ()):
                raise ModelFileError(
                    f"{self.path}: {f'{prefix}.{expert}.{kind}.weight'!r} is missing; other experts are there"
                )
        parts = []
        for expert in range(len(experts)):
            row = 0
            for kind in kinds:
                name = f"{prefix}.{expert}.{kind}.weight"
                spec, scale = self._piece(name)
                if len(spec.shape) != 2:
                    raise ModelFileError(f"{self.path}: {name!r} has shape {list(spec.shape)}; an expert is a matrix")
                rows, cols = spec.shape
                where = (slice(expert, expert + 1), slice(row, row + rows), slice(0, cols))
                parts.append(Part(name, spec, where, scale=scale))
                row += rows
        return tuple(parts)

    def _piece(self, name: str) -> tuple[TensorSpec, str | None]:
        """Spec of a stored tensor with its scales, and their name."""
        stored = self._stored[name]
        if stored.dtype not in _DTYPES:
            raise ModelFileError(f"{stored.file.path}: {name!r} is {stored.dtype}; known are {', '.join(_DTYPES)}")
        dtype = _DTYPES[stored.dtype][0]
        if dtype in NATURAL:
            return TensorSpec(stored.shape, dtype, NATURAL[dtype], stored.nbytes), None
        scales = self._stored.get(name + _SCALE)
        if scales is None or len(stored.shape) < 2:
            raise ModelFileError(f"{stored.file.path}: {name!r} is FP8, but there is no {name + _SCALE!r} for it")
        blocks = tuple(-(-n // self._block) for n in stored.shape[-2:])
        if scales.shape != (*stored.shape[:-2], *blocks) or scales.dtype != "F32":
            raise ModelFileError(
                f"{scales.file.path}: {name + _SCALE!r} is {scales.dtype} {list(scales.shape)}; "
                f"blocks of {self._block} need F32 {[*stored.shape[:-2], *blocks]}"
            )
        encoding = f"fp8_block{self._block}"
        return TensorSpec(stored.shape, torch.float32, encoding, stored.nbytes + scales.nbytes), name + _SCALE

    def _read(self, name: str, index: Index) -> Tensor:
        stored = self._stored[name]
        return stored.file.tensor(stored.offset, stored.shape, _DTYPES[stored.dtype][0], index)


def _layer(key: str) -> int:
    match = _LAYER.match(key)
    return int(match.group(1)) if match else -1


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """Files of a model with the tensors that the index says are in them (None without an index)."""
    if path.is_file():
        return {path: None}
    if not path.is_dir():
        raise ModelFileError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        return _index(path / INDEX)
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = f"{len(files)} safetensors files, but no {INDEX}" if files else "no safetensors file"
        raise ModelFileError(f"{path}: {names}; a folder needs one file, or shards with an index")
    return {files[0]: None}


def _index(path: Path) -> dict[Path, set[str] | None]:
    content = load_json(path, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{path}: weight_map: must be an object that gives a file for every tensor")
    shards: dict[Path, set[str] | None] = {}
    names: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "\0" in file or re.search(r"[/\\]", file):
            raise ModelFileError(
                f"{path}: weight_map: {tensor[:200]!r} is in {str(file)[:200]!r}; "
                "shards are *.safetensors files in the same folder"
            )
        names.setdefault(file, set()).add(tensor)
    absent = [file for file in names if not (path.parent / file).is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ModelFileError(f"{path}: {len(absent)} of {len(names)} shards are missing: {', '.join(absent[:3])}{more}")
    for file, tensors in names.items():
        shards[path.parent / file] = tensors
    return shards


def _read_header(file: ModelFile) -> dict[str, _Stored]:
    """Check and parse the header of one file: 8 bytes of length, JSON, data without holes or overlaps."""
    if file.size_bytes < 8:
        raise ModelFileError(f"{file.path}: {file.size_bytes} bytes; a safetensors file has at least 8")
    length = int.from_bytes(file.read(0, 8), "little")
    most = min(MAX_HEADER_BYTES, file.size_bytes - 8)
    if length > most:
        raise ModelFileError(
            f"{file.path}: byte 0: header length {length}; the file leaves {file.size_bytes - 8} bytes "
            f"and {MAX_HEADER_BYTES} are allowed"
        )
    header = parse_json(file.read(8, length), f"{file.path}: header")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _entry(file, name, info, data) for name, info in header.items()}
    end = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise ModelFileError(
                f"{file.path}: {name!r} begins at byte {stored.offset}, the tensor before it ends at {end}"
            )
        end = stored.offset + stored.nbytes
    if end != file.size_bytes:
        raise ModelFileError(f"{file.path}: the last tensor ends at byte {end}, the file at {file.size_bytes}")
    return tensors


def _entry(file: ModelFile, name: str, info: object, data: int) -> _Stored:
    where = f"{file.path}: header: {name[:200]!r}"
    if not isinstance(info, dict):
        raise ModelFileError(f"{where}: must be an object with dtype, shape and data_offsets")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ModelFileError(f"{where}: dtype {str(dtype)[:50]!r} is not known; {', '.join(_BITS)} are")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
        raise ModelFileError(f"{where}: shape {str(shape)[:200]} must be a list of at most 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ModelFileError(f"{where}: data_offsets {str(offsets)[:200]} must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= file.size_bytes - data:
        raise ModelFileError(
            f"{where}: data_offsets {offsets} must be in order and end by {file.size_bytes - data}: cut off or damaged"
        )
    if 8 * (end - begin) != math.prod(shape) * _BITS[dtype]:
        raise ModelFileError(
            f"{where}: {dtype} {shape} takes {math.prod(shape) * _BITS[dtype]} bits, its data {8 * (end - begin)}"
        )
    return _Stored(file, dtype, tuple(shape), data + begin, end - begin)
