"""Layers, inputs and what is expected of them, that the tests of the routed experts share."""

import os
from functools import lru_cache
from pathlib import Path

from native import report
from native.reference import RANDOM_BITS, Layer, inputs, layer, route

from ktcompile.backends import native

MIXES = (
    ("q4_k", "q4_k", "q6_k"),
    ("iq4_xs", "q3_k", "q2_k"),
    ("q8_0", "mxfp4", "q5_k"),
    ("int8_row", "int4_64", "int4_128"),
    ("fp8_block128", "q4_0", "bf16"),
    ("bf16", "fp8_block128", "iq4_nl"),
    ("f32", "bf16", "q5_0"),
    ("int8_row",) * 3,
)
N_EXPERTS, TOP_K = 5, 3

for _isa, _reason in native.isas().items():
    report.ran(_isa, f"not run: {_reason}" if _reason else "no test of it selected")
HERE = [isa for isa, reason in native.isas().items() if reason is None]


def all_positive(types: tuple[str, str, str], hidden: int, width: int) -> bool:
    """Sums of so few values may cancel, and then no relative bound holds: they get weights and tokens of one sign."""
    return min(hidden, width) < 64 and not set(types) & set(RANDOM_BITS)


@lru_cache(maxsize=20)
def cached_layer(
    types: tuple[str, str, str], hidden: int, width: int, activation: str = "silu", biases: bool = False
) -> Layer:
    positive = all_positive(types, hidden, width)
    return layer(types, N_EXPERTS, hidden, width, activation, positive=positive, biases=biases)


@lru_cache(maxsize=200)
def problem(types: tuple[str, str, str], hidden: int, width: int, tokens: int, routing: str, *more):
    made, positive = cached_layer(types, hidden, width, *more), all_positive(types, hidden, width)
    x = inputs(hidden, tokens, positive)
    ids, scores = route(routing, N_EXPERTS, tokens, TOP_K, seed=tokens)
    scores = scores.abs() if positive else scores
    return made.weights, x, ids, scores, made.expected(x, ids, scores)


def taken(isa: str) -> list[tuple[str, str, str]]:
    return [types for types in MIXES if native.refuses(isa, types) is None]


def environment(**more: str) -> dict[str, str]:
    """For a child that imports the package and what is in tests/."""
    tests = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, (str(tests.parent), str(tests), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}
