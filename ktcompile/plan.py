"""Plan: the graph as a table that a person reads. Text, JSON, HTML and the difference of two."""

import difflib
import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from ktcompile.errors import CapacityError
from ktcompile.graph import Region, argument, copies, device_of, is_copy, is_region, is_scalar, regions, value_of
from ktcompile.kernel import CONTEXT, TOKENS, Kernel
from ktcompile.memory import workspace
from ktcompile.symbols import PAGE, concrete, nbytes
from ktcompile.symbols import sizes as symbol_sizes
from ktcompile.target import Target
from ktcompile.verify import gib, used

JSON_VERSION = 1
"""Version of `Plan.json()`; fields may be added to one, never renamed or removed."""

_DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.complex64: "c64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


@dataclass(frozen=True)
class Row:
    """One region or copy. `us` is predicted; None before kernels are chosen."""

    name: str
    path: str
    device: str
    op: str
    reads: tuple[str, ...]
    type: str
    encoding: str
    nbytes: int
    kernel: str
    us: float | None


@dataclass(frozen=True)
class Use:
    """What a device holds, in bytes, of what it can. `workspace`: of a step (`ktcompile.memory`)."""

    device: str
    weights: int
    cache: int
    capacity: int
    regions: int
    workspace: int = 0
    driver: int = 0

    @property
    def total(self) -> int:
        """All that it holds while a step runs."""
        return self.weights + self.cache + self.workspace + self.driver


@dataclass(frozen=True)
class Plan:
    """Where everything runs and lives, before a weight is read. `notes`: (by, names, why not)."""

    model: str
    phase: str
    tokens: int
    context: int
    after: str
    rows: tuple[Row, ...]
    uses: tuple[Use, ...]
    copied_bytes: int
    notes: tuple[tuple[str, str, str], ...]
    lossy: tuple[str, ...] = ()
    machine: str = ""

    @property
    def us(self) -> float | None:
        """Microseconds of one step at least: every byte is read once at full bandwidth, every product at full rate.

        Devices and links work at the same time where nothing waits for another's result, each at one row at a time.
        """
        free: dict[str, float] = {}
        ready: dict[str, float] = {}
        for row in self.rows:
            if row.us is None:
                return None  # before kernels are chosen
            start = max([free.get(row.device, 0.0), *(ready.get(_whole(name), 0.0) for name in row.reads)])
            free[row.device] = ready[_whole(row.name)] = start + row.us  # of several results the last is the latest
        return float(f"{max(free.values(), default=0.0):.9g}")  # the last bits depend on the version of Python

    def with_cache(self, tokens: int) -> "Plan":
        """The same with a cache of so many tokens, of all requests together. CapacityError where it does not fit."""
        pages, planned = -(-tokens // PAGE), -(-self.context // PAGE)
        uses = tuple(replace(u, cache=u.cache * pages // planned) for u in self.uses)
        for before, u in zip(self.uses, uses, strict=True):
            if u.total > u.capacity:
                free = u.capacity - (u.total - u.cache)
                raise CapacityError(
                    f"a cache of {tokens} tokens takes {gib(u.cache)} of {u.device}, where {gib(free)} are left; at "
                    f"most {free * planned // before.cache * PAGE} tokens fit"
                )
        return replace(self, uses=uses)

    def text(self) -> str:
        """The page."""
        return "\n".join([*self._head(), "", *_table(self.rows), *self._foot()]) + "\n"

    def _head(self) -> Iterator[str]:
        tokens = "token" if self.tokens == 1 else "tokens"
        context = f", {self.context} of context" if self.context else ""
        after = f", after {self.after}" if self.after else ""
        yield f"# {self.model}, {self.phase}: {self.tokens} {tokens} a step{context}{after}"
        for what in self.lossy:
            yield f"# lossy: {what}"
        if self.machine:
            yield f"# {self.machine}"
        width = max((len(u.device) for u in self.uses), default=0)
        for u in self.uses:
            plural = "s" * (u.regions != 1)
            rest = {"cache": u.cache, "workspace": u.workspace, "driver": u.driver}
            parts = f"weights {gib(u.weights)} in {u.regions} region{plural}"
            parts += "".join(f", {use} {gib(count)}" for use, count in rest.items() if count)
            yield f"# {u.device:<{max(width, 6)}}  {gib(u.total)} of {gib(u.capacity)}: {parts}"
        count = sum(r.op == "copy" for r in self.rows)
        if count:
            yield f"# copies  {gib(self.copied_bytes)} a step in {count} copies"
        if self.us is not None:
            rate = self.tokens / self.us * 1e6
            digits = 0 if rate >= 100 else 1
            best = f"{_time(self.us)} a step, {rate:.{digits}f} tokens/s"
            yield f"# at best {best}: by nominal rates of memory, links and arithmetic"

    def _foot(self) -> Iterator[str]:
        if self.notes:
            yield ""
            yield "# why not"
        for by, names, why in self.notes:
            yield f"#   {by}: {f'{names}: ' if names else ''}{why}"

    def json(self) -> dict[str, Any]:
        """The plan as plain data, stable and versioned."""
        return {"version": JSON_VERSION, **asdict(self), "predicted_us": self.us}

    def diff(self, earlier: "Plan") -> str:
        """What changed since `earlier`, a line a change; equal changes of several layers are one line."""
        return "\n".join(_changes(earlier.rows, self.rows)) or "nothing changed"


def make_plan(
    gm: fx.GraphModule,
    target: Target,
    *,
    model: str,
    phase: str,
    tokens: int,
    context: int,
    after: str = "",
    notes: Iterable[tuple[str, str, str]] = (),
    lossy: Iterable[str] = (),
    kernels: Mapping[str, Kernel] | None = None,
) -> Plan:
    """The plan of a folded graph. Sizes are those of a step of `tokens` tokens after `context` tokens."""
    sizes = symbol_sizes(gm, tokens, context)
    names = _names(gm)
    rows = tuple(
        _row(n, names, sizes, target, kernels or {}, tokens, context)
        for n in gm.graph.nodes
        if is_region(n) or is_copy(n)
    )
    placed = used(gm) if all(r.device for r in regions(gm)) else {}
    working = workspace(gm, sizes) if placed else {}
    uses = tuple(
        Use(
            d.name,
            placed[d.name]["weights"],
            placed[d.name]["cache"],
            d.capacity,
            sum(r.home == d.name for r in regions(gm)),
            working.get(d.name, 0),
            d.reserved,
        )
        for d in target.devices
        if d.name in placed
    )
    moved = sum(nbytes(value_of(c), sizes) for c in copies(gm))
    return Plan(
        model, phase, tokens, context, after, rows, uses, moved, tuple(group_notes(notes)), tuple(lossy), target.about
    )


# ------------------------------------------------------------------------------------------------ rows


def _names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    names: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if is_region(node):
            names[node] = Region(node).name
        elif is_copy(node):
            names[node] = f"{names.get(node.args[0], node.args[0].name)}@{node.args[1]}"
        elif node.op == "placeholder":
            names[node] = _input_name(str(node.meta.get("input", node.name)))
        elif node.op == "call_function" and isinstance(node.args[0], fx.Node) and node.args[0] in names:
            names[node] = f"{names[node.args[0]]}#{node.args[1]}"
    return names


def _input_name(name: str) -> str:
    """An input as the page names it: state of a layer is the layer's (`L3.cache`, `L3.keys`)."""
    state = re.fullmatch(r".*(?:cache|past_key_values)\.layers\.(\d+)\.(\w+)", name)
    if state:
        return f"L{state[1]}.{'cache' if state[2] == 'pool' else state[2]}"
    return name.removeprefix("kwargs.")


def _whole(name: str) -> str:
    """Of one of several results, the name of all."""
    return re.sub(r"#\d+", "", name)


_BOOKKEEPING = {"cache.page_table", "cache.seq_len", "cache.query_start"}


def _row(
    node: fx.Node,
    names: Mapping[fx.Node, str],
    sizes: Mapping[str, int],
    target: Target,
    kernels: Mapping[str, Kernel],
    tokens: int,
    context: int,
) -> Row:
    kind = _type(value_of(node), sizes)
    if is_copy(node):
        copied, to = argument(node, 0), str(node.args[1])
        source = device_of(copied) or ""
        link = target.link(source, to)
        moved = nbytes(value_of(node), sizes)
        return Row(
            names[node],
            str(names[node]),
            f"-> {to}",
            "copy",
            (names[copied],),
            kind,
            "",
            moved,
            "",
            (moved / link.bandwidth + link.latency) * 1e6,
        )
    region = Region(node)
    reads = tuple(
        dict.fromkeys(
            _whole(names[i]) for i in region.inputs if not is_scalar(i) and names[i].split("@")[0] not in _BOOKKEEPING
        )
    )
    codes = dict.fromkeys(code for w in region.weights.values() for code in str(w.meta.get("encoding", "")).split("+"))
    main = [c for c in codes if c not in ("", "f32")] or list(codes)
    made = dict.fromkeys(region.quantized.values())
    encoding = "+".join(main) + (f">{'+'.join(made)}" if made else "")
    kernel = kernels.get(region.kernel or "")
    us = None
    if kernel is not None and region.device is not None:
        device = target[region.device]
        cost = kernel.cost(region, target)
        at = {TOKENS: tokens, CONTEXT: context}
        us = 1e6 * max(
            float(sympy.sympify(cost.nbytes).subs(at)) / device.bandwidth,
            float(sympy.sympify(cost.across).subs(at)) / target.link(region.home or "", device.name).bandwidth,
            float(sympy.sympify(cost.flops).subs(at)) / device.flops,
        )
    return Row(
        region.name,
        region.path,
        region.device or "-",
        region.op,
        reads,
        kind,
        encoding,
        region.nbytes,
        region.kernel or "",
        us,
    )


def _type(value: Any, sizes: Mapping[str, int]) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{','.join(str(concrete(d, sizes)) for d in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(_type(v, sizes) for v in value)
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------------------ text

_HEADER = ("name", "device", "op", "reads", "type", "encoding", "bytes", "kernel", "µs")
_RIGHT = {6, 8}


def _time(us: float) -> str:
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1000:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def _cells(row: Row) -> tuple[str, ...]:
    us = "" if row.us is None else f"{row.us:.0f}" if row.us >= 10 else f"{row.us:.1f}"
    return (
        row.name,
        row.device,
        row.op,
        " ".join(row.reads),
        row.type,
        row.encoding,
        gib(row.nbytes) if row.nbytes else "",
        row.kernel,
        us,
    )


def _layer(name: str) -> int | None:
    match = re.match(r"L(\d+)\.", name)
    return int(match[1]) if match else None


def _relative(text: str, layer: int) -> str:
    return re.sub(r"\bL(\d+)\.", lambda m: f"L[{int(m[1]) - layer}].", text)


def _shape(text: str, layer: int) -> str:
    """`_relative`, with one name for all results of an earlier layer, whatever region makes them there."""
    return re.sub(r"(L\[-\d+\])\.[^\s|]+", r"\1", _relative(text, layer))


def _absolute(text: str, layer: int) -> str:
    return re.sub(r"L\[(-?\d+)\]", lambda m: f"L{layer + int(m[1])}", text)


def _table(rows: Sequence[Row]) -> list[str]:
    """Aligned rows; a layer like an earlier one is one line that says so."""
    blocks: list[tuple[int | None, list[Row]]] = []
    for row in rows:
        layer = _layer(row.name)
        if not blocks or blocks[-1][0] != layer:
            blocks.append((layer, []))
        blocks[-1][1].append(row)
    shown: dict[tuple[str, ...], int] = {}
    alike: dict[int, list[int]] = {}  # layer in full -> the layers like it
    lines: list[tuple[str, ...] | str] = [_HEADER]
    for i, (layer, block) in enumerate(blocks):
        key = tuple(_shape("|".join(map(str, _cells(r)[:8])), layer) for r in block) if layer is not None else ()
        if layer is not None and key in shown:
            alike.setdefault(shown[key], []).append(layer)
        else:
            if layer is not None:
                shown[key] = layer
            lines.append("")
            lines.extend(_cells(r) for r in block)
        if alike and all(later is None for later, _ in blocks[i + 1 :]):
            lines.append("")
            lines.extend(f"{spans(layers)} as L{like}" for like, layers in alike.items())
            alike = {}
    grid = [c for c in lines if isinstance(c, tuple)]
    width = [max(len(r[i]) for r in grid) for i in range(len(_HEADER))]
    return [
        "  ".join(
            c.rjust(w) if i in _RIGHT else c.ljust(w) for i, (c, w) in enumerate(zip(line, width, strict=True))
        ).rstrip()
        if isinstance(line, tuple)
        else line
        for line in lines
    ]


def spans(numbers: Iterable[int]) -> str:
    """`L1-L3, L5` of 1, 2, 3, 5."""
    out: list[list[int]] = []
    for n in sorted(set(numbers)):
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(f"L{a}" if a == b else f"L{a}-L{b}" for a, b in out)


def _grouped(items: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names whose texts are equal but for the layer, as one name: (`L1-L5.experts`, texts), in order of appearance."""
    groups: dict[tuple[str, ...], list[tuple[int | None, str]]] = {}
    for name, texts in items:
        layer = _layer(name)
        leaf = name if layer is None else name.split(".", 1)[1]
        key = (leaf, *(t if layer is None else _relative(t, layer) for t in texts))
        groups.setdefault(key, []).append((layer, name))
    for key, members in groups.items():
        layers = [layer for layer, _ in members if layer is not None]
        first = members[0][0]
        texts = tuple(t if first is None else _absolute(t, first) for t in key[1:])
        yield (f"{spans(layers)} {key[0]}" if layers else members[0][1]), texts


def group_notes(notes: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Notes that differ only by layer as one: (by, `L1-L5 experts`, why)."""
    for name, (by, why) in _grouped((name, (by, why)) for by, name, why in notes):
        yield by, name, why


def _changes(before: Sequence[Row], after: Sequence[Row]) -> Iterator[str]:
    old, new = {r.name: r for r in before}, {r.name: r for r in after}
    lines: list[tuple[str, tuple[str, ...]]] = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, list(old), list(new), autojunk=False).get_opcodes():
        if tag == "equal":
            for name in list(old)[i1:i2]:
                pairs = zip(_HEADER[1:8], _cells(old[name])[1:8], _cells(new[name])[1:8], strict=True)
                changed = [f"{column} {a or '-'} -> {b or '-'}" for column, a, b in pairs if a != b]
                if changed:
                    lines.append((name, ("~", "; ".join(changed))))
            continue
        lines += [(n, ("-", " ".join(filter(None, _cells(old[n])[1:5])))) for n in list(old)[i1:i2] if n not in new]
        lines += [(n, ("+", " ".join(filter(None, _cells(new[n])[1:5])))) for n in list(new)[j1:j2] if n not in old]
        moved = [n for n in list(new)[j1:j2] if n in old and _cells(old[n])[1:8] != _cells(new[n])[1:8]]
        lines += [(n, ("~", " ".join(_cells(new[n])[1:5]))) for n in moved]
    for name, (sign, text) in _grouped(lines):
        yield f"{sign} {name}  {text}"


# ------------------------------------------------------------------------------------------------ HTML

_CSS = """
body{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;margin:2em;color:#222;background:#fff}
h1{font-size:17px}h2{font-size:13px;grid-column:1/3;margin:.8em 0 .1em;border-top:1px solid #ddd;padding-top:.4em}
input{position:absolute;opacity:0}section{display:none}
label{display:inline-block;padding:.2em .8em;border:1px solid #bbb;border-radius:3px;margin:0 .4em .4em 0}
label{cursor:pointer}
input:focus-visible+label{outline:2px solid #06c}
.g{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:2px 2em;max-width:1200px;margin-top:1em}
.g>div{padding:2px 8px;border-radius:3px;overflow-wrap:anywhere}.lane0{grid-column:1;background:#e8f1ff}
.lane1{grid-column:2;background:#fff1dd}
.lane2{grid-column:1/3;background:#eee}.copy{grid-column:1/3;color:#a33;text-align:center}
.new{outline:2px solid #2a7}b{font-weight:600}small{color:#666;float:right;margin-left:1em}
pre{white-space:pre-wrap}p.key{color:#666}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}.lane0{background:#1c2b40}.lane1{background:#40301a}.lane2{background:#333}
h2{border-color:#444}small,p.key{color:#aaa}label{border-color:#666}}
"""


def html_page(plans: Sequence[Plan]) -> str:
    """One self-contained page, no script: a button a pass, GPU lane left, CPU lane right, changes outlined."""
    title = html.escape(f"{plans[-1].model}, {plans[-1].phase}")
    rules = "".join(
        f"#p{i}:checked~#s{i}{{display:block}}#p{i}:checked~nav label[for=p{i}]{{background:#222;color:#fff}}"
        for i in range(len(plans))
    )
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{title} - ktcompile</title><style>{_CSS}{rules}</style><h1>{title}</h1>",
    ]
    for i in range(len(plans)):
        checked = " checked" if i == len(plans) - 1 else ""
        out.append(f"<input type=radio name=p id=p{i}{checked}>")
    out.append(
        "<nav>"
        + "".join(f"<label for=p{i}>{html.escape(p.after or 'result')}</label>" for i, p in enumerate(plans))
        + "</nav>"
    )
    out.append("<p class=key>Left: GPU. Right: CPU. Red: copies. Outlined: changed by this pass.</p>")
    for i, plan in enumerate(plans):
        head = html.escape("\n".join(line.removeprefix("# ") for line in (*plan._head(), *plan._foot()) if line))
        out.append(f"<section id=s{i}><pre>{head}</pre><div class=g>")
        earlier = {_cells(r)[:8] for r in plans[i - 1].rows} if i else None
        out += _lanes(plan.rows, earlier)
        out.append("</div></section>")
    return "\n".join(out) + "</html>\n"


def _lanes(rows: Sequence[Row], earlier: set[tuple[str, ...]] | None) -> Iterator[str]:
    layer: int | None = None
    for row in rows:
        if _layer(row.name) != layer:
            layer = _layer(row.name)
            yield f"<h2>{f'L{layer}' if layer is not None else 'after the layers'}</h2>"
        new = " new" if earlier is not None and _cells(row)[:8] not in earlier else ""
        tip = html.escape("reads " + ", ".join(row.reads), quote=True)
        if row.op == "copy":
            text = html.escape(f"{row.reads[0]} {row.device}")
            yield f'<div class="copy{new}" title="{tip}">{text} {gib(row.nbytes)}</div>'
            continue
        lane = 2 if row.device == "-" else 1 if row.device.startswith("cpu") else 0
        facts = [
            row.type,
            row.encoding,
            gib(row.nbytes) if row.nbytes else "",
            row.kernel,
            "" if row.us is None else _time(row.us),
        ]
        yield (
            f'<div class="lane{lane}{new}" title="{tip}">{html.escape(row.name)} <b>{html.escape(row.op)}</b> '
            f"<small>{html.escape(' · '.join(filter(None, facts)))}</small></div>"
        )
