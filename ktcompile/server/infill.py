"""`POST /infill`, llama.cpp's way to fill in the middle: what editors' completion calls at every pause in typing."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field, StrictInt, StrictStr

from ktcompile.request import Event, Finished
from ktcompile.server.answers import POLL_SECONDS, Answers, failed, said, timings_of
from ktcompile.server.errors import ApiError
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
    if given.n_predict is not None:
        given.max_tokens = given.n_predict
    ids = await asyncio.to_thread(prompt_of, state, given)
    answers = answers_to(http, given, Prompt(tuple(ids)))
    if given.stream:
        return StreamingResponse(_streamed(state, given, answers), media_type="text/event-stream")
    text, end = "", None
    async for event in events(answers, given.t_max_predict_ms, http):
        text += event.text
        end = event
    assert isinstance(end, Finished)
    return JSONResponse(_told(state, text, end))


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


async def events(answers: Answers, most_ms: int | None, http: HttpRequest | None = None) -> AsyncIterator[Event]:
    """Events until the end, or until the first line that ends `most_ms` after the first token."""
    begun: float | None = None
    try:
        while answers.open:
            came = await answers.next(POLL_SECONDS)
            if came is None:
                if http is not None and await http.is_disconnected():
                    raise ApiError(499, "the client is gone")
                continue
            event = came[1]
            if isinstance(event, Finished) and event.reason == "cancelled" and begun is not None:
                yield event
                return
            failed(event)
            yield event
            begun = begun or time.monotonic()
            late = most_ms is not None and most_ms > 0 and (time.monotonic() - begun) * 1e3 > most_ms
            if late and "\n" in event.text:
                answers.cancel()
    finally:
        answers.cancel()


async def _streamed(state: State, given: InfillRequest, answers: Answers) -> AsyncIterator[str]:
    try:
        async for event in events(answers, given.t_max_predict_ms):
            if isinstance(event, Finished):
                yield said(_told(state, event.text, event))
            elif event.text:
                yield said({"content": event.text, "stop": False})
    except ApiError as error:
        yield said(error.json())


def _told(state: State, text: str, end: Finished) -> dict[str, Any]:
    """llama.cpp's last object."""
    kinds = {"stop": "word" if end.matched else "eos", "length": "limit", "cancelled": "limit"}
    return {
        "content": text,
        "stop": True,
        "stop_type": kinds[end.reason],
        "stopping_word": end.matched or "",
        "model": state.name,
        "tokens_predicted": end.usage.completion_tokens,
        "tokens_evaluated": end.usage.prompt_tokens,
        "tokens_cached": end.usage.cached_tokens,
        "truncated": False,
        "timings": timings_of(end.usage),
    }


__all__ = ["Extra", "InfillRequest", "events", "prompt_of", "router"]
