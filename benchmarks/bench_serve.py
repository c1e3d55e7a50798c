"""Load over HTTP: requests that arrive as they like, whether or not the server keeps up. JSON lines, a table, a plot.

    python benchmarks/bench_serve.py --json serve.jsonl --plot serve.png
    python benchmarks/bench_serve.py --users 1,4,8,16 --seconds 60 -- MODEL --cache-lens 65536

Starts `ktrans serve` with what follows `--`, and once more with `--max-batch-size 1`, which answers one request after
the other, and asks both the same, in turn: prompts of mixed lengths that nobody else has, answers of mixed lengths. Two
loads:

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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

SERVERS = ("together", "one at a time")

PROMPTS = (0, 16, 32, 64, 192)
"""Words before the question, each number as likely."""

ANSWERS = (64, 96, 128)
"""Most tokens of an answer, which is greedy: the same from every server. Few end before."""

WORDS = ("the", "dog", "ran", "to", "a", "tree", "and", "saw", "Tim", "he", "was", "sad", "but", "happy", "with", "red")


@dataclass(frozen=True)
class Asked:
    """One request as it went: when it was due, the times of its pieces of text, and how many tokens they were."""

    due: float
    times: tuple[float, ...]
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.due

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between tokens."""
        return tuple(b - a for a, b in pairwise(self.times))

    def until(self, end: float) -> float:
        """Its tokens by then."""
        return self.tokens * sum(t <= end for t in self.times) / len(self.times)


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
    words = [str(number), *chosen.choices(WORDS, k=chosen.choice(PROMPTS)), "Tell me a story about a dog named Max."]
    asked = {"messages": [{"role": "user", "content": " ".join(words)}], "max_tokens": chosen.choice(ANSWERS)}
    return asked | {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}


async def ask(base: str, number: int, due: float, key: str = "") -> Asked:
    """Stream one answer. `due`: when it should have been asked, by `time.perf_counter`.

    By hand, over a connection of its own: an HTTP client takes as long for an event as the server, on the same cores.
    """
    at = urlsplit(base)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    sent = json.dumps(body(number)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {at.netloc}\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + sent)
    status = (await reader.readline()).decode().strip()
    times: list[float] = []
    tokens = 0
    async for line in reader:
        if b'"finish_reason": null' in line and b'"role"' not in line:
            times.append(time.perf_counter())
        elif b'"usage"' in line:
            tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    if " 200 " not in status or not times:
        raise SystemExit(f"request {number}: {status}, {len(times)} pieces of text")
    return Asked(due, tuple(times), tokens)


async def together(
    base: str, users: int, seconds: float, numbers: Iterator[int], key: str = ""
) -> tuple[list[Asked], float, float]:
    """Each user asks again and again until time is over; the requests, and between which times N users asked."""
    done: list[Asked] = []
    start = time.perf_counter()

    async def user() -> None:
        while time.perf_counter() - start < seconds:
            done.append(await ask(base, next(numbers), time.perf_counter(), key))

    await asyncio.gather(*(user() for _ in range(users)))
    return done, start, start + seconds


async def arrivals(
    base: str, rate: float, seconds: float, numbers: Iterator[int], key: str = ""
) -> tuple[list[Asked], float, float]:
    """Requests at the times of a Poisson process of `rate` a second, the same ones for every server, to their end."""
    chosen = random.Random(round(1e6 * rate))
    due, at = [], 0.0
    while (at := at + chosen.expovariate(rate)) < seconds:
        due.append(at)

    start = time.perf_counter()

    async def one(at: float, number: int) -> Asked:
        await asyncio.sleep(start + at - time.perf_counter())
        return await ask(base, number, start + at, key)

    done = await asyncio.gather(*(one(at, next(numbers)) for at in due))
    return list(done), start, time.perf_counter()


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
            time.sleep(0.02)
        yield base
    finally:
        process.terminate()
        process.wait()


def row(name: str, load: str, users: int, rate: float, done: list[Asked], start: float, end: float) -> Load:
    """What is told of these requests; tokens a second between `start` and `end`."""
    tokens = sum(a.until(end) for a in done)
    gaps = [gap for a in done for gap in a.gaps]
    first = percentiles([a.first for a in done])
    return Load(name, load, users, rate, len(done), end - start, tokens / (end - start), first, percentiles(gaps))


def measure(args: argparse.Namespace) -> Iterator[Load]:
    """Every load on both servers in turn, which so see the same hour; one that does not count first."""
    most = max(args.users)
    numbers = {name: count() for name in SERVERS}
    with ExitStack() as stack:
        bases = {}
        for name, batch in zip(SERVERS, (most, 1), strict=True):
            bases[name] = stack.enter_context(server([*args.serve, "--max-batch-size", str(batch)]))
            asyncio.run(together(bases[name], most, 2.0, numbers[name]))
        for users in args.users:
            rate = 0.0
            for name, base in bases.items():
                found = row(
                    name, "together", users, 0.0, *asyncio.run(together(base, users, args.seconds, numbers[name]))
                )
                rate = rate or args.load * found.requests / found.seconds
                yield found
            for name, base in bases.items():
                seen = asyncio.run(arrivals(base, rate, args.seconds, numbers[name]))
                yield row(name, "arrivals", users, rate, *seen)


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
    for name, colour, marker in zip(SERVERS, ("#0b6fa4", "#c8472b"), "os", strict=True):
        closed = [r for r in rows if (r.server, r.load) == (name, "together")]
        left.plot([r.users for r in closed], [r.tok_s for r in closed], color=colour, marker=marker, label=name)
        opened = sorted((r for r in rows if (r.server, r.load) == (name, "arrivals")), key=lambda r: r.rate)
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
