"""Answers on their way from the engine's thread to a client."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ktcompile.engine import Engine
from ktcompile.errors import BusyError, CapacityError, KtransError
from ktcompile.request import Event, Finished, Handle, Request, Usage
from ktcompile.server.calls import Calls, Delta, Format
from ktcompile.server.errors import ApiError
from ktcompile.server.thoughts import Thoughts
from ktcompile.server.tools import object_of

PING_SECONDS = 10.0
"""So long a stream says nothing before a comment says that it lives."""

POLL_SECONDS = 0.25
"""So often who waits for a whole answer is looked after."""


class Answers:
    """The events of several requests as they come, `(index, event)`; ends when all are finished."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], ended: Callable[[Finished], None] = lambda _: None
    ) -> None:
        """Submit all, or none. `ended` hears of each that finishes. Raises ApiError."""
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.open = len(requests)
        self.handles: list[Handle] = []
        try:
            for i, request in enumerate(requests):
                self.handles.append(engine.submit(request, lambda event, i=i: self._tell(i, event)))  # type: ignore[misc]
        except BusyError as error:
            self.cancel()
            raise ApiError(429, str(error), code="queue_full", headers={"retry-after": "5"}) from error
        except CapacityError as error:
            self.cancel()
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
        except KtransError as error:
            self.cancel()
            raise ApiError(400, str(error), code="invalid_request") from error

    def _tell(self, index: int, event: Event) -> None:
        if isinstance(event, Finished):
            self._ended(event)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

    def cancel(self) -> None:
        """End what is not finished."""
        for handle in self.handles:
            handle.cancel()

    async def next(self, seconds: float) -> tuple[int, Event] | None:
        """The next event; None if none came in that time. Call it while some are `open`."""
        try:
            index, event = await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None
        self.open -= isinstance(event, Finished)
        return index, event

    async def all(self, http: HttpRequest) -> list[list[Event]]:
        """Every event of each request. Raises ApiError where one failed, and ends all where the client is gone."""
        found: list[list[Event]] = [[] for _ in self.handles]
        looked = time.monotonic()
        try:
            while self.open:
                came = await self.next(POLL_SECONDS)
                if came is not None:
                    found[came[0]].append(came[1])
                if time.monotonic() - looked < POLL_SECONDS:
                    continue
                looked = time.monotonic()
                if await http.is_disconnected():
                    raise ApiError(499, "the client is gone")
        finally:
            self.cancel()
        for events in found:
            failed(events[-1])
        return found


class Deltas:
    """One answer, from events to what each makes certain: thoughts, text, calls of tools.

    `thinks`: it begins inside of a thought. `format`, `names`: of the calls, see `Calls`.
    """

    def __init__(self, thinks: bool = False, format: Format | None = None, names: frozenset[str] = frozenset()) -> None:
        self._thoughts, self._calls = Thoughts(thinks), Calls(format, names)
        self.thinking = 0  # tokens of thoughts

    def of(self, event: Event) -> list[Delta]:
        """What is certain after this event; after the last one, all of it."""
        parts = self._thoughts.push(event.text) if event.text else []
        is_last = isinstance(event, Finished)
        if is_last:
            parts += self._thoughts.finish()
        else:
            self.thinking += self._thoughts.inside
        found: list[Delta] = []
        for is_thought, text in parts:
            found += [Delta("thought", text)] if is_thought else self._calls.push(text)
        return found + (self._calls.finish() if is_last else [])

    def all(self, events: Sequence[Event]) -> list[Delta]:
        """A whole answer."""
        return joined(delta for event in events for delta in self.of(event))

    def reason(self, end: Finished) -> str:
        """Why it ended, as OpenAI says it: stop, length, tool_calls."""
        return "tool_calls" if self._calls.count and end.reason == "stop" else end.reason


def joined(deltas: Iterable[Delta]) -> list[Delta]:
    """What is of one kind, or of one call, as one."""
    runs = [list(run) for _, run in groupby(deltas, key=lambda delta: (delta.kind, delta.call))]
    return [replace(run[0], text="".join(delta.text for delta in run)) for run in runs]


def calls_with_arguments(deltas: Sequence[Delta]) -> Iterator[tuple[Delta, dict[str, Any] | None]]:
    """Those of a whole answer, calls with their arguments as an object.

    A call whose arguments are none, as the answer was cut, is text: nobody should run it.
    """
    texts = {delta.call: delta.text for delta in deltas if delta.kind == "arguments"}
    for delta in deltas:
        if delta.kind == "call":
            text = texts.get(delta.call, "")
            arguments = object_of(text)
            is_call = isinstance(arguments, dict)
            yield (delta, arguments) if is_call else (Delta("text", f"{delta.text}({text})"), None)
        elif delta.kind != "arguments":
            yield delta, None


def failed(event: Event) -> None:
    """Raise ApiError for an event that tells of an error."""
    if isinstance(event, Finished) and event.reason == "error":
        raise ApiError(503, event.message, code="out_of_memory" if event.is_full else "engine_error")
    if isinstance(event, Finished) and event.reason == "cancelled":
        raise ApiError(503, event.message or "the answer was cancelled", code="cancelled")


class Shape:
    """The events of answers as an API's objects: of a stream (`begin`, `piece`, `end`), or `whole`.

    A stream here is OpenAI's: server-sent events without names, the `last` one says that there is no more.
    """

    media = "text/event-stream"
    last = "data: [DONE]\n\n"

    def begin(self) -> Iterable[dict[str, Any]]:
        """Before the first event."""
        return ()

    def piece(self, index: int, event: Event) -> Iterable[dict[str, Any]]:
        """One event."""
        raise NotImplementedError

    def end(self) -> Iterable[dict[str, Any]]:
        """After the last event."""
        return ()

    def whole(self, found: list[list[Event]]) -> dict[str, Any]:
        """All events of each answer."""
        raise NotImplementedError

    def said(self, item: dict[str, Any]) -> str:
        """An object in a stream."""
        return f"data: {json.dumps(item, ensure_ascii=False)}\n\n"

    def ping(self) -> str:
        """What says that a stream lives, while there is nothing else to say."""
        return ": keep-alive\n\n"


async def answered(http: HttpRequest, answers: Answers, shape: Shape, stream: bool) -> Response:
    """The events of the answers in their shape, as they come or all at once."""
    if stream:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(streamed(http, answers, shape), media_type=shape.media, headers=headers)
    return JSONResponse(shape.whole(await answers.all(http)))


async def streamed(http: HttpRequest, answers: Answers, shape: Shape) -> AsyncIterator[str]:
    """What `shape` makes of each event, and pings; an error ends the stream."""
    try:
        for item in shape.begin():
            yield shape.said(item)
        while answers.open:
            came = await answers.next(PING_SECONDS)
            if came is None:
                yield shape.ping()
                continue
            failed(came[1])
            for item in shape.piece(*came):
                yield shape.said(item)
        for item in shape.end():
            yield shape.said(item)
        if shape.last:
            yield shape.last
    except ApiError as error:
        yield shape.said(error.json(http.url.path))
    finally:
        answers.cancel()


def end_of(events: Sequence[Event]) -> Finished:
    """How an answer of which these are all events ended."""
    end = events[-1]
    assert isinstance(end, Finished)
    return end


def usage_of(usages: Sequence[Usage], reasoning: int = 0) -> dict[str, Any]:
    """OpenAI's `usage` of several answers to one prompt."""
    prompt, said_tokens = usages[0].prompt_tokens, sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said_tokens,
        "total_tokens": prompt + said_tokens,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def timings_of(usage: Usage) -> dict[str, float]:
    """llama.cpp's `timings` of one answer."""
    new = usage.prompt_tokens - usage.cached_tokens
    prompt_s, predicted_s = usage.prompt_ms / 1e3, usage.predicted_ms / 1e3
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": new,
        "prompt_ms": usage.prompt_ms,
        "prompt_per_second": new / prompt_s if prompt_s else 0.0,
        "predicted_n": usage.completion_tokens,
        "predicted_ms": usage.predicted_ms,
        "predicted_per_second": usage.completion_tokens / predicted_s if predicted_s else 0.0,
    }


__all__ = [
    "PING_SECONDS",
    "Answers",
    "Delta",
    "Deltas",
    "Shape",
    "answered",
    "calls_with_arguments",
    "end_of",
    "joined",
    "streamed",
    "timings_of",
    "usage_of",
]
