"""Steps that the host enqueues and waits for once, with the CPU's experts inside.

StepGraph: a decode step whose addresses never change, replayed as one CUDA graph, or one for each GPU in turn.
StreamedStep: any other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib.metadata import entry_points
from threading import get_ident
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ktcompile.capture import forget_workspaces
from ktcompile.kernel import Prepared
from ktcompile.runtime import Executable, Step
from ktcompile.step_parts import Handover, Handovers, NotCapturable, Part, parts_of, with_handovers

Last = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


def handover() -> Handovers:
    """The first registered way of handing over that works here. Raises NotCapturable with what each one lacks."""
    lacking = []
    for point in sorted(entry_points(group="ktcompile.handovers"), key=lambda e: e.name):
        found = point.load()
        why = found.missing()
        if why is None:
            return found  # type: ignore[no-any-return]
        lacking.append(f"{point.name}: {why}")
    raise NotCapturable("; ".join(lacking) or "no way of handing over to the CPU is installed")


class Recordings:
    """CUDA graphs that never run at the same time, by device.

    What one leaves in its pool of memory others may use, except for tensors that are still held.
    """

    def __init__(self) -> None:
        self._graphs: dict[torch.device, WeakSet[torch.cuda.CUDAGraph]] = {}

    def add(self, device: torch.device, graph: torch.cuda.CUDAGraph) -> None:
        self._graphs.setdefault(device, WeakSet()).add(graph)

    def any(self, device: torch.device) -> torch.cuda.CUDAGraph | None:
        """One whose pool the next recording there shall use: torch takes no pool whose graphs are all gone."""
        return next(iter(self._graphs.get(device, ())), None)

    def forget(self, device: torch.device) -> None:
        """Those to come there have a pool of their own."""
        self._graphs.pop(device, None)


class StepGraph:
    """An executable on inputs of fixed addresses. The first call runs it and, on a GPU, records it; others replay.

    Layers on several GPUs are a graph for each, replayed one after the other with copies between. `state`: inputs that
    stay where they are (page pools, the page table). `shapes`: the int64 inputs that change every step, by name; the
    caller gives them in one list a step. `last`: what the step ends with, also part of the graph: it is given the first
    result and the changing inputs, its own result goes to the host. `beside`: recordings of steps that never run while
    this one does. They share a pool of memory on each GPU.
    """

    def __init__(
        self,
        executable: Executable,
        main: torch.device,
        tokens: int,
        state: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        make: Handovers | None = None,
        last: Last | None = None,
        beside: Recordings | None = None,
    ) -> None:
        self.main, self._last, self._state = main, last, state
        self._beside = beside if beside is not None else Recordings()
        needs_cpu = any(isinstance(m, Step) and m.device.index is None for m in executable.gm.modules())
        self.gm, self.prepared = with_handovers(executable, main, tokens, make or (handover() if needs_cpu else _none))
        self.parts, self._result = parts_of(self.gm)
        given = [n.name for n in self.gm.graph.nodes if n.op == "placeholder"]
        self._inputs = dict(zip(given, executable.inputs, strict=True))
        counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        total = sum(counts.values())
        self._host = torch.zeros(total, dtype=torch.int64, pin_memory=main.type == "cuda")
        self._given = self._host.numpy()  # the same memory; writing to it takes less time than a call of torch
        self._numbers: dict[torch.device, Tensor] = {}
        self._changing: dict[torch.device, dict[str, Tensor]] = {}
        for device in dict.fromkeys(part.device for part in self.parts):
            held = self._numbers[device] = torch.zeros(total, dtype=torch.int64, device=device)
            split = zip(counts, held.split(list(counts.values())), strict=True)
            self._changing[device] = {name: each.view(tuple(shapes[name])) for name, each in split}
        self._found: dict[str, Tensor] = {}  # results of parts, by name
        self._copies: dict[tuple[torch.device, str], Tensor] = {}
        self._moves: list[list[tuple[Tensor, Tensor]]] = []  # before each part's graph: to, from
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._out: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether a call has ended in a graph. If the first one fails, the CPU may still be at what it submitted."""
        return bool(self._graphs)

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Run on the changing inputs, all in one list in the order of `shapes`; the result, on the CPU.

        The result is overwritten by the next call.
        """
        self._given[:] = numbers
        for each in self.prepared[:1]:
            each.rest(False)
        try:
            with torch.inference_mode():
                self._run()
        finally:
            for each in self.prepared[:1]:
                each.rest(True)
        for each in self.prepared:
            each.check()
        assert self._out is not None
        return self._out

    def _run(self) -> None:
        if self.main.type != "cuda":
            self._step()
            return
        with torch.cuda.device(self.main):
            if not self._graphs:
                self._capture()
            try:
                for moves, graph in zip(self._moves, self._graphs, strict=True):
                    for to, value in moves:
                        to.copy_(value, non_blocking=True)
                    graph.replay()
            finally:  # what was enqueued needs the CPU, which rests after a step
                wait_for(self._numbers)

    def _step(self) -> None:
        for part in self.parts:
            args, _ = self._taken(part)
            self._record(part, args)

    def _capture(self) -> None:
        graphs: list[torch.cuda.CUDAGraph] = []
        with _streams_beside(self._numbers):
            try:
                self._step()  # compiles kernels, and lets libraries allocate; the step itself may be repeated
            finally:  # what was enqueued needs the CPU, which rests after a step
                wait_for(self._numbers)
            self._moves = []
            for part in self.parts:
                args, moves = self._taken(part)
                self._moves.append(moves)
                graphs.append(self._captured(part, args))
            wait_for(self._numbers)
        self._graphs = graphs

    def _captured(self, part: Part, args: list[Any]) -> torch.cuda.CUDAGraph:
        graph, other = torch.cuda.CUDAGraph(), self._beside.any(part.device)
        pool = None if other is None else other.pool()
        try:
            with torch.cuda.device(part.device):
                wait_for(self._numbers)
                # Other threads may ask for events meanwhile, as `counters` does.
                mode, stream = "thread_local", torch.cuda.current_stream()
                with _workspaces_inside(), torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
                    self._record(part, args)
        except torch.OutOfMemoryError:
            raise  # it may fit another time
        except BaseException as error:
            self._beside.forget(part.device)  # nobody knows in what state the pool is
            if isinstance(error, RuntimeError):
                raise NotCapturable(f"CUDA refused to record it: {error}") from error
            raise
        self._beside.add(part.device, graph)
        return graph

    def _taken(self, part: Part) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
        """What a part is called with, and what is copied for it from another GPU: to, from. It is copied now, too."""
        args: list[Any] = []
        moves = []
        for taken in part.takes:
            name, source = (taken, taken) if isinstance(taken, str) else taken
            value = self._found[source] if source in self._found else self._input(source, part.device)
            if name != source and self._inputs.get(source) not in self._changing[part.device]:
                key = part.device, name
                if key not in self._copies:
                    self._copies[key] = torch.empty_like(value, device=part.device)
                moves.append((self._copies[key], value))
                value = self._copies[key].copy_(value, non_blocking=True)
            args.append(value)
        return args, moves

    def _input(self, name: str, device: torch.device) -> Any:
        """An input of the whole: numbers that change are on every GPU, state where it is."""
        what = self._inputs[name]
        values = {**self._state, **self._changing[device]}
        return values[what] if isinstance(what, str) else values[what[0]].shape[what[1]]

    def _record(self, part: Part, args: list[Any]) -> None:
        if part is next(p for p in self.parts if p.device == part.device):
            self._numbers[part.device].copy_(self._host, non_blocking=True)
        given = dict(zip(part.gives, part.gm(*args), strict=True))
        found = given.pop(self._result, None)
        self._found |= given
        if found is None:
            return
        if self._last is not None:
            found = self._last(found, self._changing[part.device])
        if self._out is None:
            self._out = torch.zeros(found.shape, dtype=found.dtype, pin_memory=self.main.type == "cuda")
        self._out.copy_(found, non_blocking=True)

    def close(self) -> None:
        """Let go of the CPU's kernels."""
        for each in self.prepared:
            each.close()
        self.prepared = []


def wait_for(devices: Iterable[torch.device]) -> None:
    """For the current stream of each."""
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def _workspaces_inside() -> Iterator[None]:
    """What cuBLAS works with is made anew inside, in the pool of what is recorded, and forgotten after.

    Else it is outside of all pools, graphs of one stream share it, and from pull request 175276 of pytorch on the first
    of them that ends lets go of it (issue 193402).
    """
    forget_workspaces()
    try:
        yield
    finally:
        forget_workspaces()


@cache
def _beside(device: torch.device, thread: int) -> torch.cuda.Stream:
    """One for all recordings of a thread: libraries keep memory for each stream that they were used on."""
    return torch.cuda.Stream(device)


@contextmanager
def _streams_beside(devices: Iterable[torch.device]) -> Iterator[None]:
    """A stream beside is the current one of each GPU, once its last one has come to here; the current GPU stays."""
    current = torch.cuda.current_device()
    with ExitStack() as stack:
        for device in devices:
            stream = _beside(device, get_ident())
            stream.wait_stream(torch.cuda.current_stream(device))
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(torch.cuda.device(current))
        yield


class StreamedStep:
    """An executable for steps of up to `tokens` tokens, kernel by kernel on the GPU's stream.

    Regions on the CPU run where the stream has come to them: shared experts and copies go on meanwhile, and the host
    is never waited for. Raises NotCapturable as `with_handovers`.
    """

    def __init__(self, executable: Executable, main: torch.device, tokens: int, make: Handovers | None = None) -> None:
        self.executable, self.main, self.tokens = executable, main, tokens
        self.gm, self.prepared = with_handovers(executable, main, tokens, make or handover())
        self._devices = {n.meta["device"] for n in self.gm.graph.nodes if "device" in n.meta}

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The first result, on its GPU, once the step is over. `values`: inputs by name, as for the executable."""
        args = [  # what has no device is state: it stays where it is written
            (values[i] if d is None else values[i].to(self.main, non_blocking=True))
            if isinstance(i, str)
            else values[i[0]].shape[i[1]]
            for i, d in zip(self.executable.inputs, self.executable.devices, strict=True)
        ]
        for each in self.prepared[:1]:
            each.rest(False)
        on_gpu = self.main.type == "cuda"
        try:
            with torch.inference_mode(), torch.cuda.device(self.main) if on_gpu else nullcontext():
                found: Tensor = self.gm(*args)[0]
        finally:
            if on_gpu:
                wait_for(self._devices)
            for each in self.prepared[:1]:
                each.rest(True)
        for each in self.prepared:
            each.check()
        return found

    def close(self) -> None:
        """Let go of the CPU's kernels."""
        for each in self.prepared:
            each.close()
        self.prepared = []


def _none(prepared: Prepared, device: torch.device) -> Handover:
    raise NotCapturable("nothing runs on the CPU")


__all__ = ["StepGraph", "StreamedStep", "handover"]
