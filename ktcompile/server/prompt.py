"""From a conversation to what the engine takes: the tokens of the prompt, and the form that the answer has to have."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ktcompile.errors import KtransError
from ktcompile.generate import encode_chat
from ktcompile.grammar import Grammar, check_schema, json_of
from ktcompile.grammar_trial import SECONDS
from ktcompile.server.answers import Deltas
from ktcompile.server.calls import Format
from ktcompile.server.errors import ApiError
from ktcompile.server.state import State
from ktcompile.server.thoughts import CLOSE, OPEN
from ktcompile.server.tools import NO_TOOLS, Template, Tools, calls_rules
from ktcompile.template import template_of


@dataclass(frozen=True)
class Form:
    """Text of an answer must be JSON that the schema describes. `strict`: see `json_of`. `where`: it was asked for."""

    schema: Mapping[str, Any]
    strict: bool = False
    where: str = "response_format"


@dataclass(frozen=True)
class Prompt:
    """Tokens, and what is to be known of the answers to them. `thinks`: they begin inside of a thought.

    `format`: of calls in them, None: there are none. `say`: special tokens that part them, so must have their text.
    """

    ids: tuple[int, ...]
    thinks: bool = False
    grammar: Grammar | None = None
    format: Format | None = None
    names: frozenset[str] = frozenset()
    say: frozenset[int] = frozenset()

    def deltas(self) -> Deltas:
        """What parts an answer; each has its own."""
        return Deltas(self.thinks, self.format, self.names)


def prompt_of(
    state: State,
    messages: Sequence[Mapping[str, Any]],
    tools: Tools = NO_TOOLS,
    form: Form | None = None,
    think: bool | None = None,
) -> Prompt:
    """A conversation as a prompt. It takes time: call it on a thread of its own.

    `messages` are in OpenAI's form: `role`, `content` (text), `tool_calls` with arguments as text, `tool_call_id`.
    `think`: as `encode_chat` has it; None: as the server was started. ApiError 400 for a schema that cannot be held.
    """
    for i, tool in enumerate(tools.offered):
        with _refusing(f"tools[{i}]"):
            check_schema(tool.schema)
    template = Template.of(template_of(state.tokenizer, bool(tools.offered)))
    told = template.messages(messages, tools.offered)
    given = [tool.json() for tool in tools.offered] if template.takes_tools else []
    ids = encode_chat(state.tokenizer, told, (state.think or None) if think is None else think, given, state.context)
    end = str(state.tokenizer.decode(ids[-8:])).rstrip()
    thinks = end.endswith(OPEN)
    may_think = template.thinks and think is not False and not end.endswith(CLOSE)
    thought = "thought" if thinks else "thought?" if may_think else ""
    grammar = _grammar(state, thought, template.format, tools, form)
    format = template.format if tools.offered else None
    marks = OPEN + CLOSE + (format.written([("", "")]) if format else "")
    say = frozenset(i for i, t in state.tokenizer.added_tokens_decoder.items() if t.special and t.content in marks)
    return Prompt(tuple(ids), thinks, grammar, format, tools.names, say)


def _grammar(state: State, thought: str, format: Format, tools: Tools, form: Form | None) -> Grammar | None:
    """Of an answer that must call a tool, or be JSON, or where it only may call one either, after its `thought`."""
    if form is None and not tools.must:
        return None
    grammars = state.grammars
    parts: list[tuple[str, Mapping[str, Any], bool]] = []  # what is to blame, and its schema
    answers, rules = [], []
    if form is not None and not tools.must:
        parts.append((form.where, form.schema, form.strict))
        with _refusing(form.where):
            rules.append(f"text: {json_of(form.schema, form.strict)}")
        answers.append("text")
    if tools.offered:
        parts += [(f"tools[{i}]", tool.schema, tool.strict) for i, tool in enumerate(tools.offered)]
        rules.append(calls_rules(grammars, format, tools))
        answers.append("calls")
    begin = "" if thought == "thought" else grammars.literal(OPEN)
    more = f"thought: {begin} until /\\s{{0,4}}/\n{grammars.text_until(CLOSE, 'until')}" if thought else ""
    begun = time.monotonic()
    with _refusing("tools" if tools.offered or form is None else form.where):
        try:
            return grammars.grammar("\n".join([f"answer: {' | '.join(answers)}", *rules]), thought, more)
        except KtransError:
            if time.monotonic() - begun < SECONDS / 2:  # there is time to look whose fault it is
                for name, schema, strict in parts:
                    with _refusing(name):
                        grammars.grammar(f"answer: {json_of(schema, strict)}")
            raise


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """400 for a schema that is refused inside."""
    try:
        yield
    except KtransError as error:
        raise ApiError(400, f"{param}: the schema: {error}", param=param, code="invalid_schema") from error


__all__ = ["Form", "Prompt", "prompt_of"]
