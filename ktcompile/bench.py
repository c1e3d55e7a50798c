"""Seconds and tokens a second of a loaded model in whole steps, as a conversation runs them."""

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from ktcompile.cache import PagedCache
from ktcompile.errors import CapacityError, RulesError
from ktcompile.generate import CHUNK

DEFAULT_PROMPTS, DEFAULT_NEW = (512, 2048), 64
"""Lengths where nobody says any; of the prompts those that the context holds."""

Inputs = tuple[list[int], list[int], list[int], Sequence[int]]
"""What `model.step` takes beside the cache: ids and positions `[T]`, counts `[R]`, rows whose logits are wanted."""


@dataclass(frozen=True)
class Test:
    """One row to measure. `tokens` a request: of its prompt, or generated after `depth` tokens; `batch` requests."""

    kind: str  # "pp" or "tg"
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench has it: `pp512`, `tg64 @ d4096`; `tg64 x 4` for four requests."""
        batch = f" x {self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.tokens}{batch}{f' @ d{self.depth}' if self.depth else ''}"

    @property
    def context(self) -> int:
        """Tokens that a request of the test comes to."""
        return self.depth + self.tokens


@dataclass(frozen=True)
class Row:
    """A test and the seconds of each of its runs. `steps`: the seconds of each step; of a prompt the mean of a run."""

    test: Test
    seconds: tuple[float, ...]
    steps: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each run, of all requests together."""
        return [self.test.tokens * self.test.batch / s for s in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def sd(self) -> float:
        """Sample deviation of the rates; 0 for a single run."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.steps)

    @property
    def step_s_10_90(self) -> tuple[float, float]:
        """The tenth and the ninetieth of a hundred steps."""
        ordered = sorted(self.steps)
        last = len(ordered) - 1
        return ordered[round(0.1 * last)], ordered[round(0.9 * last)]

    def json(self) -> dict[str, Any]:
        """The row as plain data."""
        rates = {"tok_s_mean": self.mean, "tok_s_sd": self.sd, "tok_s_median": self.median}
        steps = {"step_s_median": self.step_s, "step_s_10_90": list(self.step_s_10_90)}
        return {"test": self.test.name, **asdict(self.test), **rates, **steps, "seconds": list(self.seconds)}


# ------------------------------------------------------------------------------------------------ what to measure


def numbers(text: str, option: str, least: int) -> list[int]:
    """`512,2048` as numbers from `least` up, each once. RulesError names the option and the value."""
    found: list[int] = []
    for part in text.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and least <= int(digits) < 1 << 31):
            raise RulesError(f"{option} {text!r}: {digits!r} is not a whole number from {least} up, as in 1,16,512")
        if int(digits) not in found:
            found.append(int(digits))
    return found


def tests_for(
    prompts: Sequence[int] | None,
    news: Sequence[int] | None,
    depths: Sequence[int],
    batches: Sequence[int],
    most: int,
) -> list[Test]:
    """The rows: prompts alone, then new tokens at each depth for each number of requests. 0 leaves a kind out.

    None: the defaults, as far as they fit. `most`: tokens that a request may hold; RulesError where one needs more.
    """
    if prompts is None:
        prompts = [p for p in DEFAULT_PROMPTS if p <= most] or [most]
    if news is None:
        news = [max(1, min(DEFAULT_NEW, most - max(depths)))]
    found = [Test("pp", p) for p in prompts if p]
    found += [Test("tg", new, depth, batch) for new in news for batch in batches for depth in depths if new]
    if not found:
        raise RulesError("-p 0 and -n 0: nothing is left to measure; give one of them")
    for test in found:
        if test.context > most:
            given = f"-p {test.tokens}" if test.kind == "pp" else f"-n {test.tokens} with -d {test.depth}"
            raise RulesError(f"{given}: {test.name} comes to {test.context} tokens; the context holds {most}")
    return found


def context_for(tests: Iterable[Test], most: int) -> int:
    """The context that all tests fit in: a multiple of 256, or `most`."""
    return min(most, math.ceil(max(t.context for t in tests) / 256) * 256)


# ------------------------------------------------------------------------------------------------ measuring


class Requests:
    """Requests of a new cache that are given random tokens; their inputs are made before the clock starts.

    Raises CapacityError where there is no memory for the cache.
    """

    def __init__(self, model: Any, batch: int, seed: int = 0) -> None:
        self.model, self.batch = model, batch
        try:
            self.cache: PagedCache = model.new_cache(batch)
        except RuntimeError as error:  # torch's, of the host and of a GPU
            told = str(error).splitlines()[0]
            raise CapacityError(f"there is no memory for the cache of {batch} requests (-b {batch}): {told}") from error
        self._generator = torch.Generator().manual_seed(seed)

    def inputs(self, count: int, at: int) -> Inputs:
        """Random tokens: `count` of every request, from position `at` on; the logits of the last are wanted."""
        total = count * self.batch
        ids = torch.randint(int(self.model.config.vocab_size), (total,), generator=self._generator)
        return ids.tolist(), [*range(at, at + count)] * self.batch, [count] * self.batch, range(count - 1, total, count)

    def prompt(self, length: int, chunk: int) -> list[Inputs]:
        """The steps of a prompt of `length` tokens a request, at most `chunk` tokens of all requests a step."""
        each = max(1, chunk // self.batch)
        return [self.inputs(min(each, length - at), at) for at in range(0, length, each)]

    def run(self, steps: Iterable[Inputs], *, waits: bool = False) -> list[float]:
        """Seconds of each step. `waits`: each for its logits, as generating does; else the last one for all."""
        times = [time.perf_counter()]
        for step in steps:
            self.model.step(*step, self.cache)
            if waits:
                self.wait()
            times.append(time.perf_counter())
        self.wait()
        times[-1] = time.perf_counter()
        return [b - a for a, b in pairwise(times)]

    def wait(self) -> None:
        """Wait for every GPU."""
        for device in self.model.store.target.devices:
            if device.torch.type == "cuda":
                torch.cuda.synchronize(device.torch)


def measure(test: Test, model: Any, repetitions: int, chunk: int = CHUNK) -> Row:
    """The seconds of `repetitions` runs, after one that does not count: it compiles, records and fills caches."""
    requests = Requests(model, test.batch)
    requests.run(requests.prompt(test.depth, chunk))
    seconds: list[float] = []
    steps: list[float] = []
    for i in range(repetitions + 1):
        requests.cache.crop(test.depth)
        if test.kind == "pp":
            took = requests.run(requests.prompt(test.tokens, chunk))
        else:
            count = test.tokens if i else min(test.tokens, 4)
            took = requests.run([requests.inputs(1, test.depth + n) for n in range(count)], waits=True)
        if i:
            seconds.append(sum(took))
            steps += [sum(took) / len(took)] if test.kind == "pp" else took
    return Row(test, tuple(seconds), tuple(steps))


__all__ = ["Inputs", "Requests", "Row", "Test", "context_for", "measure", "numbers", "tests_for"]
