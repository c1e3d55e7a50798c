"""Graphs after the pipeline on disk, so that the next start of a model neither captures nor plans it.

A file of `PackedCache`, in a folder of its own, with one tensor: the pickle of `Compiled`. Pickles can run code; so can
any file of this user's cache folder that is found on a path, and `PackedCache` takes none that others may write.
"""

import io
import json
import operator
import os
import pickle
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import ktcompile
from ktcompile.errors import RulesError
from ktcompile.files import cache_folder
from ktcompile.packed_cache import PackedCache
from ktcompile.plan import Plan
from ktcompile.target import Target
from ktcompile.weights import WeightSource

FILES = 32
"""So many models, settings and versions of the code are kept: the oldest file goes first."""

FASTER = 3.0
"""A plan for a GPU and a RAM that seemed slower by this is made again: RAM was measured on a busy machine."""

_OF_TRACING = ("example_value", "nn_module_stack", "source_fn_stack", "stack", "stack_trace", "tensor_dict")
"""What dynamo and `fold` know of a node, and nothing after the pipeline asks for."""

_WHERE = (operator, torch, torch.nn.functional)
"""Where functions that do not say so themselves are found by their name."""


@dataclass(frozen=True)
class Compiled:
    """What `lower` needs of each phase, the prompt tokens a step that were planned, and the bytes/s of RAM then."""

    graphs: Mapping[str, fx.GraphModule]
    plans: Mapping[str, Plan]
    chunks: tuple[int, ...]
    bandwidth: float


@dataclass(frozen=True)
class Unsized:
    """A fake value whose sizes are symbols, here as text: after the pipeline only its type is asked for."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


class CompileCache:
    """The compiled model of this source, these `facts`, this code and these libraries.

    `notes` say, for a person, what was read or kept, or why not.
    """

    def __init__(self, source: WeightSource, target: Target, **facts: str) -> None:
        self.source = source
        self.bandwidth = target.host.bandwidth if target.main.kind == "cuda" else 0.0  # else it decides nothing
        self.notes: list[str] = []
        try:
            self._files: PackedCache | None = PackedCache(cache_folder() / "compiled", source)
        except RulesError as error:  # a folder that cannot be written, a source without files: it is only slower
            self._files = None
            self.notes.append(f"not used: {error}")
            return
        said = json.dumps(facts | {"target": _told(target), "code": _code()}, sort_keys=True)
        self._name = self._files.name((), "graphs", said)

    def load(self) -> Compiled | None:
        """What `save` kept, with weights of `source`; None if there is nothing that can be used."""
        if self._files is None:
            return None
        kept = self._files.load(self._name)
        self._take_notes()
        if kept is None:
            return None
        try:
            found: Compiled = _Reader(io.BytesIO(kept["graphs"].numpy().tobytes()), self.source).load()
        except Exception as error:  # whatever a library makes of what it wrote itself
            self.notes.append(f"not used: {self._files.folder / self._name}: {type(error).__name__}: {error}")
            return None
        if self.bandwidth > FASTER * found.bandwidth:  # it was measured while others were busy
            self.notes.append(
                f"not used: planned for {found.bandwidth / 1e9:.0f} GB/s, RAM has {self.bandwidth / 1e9:.0f}"
            )
            return None
        self.notes.append(f"graphs read from {self._files.folder}")
        return found

    def save(self, made: Compiled) -> None:
        """Keep it for the next start. What cannot be written is a note, not an error."""
        if self._files is None:
            return
        data = io.BytesIO()
        try:
            _Writer(data, self.source).dump(made)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            self.notes.append(f"not written: {error}")
            return
        self._files.save(self._name, {"graphs": torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)})
        if self._files.saved:
            self.notes.append(f"graphs kept in {self._files.folder} for the next start")
        self._take_notes()
        _keep_newest(self._files.folder)

    def _take_notes(self) -> None:
        assert self._files is not None
        self.notes += self._files.notes
        self._files.notes.clear()


def _keep_newest(folder: Path) -> None:
    """Remove all but the newest files; another process may have removed one."""
    aged = sorted(((_changed(p), p) for p in folder.glob("*.packed")), reverse=True)
    for _, path in aged[FILES:]:
        path.unlink(missing_ok=True)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# ------------------------------------------------------------------------------------------------ what it is made for


def _told(target: Target) -> list[Any]:
    """All of the target but the bandwidth of RAM, which is measured at every start and never the same."""
    devices = [asdict(d) | {"features": sorted(d.features)} for d in target.devices]
    for device in devices:
        if device["kind"] == "cpu":
            del device["bandwidth"]
    return [devices, sorted((*ends, link.bandwidth, link.latency) for ends, link in target.links.items()), target.about]


def _code() -> str:
    """A hash that changes with the code: of ktcompile and plugins (every file's size and time), of libraries."""
    said: list[Any] = [platform.python_version(), *(f"{n} {version(n)}" for n in ("torch", "transformers", "sympy"))]
    said += _files(Path(str(ktcompile.__file__)).parent)
    for group in ("ktcompile.passes", "ktcompile.kernels"):
        for point in sorted(entry_points(group=group), key=lambda e: (e.name, e.value)):
            said.append((point.name, point.value, point.dist.version if point.dist else ""))
            if point.module.split(".")[0] != "ktcompile" and (found := find_spec(point.module)) and found.origin:
                path = Path(found.origin)
                said += _files(path.parent if found.submodule_search_locations else path)
    return blake2b(repr(said).encode(), digest_size=20).hexdigest()


def _files(path: Path) -> list[Any]:
    """Size and time of a file, or of all code in a folder."""
    inside = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    files = [path] if path.is_file() else sorted(f for f in inside if f.suffix in (".py", ".yaml"))
    return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in files]


# ------------------------------------------------------------------------------------------------ graphs as bytes


@dataclass(frozen=True)
class _At:
    """The node of this number, in a node's arguments."""

    number: int


class _Writer(pickle.Pickler):
    """Pickles graphs node by node: torch's own form of a GraphModule is code, which has lost what nodes know."""

    def __init__(self, file: io.BytesIO, source: WeightSource) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._source = source

    def persistent_id(self, value: Any) -> str | None:
        return "source" if value is self._source else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, fx.GraphModule):
            return _module, (_attributes(value), _nodes(value.graph))
        if isinstance(value, fx.Node):
            raise pickle.PicklingError(f"node {value.name} is part of what another node knows")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return str, (str(value),)
        if getattr(value, "fake_mode", None) is not None:
            return _value(value)
        if type(value).__module__ == "torch._ops":
            return _op, (str(value),)
        if callable(value) and not isinstance(value, type):
            return _function(value)
        return NotImplemented


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, source: WeightSource) -> None:
        super().__init__(file)
        self._source = source

    def persistent_load(self, name: str) -> Any:
        return self._source


def _value(tensor: Tensor) -> Any:
    """A tensor without data, or what is known of one with symbolic sizes."""
    shape = tuple(n if isinstance(n, int) else str(n) for n in tensor.shape)
    if all(isinstance(n, int) for n in (*shape, *tensor.stride())):
        return _meta, (shape, tensor.stride(), tensor.dtype)
    return Unsized, (tensor.dtype, shape)


def _meta(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _op(name: str) -> Any:
    """`ktrans.moe`, `aten.add.Tensor`: the torch op of this name."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _function(value: Any) -> Any:
    """Functions of C are known by a name in one of a few modules; all others pickle as they are."""
    name = getattr(value, "__name__", "")
    home = next((i for i, module in enumerate(_WHERE) if getattr(module, name, None) is value), None)
    return NotImplemented if home is None else (_named, (home, name))


def _named(home: int, name: str) -> Any:
    return getattr(_WHERE[home], name)


def _nodes(graph: fx.Graph) -> list[Any]:
    numbers = {n: i for i, n in enumerate(graph.nodes)}

    def plain(arguments: Any) -> Any:
        return fx.map_arg(arguments, lambda n: _At(numbers[n]))  # type: ignore[arg-type,return-value]

    return [(n.op, n.target, plain(n.args), plain(n.kwargs), n.name, n.type, _known(n)) for n in graph.nodes]


def _known(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.meta.items() if k not in _OF_TRACING}


def _attributes(gm: fx.GraphModule) -> dict[str, Any]:
    """The modules and constants that nodes name."""

    def named() -> Iterator[tuple[str, Any]]:
        for node in gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                yield str(node.target), operator.attrgetter(str(node.target))(gm)

    return dict(named())


def _module(attributes: Mapping[str, Any], nodes: list[Any]) -> fx.GraphModule:
    root = nn.Module()
    for path, value in attributes.items():
        *parents, name = path.split(".")
        holder = root
        for parent in parents:
            if not hasattr(holder, parent):
                holder.add_module(parent, nn.Module())
            holder = getattr(holder, parent)
        setattr(holder, name, value)
    graph = fx.Graph()
    made: list[fx.Node] = []

    def wired(arguments: Any) -> Any:
        return fx.node.map_aggregate(arguments, lambda a: made[a.number] if isinstance(a, _At) else a)

    for op, target, args, kwargs, name, kind, meta in nodes:
        made.append(graph.create_node(op, target, wired(args), wired(kwargs), name, kind))
        made[-1].meta = meta
    return fx.GraphModule(root, graph)


__all__ = ["CompileCache", "Compiled", "Unsized"]
