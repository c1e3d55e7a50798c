"""Symbolic sizes of a captured graph in numbers, without adding a guard."""

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from ktcompile.graph import value_of

Sizes = Mapping[str, int]
"""The value of each symbol by its name."""

PAGE = 16
"""Tokens a page of the cache."""


def sizes(gm: fx.GraphModule, tokens: int, context: int) -> dict[str, int]:
    """A value for every symbol: one request, `tokens` tokens a step, pages for `context` tokens."""
    out = {}
    for node in gm.graph.nodes:
        value = value_of(node)
        if node.op != "placeholder" or not isinstance(value, torch.SymInt):
            continue
        name, axis = node.meta.get("size_of", ("", 0))
        if name.endswith("page_table"):
            out[str(value)] = -(-context // PAGE) if axis == 1 else 1
        else:
            out[str(value)] = tokens if axis == 1 else 2 if name.endswith("query_start") else 1
    return out


def concrete(size: Any, known: Sizes) -> int | str:
    """A size in numbers; text where a symbol has no value."""
    if isinstance(size, int):
        return size
    symbols = {s: sympy.Symbol(s, integer=True) for s in known}
    value = sympy.sympify(str(size), locals=symbols).subs({symbols[s]: v for s, v in known.items()})
    return int(value) if value.is_number else str(value)


def nbytes(value: Any, known: Sizes) -> int:
    """Bytes of a tensor, or of all in a tuple; sizes that are not known count as 1, and numbers as nothing."""
    if isinstance(value, (tuple, list)):
        return sum(nbytes(v, known) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    total = int(value.element_size())
    for size in value.shape:
        dim = concrete(size, known)
        total *= dim if isinstance(dim, int) else 1
    return total
