"""Steps that the host enqueues and waits for once, with the CPU's experts inside.

StepGraph: a decode step whose addresses never change, replayed as one CUDA graph. StreamedStep: any other.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from ktcompile.errors import KtransError
from ktcompile.graph import copy_to
from ktcompile.kernel import Prepared
from ktcompile.runtime import Executable, Step


class NotCapturable(KtransError):
    """Why a step cannot be one graph."""


class Handover(Protocol):
    """How a GPU's stream gives values to a prepared call on the CPU and takes its result, without the host."""

    def submit(self, *values: Tensor) -> None:
        """Enqueue: the call starts with `values`."""

    def wait(self, like: Tensor) -> Tensor:
        """Enqueue: the result, as a new tensor like this one."""


Handovers = Callable[[Prepared, torch.device], Handover]
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


class _Submit(nn.Module):
    def __init__(self, handover: Handover) -> None:
        super().__init__()
        self.handover = handover

    def forward(self, *values: Tensor) -> Tensor:
        self.handover.submit(*values)
        return values[0]  # of the result's shape and type; what follows waits for `wait`


class _Wait(nn.Module):
    def __init__(self, handover: Handover) -> None:
        super().__init__()
        self.handover = handover

    def forward(self, like: Tensor) -> Tensor:
        return self.handover.wait(like)


def with_handovers(
    executable: Executable, main: torch.device, tokens: int, make: Handovers
) -> tuple[fx.GraphModule, list[Prepared]]:
    """The lowered graph with every region on the CPU as two points: submit, and wait at the first use.

    Results stay on the GPU. Raises NotCapturable where a region on the CPU cannot be prepared or a second GPU is used.
    """
    gm = executable.gm
    graph, root = fx.Graph(), nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    waits: dict[fx.Node, str] = {}  # a region on the CPU -> its submodule
    prepared: list[Prepared] = []

    def prepare(step: Step, node: fx.Node) -> None:
        name = str(node.target)
        values = [a for a in node.args[: step.inputs] if isinstance(a, fx.Node)]
        copied = [v for v in values if v.target is copy_to and v.args[0] in env]
        pinned = main.type == "cuda"
        before = prepared[-1] if prepared else None
        can = len(copied) == len(values)
        made = step.kernel.prepare(step.packed, step.call, tokens, pinned, before) if can else None
        if made is None:
            by = step.kernel.name
            raise NotCapturable(f"{step.call.path} runs on {step.device} by {by}, which waits for the host")
        prepared.append(made)
        way = make(made, main)
        root.add_module(f"{name}_submit", _Submit(way))
        root.add_module(f"{name}_wait", _Wait(way))
        given = tuple(env[v.args[0]] for v in copied)  # type: ignore[index]
        env[node] = graph.call_module(f"{name}_submit", given)
        waits[node] = f"{name}_wait"

    for node in gm.graph.nodes:
        if node.target is copy_to:
            value, device = node.args
            if value in waits:
                env[node] = graph.call_module(waits[value], (env[value],))
            elif device == str(main):
                env[node] = env[value]  # an input, which is there already
            continue  # to the CPU: for a region there, which takes the value itself, or for the caller
        if node.op == "output":
            results = tuple(r.args[0] if r.target is copy_to and r not in env else r for r in node.args[0])
            if any(r in waits for r in results):
                raise NotCapturable("its result is made on the CPU")
            graph.output(tuple(env[r] for r in results))
            continue
        if node.op == "call_module":
            step = gm.get_submodule(str(node.target))
            if not isinstance(step, Step):
                raise NotCapturable("the model owns its parameters")
            if step.device != main:
                if step.device.index is not None:  # a GPU has a number, the CPU has none
                    raise NotCapturable(
                        f"{step.call.path} runs on {step.device}; one CUDA graph records the work of one GPU, {main}"
                    )
                prepare(step, node)
                continue
            root.add_module(str(node.target), step)
        if any(a not in env or a in waits for a in node.all_input_nodes):
            raise NotCapturable(f"{node.name} reads what is on the CPU")
        env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(root, graph), prepared


class StepGraph:
    """An executable on inputs of fixed addresses. The first call runs it and, on a GPU, records it; others replay.

    `state`: inputs that stay where they are (page pools, the page table). `shapes`: the int64 inputs that change every
    step, by name; the caller gives them in one list a step. `last`: what the step ends with, also part of the graph: it
    is given the first result and the changing inputs, its own result goes to the host. `first` is the first result
    itself, on the GPU, until the next call.
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
    ) -> None:
        self.main, self._last = main, last
        pinned = main.type == "cuda"
        counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        total = sum(counts.values())
        self._host = torch.zeros(total, dtype=torch.int64, pin_memory=pinned)
        self._device = torch.zeros(total, dtype=torch.int64, device=main)
        self._changing = {
            name: part.view(tuple(shapes[name]))
            for name, part in zip(counts, self._device.split(list(counts.values())), strict=True)
        }
        values = {**state, **self._changing}
        needs_cpu = any(isinstance(m, Step) and m.device != main for m in executable.gm.modules())
        self.gm, self.prepared = with_handovers(executable, main, tokens, make or (handover() if needs_cpu else _none))
        self._args = [values[i] if isinstance(i, str) else values[i[0]].shape[i[1]] for i in executable.inputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None
        self.first: Tensor | None = None

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """Run on the changing inputs, all in one list in the order of `shapes`; the result, on the CPU.

        The result is overwritten by the next call.
        """
        self._host.copy_(torch.tensor(numbers, dtype=torch.int64))
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
            self._record()
            return
        with torch.cuda.device(self.main):
            if self._graph is None:
                self._capture()
            else:
                self._graph.replay()
            torch.cuda.current_stream().synchronize()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._record()  # compiles kernels, and lets libraries allocate; the step itself may be repeated
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._record()
        except torch.OutOfMemoryError:
            raise  # it may fit another time
        except RuntimeError as error:
            raise NotCapturable(f"CUDA refused to record it: {error}") from error
        graph.replay()
        self._graph = graph

    def _record(self) -> None:
        self._device.copy_(self._host, non_blocking=True)
        found = self.first = self.gm(*self._args)[0]
        if self._last is not None:
            found = self._last(found, self._changing)
        if self._out is None:
            self._out = torch.zeros(found.shape, dtype=found.dtype, pin_memory=self.main.type == "cuda")
        self._out.copy_(found, non_blocking=True)

    def close(self) -> None:
        """Let go of the CPU's kernels."""
        for each in self.prepared:
            each.close()
        self.prepared = []


class StreamedStep:
    """An executable for steps of up to `tokens` tokens, kernel by kernel on the GPU's stream.

    Regions on the CPU run where the stream has come to them: shared experts and copies go on meanwhile, and the host
    is never waited for. Raises NotCapturable as `with_handovers`.
    """

    def __init__(self, executable: Executable, main: torch.device, tokens: int, make: Handovers | None = None) -> None:
        self.executable, self.main, self.tokens = executable, main, tokens
        self.gm, self.prepared = with_handovers(executable, main, tokens, make or handover())

    def __call__(self, values: Mapping[str, Tensor]) -> Tensor:
        """The first result, on the GPU, once the step is over. `values`: inputs by name, as for the executable."""
        args = [  # what has no device is state: it stays where it is written
            (values[i] if d is None else values[i].to(self.main, non_blocking=True))
            if isinstance(i, str)
            else values[i[0]].shape[i[1]]
            for i, d in zip(self.executable.inputs, self.executable.devices, strict=True)
        ]
        for each in self.prepared[:1]:
            each.rest(False)
        try:
            with torch.inference_mode():
                found: Tensor = self.gm(*args)[0]
        finally:
            if self.main.type == "cuda":
                torch.cuda.current_stream(self.main).synchronize()
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


__all__ = ["Handover", "NotCapturable", "StepGraph", "StreamedStep", "handover", "with_handovers"]
