"""What form an answer must have: a grammar whose next tokens are known, by llguidance.

Grammars are written in llguidance's Lark, in which `%json {schema}` stands for the JSON that a schema describes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor

from ktcompile.errors import KtransError

MAX_DEPTH, MAX_KEYS, MAX_TEXT, MAX_GRAMMAR = 64, 2000, 16384, 1 << 18
"""Of a schema: levels, keys of all objects (root of the sum of squares, as they are compared with each other),
characters of one text; of a whole grammar: characters. What is within is compiled in less than a second."""

LIMITS = LLParserLimits(verbose_errors=False)

WHITE_SPACE = r"[ ]?|\n[ ]{0,64}"
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
            raise KtransError(f"the grammar of the answer: {_first_line(self._matcher.get_error())}")


class Grammars:
    """Grammars over the tokens of one model; `stop` are those that end an answer. Compiled once: 0.05 s to 1 s."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop: frozenset[int]) -> None:
        size = max(vocabulary, tokenizer.get_vocab_size(with_added_tokens=True))
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=sorted(stop))
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._special = {text: i for text, i in added.items() if self._tokenizer.is_special_token(i)}

    def grammar(self, lark: str) -> Grammar:
        """Compile it. KtransError says what is wrong with it."""
        if len(lark) > MAX_GRAMMAR:
            raise KtransError(f"it has {len(lark)} characters, {MAX_GRAMMAR} are taken")
        start = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), log_level=0, limits=LIMITS)
        if start.is_error():
            raise KtransError(_first_line(start.get_error()))
        return Grammar(start)

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


def json_of(schema: Any, strict: bool) -> str:
    """Lark for the JSON that a schema describes. KtransError for one beyond the limits.

    `strict`: what the grammar cannot promise is refused when it is compiled, else left alone.
    """
    _measure(schema)
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE, "lenient": not strict}}
    return "%json " + json.dumps(schema)


def _measure(schema: Any) -> None:
    keys = 0
    level = [schema]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise KtransError(f"a text of {len(value)} characters, {MAX_TEXT} are taken")
            if isinstance(value, Mapping):
                keys += len(value) ** 2
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        if not below:
            break
        level = below
    else:
        raise KtransError(f"it has more than {MAX_DEPTH} levels")
    if keys > MAX_KEYS**2:
        raise KtransError(f"objects with too many keys: one may have {MAX_KEYS}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


__all__ = ["Grammar", "Grammars", "Matcher", "json_of"]
