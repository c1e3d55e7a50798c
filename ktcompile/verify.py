"""What must hold: the invariants of a graph by name, and that a bound region computes what its op says."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ktcompile.errors import CapacityError, PassError
from ktcompile.graph import Region, device_of, is_copy, is_region, is_scalar, regions, value_of
from ktcompile.memory import workspace
from ktcompile.ops import BY_NAME
from ktcompile.ops.mla import packed
from ktcompile.symbols import PAGE, Sizes, concrete, sizes
from ktcompile.target import Target


def _typed(gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Every value has a type."""
    for node in gm.graph.nodes:
        if node.op not in ("output", "placeholder", "get_attr") and "val" not in node.meta:
            raise PassError(f"{node.meta.get('path', node.name)} has no type")


def _folded(gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Nothing but regions, copies, and arithmetic on sizes."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or is_region(node) or is_copy(node) or is_scalar(node):
            continue
        if node.target is not operator.getitem:
            raise PassError(f"{node.name} ({node.target}) is in no region")


def _placed(gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Every region runs on, and lives at, a device of the target."""
    for region in regions(gm):
        for name in (region.device, region.home):
            if name is None or name not in target:
                raise PassError(
                    f"{region.path} is on {name!r}; this target has {', '.join(d.name for d in target.devices)}"
                )


def _local(gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Every region reads values of its own device only, and a value crosses to a device at most once."""
    for region in regions(gm):
        for value in region.inputs:
            at = device_of(value)
            if not is_scalar(value) and at not in (None, region.device):
                raise PassError(f"{region.path} on {region.device} reads {value.meta.get('path', value.name)} on {at}")
    seen = set[tuple[fx.Node, str]]()
    for node in gm.graph.nodes:
        if not is_copy(node):
            continue
        if node.args in seen:
            raise PassError(f"{node.args[0].name} crosses to {node.args[1]} twice")
        seen.add(node.args)


def used(gm: fx.GraphModule) -> dict[str, dict[str, int]]:
    """Bytes by device name and use: `weights` (each once), `cache` (page pools and other state)."""
    out: dict[str, dict[str, int]] = {}
    seen = set[tuple[fx.Node, str]]()
    for region in regions(gm):
        home, device = region.home or "", region.device or ""
        out.setdefault(home, {"weights": 0, "cache": 0})
        out.setdefault(device, {"weights": 0, "cache": 0})
        weights = tuple(region.weights.values())
        fresh = [w for w in weights if (w, home) not in seen]
        seen.update((w, home) for w in weights)
        if len(fresh) == len(weights):
            out[home]["weights"] += region.nbytes
        else:  # a tied weight: only what no earlier region brought
            out[home]["weights"] += sum(region.weight_bytes(leaf) for leaf, w in region.weights.items() if w in fresh)
        for node in region.inputs:
            if node.op == "placeholder" and node.meta.get("state") and (node, device) not in seen:
                seen.add((node, device))
                out[device]["cache"] += int(value_of(node).nbytes)
    return out


def _fits(gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Weights, cache, workspace and what the driver takes are within the capacity of every device."""
    working = workspace(gm, sizes)
    for name, uses in used(gm).items():
        uses |= {"workspace": working.get(name, 0), "driver": target[name].reserved}
        capacity, total = target[name].capacity, sum(uses.values())
        if total <= capacity:
            continue
        big = sorted((r for r in regions(gm) if r.home == name), key=lambda r: -r.nbytes)[:3]
        raise CapacityError(
            f"{name} needs {gib(total)} ({', '.join(f'{use} {gib(n)}' for use, n in uses.items() if n)}) and has "
            f"{gib(capacity)}; the largest regions there: {', '.join(f'{r.name} {gib(r.nbytes)}' for r in big)}",
            name,
            total - capacity,
        )


def gib(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def _lowered(gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Every region has a kernel."""
    for region in regions(gm):
        if region.kernel is None:
            raise PassError(f"{region.path} has no kernel")


INVARIANTS: dict[str, Callable[[fx.GraphModule, Target, Sizes], None]] = {
    "typed": _typed,
    "folded": _folded,
    "placed": _placed,
    "local": _local,
    "fits": _fits,
    "lowered": _lowered,
}


def check(name: str, gm: fx.GraphModule, target: Target, sizes: Sizes) -> None:
    """Raise PassError where invariant `name` does not hold for a step of these sizes."""
    INVARIANTS[name](gm, target, sizes)


# ------------------------------------------------------------------------------------------------ bindings

PROVABLE_BYTES = 512 << 20
"""Regions with more weights than this are not run on made-up ones."""

_TOKENS, _STORED = 3, 5
_ROUNDS = {"router": 16}
"""How often an op is run, if not once: a rule that is nearly right chooses other experts for some tokens only."""

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def wrong_binding(region: Region) -> str | None:
    """Run the captured body and the op's definition on the same random inputs; say so where they differ.

    None: they agree, or the binding defines nothing, or the weights are larger than PROVABLE_BYTES. Values: relative to
    the largest of the result.
    """
    op = BY_NAME[region.op]
    weights = region.weights
    if op.define is None or region.decoded_bytes > PROVABLE_BYTES:
        return None
    graph = op.define(region.binding, tuple(weights))
    if graph is None:
        return None
    definition = fx.GraphModule(torch.nn.Module(), graph)
    differences = (_difference(region, definition, seed) for seed in range(_ROUNDS.get(region.op, 1)))
    return next((d for d in differences if d is not None), None)


def _difference(region: Region, definition: fx.GraphModule, seed: int) -> str | None:
    """In what the captured body and the definition differ on one set of random inputs and weights."""
    known = sizes(region.graph_module, _TOKENS, _STORED + _TOKENS + 2 * PAGE)
    inputs = _inputs(region, known, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    made = [_weight(w, generator) for w in region.weights.values()]
    names = BY_NAME[region.op].roles
    roles = [inputs[region.binding.roles[r]] for r in names]
    before = [i.clone() if isinstance(i, Tensor) else i for i in roles]
    with torch.no_grad():
        want = _results(region.body(*inputs, *made))
        got = _results(definition(*before, *made))
    if [(a.dtype, a.shape) for a in want] != [(b.dtype, b.shape) for b in got]:
        return f"not {region.op}: its captured code returns {_types(want)}, the op {_types(got)}"
    for name, a, b in [
        *(("result", a, b) for a, b in zip(want, got, strict=True)),
        *(
            (r, x, y)
            for r, x, y in zip(names, roles, before, strict=True)
            if isinstance(x, Tensor) and x.dtype.is_floating_point
        ),
    ]:
        error = float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-9))
        if not error <= (_TOLERANCE.get(a.dtype, 1e-4) if a.dtype.is_floating_point else 0):
            return (
                f"not {region.op}: on random inputs its captured code differs from the op by {error:.1e} in its {name}"
            )
    return None


def _results(out: Any) -> tuple[Tensor, ...]:
    """Results as a tuple; where one is ids, all in their order: a router may choose its experts in any."""
    found: tuple[Tensor, ...] = (out,) if isinstance(out, Tensor) else tuple(out)
    ids = next((o for o in found if o.dtype == torch.int64), None)
    return found if ids is None else tuple(o.gather(-1, ids.argsort(-1)) for o in found)


def _types(results: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(r.dtype).removeprefix('torch.')} {list(r.shape)}" for r in results)


def _inputs(region: Region, known: dict[str, int], seed: int = 0) -> list[Any]:
    """Random inputs that mean something: a request with stored tokens, real pages, expert ids, a causal mask."""
    roles = {i: r for r, i in region.binding.roles.items()}
    generator = torch.Generator().manual_seed(seed)
    out: list[Any] = []
    tables: dict[str, Tensor] = {}
    for i, node in enumerate(region.inputs):
        value = value_of(node)
        if not isinstance(value, Tensor):
            out.append(concrete(value, known))
            continue
        shape = [int(concrete(d, known)) for d in value.shape]
        role = roles.get(i, "")
        if role == "pool":  # a short context has fewer pages than the made-up table names
            shape[0] = max(shape[0], -(-(_STORED + _TOKENS + 2 * PAGE) // PAGE))
        if role == "pool" and value.dtype == torch.uint8:  # bytes at random would be NaN
            lora = region.binding.shape.lora
            rows = torch.randn(*shape[:2], lora + (shape[2] - lora) // 2, generator=generator)
            out.append(packed(rows[..., :lora], rows[..., lora:], value.dtype))
        elif role == "ids":
            experts = region.binding.shape.experts
            out.append(
                torch.stack([torch.randperm(experts, generator=generator)[: shape[-1]] for _ in range(shape[0])])
            )
        elif role == "page_table":
            tables[role] = torch.arange(shape[0] * shape[1]).view(shape)
            out.append(tables[role])
        elif role == "seq_len":
            tables[role] = torch.full(shape, _STORED)
            out.append(tables[role])
        elif role == "query_start":
            tokens = int(concrete(value_of(region.inputs[region.binding.roles["hidden"]]).shape[1], known))
            tables[role] = torch.tensor([0, tokens])
            out.append(tables[role])
        elif role in ("cos", "sin"):
            out.append(_rotation(role, shape, value.dtype))
        elif value.dtype == torch.bool or role == "mask":
            out.append(None)  # the mask needs the tables
        else:
            is_norm = region.op in ("norm", "add_norm")
            size = 1e-3 if is_norm else 1.0  # the squares are as small as an epsilon: it counts
            out.append((size * torch.randn(shape, generator=generator)).to(value.dtype))
    if tables:
        hidden = out[region.binding.roles["hidden"]]
        given = *_tables(tables), hidden[..., 0], PAGE
        window = getattr(region.binding.shape, "window", None)
        op = torch.ops.ktrans
        mask = op.ragged_mask(*given) if window is None else op.ragged_window_mask(*given, window)
        out = [_as_given(mask, n) if o is None else o for o, n in zip(out, region.inputs, strict=True)]
    return out


def _rotation(role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Cosines or sines of the same random angles, two equal halves of them; where complex numbers are both, those."""
    pairs = shape[-1] if dtype.is_complex else shape[-1] // 2
    angle = torch.rand(*shape[:-1], pairs, generator=torch.Generator().manual_seed(1)) * 6
    if dtype.is_complex:
        return torch.polar(torch.ones_like(angle), angle).to(dtype)
    half = angle.cos() if role == "cos" else angle.sin()
    return torch.cat([half, half], -1).to(dtype)


def _as_given(mask: Tensor, node: fx.Node) -> Tensor:
    """A mask in the type of `node`: a float is added to scores."""
    dtype = value_of(node).dtype
    if dtype == torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _tables(tables: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Page table, stored lengths and query starts, in the order of the cache's ops."""
    return tables["page_table"], tables["seq_len"], tables["query_start"]


def _weight(node: fx.Node, generator: torch.Generator) -> Tensor:
    value = value_of(node)
    made = torch.empty(tuple(value.shape), dtype=value.dtype)
    if value.dim() < 2:
        return made.uniform_(0.5, 1.5, generator=generator)
    bound = (3.0 / value.shape[-1]) ** 0.5  # variance 1 / columns: values keep their size
    return made.uniform_(-bound, bound, generator=generator)
