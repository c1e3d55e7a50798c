"""Equal layers are captured once: a few at the start are traced, the others are copies of their nodes.

Tracing 61 layers takes twenty times as long as everything else that a plan needs.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from ktcompile.graph import is_scalar, value_of

UNIFORM = frozenset(
    {
        *("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "gpt_oss", "mixtral", "olmoe"),
        *("qwen2_moe", "qwen3_moe"),
    }
)
"""Model types whose layers, where modules and attributes are equal, run equal code. Others are traced whole."""


class NotEqual(Exception):
    """The captured layers are not a chain of equals: the model has to be traced whole."""


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model: `path` of the list, and of each layer the earlier one that it is equal to.

    The first `traced` are captured. A layer is copied from one that is not its own predecessor's: the two would share
    storages, and one would seem to write into the other.
    """

    path: str
    traced: int
    like: tuple[int, ...]


def layers_of(model: PreTrainedModel) -> Layers | None:
    """What to trace of a model; None if that is all of it."""
    count = int(model.config.num_hidden_layers)
    lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and p.endswith("layers")]
    if model.config.model_type not in UNIFORM or len(lists) != 1 or len(lists[0][1]) != count:
        return None
    path, modules = lists[0]
    kinds = getattr(model.config, "layer_types", None) or [None] * count
    signatures = [(kind, _signature(layer)) for kind, layer in zip(kinds, modules, strict=True)]
    for traced in range(2, count):
        like = _like(signatures, traced)
        if like is not None:
            return Layers(path, traced, like)
    return None


def _signature(layer: nn.Module) -> tuple[object, ...]:
    """Everything that may decide what a layer runs, but its number and the values of its weights."""
    out: list[object] = []
    for path, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple, type(None)))}
        plain.pop("layer_idx", None)
        named = (*module._parameters.items(), *module._buffers.items())
        tensors = [(k, tuple(t.shape), t.dtype) for k, t in named if t is not None]
        out.append((path, type(module), tuple(sorted((k, repr(v)) for k, v in plain.items())), tuple(tensors)))
    return tuple(out)


def _like(signatures: Sequence[object], traced: int) -> tuple[int, ...] | None:
    """For every layer the traced one that it is copied from (itself, if it is traced); None if one has none."""
    like = list(range(traced))
    for number in range(traced, len(signatures)):
        known = [i for i in range(1, traced) if signatures[i] == signatures[number] and i != like[-1]]
        if not known:
            return None
        like.append(known[-1])
    return tuple(like)


@contextmanager
def first(model: PreTrainedModel, layers: Layers | None) -> Iterator[None]:
    """The model with only those layers that are traced."""
    if layers is None:
        yield
        return
    parent_path, _, name = layers.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    whole = parent._modules[name]
    assert isinstance(whole, nn.ModuleList)
    parent._modules[name] = whole[: layers.traced]
    try:
        yield
    finally:
        parent._modules[name] = whole


def repeat(gm: fx.GraphModule, layers: Layers) -> None:
    """Extend a captured graph of the first layers to all of them.

    Each copy reads its own parameters and cache, the output of the layer before it, and what all layers share. Raises
    NotEqual where the captured layers are not such a chain.
    """
    traced = [_Traced(layers.path, number, gm) for number in range(layers.traced)]
    hidden = [t.output for t in traced]
    tail = hidden[-1]
    users = list(tail.users)
    last = tail
    anchor = next(n for n in gm.graph.nodes if n.op != "placeholder")
    end = traced[-1].nodes[-1]
    for number in range(layers.traced, len(layers.like)):
        origin = traced[layers.like[number]]
        end, last = origin.copy(number, hidden[layers.like[number] - 1], last, anchor, end)
    for user in users:
        user.replace_input_with(tail, last)
    gm.graph.lint()
    gm.recompile()


class _Traced:
    """The nodes of one captured layer."""

    def __init__(self, path: str, number: int, gm: fx.GraphModule) -> None:
        self.path, self.number, self.graph = f"{path}.{number}", number, gm.graph
        self.list = path
        self.nodes = [n for n in gm.graph.nodes if n.op != "placeholder" and self._is_own(n)]
        inside = set(self.nodes)
        outputs = [n for n in self.nodes if not is_scalar(n) and any(u not in inside for u in n.users)]
        if len(outputs) != 1:
            raise NotEqual(f"{self.path}: {len(outputs)} of its values are used outside, not one")
        self.output = outputs[0]

    def _is_own(self, node: fx.Node) -> bool:
        return any(p == self.path or p.startswith(f"{self.path}.") for p, _ in node.meta["stack"])

    def copy(
        self, number: int, before: fx.Node, hidden: fx.Node, anchor: fx.Node, end: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """Copy the nodes after `end` as layer `number`, with `hidden` in place of `before`: last node, and output."""
        env: dict[fx.Node, fx.Node] = {before: hidden}
        inside = set(self.nodes)

        def argument(node: fx.Node) -> fx.Node:
            if node not in env:
                if node not in inside and self._belongs(node):
                    with self.graph.inserting_before(anchor):
                        env[node] = self._renamed(self.graph.node_copy(node), number)
                    env[node].target = env[node].name  # two arguments of one name cannot be
                else:
                    env[node] = self._shared(node)
            return env[node]

        for node in self.nodes:
            for arg in node.all_input_nodes:
                argument(arg)
            with self.graph.inserting_after(end):
                end = env[node] = self._renamed(self.graph.node_copy(node, argument), number)
        return end, env[self.output]

    def _belongs(self, node: fx.Node) -> bool:
        """Whether a graph input is this layer's own parameter or part of the cache."""
        return node.op == "placeholder" and self._new_meta(node.meta, self.number + 1) != node.meta

    def _shared(self, node: fx.Node) -> fx.Node:
        """A value that all layers read: from before the layers, or a size."""
        in_a_layer = any(p.startswith(f"{self.list}.") for p, _ in node.meta.get("stack", ()))
        if in_a_layer and not is_scalar(node) and isinstance(value_of(node), Tensor):
            raise NotEqual(f"{self.path} reads {node.name}, which another layer computes")
        return node

    def _renamed(self, node: fx.Node, number: int) -> fx.Node:
        node.meta = self._new_meta(node.meta, number)
        return node

    def _new_meta(self, meta: dict[str, Any], number: int) -> dict[str, Any]:
        """The meta of a node with this layer's number replaced, in module paths, parameter names and cache names."""
        module = re.compile(rf"^{re.escape(self.path)}(?=\.|$)")
        state = re.compile(rf"^(cache\.layers)\.{self.number}(?=\.|$)")

        def name(text: str) -> str:
            return state.sub(rf"\g<1>.{number}", module.sub(f"{self.list}.{number}", text))

        out = dict(meta)
        out["stack"] = tuple((name(p), c) for p, c in meta.get("stack", ()))
        for key in ("weight", "input"):
            if key in meta:
                out[key] = name(meta[key])
        if "size_of" in meta:
            out["size_of"] = (name(meta["size_of"][0]), meta["size_of"][1])
        return out
