"""A lowered graph as GPUs run it: regions on the CPU are two points of a stream, and each GPU's share is a part."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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


class _Submit(nn.Module):
    def __init__(self, handover: Handover, device: torch.device) -> None:
        super().__init__()
        self.handover, self.device = handover, device

    def forward(self, *values: Tensor) -> Tensor:
        with _on(self.device):
            self.handover.submit(*values)
        return values[0]  # of the result's shape and type; what follows waits for `wait`


class _Wait(nn.Module):
    def __init__(self, handover: Handover, device: torch.device) -> None:
        super().__init__()
        self.handover, self.device = handover, device

    def forward(self, like: Tensor) -> Tensor:
        with _on(self.device):
            return self.handover.wait(like)


def _on(device: torch.device) -> AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" and device.index else nullcontext()


def with_handovers(
    executable: Executable, main: torch.device, tokens: int, make: Handovers
) -> tuple[fx.GraphModule, list[Prepared]]:
    """The lowered graph with every region on the CPU as two points: submit, and wait at the first use.

    Inputs are on the GPU `main`, results stay on theirs. `copy_to` is left between GPUs alone; nodes that are no inputs
    have their GPU in `meta["device"]`. Raises NotCapturable where a region on the CPU cannot be prepared.
    """
    gm = executable.gm
    graph, root = fx.Graph(), nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    waits: dict[fx.Node, str] = {}  # a region on the CPU -> its submodule
    prepared: list[Prepared] = []

    def put(node: fx.Node, made: fx.Node, device: torch.device) -> None:
        env[node] = made
        made.meta["device"] = device

    def on(node: fx.Node) -> torch.device:
        return env[node].meta.get("device", main)  # type: ignore[no-any-return]

    def prepare(step: Step, node: fx.Node) -> None:
        name = str(node.target)
        values = [a for a in node.args[: step.inputs] if isinstance(a, fx.Node)]
        copied = [v.args[0] for v in values if v.target is copy_to and v.args[0] in env]
        sources = {on(v) for v in copied}  # type: ignore[arg-type]
        before = prepared[-1] if prepared else None
        can = len(copied) == len(values) and len(sources) == 1
        made = step.kernel.prepare(step.packed, step.call, tokens, main.type == "cuda", before) if can else None
        if made is None:
            by = step.kernel.name
            raise NotCapturable(f"{step.call.path} runs on {step.device} by {by}, which waits for the host")
        prepared.append(made)
        (gpu,) = sources
        way = make(made, gpu)
        root.add_module(f"{name}_submit", _Submit(way, gpu))
        root.add_module(f"{name}_wait", _Wait(way, gpu))
        put(node, graph.call_module(f"{name}_submit", tuple(env[v] for v in copied)), gpu)  # type: ignore[index]
        waits[node] = f"{name}_wait"

    for node in gm.graph.nodes:
        if node.target is copy_to:
            value, name = node.args
            device = torch.device(name)
            if device.index is None or value not in env:
                continue  # to the CPU: for a region there, which takes the value itself, or for the caller
            if value in waits:
                if device != on(value):
                    raise NotCapturable(f"{value.name} is handed over by {on(value)} and read by {device}")
                put(node, graph.call_module(waits[value], (env[value],)), device)
            elif device == on(value):
                env[node] = env[value]  # an input, which is there already
            else:
                put(node, graph.call_function(copy_to, (env[value], name)), device)
            continue
        if node.op == "output":
            results = tuple(r.args[0] if r.target is copy_to and r not in env else r for r in node.args[0])
            if any(r in waits for r in results):
                raise NotCapturable("its result is made on the CPU")
            graph.output(tuple(env[r] for r in results))
            continue
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
            env[node].meta = {}  # where it was: it is on `main` now
            continue
        device = next((on(a) for a in node.all_input_nodes if a in env and "device" in env[a].meta), main)
        if node.op == "call_module":
            step = gm.get_submodule(str(node.target))
            if not isinstance(step, Step):
                raise NotCapturable("the model owns its parameters")
            if step.device.index is None:  # a GPU has a number, the CPU has none
                prepare(step, node)
                continue
            device = step.device
            root.add_module(str(node.target), step)
        if any(a not in env or a in waits for a in node.all_input_nodes):
            raise NotCapturable(f"{node.name} reads what is on the CPU")
        put(node, graph.node_copy(node, lambda n: env[n]), device)
    return fx.GraphModule(root, graph), prepared


@dataclass(frozen=True)
class Part:
    """What one GPU does in a row. Names are those of nodes of the whole graph, see `parts_of`.

    `takes`: what `gm` is called with, inputs of the whole and results of earlier parts; (name, name of the source) is
    a copy of what another GPU has. `gives`: its results.
    """

    gm: fx.GraphModule
    device: torch.device
    takes: tuple[str | tuple[str, str], ...]
    gives: tuple[str, ...]


def parts_of(gm: fx.GraphModule) -> tuple[tuple[Part, ...], str]:
    """The graph of `with_handovers` cut where the GPU changes, in an order to run them, and the first result's name."""
    rank: dict[fx.Node, int] = {}  # how often the GPU has changed before
    shares: dict[tuple[int, torch.device], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        before = [rank[a] for a in node.all_input_nodes if a in rank]
        if node.target is copy_to and before:
            rank[node] = max(before) + 1
        elif node.op not in ("placeholder", "output") and node.target is not copy_to:
            rank[node] = max(before, default=0)
            shares.setdefault((rank[node], node.meta["device"]), []).append(node)
    results: tuple[fx.Node, ...] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    order = sorted(shares, key=lambda share: (share[0], share[1].index or 0))
    return tuple(_part(gm, device, shares[n, device], results) for n, device in order), results[0].name


def _part(gm: fx.GraphModule, device: torch.device, nodes: list[fx.Node], results: tuple[fx.Node, ...]) -> Part:
    graph = fx.Graph()
    own = set(nodes)
    outside = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in own)
    env = {node: graph.placeholder(node.name) for node in outside}
    for node in nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    given = [n for n in nodes if n in results or any(u not in own for u in n.users)]
    graph.output(tuple(env[n] for n in given))
    takes = tuple((n.name, str(n.args[0])) if n.target is copy_to else n.name for n in outside)
    return Part(fx.GraphModule(gm, graph), device, takes, tuple(n.name for n in given))


__all__ = ["Handover", "Handovers", "NotCapturable", "Part", "parts_of", "with_handovers"]
