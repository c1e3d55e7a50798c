"""Measures from how many tokens on tiles are faster than streaming, for each storage type: `ktrans tune`.

All experts of a call get the same number of tokens. Both ways are timed in turns, on other experts each time, so that
weights come from memory as they do in a model. What is timed does not depend on the values of the weights.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ktcompile import KernelError
from ktcompile.backends import native
from ktcompile.backends.tile_tokens import shipped, user_file, write
from ktcompile.target import cpu_name, memory
from ktcompile.verify import gib
from ktcompile.version import __version__

_HALF_FIELDS = {  # bytes of a block, and where its float16 scales are
    "q8_0": (34, (0,)),
    "q5_0": (22, (0,)),
    "q4_0": (18, (0,)),
    "q6_k": (210, (208,)),
    "q5_k": (176, (0, 2)),
    "q4_k": (144, (0, 2)),
    "q3_k": (110, (108,)),
    "q2_k": (84, (80, 82)),
    "iq4_nl": (18, (0,)),
    "iq4_xs": (136, (0,)),
}


@dataclass(frozen=True)
class Effort:
    """What is measured: experts of this shape, calls with so many tokens for each, `runs` timed calls each way."""

    hidden: int
    width: int
    weight_bytes: int  # of all experts together: more than the caches hold
    runs: int
    tokens: tuple[int, ...] = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 64)


FULL = Effort(hidden=7168, width=2048, weight_bytes=2 << 30, runs=7)
QUICK = Effort(hidden=2048, width=768, weight_bytes=256 << 20, runs=3)


@dataclass(frozen=True)
class Crossing:
    """Milliseconds of a call both ways, by tokens an expert."""

    isa: str
    type: str
    streamed: Mapping[int, float]
    tiled: Mapping[int, float]

    @property
    def tile_tokens(self) -> int:
        """The count from which tiles cost least over all that was measured; 0: never.

        Where neither way is disturbed, that is the least count from which tiles are faster. One disturbed measurement
        moves it little: each count weighs as the ratio to its faster way.
        """
        counts = sorted(self.streamed)

        def cost(first: float) -> float:
            times = ((self.tiled[n] if n >= first else self.streamed[n], n) for n in counts)
            return sum(ms / min(self.streamed[n], self.tiled[n]) for ms, n in times)

        best = min((*counts, math.inf), key=cost)
        return 0 if best == math.inf else int(best)


def tune(
    types: Sequence[str] | None,
    threads: int,
    quick: bool,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Path, str]:
    """Measure every instruction set with tiles that runs here, for `types` or all it takes; write the user's table.

    Returns the file and a table for a person. `progress` hears what is measured now, steps done, steps in all.
    KernelError, and nothing written: a machine without tiles, or a type that none of them takes.
    """
    pairs = _pairs(types)
    effort = QUICK if quick else FULL
    pool = native.Pool(threads)
    found: list[Crossing] = []
    for isa, type in pairs:
        what, done, total = f"{isa} {type}", len(found) * len(effort.tokens), len(pairs) * len(effort.tokens)
        weights, used = _experts(type, effort, threads)
        streamed: dict[int, float] = {}
        tiled: dict[int, float] = {}
        for tokens in effort.tokens:
            progress(what, done + len(streamed), total)
            streamed[tokens], tiled[tokens] = _both_ways(pool, isa, weights, used, tokens, effort.runs)
        found.append(Crossing(isa, type, streamed, tiled))
    pool.close()
    told = f" --types {','.join(types)}" if types else ""
    command = f"ktrans tune{told} --threads {threads}{' --quick' if quick else ''}"
    measured: dict[str, dict[str, int]] = {}
    for crossing in found:
        measured.setdefault(crossing.isa, {})[crossing.type] = crossing.tile_tokens
    path = user_file()
    try:
        write(path, measured, f"{cpu_name()}, ktcompile {__version__}: {command}")
    except OSError as error:
        raise KernelError(f"cannot write {path}: {error.strerror}; XDG_CACHE_HOME names another folder") from error
    return path, _text(found, effort)


def _pairs(types: Sequence[str] | None) -> list[tuple[str, str]]:
    """(instruction set, type) to measure; KernelError if there is nothing to."""
    missing = {isa: native.isas()[isa] for isa in shipped()}
    here = [isa for isa, why in missing.items() if why is None]
    if not here:
        told = "; ".join(f"{isa}: {why}" for isa, why in missing.items())
        raise KernelError(f"nothing to tune: no instruction set with tiles runs here ({told}). Experts are streamed")
    takes = {isa: [t for t in native.TYPES if native.refuses(isa, [t]) is None] for isa in here}
    allowed = dict.fromkeys(t for isa in here for t in takes[isa])
    for name in types or ():
        if name not in allowed:
            raise KernelError(f"no tiles for weights of type {name!r}; {' and '.join(here)} take {', '.join(allowed)}")
    return [(isa, t) for isa in here for t in takes[isa] if not types or t in types]


def _experts(type: str, effort: Effort, threads: int) -> tuple[native.MoeWeights, int]:
    """More experts than the caches hold, in blocks of so many that a call uses; KernelError if a block is too large."""
    used = max(16, 2 * threads)  # tasks for every thread; and over 8 tokens in all, below which a call always streams
    sizes = (effort.width, effort.hidden), (effort.width, effort.hidden), (effort.hidden, effort.width)
    each = sum(native.packed_bytes(type, *size) for size in sizes)
    blocks = min(-(-effort.weight_bytes // (used * each)), memory() // 4 // (used * each))
    if not blocks:
        raise KernelError(
            f"{used} experts of {type} are {gib(used * each)}, more than a quarter of this machine's {gib(memory())}; "
            "--quick takes smaller ones, fewer --threads fewer"
        )
    return experts((type, type, type), blocks * used, effort.hidden, effort.width, tile_tokens=0), used


def _both_ways(
    pool: native.Pool, isa: str, weights: native.MoeWeights, used: int, tokens: int, runs: int
) -> tuple[float, float]:
    """Median milliseconds of a call by streaming and by tiles: `used` experts with `tokens` tokens each."""
    ways = replace(weights, tile_tokens=0), replace(weights, tile_tokens=1)
    blocks = weights.experts // used
    ids = [torch.arange(b * used, (b + 1) * used).repeat(tokens).view(-1, 1) for b in range(blocks)]
    x, scores = torch.randn(tokens * used, weights.hidden), torch.ones(tokens * used, 1)
    out = torch.empty_like(x)
    times: tuple[list[float], list[float]] = [], []
    for call in range(2 * (runs + 1)):
        start = time.perf_counter()
        native.moe(pool, isa, ways[call % 2], x, ids[call % blocks], scores, out=out)
        times[call % 2].append((time.perf_counter() - start) * 1e3)
    streamed, tiled = (statistics.median(t[1:]) for t in times)  # the first touches new memory
    return streamed, tiled


def _text(found: Sequence[Crossing], effort: Effort) -> str:
    """For a person: the count, and what it follows from."""
    head = f"{'':<22}{'tiles':>7}   time of streaming / time of tiles, by tokens an expert"
    lines = [head, f"{'':<22}{'from':>7}  " + "".join(f"{n:>6}" for n in effort.tokens)]
    for c in found:
        ratios = "".join(f"{c.streamed[n] / c.tiled[n]:>6.2f}" for n in effort.tokens)
        lines.append(f"{c.isa + ' ' + c.type:<22}{c.tile_tokens or 'never':>7}  {ratios}")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ weights to time


def experts(types: tuple[str, str, str], count: int, hidden: int, width: int, tile_tokens: int) -> native.MoeWeights:
    """Experts that are copies of one random one."""

    def matrices(type: str, rows: int, cols: int) -> Tensor:
        raw, src, scale = source(type, rows, cols)
        one = native.pack(raw, src, type, rows, cols, scale)
        out = native.empty(count * one.numel()).view(count, -1)
        out[:] = one
        return out

    shapes = ((width, hidden), (width, hidden), (hidden, width))
    gate, up, down = (matrices(type, *shape) for type, shape in zip(types, shapes, strict=True))
    return native.MoeWeights(count, hidden, width, "silu", gate, up, down, *types, tile_tokens=tile_tokens)


def source(type: str, rows: int, cols: int) -> tuple[Tensor, str, Tensor | None]:
    """A random matrix as a file stores it: bytes, type, scales."""
    if type in ("f32", "bf16", *native.LOSSY):
        values = torch.randn(rows, cols) * cols**-0.5
        return (values, "f32", None) if type == "f32" else (values.bfloat16(), "bf16", None)
    if type == "fp8_block128":
        scale = torch.full((-(-rows // 128), -(-cols // 128)), 1e-4)
        return (torch.randn(rows, cols) * 40).to(torch.float8_e4m3fn).view(torch.uint8), type, scale
    blocks = torch.randint(0, 256, (native.source_bytes(type, rows, cols),), dtype=torch.uint8)
    if type == "mxfp4":
        blocks.view(-1, 17)[:, 0] = 120
    else:
        size, fields = _HALF_FIELDS[type]
        for field in fields:
            blocks.view(-1, size)[:, field : field + 2] = torch.tensor([1e-3]).half().view(torch.uint8)
    return blocks, type, None
