"""Budget: the smallest change that makes a plan fit, found by planning again."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import fx

from ktcompile.errors import CapacityError, KtransError
from ktcompile.graph import Region, regions, value_of
from ktcompile.pipeline import Context, Pipeline, available, make_pass
from ktcompile.symbols import PAGE, sizes
from ktcompile.target import Target
from ktcompile.weights import size_of
from ktcompile.weights.mixture import block_type, is_exact

LEAST_CONTEXT = 256
"""Tokens: a shorter context is not offered, a conversation would not fit."""

FEWER_BITS = ("q8_0", "q4_k")
"""Encodings that are offered, the one that loses least first."""

MOST_PLANS = 12
"""So many plans at most for each kind of change: one of 61 layers takes seconds."""

Attempt = Callable[[Pipeline, int], KtransError | None]
"""Plan with another pipeline and context: why that cannot be, or None where it fits."""


@dataclass(frozen=True)
class _Part:
    """Regions that go by one glob: all of a kind, in any layer."""

    kind: str  # `*.self_attn`, `lm_head`
    members: tuple[Region, ...]

    def glob(self, layers: tuple[int, ...]) -> str:
        """The members in these layers, which follow each other."""
        if not layers:
            return self.kind
        span = str(layers[0]) if len(layers) == 1 else f"{{{layers[0]}..{layers[-1]}}}"
        return f"layers.{span}.{self.kind.removeprefix('*.')}"


def smallest_change(
    error: CapacityError,
    gm: fx.GraphModule,
    pipeline: Pipeline,
    ctx: Context,
    tokens: int,
    context: int,
) -> str | None:
    """What one change would make the plan of a captured graph fit, as the user would write it; None: none is known.

    In this order: a shorter context, fewer bits, other places. Each was planned and fits. `ctx`: the target and the
    weights of the plan that did not fit, for a step of `tokens` tokens.
    """
    target = ctx.target
    if pipeline.get("place") is None or not error.device or not context:
        return None
    free = replace(target, devices=tuple(replace(d, capacity=1 << 60) for d in target.devices))
    placed = pipeline.until("place").run(gm, Context(free, ctx.weights))
    there = [r for r in regions(placed) if r.home == error.device]
    cache_bytes: dict[str | None, int] = {}
    for region in regions(placed):
        cache_bytes[region.home] = cache_bytes.get(region.home, 0) + _cache_bytes(region)

    def attempt(changed: Pipeline, tokens_kept: int) -> KtransError | None:
        with _shorter(gm, tokens_kept, context):
            try:
                changed.run(gm, Context(target, ctx.weights, sizes(gm, tokens, tokens_kept)))
            except KtransError as refused:
                return refused
        return None

    return (
        _shorter_context(error, pipeline, context, cache_bytes, attempt)
        or _fewer_bits(error, pipeline, context, there, attempt)
        or _elsewhere(error, pipeline, context, there, target, attempt)
    )


@contextmanager
def _shorter(gm: fx.GraphModule, tokens: int, context: int) -> Iterator[None]:
    """The captured graph with page pools for `tokens` instead of `context` tokens."""
    pools = [n for n in gm.graph.nodes if n.op == "placeholder" and n.meta.get("state")]
    before = [value_of(n) for n in pools]
    try:
        for node, pool in zip(pools, before, strict=True):
            node.meta["val"] = pool[: -(-int(pool.shape[0]) * tokens // context)]
        yield
    finally:
        for node, pool in zip(pools, before, strict=True):
            node.meta["val"] = pool


def _cache_bytes(region: Region) -> int:
    """Bytes of the page pools that a region writes."""
    return sum(int(value_of(n).nbytes) for n in region.inputs if n.meta.get("state")) if region.effects else 0


def _still_over(found: KtransError, error: CapacityError) -> int:
    """By how many bytes the same device is still too small; 0: something else is wrong."""
    return found.excess if isinstance(found, CapacityError) and found.device == error.device else 0


# ------------------------------------------------------------------------------------------------ a shorter context


def _shorter_context(
    error: CapacityError, pipeline: Pipeline, context: int, cache_bytes: Mapping[str | None, int], attempt: Attempt
) -> str | None:
    """`cache_bytes`: of the whole context, by device."""
    pages = failed = -(-context // PAGE)
    least, fits = LEAST_CONTEXT // PAGE, 0
    for _ in range(MOST_PLANS):
        if fits and failed - fits == 1:
            break
        tried = fits + 1 if fits else failed - -(-error.excess * pages // max(1, cache_bytes.get(error.device, 0)))
        if tried < least:
            return None
        found = attempt(pipeline, tried * PAGE)
        if found is None:
            fits = tried
        elif isinstance(found, CapacityError) and found.excess:  # of this device or another
            failed, error = tried, found
        else:
            return None
    return f"--context {fits * PAGE}" if fits else None


# ------------------------------------------------------------------------------------------------ fewer bits


def _parts(there: list[Region]) -> list[_Part]:
    """The regions with weights or a cache by kind."""
    found: dict[str, list[Region]] = {}
    for region in there:
        if region.weights or _cache_bytes(region):
            kind = re.sub(r"^.*\blayers\.\d+\.", "*.", region.path).removeprefix("model.")
            found.setdefault(kind, []).append(region)
    return [_Part(kind, tuple(members)) for kind, members in found.items()]


def _saved(region: Region, encoding: str) -> int:
    """Bytes that a region's matrices would be smaller in an encoding."""
    total = 0
    for leaf, node in region.weights.items():
        shape = region.matrix_shape(leaf)
        if is_exact(str(node.meta["weight"]), shape):
            continue
        made = block_type(encoding, "other", shape[-1])
        total += max(0, region.weight_bytes(leaf) - size_of(shape, made)) if made != "bf16" else 0
    return total


def _fewer_bits(
    error: CapacityError, pipeline: Pipeline, context: int, there: list[Region], attempt: Attempt
) -> str | None:
    if "quantize" not in available():
        return None
    before: Mapping[str, str] = getattr(pipeline.get("quantize"), "rules", {})
    for encoding in FEWER_BITS:
        saving = {p.kind: sum(_saved(r, encoding) for r in p.members) for p in _parts(there)}
        chosen: dict[str, str] = {}
        saved, wanted = 0, error.excess
        for kind in sorted((k for k, n in saving.items() if n), key=lambda k: -saving[k]):
            chosen[kind] = encoding
            saved += saving[kind]
            if saved < wanted:
                continue
            rules = {**chosen, **{k: e for k, e in before.items() if k not in chosen}}
            found = attempt(
                pipeline.with_pass(make_pass(available()["quantize"], {"rules": rules}, "quantize")), context
            )
            if found is None:
                return f"--quantize '{','.join(f'{glob}={e}' for glob, e in rules.items())}'"
            if over := _still_over(found, error):
                wanted = saved + over
                continue
            del chosen[kind]  # no kernel takes it so
            saved -= saving[kind]
    return None


# ------------------------------------------------------------------------------------------------ other places


def _elsewhere(
    error: CapacityError, pipeline: Pipeline, context: int, there: list[Region], target: Target, attempt: Attempt
) -> str | None:
    to = "cpu" if target[error.device].kind == "cuda" else "gpu"
    place = pipeline.get("place")
    if place is None or target[to].name == error.device:
        return None
    before: Mapping[str, str] = getattr(place, "rules", {})
    whole = _Part("*.*", tuple(r for r in there if _layer(r) is not None))
    wanted = dict.fromkeys((*_parts(there), whole), error.excess)  # part -> bytes that it must bring
    for _ in range(MOST_PLANS):
        moves = {part: last for part, count in wanted.items() if (last := _last(part, count)) is not None}
        if not moves:
            return None
        part = min(moves, key=lambda p: _bytes(p, moves[p]))
        glob = part.glob(moves[part])
        rules = {glob: to, **{k: d for k, d in before.items() if k != glob}}
        found = attempt(pipeline.with_pass(make_pass(type(place), {"rules": rules}, "place")), context)
        if found is None:
            return f'a first rule of place, "{glob}": {to}'
        over = _still_over(found, error)
        wanted[part] = _bytes(part, moves[part]) + over if over else 1 << 62
    return None


def _layer(region: Region) -> int | None:
    found = re.search(r"\blayers\.(\d+)\.", region.path)
    return int(found[1]) if found else None


def _bytes(part: _Part, layers: tuple[int, ...]) -> int:
    """Bytes of a part in these layers, of all of it where it is in none."""
    return sum(r.nbytes + _cache_bytes(r) for r in part.members if not layers or _layer(r) in layers)


def _last(part: _Part, wanted: int) -> tuple[int, ...] | None:
    """The fewest last layers of a part that have so many bytes; () if it is in no layer, None if all have too few."""
    layers = sorted({n for r in part.members if (n := _layer(r)) is not None})
    spans = [tuple(range(first, layers[-1] + 1)) for first in reversed(layers)] or [()]
    return next((span for span in spans if _bytes(part, span) >= wanted), None)
