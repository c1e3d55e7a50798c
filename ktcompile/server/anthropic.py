"""Anthropic's API: `POST /v1/messages`, whole or streamed, and `/v1/messages/count_tokens`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field, StrictBool, StrictStr

from ktcompile.request import Event, Finished, Usage
from ktcompile.server.answers import Delta, Shape, answered, calls_with_arguments, end_of
from ktcompile.server.errors import ApiError
from ktcompile.server.llama import state_of
from ktcompile.server.openai import answers_to
from ktcompile.server.prompt import Form, Prompt, prompt_of
from ktcompile.server.requests import (
    MAX_MESSAGES,
    MAX_TOOLS,
    Body,
    CalledFunction,
    Calling,
    Function,
    Generation,
    NamedFunction,
    NamedTool,
    OfferedTool,
    Part,
    ToolCall,
    Turn,
)
from ktcompile.server.state import State
from ktcompile.server.tools import Tools

router = APIRouter()

THOUGHTS = ("thinking", "redacted_thinking")
"""Blocks with what was thought before: a model does not read its thoughts again."""


class Block(Part):
    """A part of a message: text, a call of a tool, or the result of one."""

    id: StrictStr = ""
    name: StrictStr = ""
    input: dict[str, Any] = Field(default_factory=dict)
    tool_use_id: StrictStr = ""
    content: StrictStr | list[Part] | None = None


class Message(Body):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[Block]

    def turns(self, index: int) -> list[dict[str, Any]]:
        """The same as messages that `prompt_of` takes: results of tools are messages of their own, and come first."""
        if isinstance(self.content, str):
            return [Turn(role=self.role, content=self.content).plain(index)]
        blocks = [block for block in self.content if block.type not in THOUGHTS]
        turns = [
            Turn(role="tool", content=block.content, tool_call_id=block.tool_use_id)
            for block in blocks
            if block.type == "tool_result"
        ]
        calls = [
            ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=json.dumps(block.input)))
            for block in blocks
            if block.type == "tool_use"
        ]
        said: list[Part] = [block for block in blocks if block.type not in ("tool_result", "tool_use")]
        if said or not turns:
            turns.append(Turn(role=self.role, content=said, tool_calls=calls))
        return [turn.plain(index) for turn in turns]


class Thinking(Body):
    """Whether to think: what is neither leaves it to the model. A budget is not kept to; `max_tokens` is."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class ClientTool(Body):
    """A tool that the client runs."""

    name: StrictStr
    type: StrictStr | None = None
    description: StrictStr | None = None
    input_schema: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ToolChoice(Body):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: StrictStr = ""
    disable_parallel_tool_use: StrictBool = False


class OutputFormat(Body):
    """The form of an answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How an answer has to be."""

    format: OutputFormat | None = None


class CountRequest(Generation):
    """`POST /v1/messages/count_tokens`: what a prompt is made of."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: StrictStr | list[Part] | None = None
    thinking: Thinking | None = None
    tools: list[ClientTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None

    def plain(self) -> list[dict[str, Any]]:
        """The conversation as `prompt_of` takes it. ApiError where the answer would have to go on with a text."""
        if self.messages[-1].role == "assistant":
            told = "the last message is the assistant's: an answer begins anew here, it goes on with no other"
            raise ApiError(400, told, param="messages")
        system = [Turn(role="system", content=self.system).plain(0)] if self.system else []
        return system + [turn for i, message in enumerate(self.messages) for turn in message.turns(i)]

    def may_call(self) -> Tools:
        """The tools. ApiError for those that the client does not run."""
        offered = []
        for i, tool in enumerate(self.tools or ()):
            if tool.input_schema is None:
                told = f"tools[{i}] of type {tool.type!r} has no input_schema: nothing is run here, clients run tools"
                raise ApiError(400, told, param="tools")
            given = Function(
                name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
            )
            offered.append(OfferedTool(type="function", function=given))
        choice = self.tool_choice or ToolChoice()
        named = NamedTool(type="function", function=NamedFunction(name=choice.name))
        kinds: dict[str, Any] = {"auto": "auto", "any": "required", "tool": named, "none": "none"}
        parallel = not choice.disable_parallel_tool_use
        return Calling(tools=offered, tool_choice=kinds[choice.type], parallel_tool_calls=parallel).may_call()

    def form(self) -> Form | None:
        """The form that an answer must have."""
        given = None if self.output_config is None else self.output_config.format
        return None if given is None else Form(given.schema_, strict=True, where="output_config.format")

    def think(self) -> bool | None:
        """Whether the answer begins with a thought; None: as the server was started."""
        kind = None if self.thinking is None else self.thinking.type
        return kind == "enabled" if kind in ("enabled", "disabled") else None


class MessagesRequest(CountRequest):
    """`POST /v1/messages`."""

    stop_sequences: list[StrictStr] | None = None


@router.post("/v1/messages")
async def messages(http: HttpRequest, given: MessagesRequest) -> Response:
    """Answer a conversation."""
    prompt = await read(http, given)
    given.stop, given.n = given.stop_sequences, 1  # names of other APIs mean nothing here
    shape = Blocks(state_of(http), prompt)
    return await answered(http, answers_to(http, given, prompt), shape, bool(given.stream))


@router.post("/v1/messages/count_tokens")
async def count_tokens(http: HttpRequest, given: CountRequest) -> dict[str, int]:
    """How many tokens the prompt has."""
    return {"input_tokens": len((await read(http, given)).ids)}


async def read(http: HttpRequest, given: CountRequest) -> Prompt:
    """The prompt of a request."""
    state = state_of(http)
    state.ready()
    state.check_model(given.model)
    parts = given.plain(), given.may_call(), given.form(), given.think()
    return await asyncio.to_thread(prompt_of, state, *parts)


class Blocks(Shape):
    """A message in blocks: thoughts, text, calls of tools. Its stream has named events."""

    last = ""

    def __init__(self, state: State, prompt: Prompt) -> None:
        self.head = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": state.name}
        self.count = len(prompt.ids)
        self.deltas = prompt.deltas()
        self.index = -1  # of the block that is open, or was last
        self.open = ""  # what it has

    def said(self, item: dict[str, Any]) -> str:
        """An event with its name."""
        return f"event: {item['type']}\n{super().said(item)}"

    def ping(self) -> str:
        """An event that clients leave alone."""
        return self.said({"type": "ping"})

    def begin(self) -> Iterator[dict[str, Any]]:
        """An empty message. How much of the prompt was in the cache is told with the end."""
        message: dict[str, Any] = {**self.head, "content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": message | {"usage": self._counted(Usage(self.count))}}
        yield {"type": "ping"}

    def piece(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds to a block, or why the answer ends."""
        for delta in self.deltas.of(event):
            if delta.kind == "call" or delta.kind not in (self.open, "arguments"):
                yield from self._close()
                self.open, self.index = delta.kind, self.index + 1
                yield {"type": "content_block_start", "index": self.index, "content_block": block(delta, "")}
            if delta.kind != "call":
                kind, name = PIECES[delta.kind]
                yield {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, name: delta.text}}
        if isinstance(event, Finished):
            yield from self._close()
            yield {"type": "message_delta", "delta": self._ended(event), "usage": self._counted(event.usage)}
            yield {"type": "message_stop"}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self.open:
            yield {"type": "content_block_stop", "index": self.index}
        self.open = ""

    def whole(self, found: list[list[Event]]) -> dict[str, Any]:
        """A message."""
        end = end_of(found[0])
        parts = calls_with_arguments(self.deltas.all(found[0]))
        content = [block(delta, delta.text, arguments) for delta, arguments in parts]
        return {**self.head, "content": content, **self._ended(end), "usage": self._counted(end.usage)}

    def _ended(self, end: Finished) -> dict[str, str | None]:
        kinds = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        reason = kinds[self.deltas.reason(end)] if end.matched is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": end.matched}

    def _counted(self, usage: Usage) -> dict[str, Any]:
        """What was in the cache is no input."""
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self.deltas.thinking},
        }


PIECES = {
    "thought": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "arguments": ("input_json_delta", "partial_json"),
}
"""Of a block: the type of what is added, and where it stands."""


def block(delta: Delta, text: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    """A block with so much text. Thoughts are signed by nobody."""
    if delta.kind == "call":
        return {"type": "tool_use", "id": delta.id, "name": delta.text, "input": arguments or {}}
    if delta.kind == "thought":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


__all__ = ["Block", "Blocks", "CountRequest", "Message", "MessagesRequest", "block", "router"]
