"""The invariants of a graph, by name. A pass establishes them; from then on they hold after every pass."""

import operator
from collections.abc import Callable

from torch import fx

from ktcompile.errors import CapacityError, PassError
from ktcompile.graph import Region, device_of, is_copy, is_region, is_scalar, regions, stored_bytes, value_of
from ktcompile.target import Target


def _typed(gm: fx.GraphModule, target: Target) -> None:
    """Every value has a type."""
    for node in gm.graph.nodes:
        if node.op not in ("output", "placeholder", "get_attr") and "val" not in node.meta:
            raise PassError(f"{node.meta.get('path', node.name)} has no type")


def _folded(gm: fx.GraphModule, target: Target) -> None:
    """Nothing but regions, copies, and arithmetic on sizes."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or is_region(node) or is_copy(node) or is_scalar(node):
            continue
        if node.target is not operator.getitem:
            raise PassError(f"{node.name} ({node.target}) is in no region")


def _placed(gm: fx.GraphModule, target: Target) -> None:
    """Every region runs on, and lives at, a device of the target."""
    for region in regions(gm):
        for name in (region.device, region.home):
            if name is None or name not in target:
                raise PassError(
                    f"{region.path} is on {name!r}; this target has {', '.join(d.name for d in target.devices)}"
                )


def _local(gm: fx.GraphModule, target: Target) -> None:
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
            out[home]["weights"] += sum(stored_bytes(w) for w in fresh)
        for node in region.inputs:
            if node.op == "placeholder" and node.meta.get("state") and (node, device) not in seen:
                seen.add((node, device))
                out[device]["cache"] += int(value_of(node).nbytes)
    return out


def _fits(gm: fx.GraphModule, target: Target) -> None:
    """Weights and cache are within the capacity of every device."""
    for name, uses in used(gm).items():
        capacity, total = target[name].capacity, sum(uses.values())
        if total <= capacity:
            continue
        big = sorted((r for r in regions(gm) if r.home == name), key=lambda r: -r.nbytes)[:3]
        raise CapacityError(
            f"{name} needs {gib(total)} (weights {gib(uses['weights'])}, cache {gib(uses['cache'])}) and has "
            f"{gib(capacity)}; the largest regions there: "
            f"{', '.join(f'{r.name} {gib(r.nbytes)}' for r in big)}. Place some of them elsewhere, use a smaller "
            "encoding, or shorten the context"
        )


def gib(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def _lowered(gm: fx.GraphModule, target: Target) -> None:
    """Every region has a kernel."""
    for region in regions(gm):
        if region.kernel is None:
            raise PassError(f"{region.path} has no kernel")


INVARIANTS: dict[str, Callable[[fx.GraphModule, Target], None]] = {
    "typed": _typed,
    "folded": _folded,
    "placed": _placed,
    "local": _local,
    "fits": _fits,
    "lowered": _lowered,
}


def check(name: str, gm: fx.GraphModule, target: Target) -> None:
    """Raise PassError where invariant `name` does not hold."""
    INVARIANTS[name](gm, target)
