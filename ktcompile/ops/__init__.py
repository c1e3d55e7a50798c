"""The op vocabulary: what a region can mean. One op a file: signature, definition, and `bind`.

`bind` decides once what a captured module call means, from its class, weights and shapes. When unsure it says why and
the region keeps its captured body.
"""

from ktcompile.folding import Site
from ktcompile.ops import gqa, mla, moe, plain, router
from ktcompile.ops.base import Binding, Bound, Op

OPS: tuple[Op, ...] = (mla.OP, gqa.OP, moe.OP, router.OP, *plain.OPS)
"""Tried in this order: the ops with hand kernels first."""

BY_NAME = {op.name: op for op in OPS}


def bind(site: Site) -> Bound | None:
    """The op of a module call, or None where no op knows it. A `Bound` with `why` keeps its captured body."""
    return next((bound for op in OPS if (bound := op.bind(site)) is not None), None)


__all__ = ["BY_NAME", "OPS", "Binding", "Bound", "Op", "bind"]
