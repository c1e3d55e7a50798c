"""Terms: what captured code computes, one expression a value, so that `bind` can read attributes off it.

Ways to write one operation are one term: `x / y`, `x /= y` and `torch.div(x, y)`; arguments by name or position; a
dimension from either end. What is not known here stays a term with all its arguments, and fits no pattern.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ktcompile.graph import value_of, writes


@dataclass(frozen=True)
class Term:
    """One operation on terms, leaves (nodes from outside), numbers and types. `dtype` is that of its result."""

    name: str
    args: tuple[Any, ...]
    dtype: torch.dtype | None = None


_ALIASES = {
    **{"truediv": "div", "itruediv": "div", "imul": "mul", "multiply": "mul", "iadd": "add"},
    **{"invert": "not", "bitwise_not": "not", "logical_not": "not"},
    **dict.fromkeys(("type", "type_as", "float", "half", "bfloat16", "bool"), "to"),
    **dict.fromkeys(("reshape", "unsqueeze", "squeeze", "flatten"), "view"),
}
_SAME = {"contiguous", "detach", "clone"}

_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "amax": {"dim": (), "keepdim": False},
    "gather": {"dim": None, "index": None},
    "linear": {"weight": None, "bias": None},
    "masked_fill": {"mask": None, "value": None},
    "max": {"dim": None, "keepdim": False},
    "mean": {"dim": None, "keepdim": False, "dtype": None},
    "scatter": {"dim": None, "index": None, "src": None},
    "softmax": {"dim": None, "dtype": None},
    "sum": {"dim": None, "keepdim": False, "dtype": None},
    "topk": {"k": None, "dim": -1, "largest": True, "sorted": True},
}
"""What these operations take after their input, with defaults."""

_IDLE = {"topk": {"sorted"}, "softmax": {"_stacklevel"}}
"""Arguments that change no value, or the order of values only."""


def terms_of(nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """The term of each node, after all of them ran: of one that was written to, what was written last."""
    terms: dict[fx.Node, Any] = {}
    for node in nodes:
        terms[node] = _term(node, terms)
        for written in writes(node):
            terms[written] = terms[node]
    return terms


def _term(node: fx.Node, terms: Mapping[fx.Node, Any]) -> Any:
    value = value_of(node)
    dtype = value.dtype if isinstance(value, torch.Tensor) else None
    args = [terms.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
    named = {k: terms.get(v, v) if isinstance(v, fx.Node) else v for k, v in node.kwargs.items()}
    name = str(getattr(node.target, "__name__", node.target)).strip("_")
    name = _ALIASES.get(name, name)
    if name in _SAME:
        return args[0]
    if name == "to":
        return Term(name, (args[0],), dtype)
    if name in ("view", "expand"):  # all but the first axis, which is tokens; as text: comparing symbols adds guards
        return Term(name, (args[0], *(d if isinstance(d, int) else str(d) for d in value.shape[1:])), dtype)
    wanted = _PARAMETERS.get(name, {})
    if not wanted or len(args) > 1 + len(wanted):
        return Term(name, (*args, *named.items()), dtype)
    rank = value_of(node.args[0]).dim() if args and isinstance(node.args[0], fx.Node) else 0
    return Term(name, (*args[:1], *_in_order(name, args[1:], named, rank)), dtype)


def _in_order(name: str, args: Sequence[Any], named: Mapping[str, Any], rank: int) -> Iterator[Any]:
    """The arguments after the input by position, defaults filled in, dimensions counted from the last."""
    for key, value in {**_PARAMETERS[name], **dict(zip(_PARAMETERS[name], args, strict=False)), **named}.items():
        if key in _IDLE.get(name, ()):
            continue
        if key == "dim" and isinstance(value, tuple | list) and len(value) == 1:
            (value,) = value
        yield value - rank if key == "dim" and isinstance(value, int) and value >= 0 else value


def uncast(term: Any) -> Any:
    """What a term was before its last change of type, if there was one."""
    return term.args[0] if isinstance(term, Term) and term.name == "to" else term


def both_ways(args: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Two arguments in either order: of sums and products."""
    if len(args) == 2:
        yield args[0], args[1]
        yield args[1], args[0]


def type_of(term: Any) -> torch.dtype | None:
    """The type of a term or leaf."""
    if isinstance(term, fx.Node):
        value = value_of(term)
        return value.dtype if isinstance(value, torch.Tensor) else None
    return term.dtype if isinstance(term, Term) else None
