"""How many prompt tokens a step takes while others are answered, from how long steps took.

Nobody says what a step costs: a token more is 0.1 ms or 50 ms, by model and machine, and more the longer its context.
"""

from collections import deque
from statistics import median

LEAST = 8
"""Prompt tokens of a step: fewer take nearly as long."""

SLOWER = 2.0
"""A step with prompt tokens may take so many times as long as one of answers alone."""

PART = 1 / 6
"""But a prompt is read at this part of the speed that it has alone, whatever that costs those who are answered."""


class Pace:
    """`tokens` is the budget of the next step, LEAST to `most`. Begins with LEAST and at most doubles each step."""

    def __init__(self, most: int) -> None:
        self.most, self.least = most, min(most, LEAST)
        self.tokens = self.least
        self._answers: deque[float] = deque(maxlen=9)  # seconds of steps without prompts; their median forgives one
        self._alone: deque[float] = deque(maxlen=8)  # tokens a second of prompts, nobody being answered
        self._beside: deque[float] = deque(maxlen=3)  # seconds of steps with both; the shortest forgives two

    def took(self, seconds: float, prompt: int, answers: int) -> None:
        """A step of so many prompt tokens and so many answers took this long."""
        if not prompt:
            self._answers.append(seconds)
        elif not answers:
            self._alone.append(prompt / seconds)
        elif self._answers:
            self._adjust(seconds, prompt)

    def _adjust(self, seconds: float, prompt: int) -> None:
        """What is left of the time, over what the prompt took of it: where the first tokens are dear, step by step.

        Not fewer than make PART of the speed alone if a step takes this long with fewer, too: nobody knows what it is
        of a step that fewer tokens would spare.
        """
        answers = median(self._answers)
        factor = min(2.0, (SLOWER - 1) * answers / max(seconds - answers, 1e-9))
        self._beside.append(seconds)
        least = int(PART * max(self._alone, default=0.0) * min(self._beside))
        wanted = max(int(prompt * factor), min(least, 2 * prompt))
        if prompt < self.tokens and factor >= 1:  # there was no more to read: says nothing of more
            wanted = max(wanted, self.tokens)
        self.tokens = max(self.least, min(wanted, self.most))


__all__ = ["LEAST", "PART", "SLOWER", "Pace"]
