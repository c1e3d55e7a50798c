"""What is asked of the engine, and what comes back: a request, its events, and the handle in the hands of who asked."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

from ktcompile.errors import KtransError
from ktcompile.grammar import Grammar
from ktcompile.penalties import Penalties
from ktcompile.sampling import Sampling

Reason = Literal["stop", "length", "cancelled", "error"]
MAX_TOP = 100
"""The most likely tokens that can be asked for beside each token of an answer."""


@dataclass(frozen=True)
class Request:
    """A prompt, in token ids, and how it is to be answered.

    `most`: tokens of the answer; None, or more than fit: as many as the context holds. `stop`: tokens that end it, and
    `stop_strings` texts that do: neither is said. `top`: so many of the most likely tokens with each token.
    `skip_special`: special tokens have no text, but for those of `say`. `grammar`: the form of the answer, which ends
    where that does.
    """

    prompt: tuple[int, ...]
    most: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    penalties: Penalties = field(default_factory=Penalties)
    stop: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    top: int = 0
    skip_special: bool = True
    grammar: Grammar | None = None
    say: frozenset[int] = frozenset()

    @property
    def needs_logits(self) -> bool:
        """Its tokens cannot be chosen where the logits are."""
        return bool(self.penalties or self.top or self.grammar)

    def check(self, vocabulary: int) -> None:
        """Raises KtransError for what no model of so many tokens could answer."""
        if not self.prompt:
            raise KtransError("the prompt has no tokens")
        for token in (*self.prompt, *self.penalties.bias):
            if not 0 <= token < vocabulary:
                raise KtransError(f"token {token}: the vocabulary has 0 to {vocabulary - 1}")
        if self.most is not None and self.most < 1:
            raise KtransError(f"an answer of {self.most} tokens: 1 or more")
        if not 0 <= self.top <= MAX_TOP:
            raise KtransError(f"the {self.top} most likely tokens: 0 to {MAX_TOP}")


@dataclass(frozen=True)
class Piece:
    """One token of an answer, and the text that can be said with it: that of earlier ones, or none yet.

    Logarithms of probabilities are of the model's own logits, without penalties, at temperature 1.
    """

    text: str
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens and milliseconds of one request.

    `cached_tokens`: of the prompt, those that were in pages of others; `completion_tokens`: without the one that ends
    the answer. `queue_ms` until its first step, `prompt_ms` from there to the first token, `predicted_ms` from there to
    the last one, `first_token_ms` from the submission to the first token.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0
    first_token_ms: float = 0.0


@dataclass(frozen=True)
class Finished:
    """The last event. `text`: what was held back. `message`: of an error; `is_full`: it was the memory of a GPU.

    `matched`: the stop string, if it was one.
    """

    reason: Reason
    usage: Usage
    text: str = ""
    message: str = ""
    matched: str | None = None
    is_full: bool = False


Event = Piece | Finished


class Handle:
    """A submitted request. Its events come once, by iteration, or to `tell`, which the engine's thread calls."""

    def __init__(self, request: Request, wake: Callable[[], None], tell: Callable[[Event], None] | None = None) -> None:
        self.request, self.submitted = request, time.perf_counter()
        self.cancelled = False
        self.finished: Finished | None = None
        self._wake = wake
        self._events: SimpleQueue[Event] = SimpleQueue()
        self.tell = tell or self._events.put

    def cancel(self) -> None:
        """End it before the next step, from any thread. Once it is finished: nothing."""
        self.cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished):
                return

    def result(self) -> tuple[str, list[int], Finished]:
        """Wait for all of it: the text, the tokens, and how it ended."""
        text, tokens = "", []
        for event in self:
            text += event.text
            if isinstance(event, Piece):
                tokens.append(event.token)
            else:
                return text, tokens, event
        raise AssertionError("unreachable")


__all__ = ["MAX_TOP", "Event", "Finished", "Handle", "Piece", "Reason", "Request", "Usage"]
