"""Folding: from a captured graph to regions. What `bind` sees of a module call, and how calls become nodes."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from ktcompile.errors import PassError
from ktcompile.graph import GLUE, is_scalar, is_weight, short, value_of, writes

_VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "flatten"}


@dataclass(frozen=True)
class Site:
    """A captured module call before it is folded: what `bind` looks at."""

    path: str
    cls: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    weights: Mapping[str, fx.Node]
    outputs: tuple[fx.Node, ...]
    written: tuple[fx.Node, ...]

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """Inputs that are tensors."""
        return tuple(n for n in self.inputs if isinstance(value_of(n), torch.Tensor))


class Bound(Protocol):
    """What `bind` says of a site: the op, its binding, and why no kernel may take it (`ops.Bound` is one)."""

    @property
    def op(self) -> str: ...
    @property
    def binding(self) -> Any: ...
    @property
    def why(self) -> str | None: ...


Bind = Callable[[Site], Bound | None]


def _storage(node: fx.Node) -> StorageWeakRef | None:
    value = value_of(node)
    return StorageWeakRef(value.untyped_storage()) if isinstance(value, torch.Tensor) else None


def site_of(path: str, cls: str, nodes: Sequence[fx.Node]) -> Site:
    """The inputs, weights, outputs and in-place writes of a set of nodes."""
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    weights: dict[str, fx.Node] = {}
    for node in nodes:
        for arg in node.all_input_nodes:
            if arg in inside:
                continue
            if not is_weight(arg):
                inputs[arg] = None
                continue
            key = str(arg.meta["weight"])
            weights[key.removeprefix(f"{path}.") if key.startswith(f"{path}.") else key.rsplit(".", 1)[-1]] = arg
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    held = {ref: arg for arg in (*inputs, *weights.values()) if (ref := _storage(arg)) is not None}
    changed = {held[ref]: None for n in nodes for w in writes(n) if (ref := _storage(w)) in held}
    tensors = [n for n in inputs if not is_scalar(n)]
    scalars = [n for n in inputs if is_scalar(n)]
    return Site(path, cls, tuple(nodes), (*tensors, *scalars), weights, tuple(outputs), tuple(changed))


@dataclass
class _Unit:
    """Nodes that will become one region."""

    path: str
    cls: str
    op: str
    binding: Any
    nodes: list[fx.Node]
    roles: dict[str, fx.Node] = field(default_factory=dict)


def fold(gm: fx.GraphModule, bind: Bind) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    """Fold each outermost module call that `bind` accepts into one region; the rest becomes glue.

    Expects a graph annotated by `capture`: `meta` has `stack` ((path, class), outermost first), `val`, and `weight` on
    parameters. Returns the folded graph and, as (path, why), what no kernel may take.
    """
    refusals: list[tuple[str, str]] = []
    scalars = _hoistable(gm)
    todo = [
        n for n in gm.graph.nodes if n.op not in ("placeholder", "output") and n not in scalars and not _is_noise(n)
    ]
    calls: dict[tuple[str, str], list[fx.Node]] = {}
    for node in todo:
        for frame in node.meta["stack"]:
            calls.setdefault(frame, []).append(node)
    order = {n: i for i, n in enumerate(todo)}
    owner: dict[fx.Node, _Unit] = {}
    for (path, cls), nodes in calls.items():  # outermost first: a frame is met before the frames inside it
        if nodes[0] in owner:
            continue
        site = site_of(path, cls, nodes)
        found = bind(site)
        if found is None:
            continue
        if order[nodes[-1]] - order[nodes[0]] + 1 != len(nodes):
            refusals.append((path, f"not {found.op}: other code runs between its first and last operation"))
            continue
        if found.why is not None:
            refusals.append((path, found.why))
        roles = found.binding.roles if found.binding else {}
        unit = _Unit(path, cls, found.op, found.binding, nodes, {r: site.inputs[i] for r, i in roles.items()})
        owner.update(dict.fromkeys(nodes, unit))
    return _build(gm, _units(todo, owner), scalars), refusals


def _is_noise(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "_log_api_usage_once"


def _hoistable(gm: fx.GraphModule) -> dict[fx.Node, None]:
    """Arithmetic on sizes that needs graph inputs only: dynamo shares it across modules, so no region owns it."""
    found: dict[fx.Node, None] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or not is_scalar(node) or value_of(node) is None:
            continue
        if all(a.op == "placeholder" or a in found for a in node.all_input_nodes):
            found[node] = None
    return found


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in _VIEWS


def _as_defined(unit: _Unit, view: fx.Node) -> bool:
    """Whether a region that ends with `view` returns the shape of its `x`, as ops do: kernels know no other."""
    x = unit.roles.get("x")
    while x in unit.nodes:
        x = x.all_input_nodes[0]
    return x is None or str(value_of(x).shape) == str(value_of(view).shape)  # as text: comparing symbols adds guards


def _units(todo: Sequence[fx.Node], owner: dict[fx.Node, _Unit]) -> list[_Unit]:
    """Every node in one unit, in execution order: bound module calls, and maximal runs of glue."""
    for node in todo:  # a view that one region alone reads, or that alone reads a region, belongs to it
        if node in owner or not _is_view(node):
            continue
        users = {id(owner[u]): owner[u] for u in node.users if u in owner}
        if len(users) == 1 and all(u in owner for u in node.users):
            (unit,) = users.values()
            unit.nodes.insert(0, node)
            owner[node] = unit
            continue
        source = node.all_input_nodes[0]
        ends = source in owner and len(source.users) == 1 and owner[source].op != GLUE
        if ends and _as_defined(owner[source], node):
            owner[source].nodes.append(node)
            owner[node] = owner[source]
    units: list[_Unit] = []
    seen: set[int] = set()
    for node in todo:
        if node not in owner:
            path, cls = node.meta["stack"][-1] if node.meta["stack"] else ("", "")
            last = units[-1] if units and units[-1].op == GLUE else None
            if last is None or last.path != path:
                last = _Unit(path, cls, GLUE, None, [])
                units.append(last)
            last.nodes.append(node)
            owner[node] = last
        elif id(owner[node]) not in seen:
            seen.add(id(owner[node]))
            units.append(owner[node])
    return _in_order(units, owner)


def _in_order(units: list[_Unit], owner: Mapping[fx.Node, _Unit]) -> list[_Unit]:
    """Units so that each comes after those it reads (an absorbed view may start a region before its other inputs)."""
    needs = {id(u): {id(owner[a]) for n in u.nodes for a in n.all_input_nodes if a in owner} - {id(u)} for u in units}
    done: set[int] = set()
    out: list[_Unit] = []
    waiting = list(units)
    while waiting:
        ready = next((u for u in waiting if needs[id(u)] <= done), None)
        if ready is None:
            raise PassError(f"fold: regions {', '.join(u.path for u in waiting[:3])} read each other")
        waiting.remove(ready)
        done.add(id(ready))
        out.append(ready)
    return out


def _glue_name(unit: _Unit, site: Site, owner: Mapping[fx.Node, str]) -> str:
    """What the glue does, from what it reads: `layers.0.residual_attn`, `mask`, `last_tokens`."""
    dot = f"{unit.path}." if unit.path else ""
    targets = {str(getattr(n.target, "__name__", n.target)) for n in unit.nodes}
    if targets & {"add", "iadd", "add_"}:
        inside = [owner[i].removeprefix(dot) for i in site.inputs if i in owner and owner[i].startswith(dot)]
        if not unit.cls.endswith(("Layer", "Block")):
            return f"{dot}sum"  # routed plus shared experts
        return f"{dot}residual_{short(inside[-1]).split('.')[0]}" if inside else f"{dot}residual"
    masks = [o for o in site.outputs if isinstance(value_of(o), torch.Tensor) and value_of(o).dtype == torch.bool]
    if masks or any("mask" in t for t in targets):
        return f"{dot}mask"
    if targets <= {"getitem", "contiguous"} | _VIEWS:
        return f"{dot}last_tokens" if not unit.path else f"{dot}slice"
    return f"{dot}glue"


def _build(gm: fx.GraphModule, units: Sequence[_Unit], scalars: Mapping[fx.Node, None]) -> fx.GraphModule:
    """The folded graph: inputs, size arithmetic, then one call a unit. Equal bodies are one module."""
    root = torch.nn.Module()
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in scalars or (node.op == "get_attr"):
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    bodies: dict[str, str] = {}
    names: dict[fx.Node, str] = {}
    taken: dict[str, int] = {}
    for unit in units:
        nodes = [n for n in unit.nodes if n.op != "get_attr"]
        if not nodes:
            continue
        site = site_of(unit.path, unit.cls, nodes)
        path = unit.path if unit.op != GLUE else _glue_name(unit, site, names)
        taken[path] = taken.get(path, 0) + 1
        if taken[path] > 1:
            path = f"{path}_{taken[path]}"
        body, key = _body(gm, site)
        if key not in bodies:
            kind = sum(b.rsplit("_", 1)[0] == unit.op for b in bodies.values())
            bodies[key] = f"{unit.op}_{kind}"
            root.add_module(bodies[key], fx.GraphModule(gm, body))
        call = graph.call_module(bodies[key], tuple(env[a] for a in (*site.inputs, *site.weights.values())))
        values = tuple(value_of(o) for o in site.outputs)
        call.meta.update(
            path=path,
            cls=unit.cls,
            op=unit.op,
            binding=_rebind(unit, site),
            leaves=tuple(site.weights),
            effects=bool(site.written),
            val=values[0] if len(values) == 1 else values,
        )
        for i, out in enumerate(site.outputs):
            env[out] = call
            if len(values) > 1:
                env[out] = graph.call_function(operator.getitem, (call, i))
                env[out].meta["val"] = values[i]
            names[out] = path
    output = next(n for n in gm.graph.nodes if n.op == "output")
    graph.output(fx.map_arg(output.args[0], lambda n: env[n]))
    for name, attribute in _attributes(gm):
        setattr(root, name, attribute)
    folded = fx.GraphModule(root, graph)
    folded.meta = dict(gm.meta)
    return folded


def _rebind(unit: _Unit, site: Site) -> Any:
    """The unit's binding with roles counted among the inputs that it has now: absorbed views changed their order."""
    if unit.binding is None:
        return None
    inside = set(unit.nodes)
    roles = {}
    for role, node in unit.roles.items():
        while node in inside:
            node = node.all_input_nodes[0]
        roles[role] = site.inputs.index(node)
    return replace(unit.binding, roles=roles)


def _attributes(gm: fx.GraphModule) -> Iterator[tuple[str, Any]]:
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            yield str(node.target), getattr(gm, str(node.target))


def _body(gm: fx.GraphModule, site: Site) -> tuple[fx.Graph, str]:
    """The site's own graph, and a key that equal code shares: operations, wiring and constants, no names."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(site.inputs):
        env[node] = graph.placeholder(f"x{i}")
    for leaf, node in site.weights.items():
        env[node] = graph.placeholder("w_" + re.sub(r"\W", "_", leaf))
    for node in env:
        env[node].meta["val"] = value_of(node)
    tokens = [f"{len(site.inputs)} {' '.join(site.weights)}"]
    index = {n: i for i, n in enumerate(env)}
    for node in site.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = {"val": value_of(node)}
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{index[n]}")
        target = (
            node.target
            if isinstance(node.target, str)
            else f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', None) or node.target}"
        )
        tokens.append(f"{node.op} {target} {args}")
        index[node] = len(index)
    outs = tuple(env[o] for o in site.outputs)
    graph.output(outs[0] if len(outs) == 1 else outs)
    tokens.append(f"output {[index[o] for o in site.outputs]}")
    return graph, "\n".join(tokens)
