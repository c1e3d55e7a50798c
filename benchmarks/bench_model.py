"""Times a whole model at several numbers of layers, and says what its real number would take. JSON lines.

    python benchmarks/bench_model.py --model v3 --layers 2,4,6 --out /dev/shm

For each number N the model of `synthetic.py` with N layers with experts is written, loaded, measured and deleted. At
the end a line a + b N is fitted to the median seconds of a step of each test, and extrapolated to `moe_layers`, all
that the model has. Its `dense_layers` without experts are in a: one, where DeepSeek-V3 really has three. About half
of the layers have finer matrices (llama.cpp's Q4_K_M). `gb_a_layer` says how far the mean layer is from the whole
model's: a single layer is a finer one, even N are close.

`read_gb_s` is what all threads together read from memory, before and after the tests of each N. The fit's `of_read`
is the share of a step of one token in which the experts that it reads could have been read at that rate.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import synthetic
import torch

import ktcompile
from ktcompile.backends import native
from ktcompile.bench import Row, Test, context_for, measure, numbers, tests_for
from ktcompile.errors import CapacityError, KtransError
from ktcompile.model import torch_threads
from ktcompile.target import Target, default_threads, detect, size


def say(**facts: object) -> None:
    """One line, at once."""
    print(json.dumps(facts), flush=True)


# ------------------------------------------------------------------------------------------------ one model


def machine(threads: int | None, vram: str | None) -> Target:
    """This machine with `threads` of its CPU, its GPUs held to `vram` (24G) each."""
    found = detect(threads)
    if vram is None:
        return found
    most = size(vram)
    return replace(
        found,
        devices=tuple(replace(d, capacity=min(d.capacity, most)) if d.kind == "cuda" else d for d in found.devices),
    )


def gb_a_layer(shape: synthetic.Shape) -> float:
    """10^9 bytes of the file that a layer with experts takes, on average."""
    first = int(bool(shape.dense))
    layers = range(first, first + shape.layers)
    return sum(t.nbytes for i in layers for t in synthetic.tensors_of(shape, i)) / len(layers) / 1e9


@contextmanager
def written(shape: synthetic.Shape, out: Path) -> Iterator[Path]:
    """The model's file in a new folder of `out`, deleted in the end."""
    folder = Path(mkdtemp(prefix="bench-model-", dir=out))
    try:
        yield synthetic.write(shape, folder)
    finally:
        shutil.rmtree(folder)


def one(
    shape: synthetic.Shape, tests: Sequence[Test], path: Path, target: Target, args: argparse.Namespace
) -> tuple[list[Row], float]:
    """Load and measure: a line for the loading and for each test as soon as they are known, then one with all of it.

    The rows, and 10^9 bytes a second that memory gives.
    """
    n = shape.layers
    start = time.perf_counter()
    context = context_for(tests, shape.context)
    options = {"experts": args.experts, "context": context, "chunk": args.chunk_size, "rules": args.rules}
    model: Any = ktcompile.load(path, target=target, **options)
    load_s = round(time.perf_counter() - start, 2)
    plan = model.plans["decode"]
    torch.set_num_threads(torch_threads(plan, target))
    kernels = sorted({f"{r.op}:{r.kernel}@{r.device}" for r in plan.rows if r.op != "copy"})
    say(step="load", n=n, load_s=load_s, kernels=kernels, lossy=list(plan.lossy))
    rows, read = [], [reading(target)]
    for test in tests:
        rows.append(measure(test, model, args.runs, args.chunk_size))
        times = [round(1e3 * s, 3) for s in rows[-1].steps]
        say(step="measure", n=n, test=test.name, **told(rows[-1]), runs_s=list(rows[-1].seconds), steps_ms=times)
    read.append(reading(target))
    say(
        step="model",
        n=n,
        read_gb_s=read,
        gb_a_layer=gb_a_layer(shape),
        load_s=load_s,
        tests={row.test.name: told(row) for row in rows},
        weights_gb={device: count / 1e9 for device, count in model.store.nbytes.items()},
        max_allocated_gb={str(g): torch.cuda.max_memory_allocated(g) / 1e9 for g in gpus(target)},
        rss_gb=resident() / 1e9,
        no_graph={tokens: why for tokens, why in model.graphs.items() if why},
    )
    return rows, statistics.fmean(read)


def reading(target: Target) -> float:
    """10^9 bytes a second that the threads of the experts read from memory."""
    pool = native.Pool(target.host.threads or default_threads())
    data = native.empty(1 << 30).fill_(1)  # pages that nobody wrote to are one and the same
    return max(native.read_rate(pool, data, ahead) for ahead in (0, 4096, 16384)) / 1e9


def told(row: Row) -> dict[str, object]:
    """Tokens a second with their deviation, seconds of a step with their spread."""
    rates = {"tok_s": round(row.median, 3), "tok_s_sd": round(row.sd, 3)}
    return rates | {"step_s": row.step_s, "step_s_10_90": list(row.step_s_10_90)}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpus(target: Target) -> list[torch.device]:
    return [d.torch for d in target.devices if d.torch.type == "cuda"]


def free(target: Target) -> None:
    """Give back what the last model held: to torch, and to the GPU."""
    gc.collect()
    for gpu in gpus(target):
        with torch.cuda.device(gpu):
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(gpu)


# ------------------------------------------------------------------------------------------------ the line


@dataclass(frozen=True)
class Line:
    """y = a + b x, least squares. `se` of one residual: sqrt(sum of squares / (points - 2)); needs three points."""

    a: float
    b: float
    se: float
    r2: float
    mean_x: float
    sxx: float
    points: int

    def at(self, x: float) -> tuple[float, float]:
        """The line at x and its standard error there: se * sqrt(1 / points + (x - mean x)^2 / Sxx)."""
        return self.a + self.b * x, self.se * math.sqrt(1 / self.points + (x - self.mean_x) ** 2 / self.sxx)


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Least squares through three or more points of different x; R2 is 1 - residuals / deviations from the mean."""
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    sxx = sum((x - mx) ** 2 for x in xs)
    b = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sxx
    a = my - b * mx
    rest = sum((y - a - b * x) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - my) ** 2 for y in ys)
    return Line(a, b, math.sqrt(rest / (len(xs) - 2)), 1 - rest / total if total else 1.0, mx, sxx, len(xs))


def extrapolated(test: Test, line: Line, layers: int, chunk: int) -> dict[str, object]:
    """A test of the whole model: seconds of a step with their error, tokens a second at both ends of it."""
    steps = test.tokens if test.kind == "tg" else -(-test.tokens // chunk)
    step_s, error = line.at(layers)
    tokens = test.tokens * test.batch / steps
    rates = [tokens / s if s > 0 else None for s in (step_s, step_s + error, step_s - error)]
    return {
        "a_s": line.a,
        "b_s": line.b,
        "r2": line.r2,
        "residual_se_s": line.se,
        "step_s": step_s,
        "step_s_se": error,
        "tok_s": rates[0],
        "tok_s_within_one_se": rates[1:],
    }


# ------------------------------------------------------------------------------------------------ command


def main(given: Sequence[str] | None = None) -> int:
    """Measure each N, then the fit; 1 where fewer than three N were measured."""
    args = arguments(given)
    whole: synthetic.Shape = synthetic.SHAPES[args.model]
    started = time.perf_counter()
    try:
        target = machine(args.cpu_threads, args.vram)
        layers = sorted(numbers(args.layers, "--layers", 1))
        prompts, new, depths, batches = (
            numbers(text, option, least)
            for text, option, least in ((args.p, "-p", 0), (args.n, "-n", 0), (args.d, "-d", 0), (args.b, "-b", 1))
        )
        tests = tests_for(prompts, new, depths, batches, whole.context)
    except KtransError as error:
        raise SystemExit(f"bench_model: {error}") from error
    say(
        step="about",
        model=whole.name,
        layers=layers,
        devices={d.name: {"gb": d.capacity / 1e9, "gb_s": d.bandwidth / 1e9} for d in target.devices},
        threads=target.host.threads or default_threads(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        torch=torch.__version__,
        chunk=args.chunk_size,
    )
    seconds: dict[Test, dict[int, float]] = {test: {} for test in tests}
    read: list[float] = []
    cost = 0.0  # seconds a layer of the last one
    for n in layers:
        shape, spent = replace(whole, layers=n), time.perf_counter() - started
        why = lacking(shape_bytes(shape), args.out, target)
        if args.seconds is not None and spent + cost * n > args.seconds:
            why = f"{spent:.0f} s are spent, {n} layers take about {cost * n:.0f} s more, --seconds is {args.seconds:g}"
        if why:
            say(step="skip", n=n, why=why)
            continue
        try:
            with written(shape, args.out) as path:
                rows, gb_s = one(shape, tests, path, target, args)
            read.append(gb_s)
            for row in rows:
                seconds[row.test][n] = row.step_s
        except CapacityError as error:
            say(step="skip", n=n, why=str(error))
        free(target)
        cost = (time.perf_counter() - started - spent) / n
    return tell(whole, seconds, read, args)


def lacking(needed: int, out: Path, target: Target) -> str:
    """Why there is no room for a file of so many bytes, and for what is loaded of it; or nothing."""
    there, memory = shutil.disk_usage(out).free, target.host.capacity
    if needed > there:
        return f"the file has {needed / 1e9:.1f} GB, {out} has {there / 1e9:.1f} GB left"
    both = needed * (2 if str(out.resolve()).startswith("/dev/shm") else 1)
    if both > memory:
        return f"file and weights take {both / 1e9:.1f} GB of memory, there are {memory / 1e9:.1f} GB"
    return ""


def tell(
    whole: synthetic.Shape, seconds: dict[Test, dict[int, float]], read: list[float], args: argparse.Namespace
) -> int:
    """The line of the fit, or why there is none."""
    measured = sorted(next(iter(seconds.values())))
    if len(measured) < 3:
        say(step="fit", why=f"a line and its error need three numbers of layers; measured: {measured}")
        return 1
    fits = {
        test.name: extrapolated(test, fit(list(points), list(points.values())), whole.layers, args.chunk_size)
        for test, points in seconds.items()
    }
    gb_s = statistics.fmean(read)
    used = whole.layers * gb_a_layer(whole) * (args.experts or whole.used) / whole.experts
    for test in seconds:
        if test.kind == "tg" and test.batch == 1:
            fits[test.name]["of_read"] = used / gb_s / float(str(fits[test.name]["step_s"]))
    about = {"moe_layers": whole.layers, "dense_layers": int(bool(whole.dense)), "gb_a_layer": gb_a_layer(whole)}
    about |= {"read_gb_s": gb_s}
    say(step="fit", model=whole.name, **about, measured=measured, tests=fits)
    return 0


def shape_bytes(shape: synthetic.Shape) -> int:
    """Bytes of the model's file, but for its header."""
    layers = range(shape.layers + bool(shape.dense))
    tensors = [*synthetic.ends_of(shape), *(t for i in layers for t in synthetic.tensors_of(shape, i))]
    return sum(t.nbytes for t in tensors)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=synthetic.SHAPES, default="v3")
    parser.add_argument("--layers", default="2,4,6", help="numbers of layers with experts, three or more for a fit")
    parser.add_argument("--out", type=Path, default=Path("/dev/shm"), help="where files go, one at a time")
    parser.add_argument("-p", default="512", help="prompt lengths")
    parser.add_argument("-n", default="64", help="tokens to generate")
    parser.add_argument("-d", default="0", help="after so many tokens")
    parser.add_argument("-b", default="1", help="requests at once")
    parser.add_argument("-r", "--runs", type=int, default=3, help="of each test, after one that does not count")
    parser.add_argument("--chunk-size", type=int, default=2048, help="prompt tokens a step")
    parser.add_argument("--vram", help="most memory of each GPU, as 24G")
    parser.add_argument("--experts", type=int, help="keep this many of the router's experts a token; lossy")
    parser.add_argument("--rules", type=Path, help="a rules file instead of the model's")
    parser.add_argument("--cpu-threads", "--threads", type=int, help="default: all cores, from 8 on all but one")
    parser.add_argument("--seconds", type=float, help="begin no N that would end later than this")
    args = parser.parse_args(given)
    for option in ("runs", "chunk_size"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)}: 1 or more")
    if not args.out.is_dir():
        parser.error(f"--out {args.out}: there is no such folder")
    return args


if __name__ == "__main__":
    sys.exit(main())
