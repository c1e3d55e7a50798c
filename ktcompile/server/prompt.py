"""From a conversation to what the engine takes: the tokens of the prompt, and the form that the answer has to have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktcompile.errors import KtransError
from ktcompile.generate import encode_chat
from ktcompile.grammar import Grammar, json_of
from ktcompile.server.answers import Deltas
from ktcompile.server.calls import Format
from ktcompile.server.errors import ApiError
from ktcompile.server.state import State
from ktcompile.server.thoughts import CLOSE, OPEN
from ktcompile.server.tools import NO_TOOLS, Template, Tools, calls_rules


@dataclass(frozen=True)
class Form:
    """Text of an answer must be JSON that the schema describes. `strict`: see `json_of`."""

    schema: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class Prompt:
    """Tokens, and what is to be known of the answers to them. `thinks`: they begin inside of a thought.

    `format`: of calls in them, None: there are none. `skip_special`: special tokens have no text.
    """

    ids: tuple[int, ...]
    thinks: bool = False
    grammar: Grammar | None = None
    format: Format | None = None
    names: frozenset[str] = frozenset()
    skip_special: bool = True

    def deltas(self) -> Deltas:
        """What parts an answer; each has its own."""
        return Deltas(self.thinks, self.format, self.names)


def prompt_of(
    state: State, messages: Sequence[Mapping[str, Any]], tools: Tools = NO_TOOLS, form: Form | None = None
) -> Prompt:
    """A conversation as a prompt. It takes time: call it on a thread of its own.

    `messages` are in OpenAI's form: `role`, `content` (text), `tool_calls` with arguments as text, `tool_call_id`.
    ApiError 400 for a schema that cannot be held.
    """
    template = Template.of(str(state.tokenizer.get_chat_template(None, [{}] if tools.offered else None)))
    told = template.messages(messages, tools.offered)
    given = [tool.json() for tool in tools.offered] if template.takes_tools else []
    ids = encode_chat(state.tokenizer, told, f"{OPEN}\n" if state.think else "", given)
    thinks = str(state.tokenizer.decode(ids[-8:])).rstrip().endswith(OPEN)
    if not tools.offered:
        return Prompt(tuple(ids), thinks, _grammar(state, thinks, None, tools, form))
    format = template.format
    is_special = any(token in format.written([("", "")]) for token in state.tokenizer.all_special_tokens)
    grammar = _grammar(state, thinks, format, tools, form)
    return Prompt(tuple(ids), thinks, grammar, format, tools.names, not is_special)


def _grammar(state: State, thinks: bool, format: Format | None, tools: Tools, form: Form | None) -> Grammar | None:
    """Of an answer that must call a tool, or be JSON, or if it may call one either."""
    if form is None and not tools.must:
        return None
    grammars = state.grammars
    answers: list[str] = []
    rules: list[str] = []
    where = "response_format"
    try:
        if form is not None and not tools.must:
            answers.append("text")
            rules.append(f"text: {json_of(form.schema, form.strict)}")
        if format is not None:
            where = "tools"
            answers.append("calls")
            rules.append(calls_rules(grammars, format, tools))
        if thinks:
            rules.append("thought: until /\\s{0,4}/\n" + grammars.text_until(CLOSE, "until"))
        return grammars.grammar("\n".join([f"start: {'thought' * thinks} ({' | '.join(answers)})", *rules]))
    except KtransError as error:
        raise ApiError(400, f"{where}: {error}", param=where, code="invalid_schema") from error


__all__ = ["Form", "Prompt", "prompt_of"]
