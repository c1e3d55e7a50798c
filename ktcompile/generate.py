"""Text from a loaded model, token by token: prefill in chunks, sampling, incremental decoding, timing."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from ktcompile.cache import PagedCache
from ktcompile.errors import CapacityError, KtransError
from ktcompile.sampling import Sampling
from ktcompile.template import render

CHUNK = 512
"""Prompt tokens a step of a model that does not say how many: an interrupt waits for one chunk at most."""


THINK, THOUGHT = "<think>", "</think>"
"""What a thought begins with, and what it ends with. Templates look for the end in earlier answers."""


def chunk_of(model: Any) -> int:
    """Prompt tokens that a loaded model takes a step."""
    return int(getattr(model, "chunk", CHUNK))


@dataclass
class Statistics:
    """Counts and seconds of one answer.

    `reused`: prompt tokens that were still in the cache; `new`: tokens of the answer, without the one that ends it;
    `steps`: decode steps; `ended`: why the answer is not complete.
    """

    prompt: int = 0
    reused: int = 0
    new: int = 0
    steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ended: str = ""

    def __str__(self) -> str:
        read = self.prompt - self.reused
        kept = f" ({self.reused} more from the cache)" if self.reused else ""
        fill = f"{read / self.prefill_s:.1f} tok/s" if self.prefill_s else "-"
        rate = f"{self.steps / self.decode_s:.1f} tok/s" if self.decode_s else "-"
        return f"prompt {read} tokens{kept}, prefill {fill}; answer {self.new} tokens, decode {rate}{self.ended}"


@dataclass
class Session:
    """One conversation: a model, its tokenizer, and the cache with what both have seen."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    sampling: Sampling
    stop: frozenset[int]
    cache: PagedCache = field(init=False)
    seen: list[int] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self.cache = self.model.new_cache(1)
        self.sampling = self.sampling.seeded()

    def stream(self, prompt: Sequence[int], most: int) -> Iterator[str]:
        """Pieces of the answer to the prompt's token ids, at most `most` tokens; what the cache has is not read again.

        Raises CapacityError where the prompt does not fit the context. Closing the iterator stops the answer.
        """
        self.statistics = Statistics(prompt=len(prompt))
        if len(prompt) >= self.cache.context:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens; the context holds {self.cache.context}, the answer included. "
                "Shorten it, or load with a larger context if the model has one"
            )
        same = next(
            (i for i, (a, b) in enumerate(zip(self.seen, prompt, strict=False)) if a != b),
            min(len(self.seen), len(prompt)),
        )
        same = min(same, len(prompt) - 1)  # the last token's logits are wanted
        self.cache.crop(same)
        self.seen = list(prompt[:same])
        self.statistics.reused = same
        start = time.perf_counter()
        token = -1
        chunk = chunk_of(self.model)
        for at in range(same, len(prompt), chunk):
            token = self._next(prompt[at : at + chunk])
        self.statistics.prefill_s = time.perf_counter() - start
        start = time.perf_counter()
        decoder = DecodeStream(skip_special_tokens=True)
        while token not in self.stop:
            self.statistics.new += 1
            piece = decoder.step(self.tokenizer.backend_tokenizer, token)
            if piece:
                yield piece
            if self.statistics.new == most:
                self.statistics.ended = f"; ended after {most} tokens"
                return
            if len(self.seen) >= self.cache.context:
                self.statistics.ended = "; ended, the context is full"
                return
            token = self._next([token])
            self.statistics.steps += 1
            self.statistics.decode_s = time.perf_counter() - start

    def _next(self, ids: Sequence[int]) -> int:
        """The token that follows these. KtransError where the logits are no distribution."""
        first, count = len(self.seen), len(ids)
        step = ids, range(first, first + count), [count], [count - 1], self.cache, [self.sampling]
        (token,) = self.model.next_tokens(*step).ids()
        self.seen += ids
        return int(token)


def stop_tokens(tokenizer: PreTrainedTokenizerFast, generation: Any) -> frozenset[int]:
    """Token ids that end an answer, from the generation defaults and the tokenizer."""
    configured = getattr(generation, "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(t) for t in (*several, tokenizer.eos_token_id) if t is not None)


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    think: bool | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    most: int | None = None,
) -> list[int]:
    """Token ids of a rendered conversation; `tools` as the template takes them. `most`: see `encode`.

    `think`: whether the answer begins inside <think>, or without a thought; None: as the model's template has it. A
    template may know one of two variables for that (DeepSeek's and Qwen's); of others the end of the prompt is changed.
    What people write stays text: a special token inside a message or a tool is encoded as its characters. Raises
    TemplateError, and KtransError for what is no text.
    """
    added = tokenizer.added_tokens_decoder.values()  # `all_special_tokens` are those with a name, without roles
    special = (token.content for token in added if token.special and token.content not in (THINK, THOUGHT))
    marks = {f"\ue000{i}\ue001": token for i, token in enumerate(special)}

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            for mark, token in marks.items():
                value = value.replace(token, mark)
            return value
        if isinstance(value, Mapping):
            return {marked(key): marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    given = [marked(message) for message in messages]
    known = [marked(tool) for tool in tools] or None
    switch = {} if think is None else {"thinking": think, "enable_thinking": think}
    text = render(tokenizer, given, known, switch)
    if think is not None and text.rstrip().endswith(THINK) != think:
        text += f"{THINK}\n" if think else f"\n{THOUGHT}\n\n"
    _check_length(tokenizer, text, most)
    ids: list[int] = []
    for piece in filter(None, re.split("(" + "|".join(map(re.escape, marks)) + ")", text) if marks else [text]):
        ids += encode(tokenizer, marks.get(piece, piece), plain=piece in marks)
    return ids


def encode(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    plain: bool = False,
    add_special: bool = False,
    most: int | None = None,
) -> list[int]:
    """Token ids of a text. `plain`: special tokens in it are text; `add_special`: with those around every text.

    `most`: raise CapacityError for a text so long that it has more tokens, as to count them would take seconds.

    For several threads at once: transformers' `split_special_tokens` is a setting of the tokenizer itself, which one
    thread would change under another. Raises KtransError for what is no text.
    """
    _check_length(tokenizer, text, most)
    backend = tokenizer.backend_tokenizer
    if plain:
        backend = _without_special(backend)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at {error.start}"
        raise KtransError(f"the text has {half}, half of a pair that JSON writes a character as") from error
    return list(backend.encode(text, add_special_tokens=add_special).ids)


def _check_length(tokenizer: PreTrainedTokenizerFast, text: str, most: int | None) -> None:
    """CapacityError for more characters than `most` tokens have."""
    if most is not None and len(text) > most * _longest(tokenizer):
        raise CapacityError(
            f"the prompt has {len(text)} characters, so more tokens than the {most} of the context. Shorten it, or "
            "start with a larger context if the model has one"
        )


@lru_cache(4)
def _longest(tokenizer: PreTrainedTokenizerFast) -> int:
    """Characters of the longest token; a byte of it is one here, which a character has at least."""
    return max(map(len, tokenizer.get_vocab()))


def _without_special(backend: Tokenizer) -> Tokenizer:
    """The same vocabulary and rules, nothing of it copied, without special tokens: made in some microseconds."""
    made = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if (value := getattr(backend, part)) is not None:
            setattr(made, part, value)
    made.add_tokens([token for token in backend.get_added_tokens_decoder().values() if not token.special])
    return made


__all__ = [
    "CHUNK",
    "THINK",
    "THOUGHT",
    "Sampling",
    "Session",
    "Statistics",
    "chunk_of",
    "encode",
    "encode_chat",
    "stop_tokens",
]
