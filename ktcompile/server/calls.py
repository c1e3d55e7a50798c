"""Parting an answer, as it comes, into text and calls of tools: as DeepSeek, Qwen (Hermes) or plain JSON write them."""

import json
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import regex

SPACE = r"\s{0,32}"
MAX_HELD = 16384
"""Characters of a call whose arguments come before its name: they wait for it."""


@dataclass(frozen=True)
class Delta:
    """What is certain of an answer: more of a thought or of its text; a `call` begins; more of its arguments.

    `text` of a call is the function's name. `call`: which call of the answer it is, from 0. `id`: of one that begins.
    """

    kind: Literal["thought", "text", "call", "arguments"]
    text: str
    call: int = -1
    id: str = ""


@dataclass(frozen=True)
class Format:
    """How a model writes calls: `begin`; `open` name `middle` arguments `close` for each, with `between`; `end`.

    Written by others it may have other white space: `first` finds a call in text up to its arguments, or a `whole` one;
    `tail` is what stands behind them, `after` another call behind this one or what ends them all. `alone`: a call must
    be what an answer begins with, and of a function that is known, as nothing else tells it from text.
    """

    begin: str
    open: str
    middle: str
    close: str
    between: str
    end: str
    first: regex.Pattern[str]
    tail: regex.Pattern[str]
    after: regex.Pattern[str]
    alone: bool = False

    def written(self, calls: list[tuple[str, str]]) -> str:
        """Calls, `(name, arguments)`, as the model writes them."""
        each = [f"{self.open}{name}{self.middle}{arguments}{self.close}" for name, arguments in calls]
        return self.begin + self.between.join(each) + self.end


_NAME = r'(?P<name>[^"\\\s<]{1,128})'
_JSON_HEAD = rf'\{{{SPACE}"name"{SPACE}:{SPACE}"{_NAME}"{SPACE},{SPACE}"(?:arguments|parameters)"{SPACE}:{SPACE}(?=\{{)'

_CALL_BEGIN = rf"{SPACE}<｜tool▁call▁begin｜>{SPACE}"
_DEEPSEEK_HEAD = (  # V3 and R1 write the first, V3.1 the second
    rf"{_CALL_BEGIN}(?:function<｜tool▁sep｜>(?P<name>[^<\s]{{1,128}}){SPACE}```(?:json)?{SPACE}(?=\{{)"
    rf"|(?P<name>[^<\s]{{1,128}}){SPACE}<｜tool▁sep｜>{SPACE}(?=\{{))"
)
_DEEPSEEK_RULES = (
    regex.compile(rf"{SPACE}<｜tool▁calls▁begin｜>{_DEEPSEEK_HEAD}"),
    regex.compile(rf"{SPACE}(?:```{SPACE})?<｜tool▁call▁end｜>"),
    regex.compile(rf"(?:{_DEEPSEEK_HEAD}|{SPACE}<｜tool▁calls▁end｜>)"),
)
DEEPSEEK_V3 = Format(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    "\n",
    "<｜tool▁calls▁end｜>",
    *_DEEPSEEK_RULES,
)
DEEPSEEK = Format(
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "",
    "<｜tool▁calls▁end｜>",
    *_DEEPSEEK_RULES,
)

# A search prefers what is complete to what may become so before it: neither may hold the beginning of another.
_WHOLE = rf"(?P<whole>\{{(?:(?!<tool_call>).){{0,{MAX_HELD}}}?\}}){SPACE}</tool_call>"
_HERMES_HEAD = regex.compile(rf"{SPACE}<tool_call>{SPACE}(?:{_JSON_HEAD}|{_WHOLE})", regex.DOTALL)
HERMES = Format(
    "",
    '<tool_call>\n{"name": "',
    '", "arguments": ',
    "}\n</tool_call>",
    "\n",
    "",
    _HERMES_HEAD,
    regex.compile(rf"{SPACE}\}}{SPACE}</tool_call>"),
    _HERMES_HEAD,
)

PLAIN = Format(
    "",
    '{"name": "',
    '", "arguments": ',
    "}",
    "\n",
    "",
    regex.compile(rf"{SPACE}(?:\[{SPACE})?{_JSON_HEAD}"),
    regex.compile(rf"{SPACE}\}}"),
    regex.compile(rf"{SPACE}(?:,{SPACE})?{_JSON_HEAD}|{SPACE}\]"),
    alone=True,
)


class Calls:
    """`push` text, take deltas. Marks may come in pieces; what could become one is kept back until it is known.

    What only looks like a call is text, all of it. White space next to calls belongs to nothing. Without a `format` all
    is text; `names` are the functions that can be called.
    """

    def __init__(self, format: Format | None = None, names: frozenset[str] = frozenset()) -> None:
        self.format, self.names = format, names
        self.count = 0
        self._state: Literal["text", "arguments", "tail", "after"] = "text"
        self._held = ""
        self._is_first = True  # nothing was said
        self._trim = False
        self._value = _Value()

    def push(self, text: str) -> list[Delta]:
        """What is certain after this text."""
        found: list[Delta] = []
        self._held += text
        while self._held and self._step(found):
            pass
        return found

    def finish(self) -> list[Delta]:
        """What was kept back, as nothing follows. Half of what closes a call is no text."""
        found: list[Delta] = []
        if self._state != "tail":
            self._say(found, self._held)
        self._held = ""
        return found

    def _step(self, found: list[Delta]) -> bool:
        """One part of what is held. Whether it is worth to go on."""
        if self._state == "arguments":
            count = self._value.length(self._held)
            found.append(Delta("arguments", self._held[:count], self.count - 1))
            self._held = self._held[count:]
            if self._value.is_complete:
                self._state = "tail"
            return True
        if self.format is None or (self._state == "text" and self.format.alone and not self._is_first):
            self._say(found, self._held)
            self._held = ""
            return False
        if self._state == "text":
            look = self.format.first.match if self.format.alone else self.format.first.search
            match = look(self._held, partial=True)
            self._say(found, self._held[: match.start() if match else len(self._held)])
            self._held = self._held[match.start() :] if match else ""
        else:
            match = (self.format.tail if self._state == "tail" else self.format.after).match(self._held, partial=True)
        if match is None:
            self._state, self._is_first = "text", False
            return True
        if match.partial:
            return False
        if self._state == "tail":
            self._state = "after"
        elif not self._begin(found, match.groupdict()):
            self._say(found, match[0])
        self._held = self._held[len(match[0]) :]
        return True

    def _begin(self, found: list[Delta], given: dict[str, Any]) -> bool:
        """A call with its name, or all of it, or the end of all. False where it is text."""
        assert self.format is not None
        name, whole = given.get("name"), given.get("whole")
        if name is not None and self.format.alone and name not in self.names:
            self._state = "text"
            return False
        arguments = ""
        if whole is not None:
            call = _call(whole)
            if call is None:
                self._state = "text"
                return False
            name, arguments = call
        self._trim, self._is_first = True, False
        self._state = "text"
        if name is None:
            return True
        found.append(Delta("call", name, self.count, f"call_{uuid4().hex[:24]}"))
        self.count += 1
        if whole is None:
            self._state, self._value = "arguments", _Value()
        else:
            found.append(Delta("arguments", arguments, self.count - 1))
        return True

    def _say(self, found: list[Delta], text: str) -> None:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if text:
            self._is_first = False
            found.append(Delta("text", text))


class _Value:
    """Where a JSON object ends that comes in pieces."""

    def __init__(self) -> None:
        self.is_complete = False
        self._depth = 0
        self._in_string = self._is_escaped = False

    def length(self, text: str) -> int:
        """How many of the next characters belong to it."""
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            mark = _MARKS.search(text, at)
            if mark is None:
                return len(text)
            at = int(mark.end())
            self._see(mark[0])
            if self.is_complete:
                return at
        return at

    def _see(self, mark: str) -> None:
        if self._in_string:
            self._in_string, self._is_escaped = mark != '"', mark == "\\"
        elif mark == '"':
            self._in_string = True
        elif mark != "\\":
            self._depth += 1 if mark in "{[" else -1
            self.is_complete = self._depth == 0


_MARKS = regex.compile(r'["\\{}\[\]]')


def _call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a JSON object that is a call."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = given.get("name"), given.get("arguments", given.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


__all__ = ["DEEPSEEK", "DEEPSEEK_V3", "HERMES", "PLAIN", "Calls", "Delta", "Format"]
