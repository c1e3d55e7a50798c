"""Executable: a placed graph with its weights packed, ready to call."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from ktcompile.capture import version
from ktcompile.errors import PassError
from ktcompile.graph import Region, is_region, is_weight, regions, stored_bytes
from ktcompile.kernel import Call, Kernel, Packed, Parts
from ktcompile.packed_cache import PackedCache
from ktcompile.plan import Plan
from ktcompile.target import Target
from ktcompile.weights import ModuleSource, Part, WeightSource

Progress = Callable[[str, int, int], None]
"""Called while weights are read and packed, from any thread: (region, bytes of the file done, bytes in all)."""


class Store:
    """Packed weights by (keys, layout, device): every phase of a model reads the same ones.

    With a `cache`, those that kernels can restore are read from it, and written to it after they were packed.
    """

    def __init__(
        self, source: WeightSource, target: Target, kernels: Mapping[str, Kernel], cache: PackedCache | None = None
    ) -> None:
        self.source, self.target, self.kernels, self.cache = source, target, kernels, cache
        self._packed: dict[tuple[tuple[str, ...], str, str], Packed] = {}

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held on each device."""
        out: dict[str, int] = {}
        for (_, _, device), packed in self._packed.items():
            out[device] = out.get(device, 0) + packed.nbytes
        return out

    def get(self, region: Region, read: Callable[[int], None] | None = None) -> Packed:
        """The region's weights in its kernel's layout, packed at the first call. `read` hears of the bytes read."""
        keys = {leaf: str(node.meta["weight"]) for leaf, node in region.weights.items()}
        key = tuple(keys.values()), str(region.node.meta["layout"]), str(region.home)
        if key not in self._packed:
            source = self.source if read is None else _Counted(self.source, read)
            self._packed[key] = self._make(region, Parts(source, keys), key[1])
        return self._packed[key]

    def _make(self, region: Region, parts: Parts, layout: str) -> Packed:
        kernel = self.kernels[str(region.kernel)]
        details = kernel.cache_key(region) if self.cache else None
        if self.cache is None or details is None:
            return kernel.pack(parts, region, self.target)
        name = self.cache.name(tuple(parts.keys.values()), layout, details)
        kept = self.cache.load(name)
        if kept is not None:
            return kernel.restore(kept, region, self.target)
        made = kernel.pack(parts, region, self.target)
        self.cache.save(name, made.tensors)
        return made


class _Counted:
    """A source that tells how many bytes of parameters were read."""

    def __init__(self, source: WeightSource, read: Callable[[int], None]) -> None:
        self._source, self._read = source, read
        self.keys, self.spec, self.parts, self.read_scale = source.keys, source.spec, source.parts, source.read_scale

    def read(self, part: Part) -> Tensor:
        found = self._source.read(part)
        self._read(part.spec.nbytes)
        return found


class BorrowedStore:
    """Packed copies of parameters that somebody else owns: gone when the parameter is, made anew after writes."""

    def __init__(self, target: Target, kernels: Mapping[str, Kernel]) -> None:
        self.target, self.kernels = target, kernels
        self._packed: Any = WeakIdKeyDictionary()  # first weight -> {(layout, device): (versions of all, Packed)}

    def get(self, region: Region, weights: Sequence[Tensor]) -> Packed:
        """The weights in the layout of the region's kernel."""
        if not weights:
            return Packed(str(region.node.meta["layout"]))
        held = self._packed.setdefault(weights[0], {})
        key = region.node.meta["layout"], region.home
        versions = tuple((id(w), version(w)) for w in weights)
        if key in held and held[key][0] == versions:
            packed: Packed = held[key][1]
            return packed
        leaves = tuple(region.weights)
        source = ModuleSource(dict(zip(leaves, weights, strict=True)))
        made = self.kernels[str(region.kernel)].pack(
            Parts(source, {leaf: leaf for leaf in leaves}), region, self.target
        )
        held[key] = versions, made
        return made


class Step(nn.Module):
    """One region: its kernel, called on weights that the store packed."""

    def __init__(self, kernel: Kernel, packed: Packed, region: Region, call: Call, device: torch.device) -> None:
        super().__init__()
        self.kernel, self.packed, self.call, self.device = kernel, packed, call, device
        self.inputs = len(region.inputs)
        # On the first GPU, which is the current one, switching would cost a microsecond a region.
        self.elsewhere = torch.cuda.device(device) if device.type == "cuda" and device.index else nullcontext()

    def forward(self, *args: Any) -> Any:
        with self.elsewhere:
            return self.kernel(self.packed, self.call, *args[: self.inputs])


class _BorrowedStep(nn.Module):
    """One region of a model that owns its parameters: they come as the last arguments of each call."""

    def __init__(self, kernel: Kernel, store: BorrowedStore, region: Region, call: Call) -> None:
        super().__init__()
        self.kernel, self.store, self.region, self.call = kernel, store, region, call
        self.inputs = len(region.inputs)
        self.device = store.target[region.device or ""].torch

    def forward(self, *args: Any) -> Any:
        inputs, weights = args[: self.inputs], args[self.inputs :]
        if self.kernel.op == "*" and all(w.device == self.device for w in weights):
            return self.call.body(*args)
        return self.kernel(self.store.get(self.region, weights), self.call, *inputs)


class Executable:
    """A lowered graph. `inputs` names what each argument is: an input's name, or (name, axis) for a size of one."""

    def __init__(
        self,
        plan: Plan,
        gm: fx.GraphModule,
        inputs: tuple[str | tuple[str, int], ...] = (),
        devices: tuple[torch.device | None, ...] = (),
    ) -> None:
        self.plan, self.gm, self.inputs, self.devices = plan, gm, inputs, devices
        self._run = gm.forward

    def __call__(self, values: Mapping[str, Tensor]) -> Any:
        """Run on the inputs by name; what the captured function returned, as a tuple."""
        args = [
            (values[i] if d is None else values[i].to(d)) if isinstance(i, str) else values[i[0]].shape[i[1]]
            for i, d in zip(self.inputs, self.devices, strict=True)
        ]
        with torch.inference_mode():
            return self._run(*args)

    def flat(self, *args: Any) -> Any:
        """Run on dynamo's arguments in dynamo's order. No kernel has a backward: no result may look as if it had."""
        with torch.no_grad():
            return self._run(*args)


def lower(gm: fx.GraphModule, plan: Plan, store: Store, progress: Progress | None = None) -> Executable:
    """Replace every region by its kernel, with weights from the store: read, packed and placed now."""
    total = sum(_stored(r) for r in regions(gm))
    before = 0

    def step(region: Region) -> nn.Module:
        nonlocal before
        lock, done, region_bytes = Lock(), 0, _stored(region)

        def read(count: int) -> None:
            nonlocal done
            with lock:  # kernels read in several threads
                done += count
                if progress:
                    progress(region.name, before + min(done, region_bytes), total)

        read(0)
        kernel, device = store.kernels[str(region.kernel)], store.target[region.device or ""].torch
        packed = store.get(region, read)
        kernel.ready(packed)
        made = Step(kernel, packed, region, _call(region, store.target), device)
        before += region_bytes
        return made

    lowered = _lower(gm, step, weights=False)
    if progress:
        progress("", total, total)
    given = [n for n in lowered.graph.nodes if n.op == "placeholder"]
    inputs = tuple(n.meta.get("size_of") or str(n.meta.get("input", n.name)) for n in given)
    # State is never moved: a copy would take the writes.
    moved = ["device" in n.meta and not n.meta.get("state") for n in given]
    devices = tuple(store.target[n.meta["device"]].torch if m else None for n, m in zip(given, moved, strict=True))
    return Executable(plan, lowered, inputs, devices)


def _stored(region: Region) -> int:
    """Bytes of its weights as stored: what loading reads."""
    return sum(map(stored_bytes, region.weights.values()))


def lower_borrowed(gm: fx.GraphModule, plan: Plan, store: BorrowedStore, stored: Store | None = None) -> Executable:
    """Replace every region by its kernel; the graph keeps its parameters as arguments.

    Regions whose weights all come from the source of `stored` read them from there.
    """

    def step(region: Region) -> nn.Module:
        kernel, call = store.kernels[str(region.kernel)], _call(region, store.target)
        weights = region.weights.values()
        if stored is not None and weights and all("source" in w.meta for w in weights):
            return Step(kernel, stored.get(region), region, call, store.target[region.device or ""].torch)
        return _BorrowedStep(kernel, store, region, call)

    return Executable(plan, _lower(gm, step, weights=True))


def _call(region: Region, target: Target) -> Call:
    binding = region.binding
    body = _on_device(region.body, target[region.device or ""].torch)
    return Call(region.path, region.op, binding.shape if binding else None, body, tuple(region.weights))


def _on_device(body: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The body with every device that it names (arange, `.to`, new tensors) replaced by the one it runs on."""

    def swap(value: Any) -> Any:
        return device if isinstance(value, torch.device) and value.type in ("cpu", "cuda") else value

    def named(value: Any) -> bool:
        return isinstance(value, torch.device) and value != device

    if not any(named(a) for n in body.graph.nodes for a in (*n.args, *n.kwargs.values())):
        return body
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].args = tuple(map(swap, env[node].args))
        env[node].kwargs = {k: swap(v) for k, v in env[node].kwargs.items()}
    return fx.GraphModule(body, graph)


def _lower(gm: fx.GraphModule, step: Callable[[Region], nn.Module], *, weights: bool) -> fx.GraphModule:
    root = nn.Module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and is_weight(node) and not weights:
            continue
        if not is_region(node):
            env[node] = graph.node_copy(node, lambda n: env[n])
            continue
        region = Region(node)
        name = node.meta["path"].replace(".", "_") or "root"
        root.add_module(name, step(region))
        args = [a for a in node.args if weights or not (isinstance(a, fx.Node) and is_weight(a))]
        env[node] = graph.call_module(name, tuple(env[a] for a in args))
    return fx.GraphModule(root, graph)


def check_one_layout(graphs: Sequence[fx.GraphModule]) -> None:
    """Invariant over all phases: a region lives on one device, its weights in one layout, else they are held twice."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    homes: dict[str, str] = {}
    for gm in graphs:
        for region in regions(gm):
            home = homes.setdefault(region.path, str(region.home))
            if region.weights and home != region.home:
                raise PassError(
                    f"{region.path} would be in memory twice: on {home} in one phase and on {region.home} in another. "
                    "Place it by its name"
                )
            for node in region.weights.values():
                key = str(node.meta["weight"]), str(region.home)
                layout = str(region.node.meta["layout"])
                first = seen.setdefault(key, (layout, region.path))
                if first[0] != layout:
                    raise PassError(
                        f"{key[0]} would be in {key[1]}'s memory twice: as {first[0]!r} for {first[1]} and as "
                        f"{layout!r} for {region.path}. Give both phases kernels of one layout"
                    )


__all__ = ["BorrowedStore", "Executable", "Progress", "Step", "Store", "check_one_layout", "lower", "lower_borrowed"]
