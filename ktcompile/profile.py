"""Where the time of one step goes: region by region, each waited for, and what is no region."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from ktcompile.bench import Requests
from ktcompile.cache import windows
from ktcompile.generate import CHUNK
from ktcompile.graph import copy_to, short
from ktcompile.ops.moe import MoeShape
from ktcompile.runtime import Executable, Step
from ktcompile.target import Target


@dataclass(frozen=True)
class Event:
    """One region or copy. `start` and `seconds`; `nbytes` of weights that it has to read, or that are copied."""

    name: str
    op: str
    device: str
    kernel: str
    start: float
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Share:
    """All regions of an op on a device in one step. A copy is on the device that it goes to."""

    op: str
    device: str
    regions: int
    seconds: float
    nbytes: int

    def of(self, target: Target) -> float | None:
        """Its bytes a second as a part of the device's; None where no weights are read."""
        if self.op == "copy" or not self.nbytes or not self.seconds:
            return None
        return self.nbytes / self.seconds / target[self.device].bandwidth


@dataclass(frozen=True)
class Profile:
    """One step of `tokens` after `depth`, serialised: `events`. As it runs it takes `step_s`, of which a GPU is busy
    with kernels and copies for `gpu_s` (None: there is no GPU, or it cannot be known).
    """

    phase: str
    tokens: int
    depth: int
    step_s: float
    cache_bytes: Mapping[str, int]
    events: tuple[Event, ...]
    gpu_s: float | None = None
    has_gpu: bool = False

    @property
    def seconds(self) -> float:
        """Of all regions and copies, one after the other."""
        return sum(e.seconds for e in self.events)

    @property
    def host_s(self) -> float:
        """Of the regions on the CPU."""
        return sum(e.seconds for e in self.events if e.device == "cpu" and e.op != "copy")

    @property
    def other_s(self) -> float | None:
        """Seconds of the step as it runs that are no region and no copy; None where it is too little to be seen.

        With a GPU at least: what it computes while the CPU does is counted twice.
        """
        if self.has_gpu and self.gpu_s is None:
            return None
        known = self.seconds if self.gpu_s is None else self.gpu_s + self.host_s
        return self.step_s - known if self.step_s > known else None

    def shares(self) -> list[Share]:
        """By op and device, the longest first."""
        groups: dict[tuple[str, str], list[Event]] = {}
        for e in self.events:
            groups.setdefault((e.op, e.device), []).append(e)
        found = [
            Share(op, device, len(g), sum(e.seconds for e in g), sum(e.nbytes for e in g))
            for (op, device), g in groups.items()
        ]
        return sorted(found, key=lambda s: -s.seconds)

    def read(self) -> dict[str, int]:
        """Bytes of weights and cache that the step has to read from each device's memory."""
        out = dict(self.cache_bytes)
        for e in self.events:
            out[e.device] = out.get(e.device, 0) + (e.nbytes if e.op != "copy" else 0)
        return {device: count for device, count in out.items() if count}

    def json(self, target: Target) -> dict[str, Any]:
        """The profile as plain data; `of_bandwidth` is a part of what the device's memory can."""
        total = self.seconds or 1.0
        shares = [
            {
                **asdict(s),
                "share": s.seconds / total,
                "bytes_s": s.nbytes / s.seconds if s.nbytes and s.seconds else None,
                "of_bandwidth": s.of(target),
            }
            for s in self.shares()
        ]
        step = {
            "seconds": self.step_s,
            "serialised_seconds": self.seconds,
            "host_seconds": self.host_s,
            "gpu_busy_seconds": self.gpu_s,
            "other_seconds": self.other_s,
            "bytes": self.read(),
            "bytes_s": {device: count / self.step_s for device, count in self.read().items()},
        }
        return {"phase": self.phase, "tokens": self.tokens, "depth": self.depth, "step": step, "shares": shares}


# ------------------------------------------------------------------------------------------------ measuring


class _Timed(fx.Interpreter):
    """The lowered graph, node by node, with the time of each region and copy once its device is done."""

    def __init__(self, gm: fx.GraphModule, requests: Requests, tokens: int) -> None:
        super().__init__(gm)
        self.requests, self.tokens = requests, tokens
        self.events: list[Event] = []
        self._names: dict[fx.Node, str] = {}
        self._node: fx.Node | None = None
        self._begin = 0.0

    def forward(self, *args: Any) -> Any:
        """What `Executable` calls."""
        self.events = []
        self.requests.wait()
        self._begin = time.perf_counter()
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._call(super().call_module, target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call = super().call_function
        return self._call(call, target, args, kwargs) if target is copy_to else call(target, args, kwargs)

    def _call(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        start = time.perf_counter()
        out = call(target, args, kwargs)
        self.requests.wait()
        end = time.perf_counter()
        assert self._node is not None
        self.events.append(self._event(self._node, start - self._begin, end - start, out))
        return out

    def _event(self, n: fx.Node, start: float, seconds: float, out: Any) -> Event:
        if n.target is copy_to:
            source, to = n.args
            name = self._names.get(source, source.name) if isinstance(source, fx.Node) else str(source)
            return Event(f"{name} -> {to}", "copy", str(to), "", start, seconds, out.nbytes)
        step: Step = self.fetch_attr(str(n.target))
        self._names[n] = name = short(step.call.path) or "root"
        nbytes = read_bytes(step, self.tokens)
        return Event(name, step.call.op, str(step.device), step.kernel.name, start, seconds, nbytes)


def read_bytes(step: Step, tokens: int) -> int:
    """Bytes of packed weights that a region has to read: none of an embedding, of the experts those chosen.

    Many tokens choose experts as if at random. Of experts that two devices share, each reads its own; those that
    stream are read whole.
    """
    shape, total = step.call.shape, step.packed.nbytes
    if step.call.op == "moe" and isinstance(shape, MoeShape):
        streamed = shape.share.streamed(tokens, shape) / shape.experts if shape.share else 0.0
        if shape.share and shape.share.streams:
            return round(total * streamed)
        return round(total * (1 - streamed) * (1 - (1 - shape.top_k / shape.experts) ** tokens))
    return 0 if step.call.op == "embed" else total


def profile(model: Any, count: int, depth: int, batch: int, repetitions: int = 3, chunk: int = CHUNK) -> Profile:
    """A step of `count` tokens of each of `batch` requests after `depth`: as it runs and serialised, in turns.

    The medians of both, of `repetitions` runs, or five times as many where a step is one token a request.
    """
    tokens, target = count * batch, model.store.target
    phase = "decode" if tokens == 1 else "prefill"
    executable: Executable = model.phases[phase]
    requests = Requests(model, batch)
    timed = _Timed(executable.gm, requests, tokens)
    traced = Executable(executable.plan, timed, executable.inputs, executable.devices)  # type: ignore[arg-type]
    requests.run(requests.prompt(depth, chunk))
    whole, runs = [], []
    for i in range(1 + repetitions * (5 if count == 1 else 1)):
        requests.cache.crop(depth)
        took = requests.run([requests.inputs(count, depth)])
        requests.cache.crop(depth)
        with _instead(model, traced, phase, batch):
            requests.run([requests.inputs(count, depth)])
        if i:  # the first ones compile, record and fill caches
            whole += took
            runs.append(timed.events)
    runs.sort(key=lambda events: sum(e.seconds for e in events))
    held: dict[str, int] = {}
    pools, window = requests.cache.pools, windows(model.config)
    kinds = getattr(model.config, "layer_types", None) or [""] * len(pools)
    for pool, kind in zip(pools, kinds, strict=True):
        device, seen = str(pool.device), min(depth, window[kind] or depth)
        held[device] = held.get(device, 0) + batch * seen * pool.shape[-1] * pool.element_size()
    has_gpu = any(d.torch.type == "cuda" for d in target.devices)
    busy = gpu_seconds(requests, depth, repetitions) if has_gpu and count == 1 else None
    events = tuple(runs[len(runs) // 2])
    kind = "decode" if count == 1 else "prefill"
    return Profile(kind, tokens, depth, statistics.median(whole), held, events, busy, has_gpu)


@contextmanager
def _instead(model: Any, traced: Executable, phase: str, batch: int) -> Iterator[None]:
    """Until the end `model.step` runs this executable, and records no CUDA graph of it."""
    real, graph = model.phases[phase], model.graphs.get(batch)
    model.phases[phase], model.graphs[batch] = traced, "it is being profiled"
    try:
        yield
    finally:
        model.phases[phase] = real
        del model.graphs[batch]
        if graph is not None:
            model.graphs[batch] = graph


def gpu_seconds(requests: Requests, depth: int, repetitions: int) -> float | None:
    """Median seconds of a decode step, as it runs, in which torch's profiler sees a GPU busy; None: never."""
    found = []
    for _ in range(repetitions):
        requests.cache.crop(depth)
        steps = [requests.inputs(1, depth)]
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                requests.run(steps)
        except RuntimeError as error:
            warnings.warn(f"torch's profiler does not run here: {error}", stacklevel=2)
            return None
        spans = [
            (e.time_range.start, e.time_range.end)
            for e in seen.events()
            if e.device_type == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        ]
        found.append(covered(spans) / 1e6)
    return statistics.median(found) or None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end)."""
    total, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


__all__ = ["Event", "Profile", "Share", "profile", "read_bytes"]
