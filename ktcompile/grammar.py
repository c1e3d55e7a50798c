"""What form an answer must have: a grammar whose next tokens are known, by llguidance.

Grammars are written in llguidance's Lark, in which `%json {schema}` stands for the JSON that a schema describes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor

from ktcompile.apart import Apart, Ended
from ktcompile.errors import KtransError
from ktcompile.grammar_trial import LIMITS, SECONDS

MAX_DEPTH, MAX_TEXT, MAX_GRAMMAR = 64, 16384, 1 << 18
"""Of a schema: levels, characters of a text; of a grammar: characters."""

MAX_ERROR = 300
"""Characters of an error: some repeat the schema."""

WHITE_SPACE = r"[ ]?|\n[ ]{0,32}"
"""Between the parts of JSON: what a printer writes. A model that writes white space for ever would never end."""


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Any number of answers can have it."""

    start: LLMatcher

    def matcher(self) -> "Matcher":
        """Where an answer stands that has no token yet."""
        return Matcher(self.start.deep_copy())


class Matcher:
    """How far an answer is. KtransError where a limit is reached, or a token does not fit."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """Whether each token may be next, bool `[vocabulary]`. One that ends the answer may be where it is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()

    def push(self, token: int) -> None:
        """The next token."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise KtransError(f"the grammar of the answer: {_plain(self._matcher.get_error())}")


class Grammars:
    """Grammars over the tokens of one model; `stop` are those that end an answer.

    Tokens are compiled once, in 0.05 s to 1 s, here and in the process where each grammar is tried first.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop: frozenset[int]) -> None:
        size = max(vocabulary, tokenizer.get_vocab_size(with_added_tokens=True))
        source = tokenizer.to_str()
        trial = Path(__file__).with_name("grammar_trial.py")
        self._trial = Apart(trial, json.dumps([source, size, sorted(stop)]))
        self._trial.start_soon()
        self._tokenizer = LLTokenizer(source, n_vocab=size, eos_token=sorted(stop))
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._special = {text: i for text, i in added.items() if self._tokenizer.is_special_token(i)}

    def grammar(self, rules: str, before: str = "", more: str = "") -> Grammar:
        """Compile the rule `answer` and its others. `before`: what may stand before it, with `more` rules, not tried.

        KtransError says what is wrong with it, or that it takes too long.
        """
        if len(rules) > MAX_GRAMMAR:
            raise KtransError(f"it has {len(rules)} characters, {MAX_GRAMMAR} are taken")
        wrong = self._tried(LLMatcher.grammar_from_lark(f"start: answer\n{rules}"))
        if wrong:
            raise KtransError(_plain(wrong))
        source = LLMatcher.grammar_from_lark(f"start: {before} answer\n{rules}\n{more}")
        return Grammar(LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS))

    def _tried(self, source: str) -> str:
        """What is wrong with a grammar, found where it can do no harm."""
        try:
            return str(json.loads(self._trial.ask(json.dumps(source))))
        except Ended as error:
            if error.was_late:
                return f"it takes more than {SECONDS} s to compile"
            return "it cannot be compiled: the process that tried it broke"

    def literal(self, text: str) -> str:
        """Lark for exactly this text. A special token in it, and no other text like it, is that token."""
        if not self._special:
            return _quoted(text)
        parts = re.split("(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")", text)
        return " ".join(f"<[{self._special[p]}]>" if p in self._special else _quoted(p) for p in parts if p)

    def text_until(self, mark: str, rule: str) -> str:
        """A Lark rule of this name for any text up to `mark`, and `mark`."""
        if mark in self._special:
            return f"{rule}: /(.|\\n)*/ {self.literal(mark)}"
        return f"{rule}[lazy]: /(.|\\n)*/ {self.literal(mark)}"


def json_of(schema: Mapping[str, Any], strict: bool) -> str:
    """Lark for the JSON that a schema describes. KtransError for one beyond the limits.

    `strict`: what the grammar cannot promise is refused when it is compiled, else left alone.
    """
    check_schema(schema)
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE, "lenient": not strict}})


def check_schema(schema: Mapping[str, Any]) -> None:
    """KtransError for a schema beyond the limits, whether or not a grammar is made of it."""
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise KtransError(f"a text of {len(value)} characters, {MAX_TEXT} are taken")
            if isinstance(value, Mapping):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise KtransError(f"it has more than {MAX_DEPTH} levels")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(error: str) -> str:
    """llguidance's error without what it quotes of a grammar that nobody wrote."""
    lines = [line.strip() for line in re.sub(r"^at \d+\(\d+\): ", "", error).splitlines()]
    return " ".join(line for line in lines if line and not re.match(r"\d+ \||\^+$", line))[:MAX_ERROR]


__all__ = ["Grammar", "Grammars", "Matcher", "check_schema", "json_of"]
