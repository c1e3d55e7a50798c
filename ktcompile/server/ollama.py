"""A part of Ollama's API: `/api/chat` and `/api/generate`, and what it says about the one model that is there."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from ktcompile.request import Event, Finished
from ktcompile.server.answers import Delta, Shape, answered, calls_with_arguments, end_of, joined
from ktcompile.server.errors import ApiError
from ktcompile.server.llama import state_of
from ktcompile.server.openai import answers_to, marks, prompt_ids
from ktcompile.server.prompt import Form, Prompt, prompt_of
from ktcompile.server.requests import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    CalledFunction,
    Calling,
    CompletionRequest,
    Generation,
    Number,
    OfferedTool,
    ToolCall,
    Turn,
)
from ktcompile.server.state import State
from ktcompile.server.tools import NO_TOOLS

router = APIRouter()

VERSION = "0.12.0"
"""Of Ollama, whose API this is: clients ask for one that is new enough for them."""

NO_LIMIT = (-1, -2)
"""Values of num_predict: as many tokens as fit."""

NOTHING, LOADED = Prompt(()), {"done": True, "done_reason": "load"}
"""Who asks nothing, to have the model loaded, and what is answered."""

NOT_OFFERED = ("pull", "push", "create", "copy", "delete", "embed", "embeddings")


class Options(Generation):
    """Ollama's names for how to generate. `num_ctx` is what the server was started with."""

    num_predict: StrictInt | None = None
    repeat_penalty: Number | None = None

    def taken(self) -> Generation:
        """The same by the names that all APIs here share."""
        most = -1 if self.num_predict in NO_LIMIT else self.num_predict
        names = {"n": 1, "max_tokens": most, "repetition_penalty": self.repeat_penalty, "logit_bias": None}
        return self.model_copy(update=names)


class Called(Body):
    """A function that was called, with its arguments as an object."""

    name: StrictStr
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Body):
    """A call of an earlier answer."""

    id: StrictStr = ""
    function: Called


class Message(Body):
    """A message of a conversation. What was thought before is not read again."""

    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr | None = None
    images: list[Any] | None = None
    tool_calls: list[Call] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: StrictStr | None = None
    tool_name: StrictStr | None = None

    def plain(self, index: int) -> dict[str, Any]:
        """What `prompt_of` takes. ApiError for images."""
        no_images(self.images, f"messages[{index}].images")
        calls = [
            ToolCall(id=c.id, function=CalledFunction(name=c.function.name, arguments=json.dumps(c.function.arguments)))
            for c in self.tool_calls or ()
        ]
        turn = Turn(
            role=self.role,
            content=self.content,
            tool_calls=calls,
            tool_call_id=self.tool_call_id,
            name=self.tool_name,
        )
        return turn.plain(index)


class Asked(Body):
    """What both ways to generate have in common. `keep_alive` is not looked at: the model stays."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    options: Options | None = None
    think: StrictBool | Literal["low", "medium", "high"] | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None

    def form(self) -> Form | None:
        """The form that an answer must have."""
        schema = {"type": "object"} if self.format == "json" else self.format
        return Form(schema, where="format") if schema else None

    def thinks(self) -> bool | None:
        """Whether the answer begins with a thought; None: as the server was started."""
        return True if isinstance(self.think, str) else self.think


class ChatRequest(Asked):
    """`POST /api/chat`."""

    messages: list[Message] = Field(default_factory=list, max_length=MAX_MESSAGES)
    tools: list[OfferedTool] | None = Field(default=None, max_length=MAX_TOOLS)


class GenerateRequest(Asked):
    """`POST /api/generate`: one question, or with `suffix` or `raw` a text as the model sees it."""

    prompt: StrictStr = ""
    suffix: StrictStr | None = None
    system: StrictStr | None = None
    raw: StrictBool | None = None
    template: StrictStr | None = None
    context: list[StrictInt] | None = None
    images: list[Any] | None = None

    def check(self) -> None:
        """ApiError for what this server has one of."""
        no_images(self.images, "images")
        if self.template:
            raise ApiError(400, "template: the model's own is used; send a text with raw instead", param="template")
        if self.context:
            raise ApiError(400, "context: send the conversation to /api/chat instead", param="context")


class NamedRequest(Body):
    """`POST /api/show`."""

    model: StrictStr | None = None
    name: StrictStr | None = None


def no_images(images: list[Any] | None, where: str) -> None:
    """ApiError where there are some: nothing is decoded, nothing is fetched."""
    if images:
        raise ApiError(400, f"{where}: this model takes text alone", param=where)


# ------------------------------------------------------------------------------------------------ answers


@router.post("/api/chat")
async def chat(http: HttpRequest, given: ChatRequest) -> Response:
    """Answer a conversation; without one, say that the model is there."""
    state = served(http, given.model)
    if not given.messages:
        return JSONResponse(ChatLines(state, NOTHING).line(LOADED))
    plain = [message.plain(i) for i, message in enumerate(given.messages)]
    tools = Calling(tools=given.tools).may_call()
    prompt = await asyncio.to_thread(prompt_of, state, plain, tools, given.form(), given.thinks())
    return await lines(http, given, prompt, ChatLines(state, prompt))


@router.post("/api/generate")
async def generate(http: HttpRequest, given: GenerateRequest) -> Response:
    """Answer one question, continue a text, or fill what is missing in it; without one, say that the model is there."""
    state = served(http, given.model)
    given.check()
    if not given.prompt and not given.suffix:
        return JSONResponse(GenerateLines(state, NOTHING).line(LOADED))
    if given.raw or given.suffix:
        if given.format:
            raise ApiError(400, "format: not of a text that goes on; leave it out, or raw and suffix", param="format")
        text = CompletionRequest(prompt=given.prompt, suffix=given.suffix)
        prompt = Prompt(tuple(await asyncio.to_thread(prompt_ids, state, text)))
    else:
        plain = [{"role": "system", "content": given.system}] if given.system else []
        plain.append({"role": "user", "content": given.prompt})
        prompt = await asyncio.to_thread(prompt_of, state, plain, NO_TOOLS, given.form(), given.thinks())
    return await lines(http, given, prompt, GenerateLines(state, prompt))


async def lines(http: HttpRequest, given: Asked, prompt: Prompt, shape: "Lines") -> Response:
    """What is answered to a prompt: streamed, if nothing else is asked for."""
    generation = (given.options or Options()).taken()
    return await answered(http, answers_to(http, generation, prompt), shape, given.stream is not False)


class Lines(Shape):
    """Objects a line each: of a stream pieces and then what ended it, or that one with all of the text."""

    media = "application/x-ndjson"
    last = ""

    def __init__(self, state: State, prompt: Prompt) -> None:
        self.name = state.name
        self.deltas = prompt.deltas()
        self.held: list[Delta] = []  # a call whose arguments may not be complete

    def text(self, said: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """Where a text stands, and a thought and calls if there are any."""
        raise NotImplementedError

    def line(
        self, more: dict[str, Any], text: str = "", thought: str = "", calls: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """One object."""
        return {"model": self.name, "created_at": now(), **self.text(text, thought, list(calls)), **more}

    def said(self, item: dict[str, Any]) -> str:
        """A line."""
        return json.dumps(item, ensure_ascii=False) + "\n"

    def ping(self) -> str:
        """A piece without text: lines have no comments."""
        return self.said(self.line({"done": False}))

    def piece(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What is certain, and how the answer ended. A call comes as a whole."""
        deltas, self.held = [*self.held, *self.deltas.of(event)], []
        if not isinstance(event, Finished):
            at = next((i for i, d in enumerate(deltas) if d.kind == "call" and d.call == deltas[-1].call), len(deltas))
            deltas, self.held = deltas[:at], deltas[at:]
        for name, what in parts(joined(deltas)):
            yield self.line({"done": False}, **{name: what})
        if isinstance(event, Finished):
            yield self.line(counted(event))

    def whole(self, found: list[list[Event]]) -> dict[str, Any]:
        """All of it."""
        given = list(parts(self.deltas.all(found[0])))
        text, thought = ("".join(what for name, what in given if name == kind) for kind in ("text", "thought"))
        calls = [call for name, what in given if name == "calls" for call in what]
        return self.line(counted(end_of(found[0])), text, thought, calls)


class ChatLines(Lines):
    """Of a message."""

    def text(self, said: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """A message."""
        more = {"thinking": thought, "tool_calls": calls}
        return {"message": {"role": "assistant", "content": said} | {k: v for k, v in more.items() if v}}


class GenerateLines(Lines):
    """Of a text, which calls nothing."""

    def text(self, said: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """A response."""
        return {"response": said} | ({"thinking": thought} if thought else {})


def parts(deltas: Sequence[Delta]) -> Iterator[tuple[str, Any]]:
    """Of a line: its name there, and what it is."""
    for delta, arguments in calls_with_arguments(deltas):
        if delta.kind == "call":
            function = {"index": delta.call, "name": delta.text, "arguments": arguments}
            yield "calls", [{"id": delta.id, "function": function}]
        else:
            yield delta.kind, delta.text


def counted(end: Finished) -> dict[str, Any]:
    """How an answer ended, tokens, and nanoseconds. The model was loaded before."""
    usage = end.usage
    prompt_ns, predicted_ns = int(usage.prompt_ms * 1e6), int(usage.predicted_ms * 1e6)
    return {
        "done": True,
        "done_reason": end.reason,
        "total_duration": int(usage.queue_ms * 1e6) + prompt_ns + predicted_ns,
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": prompt_ns,
        "eval_count": usage.completion_tokens,
        "eval_duration": predicted_ns,
    }


# ------------------------------------------------------------------------------------------------ the model


@router.get("/api/version")
async def version() -> dict[str, str]:
    """Whose API this is."""
    return {"version": VERSION}


@router.get("/api/tags")
async def tags(http: HttpRequest) -> dict[str, Any]:
    """The one model."""
    state = served(http, None)
    size = sum(use.weights for use in state.engine.model.plans["decode"].uses)
    since = datetime.fromtimestamp(state.started, UTC).isoformat()
    model = {"name": state.name, "model": state.name, "modified_at": since, "size": size, "digest": ""}
    return {"models": [model | {"details": details(state)}]}


@router.post("/api/show")
async def show(http: HttpRequest, given: NamedRequest) -> dict[str, Any]:
    """What the model is, and what it can do."""
    state = served(http, given.model or given.name)
    kind = state.engine.model.config.model_type
    template = state.tokenizer.chat_template or ""
    can = {"insert": bool(marks(state)), "thinking": "think" in template}
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": details(state),
        "model_info": {"general.architecture": kind, f"{kind}.context_length": state.context},
        "capabilities": ["completion", "tools", *(name for name, is_able in can.items() if is_able)],
    }


def details(state: State) -> dict[str, Any]:
    """What Ollama says of a model's files; there it has sizes and types in words, of which this server knows none."""
    kind = state.engine.model.config.model_type
    known = {"family": kind, "families": [kind]}
    return {"parent_model": "", "format": "", **known, "parameter_size": "", "quantization_level": ""}


def served(http: HttpRequest, name: str | None) -> State:
    """The server's state. ApiError while there is no model, and for another one."""
    state = state_of(http)
    state.ready()
    state.check_model(name.removesuffix(":latest") if name else None)
    return state


async def refused(http: HttpRequest) -> Response:
    """What is not offered, and why."""
    why = "the model that was given at the start is served, for text; nothing is fetched, made or deleted"
    raise ApiError(501, f"{http.url.path} is not offered: {why}")


for name in NOT_OFFERED:
    router.add_api_route(f"/api/{name}", refused, methods=["POST", "DELETE"])


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat()


__all__ = [
    "VERSION",
    "Asked",
    "ChatLines",
    "ChatRequest",
    "GenerateLines",
    "GenerateRequest",
    "Lines",
    "Message",
    "NamedRequest",
    "Options",
    "router",
]
