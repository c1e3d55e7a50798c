"""place: give every region a device."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch.fx import GraphModule, Node

from ktcompile import Context, OptionError, Pass, Region, RulesError, Target, regions, suggest, value_of

GPUS = "gpus"


@dataclass(frozen=True)
class Place(Pass):
    """Put each region, and its weights, on the device of the first rule whose glob matches its module path.

    A device is a name of the target, `cpu`, `gpu` (the first GPU, and the CPU where there is none) or `gpus`: all of
    them, with consecutive layers on each, so that the fullest is as empty as can be. Page pools of the cache follow the
    region that writes them; other inputs stay where the caller has them.
    """

    name = "place"
    requires = ("folded",)
    establishes = ("placed", "fits")
    rules: Mapping[str, str] = field(default_factory=lambda: {"*.experts": "cpu", "*": "gpus"})

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        devices = {glob: self._device(glob, name, ctx.target) for glob, name in self.rules.items()}
        found = list(regions(gm))
        for glob in devices:
            if not any(r.matches(glob) for r in found):
                raise OptionError(f"rules.{glob}", f"rule {glob!r} matches no region; {suggest(glob, found)}")
        chosen: dict[Region, str] = {}
        unused = devices.keys() - {"*"}  # a last "*" is for what others leave
        for region in found:
            rule = next((glob for glob in devices if region.matches(glob)), None)
            if rule is None:
                raise RulesError(f'no rule matches {region.path}; end the rules with "*": gpus')
            chosen[region] = devices[rule]
            unused.discard(rule)
        for glob in (g for g in devices if g in unused):
            ctx.skip("", f"rule {glob!r} applies to nothing: earlier rules take all that it matches")
        chosen |= _spread([r for r in found if chosen[r] == GPUS], ctx.target)
        for region, device in chosen.items():
            region.place(device)
        for node in gm.graph.nodes:
            if node.op == "placeholder" and "weight" not in node.meta:
                node.meta["device"] = _input_device(node, ctx.target)
        return gm

    def _device(self, glob: str, name: str, target: Target) -> str:
        if name == GPUS:
            return GPUS
        try:
            return target[name].name
        except RulesError as error:
            raise OptionError(f"rules.{glob}", str(error)) from error


def _spread(regions: Sequence[Region], target: Target) -> dict[Region, str]:
    """The GPU of each region: consecutive layers together, what comes before them with the first, after with the last.

    The fullest GPU, by its share of capacity, is as empty as can be; of such ways, the one that is most even.
    """
    gpus = [d for d in target.devices if d.kind == "cuda"] or [target.host]
    layers = sorted({n for r in regions if (n := _layer(r)) is not None})
    if len(gpus) == 1 or not layers:
        return dict.fromkeys(regions, gpus[0].name)
    held = dict.fromkeys(layers, 0)
    at: dict[Region, int] = {}
    layer = layers[0]
    for region in regions:  # in the order of execution
        own = _layer(region)
        layer = at[region] = layer if own is None else own
        held[layer] += region.nbytes + _pool_bytes(region)
    sizes, capacities = list(held.values()), [d.capacity for d in gpus]
    fullest, _ = _cut(sizes, capacities)
    _, firsts = _cut(sizes, capacities, fullest)
    index = {layer: bisect_right(firsts, i) - 1 for i, layer in enumerate(layers)}
    return {r: gpus[index[layer]].name for r, layer in at.items()}


def _pool_bytes(region: Region) -> int:
    """Bytes of the page pools that a region writes, as an even number of pages.

    All graphs of a model must be cut alike, or weights were held twice; prefill's is captured for two requests.
    """
    pools = [value_of(n) for n in region.inputs if n.meta.get("state")] if region.effects else []
    return sum(int(p.nbytes) // int(p.shape[0]) * 2 * -(-int(p.shape[0]) // 2) for p in pools)


def _layer(region: Region) -> int | None:
    found = re.search(r"\blayers\.(\d+)\.", region.path)
    return int(found[1]) if found else None


def _cut(sizes: Sequence[int], capacities: Sequence[int], limit: float | None = None) -> tuple[float, tuple[int, ...]]:
    """Cut `sizes` into a run for each capacity: the least cost, and the index of each run's first.

    The cost is the largest share of a capacity; under a `limit` for that, the sum of the squares of shares.
    """
    at = [0, *accumulate(sizes)]
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # sizes cut -> cost, firsts
    for capacity in capacities:
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for first, (cost, firsts) in found.items():
            for end in range(first, len(at)):
                share = (at[end] - at[first]) / capacity
                if limit is not None and share > limit:
                    break
                total = max(cost, share) if limit is None else cost + share**2
                if end not in reached or total <= reached[end][0]:  # of equals, the earlier GPUs hold more
                    reached[end] = total, (*firsts, first)
        found = reached
    return found[len(sizes)]


def _input_device(node: Node, target: Target) -> str:
    writers = [u for u in node.users if u.meta.get("effects")]
    if node.meta.get("state") and writers:
        return str(Region(writers[0]).device)
    if str(node.meta.get("input", "")).startswith("cache."):
        return target.main.name
    kind = getattr(getattr(value_of(node), "device", None), "type", "cpu")
    return target.main.name if kind == "cuda" else target.host.name
