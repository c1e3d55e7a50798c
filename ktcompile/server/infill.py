"""`POST /infill`, llama.cpp's way to fill in the middle: what editors' completion calls at every pause in typing."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field, StrictInt, StrictStr

from ktcompile.request import Event, Finished
from ktcompile.server.answers import Answers, Shape, answered, end_of, timings_of
from ktcompile.server.llama import state_of
from ktcompile.server.openai import answers_to, fill_in, plain_ids
from ktcompile.server.prompt import Prompt
from ktcompile.server.requests import Body, Generation
from ktcompile.server.state import State

router = APIRouter()

MAX_EXTRA = 256
"""Pieces of other files in one request."""


class Extra(Body):
    """A piece of another file."""

    filename: StrictStr = ""
    text: StrictStr = ""


class InfillRequest(Generation):
    """What stands before and behind the hole, and pieces of other files; `prompt` is typed after the prefix."""

    input_prefix: StrictStr = ""
    input_suffix: StrictStr = ""
    input_extra: list[Extra] = Field(default_factory=list, max_length=MAX_EXTRA)
    prompt: StrictStr = ""
    n_predict: StrictInt | None = None
    t_max_predict_ms: StrictInt | None = None


@router.post("/infill")
async def infill(http: HttpRequest, given: InfillRequest) -> Response:
    """The text of the hole. Pieces of other files stand before the prefix, if all of it fits.

    `t_max_predict_ms`: so long after the first token the answer ends with the next line.
    """
    state = state_of(http)
    state.ready()
    given.n = 1
    if given.n_predict is not None:
        given.max_tokens = given.n_predict
    ids = await asyncio.to_thread(prompt_of, state, given)
    most_ms = given.t_max_predict_ms or 0
    kind = partial(Timed, most_ms) if most_ms > 0 else Answers
    answers = answers_to(http, given, Prompt(tuple(ids)), kind=kind)
    return await answered(http, answers, Infill(state), bool(given.stream))


def prompt_of(state: State, given: InfillRequest) -> list[int]:
    """Token ids. What has no room falls away: first other files, then the beginning of what stands before the hole and
    the end of what stands behind, half of the room each."""
    room = max(2, state.context - len(fill_in(state, [], [])) - 64)  # that many for a short answer
    prefix = given.input_prefix + given.prompt
    extra = "".join(f"# {e.filename}\n{e.text.rstrip()}\n\n" for e in given.input_extra)
    before, after = plain_ids(state, extra + prefix), plain_ids(state, given.input_suffix)
    if len(before) + len(after) > room and extra:
        before = plain_ids(state, prefix)
    if len(before) + len(after) > room:
        after = after[: max(room // 2, room - len(before))]
        before = before[max(0, len(before) + len(after) - room) :]
    return fill_in(state, before, after)


class Timed(Answers):
    """Answers that end with the first line that ends `most_ms` after the first token."""

    def __init__(self, most_ms: int, *given: Any) -> None:
        super().__init__(*given)
        self.most_ms = most_ms
        self._begun: float | None = None
        self._is_cut = False

    async def next(self, seconds: float) -> tuple[int, Event] | None:
        """The next event. One that ends what was long enough says so."""
        came = await super().next(seconds)
        if came is None:
            return None
        index, event = came
        if isinstance(event, Finished):
            return index, replace(event, reason="length") if self._is_cut and event.reason == "cancelled" else event
        self._begun = self._begun or time.monotonic()
        if "\n" in event.text and (time.monotonic() - self._begun) * 1e3 > self.most_ms:
            self._is_cut = True
            self.cancel()
        return came


class Infill(Shape):
    """llama.cpp's objects."""

    last = ""

    def __init__(self, state: State) -> None:
        self.state = state

    def piece(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Its text, if it has any; the last one says how it ended."""
        if isinstance(event, Finished):
            yield self._end(event.text, event)
        elif event.text:
            yield {"content": event.text, "stop": False}

    def whole(self, found: list[list[Event]]) -> dict[str, Any]:
        """The object that ends a stream, with all of the text."""
        return self._end("".join(e.text for e in found[0]), end_of(found[0]))

    def _end(self, text: str, end: Finished) -> dict[str, Any]:
        kinds = {"stop": "word" if end.matched else "eos", "length": "limit"}
        return {
            "content": text,
            "stop": True,
            "stop_type": kinds[end.reason],
            "stopping_word": end.matched or "",
            "model": self.state.name,
            "tokens_predicted": end.usage.completion_tokens,
            "tokens_evaluated": end.usage.prompt_tokens,
            "tokens_cached": end.usage.cached_tokens,
            "truncated": False,
            "timings": timings_of(end.usage),
        }


__all__ = ["Extra", "Infill", "InfillRequest", "Timed", "prompt_of", "router"]
