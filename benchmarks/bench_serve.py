"""Load over HTTP: requests that arrive as they like, whether or not the server keeps up. JSON lines, a table, a plot.

    python benchmarks/bench_serve.py --json serve.jsonl --plot serve.png
    python benchmarks/bench_serve.py --users 1,4,8,16 --seconds 60 -- MODEL --cache-lens 65536

Starts `ktrans serve` with what follows `--`, then once more with `--max-batch-size 1`, which answers one request after
the other, and asks both the same: prompts of mixed lengths that nobody else has, answers of mixed lengths. Two loads:

    together   N users, each asking again as soon as it is answered: what N users get, N requests at a time
    arrivals   requests at random times (Poisson), on average `load` x N requests' worth: `rate` requests/s, which is
               what N users made of the server that answers together, so that both servers are asked alike

Of each: tokens of answers a second, and p50, p95, p99 of the time to the first token (from when a request was due) and
of the time between two tokens. Every request is streamed; a line is one load.
"""

import argparse
import asyncio
import json
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

PROMPTS = (16, 32, 64, 128, 256)
"""Words of a prompt, each as likely."""

ANSWERS = (32, 64, 96)
"""Most tokens of an answer, which is greedy: the same from every server."""

WORDS = ("the", "dog", "ran", "to", "a", "tree", "and", "saw", "Tim", "he", "was", "sad", "but", "happy", "with", "red")


@dataclass(frozen=True)
class Asked:
    """One request as it went: seconds from when it was due to the `first` token, and all `gaps` between tokens."""

    first: float
    gaps: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class Load:
    """What one server gave to one load. Times in milliseconds, as p50, p95, p99."""

    server: str
    load: str
    users: int
    rate: float
    requests: int
    seconds: float
    tok_s: float
    first_ms: tuple[float, float, float]
    gap_ms: tuple[float, float, float]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and p99, in milliseconds of seconds."""
    if len(values) < 2:
        return (1e3 * values[0],) * 3 if values else (0.0, 0.0, 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return 1e3 * cuts[49], 1e3 * cuts[94], 1e3 * cuts[98]


def body(number: int) -> dict[str, Any]:
    """Request `number`: always the same, and no other begins like it."""
    chosen = random.Random(number)
    words = [str(number), *chosen.choices(WORDS, k=chosen.choice(PROMPTS))]
    asked = {"prompt": " ".join(words), "max_tokens": chosen.choice(ANSWERS), "temperature": 0}
    return asked | {"stream": True, "stream_options": {"include_usage": True}}


async def ask(client: httpx.AsyncClient, number: int, due: float) -> Asked:
    """Stream one answer. `due`: when it should have been asked, by `time.perf_counter`."""
    times: list[float] = []
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body(number)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and event["choices"][0]["text"]:
                times.append(time.perf_counter())
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return Asked(times[0] - due if times else 0.0, tuple(b - a for a, b in pairwise(times)), tokens)


async def together(base: str, users: int, seconds: float, numbers: Iterator[int]) -> tuple[list[Asked], float]:
    """Each user asks again and again until time is over; the requests, and how long it took."""
    done: list[Asked] = []

    async def user(client: httpx.AsyncClient) -> None:
        while time.perf_counter() - start < seconds:
            done.append(await ask(client, next(numbers), time.perf_counter()))

    async with httpx.AsyncClient(base_url=base, timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(user(client) for _ in range(users)))
    return done, time.perf_counter() - start


async def arrivals(base: str, rate: float, seconds: float, numbers: Iterator[int]) -> tuple[list[Asked], float]:
    """Requests at the times of a Poisson process of `rate` a second, the same ones for every server."""
    chosen = random.Random(round(1e6 * rate))
    due, at = [], 0.0
    while (at := at + chosen.expovariate(rate)) < seconds:
        due.append(at)

    async def one(client: httpx.AsyncClient, at: float, number: int) -> Asked:
        await asyncio.sleep(start + at - time.perf_counter())
        return await ask(client, number, start + at)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=base, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        done = await asyncio.gather(*(one(client, at, next(numbers)) for at in due))
    return list(done), time.perf_counter() - start


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[str]:
    """`ktrans serve` with these arguments at a free port; its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ktcompile.cli", "serve", *arguments, "--port", str(port), "--max-queue", "4096"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            try:
                if httpx.get(f"{base}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield base
    finally:
        process.terminate()
        process.wait()


def row(name: str, load: str, users: int, rate: float, done: list[Asked], took: float) -> Load:
    tokens = sum(a.tokens for a in done)
    gaps = [gap for a in done for gap in a.gaps]
    return Load(
        name,
        load,
        users,
        rate,
        len(done),
        took,
        tokens / took,
        percentiles([a.first for a in done if a.tokens]),
        percentiles(gaps),
    )


def measure(args: argparse.Namespace) -> Iterator[Load]:
    """Every load on both servers; one that does not count first."""
    rates: dict[int, float] = {}
    for name, more in (
        ("together", ["--max-batch-size", str(max(args.users))]),
        ("one at a time", ["--max-batch-size", "1"]),
    ):
        numbers = iter(range(10**9))
        with server([*args.serve, *more]) as base:
            asyncio.run(together(base, max(args.users), 2.0, numbers))
            for users in args.users:
                found = row(name, "together", users, 0.0, *asyncio.run(together(base, users, args.seconds, numbers)))
                rates.setdefault(users, found.requests / found.seconds)
                yield found
            for users in args.users:
                rate = args.load * rates[users]
                yield row(name, "arrivals", users, rate, *asyncio.run(arrivals(base, rate, args.seconds, numbers)))


def table(rows: Sequence[Load]) -> str:
    """Markdown."""
    lines = [
        "| server | load | requests | tok/s | first token, ms: p50, p95, p99 | between tokens, ms: p50, p95, p99 |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        load = f"{r.users} users" if r.load == "together" else f"{r.rate:.2f} requests/s"
        first, gaps = (", ".join(f"{v:.{0 if v >= 100 else 1}f}" for v in times) for times in (r.first_ms, r.gap_ms))
        lines.append(f"| {r.server} | {load} | {r.requests} | {r.tok_s:.0f} | {first} | {gaps} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Load], path: Path) -> None:
    """Tokens a second by users, time to the first token by requests a second: both servers in each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, colour, marker in (("together", "#0b6fa4", "o"), ("one at a time", "#c8472b", "s")):
        closed = [r for r in rows if (r.server, r.load) == (name, "together")]
        left.plot([r.users for r in closed], [r.tok_s for r in closed], color=colour, marker=marker, label=name)
        opened = [r for r in rows if (r.server, r.load) == (name, "arrivals")]
        for i, (style, what) in enumerate((("-", "p50"), ("--", "p95"))):
            times = [r.first_ms[i] / 1e3 for r in opened]
            right.plot([r.rate for r in opened], times, style, color=colour, marker=marker, label=f"{name}, {what}")
    left.set(xlabel="users", ylabel="tokens of answers a second", ylim=(0, None))
    right.set(xlabel="requests a second, arriving at random", ylabel="seconds to the first token", yscale="log")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure; lines to --json or stdout, the table to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="1,4,8,16", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--load", type=float, default=0.7, help="arrivals: part of what so many users got through")
    parser.add_argument("--json", type=Path, help="write the lines here")
    parser.add_argument("--plot", type=Path, help="draw a PNG (matplotlib)")
    parser.add_argument("serve", nargs="*", help="arguments of `ktrans serve`")
    args = parser.parse_args()
    rows = []
    lines = [json.dumps({"cpu": platform.processor() or platform.machine(), "at": time.strftime("%F %T")})]
    for found in measure(args):
        rows.append(found)
        lines.append(json.dumps(asdict(found)))
        if args.json is None:
            print(lines[-1], flush=True)
    if args.json is not None:
        args.json.write_text("\n".join(lines) + "\n")
    if args.plot is not None:
        plot(rows, args.plot)
    sys.stderr.write(table(rows))


if __name__ == "__main__":
    main()
