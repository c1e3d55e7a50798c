"""A model's chat template turns a conversation into text, in a process of its own that can be ended.

Templates come with models: they are programs by strangers. Jinja's sandbox keeps them from Python's insides, not from
`[0] * 10**9` or `7**10**9`, which no thread could be stopped at. `template_process.py` is what runs there.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ktcompile.apart import Apart, Ended
from ktcompile.errors import TemplateError
from ktcompile.template_process import SECONDS


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The prompt that transformers' `render_jinja_template` makes of a conversation, within SECONDS.

    `variables`: further ones that the template may read. Raises TemplateError.
    """
    template = template_of(tokenizer, tools is not None)
    given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True}
    line = json.dumps([template, {**tokenizer.special_tokens_map, **(variables or {}), **given}])
    try:
        kind, text = json.loads(_process().ask(line))
    except Ended as error:
        why = f"takes longer than {SECONDS:g} s" if error.was_late else f"cannot be rendered: {error}"
        raise TemplateError(f"the model's chat template {why}") from error
    if kind == "error":
        raise TemplateError(f"the model's chat template: {text}")
    return str(text)


def template_of(tokenizer: PreTrainedTokenizerFast, tools: bool) -> str:
    """The model's template, or the one that it has for conversations with tools. Raises TemplateError."""
    try:
        return str(tokenizer.get_chat_template(None, [{}] if tools else None))
    except ValueError as error:
        raise TemplateError(f"the model has no chat template: {error}") from error


@cache
def _process() -> Apart:
    return Apart(Path(__file__).with_name("template_process.py"))


__all__ = ["render", "template_of"]
