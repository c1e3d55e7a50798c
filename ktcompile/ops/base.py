"""What every op of the vocabulary is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, library

from ktcompile.folding import Site


def register(signature: str, definition: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make `definition` the torch op `ktrans::<name>`; `fake` gives the types of its results."""
    name, types = signature[: signature.index("(")], signature[signature.index("(") :]
    library.define(f"ktrans::{name}", types)  # `define` + `impl` costs 1.6 µs a call where `custom_op` costs 15-24
    library.impl(f"ktrans::{name}", "default", definition)
    library.register_fake(f"ktrans::{name}", fake)


@dataclass(frozen=True)
class Binding:
    """How a region plays an op: which of its inputs has which role, and the op's attributes (a frozen dataclass)."""

    roles: Mapping[str, int]  # role -> index into Region.inputs
    shape: Any = None
    turned: frozenset[str] = frozenset()  # weights that are [..., in, out]; all others are [..., out, in]


@dataclass(frozen=True)
class Bound:
    """What `bind` found: the op's name, the binding if kernels may take it, else why they may not."""

    op: str
    binding: Binding | None = None
    why: str | None = None


@dataclass(frozen=True)
class Op:
    """A word of the vocabulary.

    `define(binding, leaves)` is its definition as a body, where it has kernels of its own; None: the binding does not
    say enough. `undefined(binding)` is what a binding still says where its definition is not what the code computes.
    """

    name: str
    bind: Callable[[Site], Bound | None]
    doc: str
    roles: tuple[str, ...] = field(default=())
    define: Callable[[Binding, tuple[str, ...]], fx.Graph | None] | None = None
    undefined: Callable[[Binding], Binding | None] = lambda binding: None


def roles_of(site: Site, **nodes: fx.Node) -> dict[str, int]:
    """The index of each named node among the site's inputs."""
    index = {n: i for i, n in enumerate(site.inputs)}
    return {role: index[node] for role, node in nodes.items()}


def calls(node: fx.Node, name: str) -> bool:
    """Whether the node calls our torch op `ktrans::name`, with or without its overload."""
    packet = getattr(torch.ops.ktrans, name)
    return node.target is packet or node.target is packet.default


def activation_of(site: Site) -> str | None:
    """The activation function that the site calls, by its name in Hugging Face configurations."""
    for node in site.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if name == "silu":
            return "silu"
        if name == "gelu":
            return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return None
