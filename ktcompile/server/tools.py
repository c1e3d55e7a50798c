"""Tools that a model may call: what it is told of them, and the grammar of an answer that must call one."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktcompile.grammar import Grammars, json_of
from ktcompile.server.calls import DEEPSEEK, DEEPSEEK_V3, HERMES, PLAIN, Format
from ktcompile.server.thoughts import OPEN

MAX_CALLS = 16
"""Of an answer that must call: one that must not end could go on for ever."""


@dataclass(frozen=True)
class Tool:
    """A function. `parameters`: the JSON schema of its arguments, None: it has none. `strict`: see `json_of`."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """Of its arguments, which are an object."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}

    def json(self) -> dict[str, Any]:
        """As templates take it."""
        told = {"description": self.description} if self.description else {}
        return {"type": "function", "function": {"name": self.name, **told, "parameters": self.schema}}


@dataclass(frozen=True)
class Tools:
    """What an answer may call; if it `must`, at least one, and the one of the name `only`. `parallel`: several."""

    offered: tuple[Tool, ...] = ()
    must: bool = False
    only: str | None = None
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Of the functions."""
        return frozenset(tool.name for tool in self.offered)


@dataclass(frozen=True)
class Template:
    """What a chat template knows. `format`: of the calls that it writes; `takes_tools`: it tells the model of tools.

    One that knows another format than those of `calls.py`, or none, gets calls and their results as text. `thinks`: an
    answer may begin with a thought.
    """

    format: Format
    is_native: bool = False
    takes_tools: bool = False
    takes_text: bool = False  # arguments as text, not as an object
    takes_none: bool = False  # as content, where there are calls alone
    thinks: bool = False

    @staticmethod
    def of(source: str) -> "Template":
        """From its source."""
        takes_tools = re.search(r"(?<![.\w'\"])tools\b", source) is not None
        thinks = OPEN in source
        if "<｜tool▁calls▁begin｜>" in source:
            takes_text = re.search(r"arguments['\"\])]*\s*\|\s*tojson", source) is None
            return Template(
                DEEPSEEK_V3 if "```json" in source else DEEPSEEK, True, takes_tools, takes_text, True, thinks
            )
        if "<tool_call>" in source and re.search(r'\\?"arguments\\?"', source):
            return Template(HERMES, True, takes_tools, thinks=thinks)
        return Template(PLAIN, thinks=thinks)

    def messages(self, given: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """A conversation in OpenAI's form, contents being text, as the template takes it, with what it does not say."""
        told = [self._native(m) for m in given] if self.is_native else self._texts(given)
        if not tools or self.takes_tools:
            return told
        what = instructions(self.format, tools)
        if told and told[0]["role"] == "system":
            return [{**told[0], "content": f"{told[0]['content']}\n\n{what}"}, *told[1:]]
        return [{"role": "system", "content": what}, *told]

    def _native(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not message.get("tool_calls"):
            return dict(message)
        calls = []
        for call in message["tool_calls"]:
            arguments = call["function"]["arguments"]
            if not self.takes_text:
                arguments = object_of(arguments)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        content = message["content"] or (None if self.takes_none else "")
        return {**message, "content": content, "tool_calls": calls}

    def _texts(self, given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Calls as the text that they were, results as what the user says."""
        found: list[dict[str, Any]] = []
        names: dict[str, str] = {}
        was_result = False
        for message in given:
            role, content = message["role"], message["content"]
            calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            names |= {c["id"]: c["function"]["name"] for c in message.get("tool_calls", ())}
            is_result = role == "tool"
            if calls:
                content = "\n".join(filter(None, [content, self.format.written(calls)]))
            elif is_result:
                name = names.get(message.get("tool_call_id", ""), message.get("name", "the function"))
                role, content = "user", f"Result of {name}: {content}"
            if is_result and was_result:
                found[-1]["content"] += f"\n{content}"
            else:
                found.append({"role": role, "content": content})
            was_result = is_result
        return found


def instructions(format: Format, tools: Sequence[Tool]) -> str:
    """What a system prompt says of tools where the template has no words for them."""
    known = "\n".join(json.dumps(tool.json()["function"], ensure_ascii=False) for tool in tools)
    how = format.written([("NAME", "ARGUMENTS")])
    return (
        f"These functions can be called:\n{known}\n\nTo call one, answer with\n{how}\nwhere NAME is its name and "
        "ARGUMENTS a JSON object as its parameters describe, and with nothing else. Results come with the next "
        "message. Call none where none is needed."
    )


def calls_rules(grammars: Grammars, format: Format, tools: Tools) -> str:
    """Lark rules in which `calls` is what must be called, in the model's format. KtransError for a bad schema."""
    offered = [tool for tool in tools.offered if tools.only in (None, tool.name)]
    one = " | ".join(f"call_{i}" for i in range(len(offered)))
    several = f"({grammars.literal(format.between)} call){{0,{MAX_CALLS - 1}}}" if tools.parallel else ""
    rules = [f"calls: {grammars.literal(format.begin)} call {several} {grammars.literal(format.end)}", f"call: {one}"]
    close = grammars.literal(format.close)
    for i, tool in enumerate(offered):
        begin = grammars.literal(f"{format.open}{tool.name}{format.middle}")
        rules.append(f"call_{i}: {begin} {json_of(tool.schema, tool.strict)} {close}")
    return "\n".join(rules)


def object_of(text: str) -> Any:
    """JSON as an object; what is none stays text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


NO_TOOLS = Tools()

__all__ = ["NO_TOOLS", "Template", "Tool", "Tools", "calls_rules", "instructions", "object_of"]
