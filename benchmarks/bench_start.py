"""Seconds from `ktrans serve` to a healthy server: first starts, which compile, and second ones, which need not. JSON.

    python benchmarks/bench_start.py
    python benchmarks/bench_start.py --runs 5 -- MODEL --packed-cache user

Every first start has an empty cache folder of its own; the second ones share that of a start that does not count.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

from bench_serve import server


def seconds(cache: str, arguments: list[str]) -> float:
    """Of one start with this cache folder."""
    os.environ["XDG_CACHE_HOME"] = cache
    start = time.perf_counter()
    with server(arguments):
        return time.perf_counter() - start


def main() -> None:
    """Both kinds, as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("serve", nargs="*", help="arguments of `ktrans serve`")
    args = parser.parse_args()
    first = []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as cache:
            first.append(seconds(cache, args.serve))
    with tempfile.TemporaryDirectory() as cache:
        seconds(cache, args.serve)
        second = [seconds(cache, args.serve) for _ in range(args.runs)]
    found = {"first": first, "second": second}
    medians = {f"{kind}_median": statistics.median(times) for kind, times in found.items()}
    print(json.dumps(found | medians | {"load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
