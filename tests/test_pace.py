"""How much of a prompt is read beside answers: by what steps took, with a clock that the model turns."""

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_model import ByteModel, Tokens
from hypothesis import given
from hypothesis import strategies as st
from test_engine import GREEDY, prompt

from ktcompile import engine as engine_module
from ktcompile import schedule as schedule_module
from ktcompile.engine import Engine
from ktcompile.pace import LEAST, PART, SLOWER, Pace
from ktcompile.request import Event, Piece, Request


def reading(pace: Pace, prompt_s: Callable[[int], float], answers_s: float, steps: int = 40) -> list[tuple[int, float]]:
    """Prompt tokens and seconds of steps beside an answer, each as the pace has it."""
    seen = []
    for _ in range(steps):
        tokens = pace.tokens
        seen.append((tokens, answers_s + prompt_s(tokens)))
        pace.took(seen[-1][1], tokens, 1)
    return seen


@given(answers_s=st.floats(1e-4, 1), token=st.floats(1e-3, 1 / LEAST), fixed=st.floats(0, 0.5))
def test_a_step_takes_twice_as_long_at_most(answers_s: float, token: float, fixed: float) -> None:
    """Where the least is not too much already; and nearly that, or as many tokens as are allowed."""
    pace = Pace(256)
    pace.took(answers_s, 0, 1)
    cost = answers_s * token
    seen = reading(pace, lambda tokens: answers_s * fixed + cost * tokens, answers_s)
    limit = SLOWER * answers_s
    least_s = answers_s * (1 + fixed) + cost * LEAST
    assert seen[0][0] == LEAST and all(after <= 2 * before for (before, _), (after, _) in pairwise(seen))
    last, last_s = seen[-1]
    assert last_s <= max(limit, least_s) * 1.001
    assert last == 256 or last == LEAST or last_s + 2 * cost >= limit
    assert pace.least <= pace.tokens <= 256


def test_one_slow_step_is_forgotten() -> None:
    pace = Pace(256)
    for seconds in (0.01, 0.01, 5.0, 0.01, 0.01):  # another program had the machine
        pace.took(seconds, 0, 1)
    assert median([tokens for tokens, _ in reading(pace, lambda tokens: 1e-4 * tokens, 0.01)]) in (99, 100)
    pace.took(9.0, pace.tokens, 1)
    assert pace.tokens == LEAST
    assert reading(pace, lambda tokens: 1e-4 * tokens, 0.01)[8][0] >= 99


def test_a_prompt_is_not_read_for_ever() -> None:
    """Experts in memory, as of DeepSeek-V3: few tokens read nearly as many of them as many do. Seconds of 58 layers."""
    steps = {8: 0.8, 16: 1.3, 32: 2.1, 64: 3.0, 128: 3.6, 256: 4.1, 1024: 6.2}
    pace = Pace(256)
    pace.took(0.1, 0, 1)
    assert {tokens for tokens, _ in reading(pace, steps.__getitem__, 0.1)} == {LEAST}, (
        "how fast it is alone is not known"
    )
    pace.took(steps[1024], 1024, 0)
    seen = reading(pace, lambda tokens: min(s for n, s in steps.items() if n >= tokens), 0.1)
    read, took = sum(tokens for tokens, _ in seen), sum(seconds for _, seconds in seen)
    assert read / took >= 0.7 * PART * 1024 / steps[1024]
    assert all(after <= 2 * before for (before, _), (after, _) in pairwise(seen))


def test_a_step_that_costs_the_same_whatever_it_reads() -> None:
    """A GPU without a graph: 14 ms are its launches. Fewer tokens would spare nobody anything."""
    pace = Pace(512)
    pace.took(0.001, 0, 1)
    pace.took(0.014, 512, 0)
    seen = reading(pace, lambda tokens: 0.013 + 1e-6 * tokens, 0.001)[6:]
    speeds = [tokens / seconds for tokens, seconds in seen]
    assert min(speeds) >= 0.9 * PART * 512 / 0.014 and max(speeds) <= 1.5 * PART * 512 / 0.014


def test_a_short_rest_says_nothing_of_more() -> None:
    pace = Pace(256)
    pace.took(0.01, 0, 1)
    reading(pace, lambda tokens: 1e-4 * tokens, 0.01)
    before = pace.tokens
    pace.took(0.0102, 2, 1)
    assert pace.tokens == before


class Timed(ByteModel):
    """Each step turns the clock: 5 ms, and for a prompt what it costs here, more with its context."""

    now = 0.0

    def _step(self, *args: Any) -> torch.Tensor:
        counts, cache = args[2], args[4]
        for length, count in zip(cache.lengths, counts, strict=True):
            self.now += count * (1e-4 + 2e-7 * length) if count > 1 else 0
        self.now += 5e-3
        return super()._step(*args)


def test_an_answer_beside_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gap is three times the median; the prompt's first token comes after at most thrice the time it takes alone."""
    model = Timed(context=2048, chunk=512)
    clock = SimpleNamespace(perf_counter=lambda: model.now)
    for module in (engine_module, schedule_module):
        monkeypatch.setattr(module, "time", clock)
    engine = Engine(model, Tokens(), cache_tokens=4096)  # type: ignore[arg-type]
    alone = engine.submit(Request(prompt(900, 3), 1, GREEDY))
    while engine.step():
        pass
    times: list[float] = []

    def tell(event: Event) -> None:
        if isinstance(event, Piece):
            times.append(model.now)

    engine.submit(Request(prompt(16), 200, GREEDY), tell)
    while len(times) < 40:
        engine.step()
    long = engine.submit(Request(prompt(900, 1), 1, GREEDY))
    while engine.step():
        pass
    gaps = [b - a for a, b in pairwise(times)]
    assert max(gaps) < 3 * median(gaps)
    ends = alone.finished, long.finished
    assert ends[0] is not None and ends[1] is not None
    assert ends[1].usage.prompt_ms < 3 * ends[0].usage.prompt_ms
    assert max(map(sum, model.seen[-180:])) > LEAST + 1, "and it is not read in the least pieces"
