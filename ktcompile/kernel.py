"""Kernels: who can run a region, at what cost, and why not."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol

import sympy
from torch import Tensor

from ktcompile.errors import KernelError
from ktcompile.graph import Region, value_of
from ktcompile.symbols import Sizes, nbytes
from ktcompile.target import Target
from ktcompile.weights import WeightSource

TOKENS, CONTEXT = sympy.symbols("T S", positive=True)
"""The symbols of every cost: tokens in this step, and tokens of context."""


@dataclass(frozen=True)
class Cost:
    """Work of one call: bytes of weights and cache read, floating-point operations. Expressions in T and S.

    `across`: bytes of weights that come over the link from where they are.
    """

    nbytes: sympy.Expr
    flops: sympy.Expr
    across: sympy.Expr | int = 0


@dataclass(frozen=True)
class Packed:
    """Weights in the form that one kernel reads, on one device. `nbytes` counts every tensor."""

    layout: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    shape: Any = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class Parts:
    """A region's weights as `pack` reads them: where each one is stored, by its name inside the module."""

    source: WeightSource
    keys: Mapping[str, str]

    def __getitem__(self, leaf: str) -> str:
        return self.keys[leaf]


class Prepared(Protocol):
    """A call on tensors that stay where they are, started by a flag or by C, without Python.

    The caller writes to the first rows of `inputs` and reads those of `out`, all in (pinned) host memory.
    """

    out: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    def resize(self, tokens: int) -> None:
        """The next run is of so many tokens, at most those that it was prepared for. None may be under way."""

    def elsewhere(self, tokens: int) -> int:
        """Experts below this are computed elsewhere in a step of so many tokens: their ids are to be given as -1."""

    def listen(self, start: Tensor, done: Tensor) -> None:
        """From now on, whenever `start` is not 0: set it to 0, run, set `done` to 1."""

    def rest(self, resting: bool) -> None:
        """False before flags are raised, True after. Several may raise some at a time, of one process."""

    def host_functions(self) -> Any:
        """`submit`, `wait` and their `argument` as addresses, for cudaLaunchHostFunc."""

    def check(self) -> Tensor:
        """`out`, or the first error of the runs since the last check."""

    def close(self) -> None:
        """End it, after a run that may be under way."""


@dataclass(frozen=True)
class Counts:
    """What threads that compute experts have done: calls, bytes of experts read, seconds at work."""

    runs: int
    nbytes: int
    seconds: float


class Counting(Protocol):
    """Threads that count what they do, whoever asks."""

    def counts(self) -> Counts: ...


@dataclass(frozen=True)
class StepFacts:
    """What the host knows of a step before it runs; a kernel alone would have to wait for the device to learn it."""

    lengths: tuple[int, ...]  # tokens that each request has stored
    counts: tuple[int, ...]  # tokens that each request brings
    pages: Tensor  # [requests, P], the cache's whole page table: the same object at every step


class Kernel(ABC):
    """Runs one op on one kind of device, from weights that it packed once. Holds no weights itself."""

    name: ClassVar[str]
    op: ClassVar[str]  # "*": every op
    device: ClassVar[str]  # kind: "cpu", "cuda", "*"
    layout: ClassVar[str]
    lossy: ClassVar[str | None] = None  # what it rounds that the compute type does not
    reads: ClassVar[tuple[str, ...]] = ()  # encodings that it computes from as stored; `pack` widens others
    quantizes: ClassVar[tuple[str, ...]] = ()  # encodings that `pack` brings weights to where a region asks for it

    @abstractmethod
    def refuses(self, region: Region, target: Target) -> str | None:
        """None: I take it; text: why not."""

    @abstractmethod
    def packed_bytes(self, region: Region) -> int:
        """Bytes that `pack` will need, known before a weight is read."""

    def workspace_bytes(self, region: Region, sizes: Sizes) -> int:
        """Most bytes that one call allocates at once, its results included. `sizes`: those of the planned step.

        Default: the results alone.
        """
        return nbytes(value_of(region.node), sizes)

    @abstractmethod
    def cost(self, region: Region, target: Target) -> Cost:
        """What one call reads and computes."""

    @abstractmethod
    def pack(self, parts: Parts, region: Region, target: Target) -> Packed:
        """Read the weights from their source, once, straight into `layout` on the region's home."""

    @abstractmethod
    def __call__(self, packed: Packed, region: "Call", *inputs: Any) -> Any:
        """Run the region. `inputs` are the op's roles in order; the captured body's inputs for op `*`."""

    def prepare(
        self, packed: Packed, region: "Call", tokens: int, pinned: bool, after: Prepared | None = None
    ) -> Prepared | None:
        """A call for up to `tokens` tokens that needs no Python once it is prepared; None: it has no such form.

        `after`: a call that is always over before this one is given its inputs: it may use the same memory.
        """
        return None

    def begin(self, step: StepFacts) -> None:
        """Called on the host before every step, once for all regions, also before a CUDA graph is replayed."""
        return None

    def end(self) -> None:
        """Called after every step that was begun. Between `end` and `begin` nothing is known of a call's lengths."""
        return None

    def cache_key(self, region: Region) -> str | None:
        """What beside weights and layout decides the packed bytes; None: packed weights are not kept on disk."""
        return None

    def restore(self, tensors: Mapping[str, Tensor], region: Region, target: Target) -> Packed:
        """What `pack` made, from its tensors alone. Only for kernels with a `cache_key`."""
        raise NotImplementedError(f"{self.name} has no cache key")

    def ready(self, packed: Packed) -> None:
        """Called once a region at load, when its weights are there, whichever kernel packed them."""
        return None

    def counting(self, packed: Packed) -> Counting | None:
        """Who computes with these weights and counts it: one and the same for all regions that share it."""
        return None

    def missing(self) -> str | None:
        """None: it can run on this machine; text: what is missing and how to get it."""
        return None


@dataclass(frozen=True)
class Call:
    """What a kernel may know of a region when it runs: no graph, only code and attributes."""

    path: str
    op: str
    shape: Any
    body: Any
    leaves: tuple[str, ...]


def available() -> dict[str, Kernel]:
    """Every registered kernel by name, ours and plugins', in the order of their names."""
    found: dict[str, Kernel] = {}
    for point in sorted(entry_points(group="ktcompile.kernels"), key=lambda e: e.name):
        try:
            kernel = point.load()()
        except Exception as error:
            raise KernelError(f"kernel {point.name!r} ({point.value}) cannot be loaded: {error}") from error
        found[point.name] = kernel
    return found


def refusal(kernel: Kernel, region: Region, target: Target) -> str | None:
    """Why `kernel` cannot run `region` where it is placed, or None."""
    if kernel.op not in ("*", region.op):
        return f"is for {kernel.op}"
    kind = target[region.device or target.main.name].kind
    if kernel.device not in ("*", kind):
        return f"runs on {kernel.device}, the region is on {region.device}"
    if kernel.op != "*" and region.binding is None:
        return "the region keeps its captured body"
    if unknown := [e for e in region.quantized.values() if e not in kernel.quantizes]:
        allowed = f"; it does to {', '.join(kernel.quantizes)}" if kernel.quantizes else ""
        return f"it does not quantise weights to {unknown[0]}{allowed}"
    return kernel.refuses(region, target)


def choose(
    region: Region,
    wanted: Iterable[str],
    target: Target,
    kernels: Mapping[str, Kernel],
) -> tuple[Kernel | None, list[tuple[str, str]]]:
    """The first of the `wanted` kernels that takes the region, and (kernel, why not) of those before it."""
    refused: list[tuple[str, str]] = []
    for name in wanted:
        kernel = kernels[name]
        why = refusal(kernel, region, target)
        if why is None:
            return kernel, refused
        refused.append((name, why))
    return None, refused
