"""Who takes part in the next step, with how many tokens, and in which pages.

A request has tokens (its prompt, then also its answer) of which the first `stored` are in the cache. What is left is
one token in a request that is being answered, more in one whose prompt is being read: nothing else tells them apart.
A step takes the one token of all the former, and of the latter as many as the budget allows. When pages run out the
request that came last gives its pages back and waits, with all its tokens as its prompt.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ktcompile.errors import KtransError
from ktcompile.grammar import Matcher
from ktcompile.pace import Pace
from ktcompile.pages import Pages, Table
from ktcompile.request import Handle, Request, Usage
from ktcompile.sampling import Sampling
from ktcompile.symbols import PAGE
from ktcompile.text import Text

MIXED_CHUNK = 256
"""Prompt tokens a step while others are answered, at most, where nobody says how many."""

PATIENCE = 16
"""Requests that may pass one for which there are not enough pages."""


@dataclass(eq=False)
class Active:
    """A request in the engine. `is_new`: it never ran. `passed`: how many later ones were let in before it."""

    handle: Handle
    order: int
    sampling: Sampling
    tokens: list[int]
    most: int
    text: Text
    matcher: Matcher | None = None  # of its grammar
    table: Table = field(init=False)
    is_new: bool = True
    was_preempted: bool = False
    stored: int = 0
    cached: int = 0
    passed: int = 0
    times: list[float] = field(default_factory=list)  # of its first step, its first token, its last one

    @property
    def request(self) -> Request:
        return self.handle.request

    @property
    def pending(self) -> int:
        """Tokens that are not stored."""
        return len(self.tokens) - self.stored

    @property
    def answer(self) -> list[int]:
        """The tokens of the answer so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def lacking(self) -> int:
        """Pages that it needs for its tokens and does not have."""
        return -(-len(self.tokens) // PAGE) - len(self.table.pages)

    def usage(self) -> Usage:
        """What it took until now."""
        start = self.handle.submitted
        begun, first, last = (*self.times, *[0.0] * 3)[:3]
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=len(self.tokens) - len(self.request.prompt),
            cached_tokens=self.cached,
            queue_ms=1e3 * (begun - start) if begun else 0.0,
            prompt_ms=1e3 * (first - begun) if first else 0.0,
            predicted_ms=1e3 * (last - first) if last else 0.0,
            first_token_ms=1e3 * (first - start) if first else 0.0,
        )


def shares(remaining: Sequence[int], budget: int) -> list[int]:
    """Of `budget` tokens, how many each prompt gets, `remaining` being what they need in the order in which they came.

    The first has half for sure, so it comes to an end; the rest is for the shortest, so none waits for a long one.
    """
    if not remaining:
        return []
    given = [0] * len(remaining)
    given[0] = min(remaining[0], -(-budget // 2))
    left = budget - given[0]
    for i in sorted(range(len(remaining)), key=lambda i: remaining[i]):
        more = min(remaining[i] - given[i], left)
        given[i] += more
        left -= more
    return given


class Schedule:
    """The requests of an engine, those that run and those that wait, and the pages that they share.

    `max_batch` run at once. A step takes at most `chunk` tokens, `mixed_chunk` of prompts while others are answered,
    fewer as its `pace` has it.
    """

    def __init__(self, pages: int, max_batch: int, chunk: int, mixed_chunk: int) -> None:
        for name, value in (("chunk", chunk), ("mixed_chunk", mixed_chunk), ("max_batch", max_batch)):
            if value < 1:
                raise KtransError(f"{name} {value}: 1 or more")
        self.max_batch, self.chunk, self.pace = min(max_batch, chunk), chunk, Pace(mixed_chunk)
        self.pages = Pages(pages)
        self.active: list[Active] = []
        self.waiting: list[Active] = []  # in the order in which they came
        self.reused = self.preempted = 0

    @property
    def requests(self) -> list[Active]:
        """All of them."""
        return [*self.active, *self.waiting]

    def add(self, a: Active) -> None:
        """A new one, which waits. They come in order."""
        a.table = self.pages.table()
        self.waiting.append(a)

    def remove(self, a: Active) -> None:
        """It is finished."""
        self.pages.release(a.table)
        for some in (self.active, self.waiting):
            if a in some:
                some.remove(a)

    def reset(self) -> list[Active]:
        """Trust no page: all requests, which are removed."""
        requests = self.requests
        self.pages = Pages(self.pages.total)
        self.active, self.waiting = [], []
        for a in requests:
            a.table = self.pages.table()
        return requests

    def admit(self) -> None:
        """Let those in for whose tokens there are pages: in the order in which they came, PATIENCE may pass one."""
        passed: list[Active] = []
        for a in list(self.waiting):
            if len(self.active) >= self.max_batch or (passed and passed[0].passed >= PATIENCE):
                return
            if not self._has_room(a, is_first=not passed):
                passed.append(a)
                continue
            for other in passed:
                other.passed += 1
            self.waiting.remove(a)
            self.active.append(a)
            self._adopt(a)
            a.times = a.times or [time.perf_counter()]

    def _has_room(self, a: Active, is_first: bool) -> bool:
        """Whether its tokens fit beside what others' need, and one page more for each of these.

        Pages that it would share with these are looked for only for the `is_first`: many may wait, with long prompts.
        """
        if not self.active:
            return True
        left = self.pages.available - sum(b.lacking for b in self.active) - len(self.active)
        return a.lacking <= left or (is_first and a.lacking - self.pages.in_use(a.tokens) <= left)

    def _adopt(self, a: Active) -> None:
        """Skip what is in pages already."""
        count = self.pages.adopt(a.table, a.tokens) * PAGE
        if not count:
            return
        a.stored += count
        self.reused += count
        if not a.was_preempted:
            a.cached += count

    def plan(self) -> list[tuple[Active, int]]:
        """Who brings how many tokens, in the order in which they came; all of them have the pages for it."""
        for a in self.active:
            if a.pending > 1 and a.stored == len(a.table.pages) * PAGE:
                self._adopt(a)  # somebody else may have read it meanwhile
        self.active.sort(key=lambda a: a.order)
        prompts = [a for a in self.active if a.pending > 1]
        answered = len(self.active) - len(prompts)
        budget = min(self.pace.tokens if answered else self.chunk, self.chunk - answered)
        given = dict(zip(prompts, shares([a.pending for a in prompts], budget), strict=True))
        rows: list[tuple[Active, int]] = []
        for a in list(self.active):
            count = given.get(a, 1)
            end = (a.stored + count) // PAGE * PAGE
            if a.stored < end and count < a.pending:
                count = end - a.stored  # whole pages, so that another request can go on from here
            if count and self._make_room(a, a.stored + count):
                rows.append((a, count))
        return rows

    def _make_room(self, a: Active, tokens: int) -> bool:
        """Get it the pages for so many tokens, from those who came last if need be. False if it was one of them."""
        while a in self.active and not self.pages.grow(a.table, tokens):
            self._preempt(self.active[-1])
        return a in self.active

    def _preempt(self, a: Active) -> None:
        self.pages.release(a.table)
        a.stored, a.was_preempted = 0, True
        self.active.remove(a)
        self.waiting.append(a)
        self.waiting.sort(key=lambda a: a.order)
        self.preempted += 1


__all__ = ["MIXED_CHUNK", "PATIENCE", "Active", "Schedule", "shares"]
