"""place: give every region a device."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from ktcompile import Context, OptionError, Pass, Region, RulesError, Target, regions, suggest, value_of


@dataclass(frozen=True)
class Place(Pass):
    """Put each region, and its weights, on the device of the first rule whose glob matches its module path.

    A device is a name of the target, `cpu`, or `gpu`: the first GPU, and the CPU where there is none. Page pools of
    the cache follow the region that writes them; other inputs stay where the caller has them.
    """

    name = "place"
    requires = ("folded",)
    establishes = ("placed", "fits")
    rules: Mapping[str, str] = field(default_factory=lambda: {"*.experts": "cpu", "*": "gpu"})

    def run(self, gm: GraphModule, ctx: Context) -> GraphModule:
        devices = {glob: self._device(glob, name, ctx.target) for glob, name in self.rules.items()}
        found = list(regions(gm))
        for glob in devices:
            if not any(r.matches(glob) for r in found):
                raise OptionError(f"rules.{glob}", f"rule {glob!r} matches no region; {suggest(glob, found)}")
        for region in found:
            device = next((d for glob, d in devices.items() if region.matches(glob)), None)
            if device is None:
                raise RulesError(f'no rule matches {region.path}; end the rules with "*": gpu')
            region.place(device)
        for node in gm.graph.nodes:
            if node.op == "placeholder" and "weight" not in node.meta:
                node.meta["device"] = _input_device(node, ctx.target)
        return gm

    def _device(self, glob: str, name: str, target: Target) -> str:
        try:
            return target[name].name
        except RulesError as error:
            raise OptionError(f"rules.{glob}", str(error)) from error


def _input_device(node: Node, target: Target) -> str:
    writers = [u for u in node.users if u.meta.get("effects")]
    if node.meta.get("state") and writers:
        return str(Region(writers[0]).device)
    if str(node.meta.get("input", "")).startswith("cache."):
        return target.main.name
    kind = getattr(getattr(value_of(node), "device", None), "type", "cpu")
    return target.main.name if kind == "cuda" else target.host.name
