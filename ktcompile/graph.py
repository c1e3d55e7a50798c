"""Regions: one node per captured module call, holding its captured body. All editing of FX graphs is here."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from ktcompile.errors import PassError

GLUE = "glue"
_VIEWS = {"view", "reshape", "unsqueeze", "squeeze", "flatten"}
_INPLACE = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.iand,
    operator.ior,
    operator.setitem,
}


# ------------------------------------------------------------------------------------------------ values of nodes


def value_of(node: fx.Node) -> Any:
    """The fake value of a node: a tensor, a tuple of them, a (symbolic) number, or None."""
    return node.meta.get("val")


def argument(node: fx.Node, index: int) -> fx.Node:
    """The argument of a node at `index`, which must be a node. Raises PassError otherwise."""
    value = node.args[index] if index < len(node.args) else None
    if not isinstance(value, fx.Node):
        raise PassError(f"{node.name}: argument {index} is {value!r}, wanted a value of the graph")
    return value


def is_scalar(node: fx.Node) -> bool:
    """Whether the node yields a number, a tuple of sizes, or nothing: such values stay on the host and are never copied."""
    value = value_of(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
        return True
    return isinstance(value, (tuple, list, torch.Size)) and not any(isinstance(v, torch.Tensor) for v in value)


def is_weight(node: fx.Node) -> bool:
    """Whether the node is a parameter or buffer of the model."""
    return "weight" in node.meta


def is_copy(node: fx.Node) -> bool:
    """Whether the node copies a value to another device."""
    return node.op == "call_function" and node.target is copy_to


def is_region(node: fx.Node) -> bool:
    """Whether the node is a folded region."""
    return node.op == "call_module" and "path" in node.meta


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments that a node changes in place."""
    args = [a for a in node.args if isinstance(a, fx.Node)]
    if node.op == "call_method":
        inplace = str(node.target).endswith("_") and not str(node.target).endswith("__")
        return tuple(args[:1]) if inplace else ()
    if node.op != "call_function":
        return ()
    if node.target in _INPLACE:
        return tuple(args[:1])
    schema = getattr(node.target, "_schema", None) or getattr(getattr(node.target, "default", None), "_schema", None)
    if schema is not None:
        pairs = zip(schema.arguments, node.args, strict=False)
        return tuple(a for s, a in pairs if s.is_write and isinstance(a, fx.Node))
    name = getattr(node.target, "__name__", "")
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        return (out,)
    return tuple(args[:1]) if name.endswith("_") and not name.endswith("__") else ()


def copy_to(value: torch.Tensor, device: str) -> torch.Tensor:
    """`value` on `device`: the only node that crosses devices."""
    return value.to(device)


# ------------------------------------------------------------------------------------------------ regions

_SHORT = (
    ("model.", ""),
    ("layers.", "L"),
    ("self_attn", "attn"),
    ("post_attention_layernorm", "norm2"),
    ("input_layernorm", "norm1"),
    ("mlp.shared_experts", "shared"),
    ("mlp.experts", "experts"),
    ("mlp.gate", "gate"),
    ("block_sparse_moe.experts", "experts"),
    ("block_sparse_moe.gate", "gate"),
    ("mlp.router", "router"),
    ("embed_tokens", "embed"),
    ("rotary_emb", "rope"),
)


def short(path: str) -> str:
    """A module path as the page writes it: `model.layers.1.mlp.experts` is `L1.experts`."""
    for old, new in _SHORT:
        path = (
            re.sub(rf"(^|\.){re.escape(old)}(?=$|[.\d\w])", rf"\g<1>{new}", path)
            if old.endswith(".")
            else re.sub(rf"(^|\.){re.escape(old)}(?=$|\.)", rf"\g<1>{new}", path)
        )
    return path


def globs(pattern: str) -> Iterator[str]:
    """The plain globs of a pattern: `{3..5}` counts, `{a,b}` lists."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    inside = match[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    choices = [str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else inside.split(",")
    for choice in choices:
        yield from globs(pattern[: match.start()] + choice + pattern[match.end() :])


def matches(path: str, pattern: str) -> bool:
    """Whether a glob names this module path or the end of it (`layers.3.*` finds `model.layers.3.mlp`)."""
    return any(fnmatchcase(path, g) or fnmatchcase(path, f"*.{g}") for g in globs(pattern))


class Definition(Protocol):
    """What `define` needs of an op (`ops.Op` is one): the roles, and a graph over roles and weights."""

    @property
    def roles(self) -> tuple[str, ...]: ...
    @property
    def define(self) -> Callable[[Any, tuple[str, ...]], fx.Graph] | None: ...


@dataclass(frozen=True)
class Region:
    """A view of one node of the folded graph: what runs, where, with which weights."""

    node: fx.Node

    @property
    def path(self) -> str:
        return str(self.node.meta["path"])

    @property
    def name(self) -> str:
        """The path as the page writes it."""
        return short(self.path)

    @property
    def op(self) -> str:
        """What the region means: a name of the op vocabulary, or `glue`."""
        return str(self.node.meta["op"])

    @property
    def cls(self) -> str:
        """Class name of the captured module."""
        return str(self.node.meta["cls"])

    @property
    def binding(self) -> Any:
        """How the region's inputs and weights play the roles of its op, or None."""
        return self.node.meta.get("binding")

    @property
    def device(self) -> str | None:
        """Name of the device that runs it."""
        return self.node.meta.get("device")

    @property
    def home(self) -> str | None:
        """Name of the device that holds its weights."""
        return self.node.meta.get("home", self.device)

    @property
    def kernel(self) -> str | None:
        """Name of the kernel chosen for it."""
        return self.node.meta.get("kernel")

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Values it reads that are no weights, in the order of the body's placeholders."""
        return tuple(a for a in self.node.args if isinstance(a, fx.Node) and not is_weight(a))

    @property
    def weights(self) -> dict[str, fx.Node]:
        """Its weights by their name inside the module (`gate_up_proj`, `q_a_proj.weight`)."""
        nodes = [a for a in self.node.args if isinstance(a, fx.Node) and is_weight(a)]
        return dict(zip(self.node.meta["leaves"], nodes, strict=True))

    @property
    def body(self) -> fx.GraphModule:
        """The captured code. Arguments: `inputs`, then `weights`."""
        module = self.node.graph.owning_module
        assert module is not None
        body = module.get_submodule(str(self.node.target))
        assert isinstance(body, fx.GraphModule)
        return body

    @property
    def nbytes(self) -> int:
        """Bytes of its weights: packed, once a kernel is chosen, else as stored."""
        packed = self.node.meta.get("packed_bytes")
        return packed if packed is not None else sum(stored_bytes(w) for w in self.weights.values())

    @property
    def effects(self) -> bool:
        """Whether it changes one of its inputs in place."""
        return bool(self.node.meta.get("effects"))

    def matches(self, pattern: str) -> bool:
        return matches(self.path, pattern)

    def place(self, device: str, home: str | None = None) -> None:
        """Run on `device`, weights at `home` (default: there too)."""
        self.node.meta["device"] = device
        self.node.meta["home"] = home or device

    def choose(self, kernel: str, layout: str, packed_bytes: int) -> None:
        """Let `kernel` run it, from weights packed as `layout`."""
        self.node.meta.update(kernel=kernel, layout=layout, packed_bytes=packed_bytes)

    def unbind(self) -> None:
        """Keep the captured code: no kernel of the op may take it."""
        self.node.meta["binding"] = None

    def define(self, op: "Definition", binding: Any) -> None:
        """Run the op's own definition, on the inputs that have a role in it, instead of the captured code."""
        if self.node.meta.get("defined"):
            return
        leaves = tuple(self.weights)
        inputs = [self.inputs[binding.roles[role]] for role in op.roles]
        self.node.args = (*inputs, *self.weights.values())
        self.node.meta.update(defined=True, binding=replace(binding, roles={r: i for i, r in enumerate(op.roles)}))
        assert op.define is not None
        self.replace_body(fx.GraphModule(torch.nn.Module(), op.define(binding, leaves)))

    def replace_body(self, body: fx.GraphModule, binding: Any = None) -> None:
        """Give this region a body of its own, and a `binding` if that changed; regions that shared the old one keep it."""
        module = self.node.graph.owning_module
        assert module is not None
        taken = dict(module.named_children())
        name = next(n for i in range(len(taken) + 1) if (n := f"{self.op}_{i}") not in taken)
        module.add_submodule(name, body)
        self.node.target = name
        if binding is not None:
            self.node.meta["binding"] = binding


def stored_bytes(weight: fx.Node) -> int:
    """Bytes of a weight in its source's encoding; of its values where no source is known."""
    return int(weight.meta.get("nbytes") or value_of(weight).nbytes)


def regions(gm: fx.GraphModule, pattern: str = "*", *, op: str | None = None) -> Iterator[Region]:
    """Regions whose module path matches the glob `pattern`, in execution order."""
    for node in list(gm.graph.nodes):
        if not is_region(node):
            continue
        region = Region(node)
        if region.matches(pattern) and op in (None, region.op):
            yield region


def copies(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that copy a value to another device, in execution order."""
    return (n for n in gm.graph.nodes if is_copy(n))


def device_of(node: fx.Node) -> str | None:
    """The device that a value is on; None for weights, scalars and inputs that nobody placed."""
    if is_copy(node):
        return str(node.args[1])
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return device_of(node.args[0])
    return node.meta.get("device")


def insert_copy(value: fx.Node, device: str, before: fx.Node) -> fx.Node:
    """A node before `before` that yields `value` on `device`."""
    graph = value.graph
    with graph.inserting_before(before):
        copy = graph.call_function(copy_to, (value, device))
    copy.meta["val"] = value_of(value)
    return copy


def prune(gm: fx.GraphModule) -> list[str]:
    """Remove regions and copies that nobody reads and that change nothing; returns their paths.

    Unlike `eliminate_dead_code` it keeps in-place effects.
    """
    gone = []
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if is_region(node) and Region(node).effects:
            continue
        gone.append(node.meta.get("path", node.name))
        gm.graph.erase_node(node)
    return gone[::-1]


# ------------------------------------------------------------------------------------------------ fold


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


# ------------------------------------------------------------------------------------------------ types


def propagate(gm: fx.GraphModule) -> None:
    """Give every node its fake value again. Equal bodies on equal types run once. Raises PassError where code fails."""
    memo: dict[tuple[Any, ...], Any] = gm.meta.setdefault("ktrans_types", {})
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if is_copy(node):
            node.meta["val"] = value_of(node.args[0])
            continue
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            node.meta["val"] = value_of(node.args[0])[node.args[1]]
            continue
        if not is_region(node):
            continue
        region = Region(node)
        args = [value_of(a) for a in node.args]
        key = (id(region.body), *(_type_key(a) for a in args))
        if key not in memo:
            memo[key] = (region.body, _run_fake(region, args))
        node.meta["val"] = memo[key][1]


def _type_key(value: Any) -> str:
    return f"{value.dtype}{tuple(map(str, value.shape))}" if isinstance(value, torch.Tensor) else str(value)


def _run_fake(region: Region, args: Sequence[Any]) -> Any:
    mode = next((getattr(a, "fake_mode", None) for a in args if isinstance(a, torch.Tensor)), None)
    if mode is None:
        return region.node.meta["val"]
    try:
        with mode, torch.no_grad():
            return fx.Interpreter(region.body).run(*args)
    except Exception as error:
        raise PassError(f"{region.path}: its code does not fit the values it reads: {error}") from error
