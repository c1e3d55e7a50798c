"""Times the routed experts beside the machine's ceilings, one JSON line a case: python benchmarks/bench_moe.py --help

The default shape is a layer of DeepSeek-V3 with as many experts as half of the memory holds. Each case is measured
between two measurements of the ceilings, in the same process with the same threads; ratios are to their mean. The
ceilings are the bandwidth of reading memory, for the case's weights once, and the rate of tile products with tiles
from the second-level cache in the best order, where there are tiles. `bound_ms` is the longer of the two.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ktcompile import target
from ktcompile.backends import native, tune
from ktcompile.backends.tile_tokens import tile_tokens


def expert_bytes(types: tuple[str, str, str], hidden: int, width: int) -> int:
    """Bytes of an expert as files store it: what has to be read at least."""
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    total = 0
    for type, (rows, cols) in zip(types, shapes, strict=True):
        bits = {"int8_row": 8, "int4_64": 4.25, "int4_128": 4.125}.get(type)
        total += int(rows * cols * bits / 8) if bits else native.source_bytes(type, rows, cols)
    return total


class Ceilings:
    """What the machine does at most, now: GB/s of reading, T op/s of tile products."""

    def __init__(self, pool: native.Pool) -> None:
        self.pool = pool
        self.data = native.empty(min(8 << 30, target.memory() // 16)).fill_(1)  # far more than the caches hold
        # Random values, as weights are: products of zeros take less power, and the clock is a fifth higher.
        random = torch.randn(native.tile_operand_bytes(pool) // 2).bfloat16()
        self.operands = native.empty(random.nbytes)
        self.operands.copy_(random.view(torch.uint8))
        self.has_tiles = {isa: native.isas()[isa] is None for isa in ("amx", "amx_int8")}

    def read(self) -> float:
        return max(native.read_rate(self.pool, self.data, ahead) for ahead in (0, 4096, 16384)) / 1e9

    def tiles(self, isa: str) -> dict[int, float]:
        """T op/s by order of loads and products; see csrc/ceiling.c."""
        if not self.has_tiles[isa]:
            return {}
        return {order: native.tile_rate(self.pool, isa, order, 4096, self.operands) / 1e12 for order in range(6)}

    def best_tiles(self, isa: str) -> float:
        """The best order with operands in the caches; that of registers only is no order for a kernel."""
        return max((rate for order, rate in self.tiles(isa).items() if order < 5), default=0.0)


def timed(call: Callable[[int], Any], seconds: float, least: int = 5) -> list[float]:
    """Milliseconds of each call; the first is not counted."""
    call(0)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < least:
        start = time.perf_counter()
        call(len(times))
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)


def middle(times: list[float]) -> float:
    return times[len(times) // 2]


def routing(experts: int, tokens: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts).topk(top_k).indices


def case(
    ceilings: Ceilings, isa: str, made: native.MoeWeights, tokens: int, top_k: int, seconds: float
) -> dict[str, Any]:
    x, out = torch.randn(tokens, made.hidden), torch.empty(tokens, made.hidden)
    scores = torch.full((tokens, top_k), 1 / top_k)
    ids = [routing(made.experts, tokens, top_k) for _ in range(8)]
    used = sum(i.unique().numel() for i in ids) / len(ids)
    tile_isa = "amx_int8" if native.FAMILY[isa] == "int8" else "amx"
    before = ceilings.read(), ceilings.best_tiles(tile_isa)
    times = timed(lambda i: native.moe(ceilings.pool, isa, made, x, ids[i % len(ids)], scores, out=out), seconds)
    after = ceilings.read(), ceilings.best_tiles(tile_isa)
    read, tiles = ((b + a) / 2 for b, a in zip(before, after, strict=True))
    nbytes = used * expert_bytes(made.types, made.hidden, made.width)
    operations = 6 * tokens * top_k * made.hidden * made.width
    ms = middle(times)
    read_ms, tiles_ms = nbytes / read / 1e6, operations / tiles / 1e9 if tiles else 0.0
    return {
        "isa": isa,
        "type": "+".join(dict.fromkeys(made.types)),
        "tokens": tokens,
        "ms": round(ms, 3),
        "ms_10_90": [round(times[len(times) // 10], 3), round(times[len(times) * 9 // 10], 3)],
        "calls": len(times),
        "weights_gb_s": round(nbytes / ms / 1e6, 1),
        "tera_op_s": round(operations / ms / 1e9, 3),
        "read_ceiling_gb_s": round(read, 1),
        "tile_ceiling_tera_op_s": round(tiles, 2),
        "ratio_read": round(read_ms / ms, 3),
        "ratio_tiles": round(tiles_ms / ms, 3),
        "bound_ms": round(max(read_ms, tiles_ms), 3),
    }


def torch_cases(
    types: tuple[str, str, str],
    experts: int,
    hidden: int,
    width: int,
    tokens: int,
    top_k: int,
    seconds: float,
    threads: int,
) -> list[dict[str, Any]]:
    """The same experts by torch: bf16 products expert by expert (oneDNN), its grouped product, and decoding first."""
    torch.set_num_threads(threads)
    x = torch.randn(tokens, hidden).bfloat16()
    ids = routing(experts, tokens, top_k)
    order = ids.reshape(-1).argsort()
    rows = order // top_k
    counts = ids.reshape(-1).bincount(minlength=experts)
    gate, down = torch.randn(experts, 2 * width, hidden).bfloat16(), torch.randn(experts, hidden, width).bfloat16()
    packed = native.pack(
        *tune.source(types[0], width, hidden)[:2], types[0], width, hidden, tune.source(types[0], width, hidden)[2]
    )

    def by_expert(_i: int, decode: bool = False) -> None:
        y, start = torch.zeros(tokens, hidden), 0
        for e, count in enumerate(counts.tolist()):
            if not count:
                continue
            here = rows[start : start + count]
            start += count
            g, d = gate[e], down[e]
            if decode:
                half = native.unpack(packed, types[0], width, hidden).bfloat16()
                g, d = torch.cat((half, half)), half.view(hidden, width)
            a, b = (x[here] @ g.T).chunk(2, -1)
            y.index_add_(0, here, ((functional.silu(a) * b) @ d.T).float())

    def grouped(_i: int) -> None:
        ends = counts.cumsum(0).int()
        a, b = functional.grouped_mm(x[rows], gate.transpose(1, 2), offs=ends).chunk(2, -1)
        h = functional.grouped_mm(functional.silu(a) * b, down.transpose(1, 2), offs=ends)
        torch.zeros(tokens, hidden).index_add_(0, rows, h.float())

    made: list[dict[str, Any]] = []
    for name, call in (
        ("torch bf16", by_expert),
        ("torch grouped_mm bf16", grouped),
        (f"decode {types[0]}, torch bf16", lambda i: by_expert(i, True)),
    ):
        try:
            times = timed(call, seconds, least=1 if name.startswith("decode") else 3)
        except (RuntimeError, AttributeError) as error:
            made.append({"isa": name, "tokens": tokens, "error": str(error).splitlines()[0]})
            continue
        operations = 6 * tokens * top_k * hidden * width
        made.append(
            {
                "isa": name,
                "tokens": tokens,
                "ms": round(middle(times), 3),
                "tera_op_s": round(operations / middle(times) / 1e9, 3),
            }
        )
    return made


def packing(type: str, experts: int, hidden: int, width: int, threads: int) -> dict[str, Any]:
    """GB/s of source that all threads pack, each an expert's matrix at a time."""
    from ktcompile.weights import each

    raw, src, scale = tune.source(type, width, hidden)
    out = native.empty(experts * native.packed_bytes(type, width, hidden)).view(experts, -1)
    out.zero_()
    start = time.perf_counter()
    each(lambda e: native.pack(raw, src, type, width, hidden, scale, out[e]), range(experts), threads)
    seconds = time.perf_counter() - start
    nbytes = experts * native.source_bytes(src, width, hidden)
    return {"pack": f"{src} to {type}", "source_gb_s": round(nbytes / seconds / 1e9, 2), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--types", nargs="+", default=["q4_k"], help="a type, or gate,up,down of different types")
    parser.add_argument("--isas", nargs="+", help="default: the best exact one, or the best that takes the type")
    parser.add_argument("--tile-tokens", type=int, help="default: the table of `ktrans tune`")
    parser.add_argument("--threads", type=int, default=target.default_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    parser.add_argument("--vs", choices=["torch"], help="also time torch on the same shapes")
    parser.add_argument("--pack", nargs="*", default=[], choices=native.TYPES, help="also time packing these types")
    options = parser.parse_args()
    pool = native.Pool(options.threads)
    ceilings = Ceilings(pool)
    about = {"cpu": target.cpu_name(), "threads": options.threads, "torch": torch.__version__}
    about |= {"read_gb_s": round(ceilings.read(), 1)}
    for isa in ("amx", "amx_int8"):
        about[f"{isa}_tera_op_s_by_order"] = {o: round(r, 2) for o, r in ceilings.tiles(isa).items()}
    print(json.dumps(about), flush=True)
    shape = {"hidden": options.hidden, "width": options.width, "top_k": options.top_k}
    here = [isa for isa, reason in native.isas().items() if reason is None]
    for spec in options.types:
        named = spec.split(",") * (1 if "," in spec else 3)
        types = (named[0], named[1], named[2])
        most = int(target.memory() * 0.5) // expert_bytes(types, options.hidden, options.width)
        experts = min(options.experts, most)
        made = tune.experts(types, experts, options.hidden, options.width, tile_tokens=0)
        taking = [isa for isa in here if not native.refuses(isa, types)]
        best = [isa for isa in taking if isa == "amx_int8"] or [i for i in taking if native.FAMILY[i] != "int8"][-1:]
        as_told = made
        for isa in [i for i in options.isas or best if i in taking]:
            count = tile_tokens(isa, types) if options.tile_tokens is None else options.tile_tokens
            as_told = replace(made, tile_tokens=count)
            for tokens in options.tokens:
                found = case(ceilings, isa, as_told, tokens, options.top_k, options.seconds)
                print(json.dumps({**found, **shape, "experts": experts, "threads": options.threads}), flush=True)
        if options.vs:
            for tokens in options.tokens:
                for found in torch_cases(
                    types,
                    min(experts, 64),
                    options.hidden,
                    options.width,
                    tokens,
                    options.top_k,
                    options.seconds,
                    options.threads,
                ):
                    print(json.dumps({**found, **shape, "experts": min(experts, 64)}), flush=True)
        del made, as_told
    for type in options.pack:
        print(
            json.dumps(packing(type, min(options.experts, 64), options.hidden, options.width, options.threads)),
            flush=True,
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
