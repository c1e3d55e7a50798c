"""OpenAI's API: chat and completions, whole or streamed."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from ktcompile.generate import encode
from ktcompile.penalties import Penalties
from ktcompile.request import Event, Finished, Piece, Request, Usage
from ktcompile.server.answers import Answers, Delta, Shape, answered, end_of, timings_of, usage_of
from ktcompile.server.errors import ApiError
from ktcompile.server.llama import state_of
from ktcompile.server.prompt import Prompt, prompt_of
from ktcompile.server.requests import ChatRequest, CompletionRequest, Generation
from ktcompile.server.state import State

router = APIRouter()

FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
"""DeepSeek's marks: before what stands in front, for the hole, after what stands behind."""


@router.post("/v1/chat/completions")
@router.post("/chat/completions")
async def chat(http: HttpRequest, given: ChatRequest) -> Response:
    """Answer a conversation."""
    state = state_of(http)
    state.ready()
    state.check_model(given.model)
    if given.max_completion_tokens is not None:
        given.max_tokens = given.max_completion_tokens
    top = given.alternatives()
    form = given.form()
    prompt = await asyncio.to_thread(prompt_of, state, given.plain(), given.may_call(), form, given.think())
    answers = answers_to(http, given, prompt, top or 0)
    shape = Chat(state, given, prompt, top is not None)
    return await answered(http, answers, shape, bool(given.stream))


@router.post("/v1/completions")
@router.post("/completions")
async def completions(http: HttpRequest, given: CompletionRequest) -> Response:
    """Continue a text, or, with a suffix, fill what is missing before it."""
    state = state_of(http)
    state.ready()
    state.check_model(given.model)
    ids = await asyncio.to_thread(prompt_ids, state, given)
    answers = answers_to(http, given, Prompt(tuple(ids)))
    return await answered(http, answers, Completion(state, given, ids), bool(given.stream))


def answers_to(
    http: HttpRequest, given: Generation, prompt: Prompt, top: int = 0, kind: Callable[..., Answers] = Answers
) -> Answers:
    """What the engine answers to a prompt, counted by the metrics. ApiError where it does not take it."""
    state = state_of(http)
    return kind(state.ready(), requests_of(state, given, prompt, top), http.app.state.metrics.finished)


def requests_of(state: State, given: Generation, prompt: Prompt, top: int) -> list[Request]:
    """One request of the engine for each answer. A seed gives each answer one of its own."""
    sampling = given.sampling(state.default)
    presence, frequency, repetition = given.penalties()
    request = Request(
        prompt.ids,
        given.most(state.max_new_tokens),
        sampling,
        Penalties(
            presence=presence, frequency=frequency, repetition=repetition, bias=given.biases(len(state.tokenizer))
        ),
        state.stop_tokens,
        given.stops(),
        top,
        grammar=prompt.grammar,
        say=prompt.say,
    )
    seeds = [None if sampling.seed is None else sampling.seed + i for i in range(given.choices())]
    return [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]


def prompt_ids(state: State, given: CompletionRequest) -> list[int]:
    """Token ids of a completion's prompt. ApiError for several prompts, and for a suffix that the model cannot take."""
    prompt = given.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise ApiError(400, f"{len(prompt)} prompts; one is taken a request", param="prompt", code="invalid_value")
        prompt = prompt[0]
    if isinstance(prompt, list):
        return [int(token) for token in prompt]
    if given.suffix:
        return fill_in(state, plain_ids(state, prompt), plain_ids(state, given.suffix))
    return [*state.bos, *encode(state.tokenizer, prompt, most=state.context)]


def plain_ids(state: State, text: str) -> list[int]:
    """Token ids of a text in which special tokens are text too."""
    return encode(state.tokenizer, text, plain=True)


def fill_in(state: State, before: list[int], after: list[int]) -> list[int]:
    """What asks the model for the tokens between the two. ApiError where it has no marks for that."""
    if not (found := marks(state)):
        raise ApiError(400, f"{state.name} has no tokens to fill in the middle with", param="suffix", code="no_fim")
    begin, hole, end = found
    return [*state.bos, begin, *before, hole, *after, end]


def marks(state: State) -> list[int]:
    """The tokens of `FIM`; none where the model lacks one."""
    found = [state.tokenizer.backend_tokenizer.token_to_id(mark) for mark in FIM]
    return [] if None in found else found


# ------------------------------------------------------------------------------------------------ shapes


class OpenAI(Shape):
    """Events as OpenAI's objects, which have choices."""

    stream_object = whole_object = ""
    prefix = ""

    def __init__(self, state: State, given: Generation) -> None:
        self.state, self.given = state, given
        self.usages: dict[int, Usage] = {}
        self.head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time.time()), "model": state.name}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An event of a stream."""
        return {**self.head, "object": self.stream_object, "choices": choices, **more}

    def end(self) -> Iterator[dict[str, Any]]:
        """After the last event: usage and timings, for who asked."""
        if self.given.stream_options is not None and self.given.stream_options.include_usage:
            yield self.chunk([], **self.counted())

    def counted(self) -> dict[str, Any]:
        """Usage of all answers, timings of the first."""
        usages = [self.usages[i] for i in sorted(self.usages)]
        return {"usage": usage_of(usages, self.reasoning()), "timings": timings_of(usages[0])}

    def reasoning(self) -> int:
        """Tokens of thoughts."""
        return 0

    def choice(self, index: int, events: list[Event], end: Finished) -> dict[str, Any]:
        """A whole answer, and why it ended."""
        raise NotImplementedError

    def whole(self, found: list[list[Event]]) -> dict[str, Any]:
        """All answers."""
        choices = []
        for i, events in enumerate(found):
            end = end_of(events)
            self.usages[i] = end.usage
            choices.append(self.choice(i, events, end))
        return {**self.head, "object": self.whole_object, "choices": choices, **self.counted()}


class Chat(OpenAI):
    """`chat.completion`: thoughts and calls of tools apart from what is said."""

    stream_object, whole_object, prefix = "chat.completion.chunk", "chat.completion", "chatcmpl"

    def __init__(self, state: State, given: ChatRequest, prompt: Prompt, logprobs: bool) -> None:
        super().__init__(state, given)
        self.deltas = [prompt.deltas() for _ in range(given.choices())]
        self.logprobs = logprobs

    def begin(self) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        for i in range(len(self.deltas)):
            yield self._delta(i, {"role": "assistant", "content": ""})

    def piece(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What is certain, if anything, or its logarithm; the last one says why it ends."""
        logprobs = self._logprobs([event]) if self.logprobs and isinstance(event, Piece) else None
        for delta in self.deltas[index].of(event):
            yield self._delta(index, told(delta), logprobs=logprobs)
            logprobs = None
        if logprobs is not None:
            yield self._delta(index, {"content": ""}, logprobs=logprobs)
        if isinstance(event, Finished):
            self.usages[index] = event.usage
            yield self._delta(index, {}, self.deltas[index].reason(event))

    def choice(self, index: int, events: list[Event], end: Finished) -> dict[str, Any]:
        """A message. Its content is null where it has calls alone."""
        deltas = self.deltas[index].all(events)
        texts = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("text", "thought")}
        arguments = {d.call: d.text for d in deltas if d.kind == "arguments"}
        calls = [called(d, arguments.get(d.call, "")) for d in deltas if d.kind == "call"]
        message: dict[str, Any] = {"role": "assistant", "content": texts["text"] or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        if texts["thought"]:
            message["reasoning_content"] = texts["thought"]
        found: dict[str, Any] = {"index": index, "message": message, "finish_reason": self.deltas[index].reason(end)}
        found["logprobs"] = self._logprobs(events) if self.logprobs else None
        return found

    def reasoning(self) -> int:
        """Tokens whose text was a thought."""
        return sum(deltas.thinking for deltas in self.deltas)

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self.chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _logprobs(self, events: list[Event]) -> dict[str, Any]:
        return {"content": [self._logprob(e) for e in events if isinstance(e, Piece)]}

    def _logprob(self, piece: Piece) -> dict[str, Any]:
        def likely(token: int, logprob: float) -> dict[str, Any]:
            text = self.state.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return likely(piece.token, piece.logprob) | {"top_logprobs": [likely(t, p) for t, p in piece.top]}


def told(delta: Delta) -> dict[str, Any]:
    """OpenAI's delta: the name of a call comes once, its arguments in pieces."""
    if delta.kind == "call":
        return {"tool_calls": [{"index": delta.call, **called(delta, "")}]}
    if delta.kind == "arguments":
        return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]}
    return {"content" if delta.kind == "text" else "reasoning_content": delta.text}


def called(delta: Delta, arguments: str) -> dict[str, Any]:
    """OpenAI's call."""
    return {"id": delta.id, "type": "function", "function": {"name": delta.text, "arguments": arguments}}


class Completion(OpenAI):
    """`text_completion`."""

    stream_object = whole_object = "text_completion"
    prefix = "cmpl"

    def __init__(self, state: State, given: CompletionRequest, ids: list[int]) -> None:
        super().__init__(state, given)
        self.echo = state.tokenizer.decode(ids, skip_special_tokens=True) if given.echo else ""
        self.count = given.choices()

    def begin(self) -> Iterator[dict[str, Any]]:
        """The prompt again, for who wants it."""
        for i in range(self.count if self.echo else 0):
            yield self.chunk([self._text(i, self.echo, None)])

    def piece(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Its text; the last one says why it ends."""
        end = event if isinstance(event, Finished) else None
        if end is not None:
            self.usages[index] = end.usage
        if event.text or end is not None:
            yield self.chunk([self._text(index, event.text, None if end is None else end.reason)])

    def choice(self, index: int, events: list[Event], end: Finished) -> dict[str, Any]:
        """A text."""
        return self._text(index, self.echo + "".join(e.text for e in events), end.reason)

    def _text(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


__all__ = [
    "FIM",
    "Chat",
    "Completion",
    "OpenAI",
    "answers_to",
    "fill_in",
    "marks",
    "plain_ids",
    "prompt_ids",
    "requests_of",
    "router",
]
