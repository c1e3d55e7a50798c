"""What clients send: the fields that are used, with their limits. Unknown ones are accepted and left alone."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

from ktcompile.sampling import Sampling
from ktcompile.server.errors import ApiError

MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_TOP_LOGPROBS, MAX_CHOICES = 2048, 16, 256, 1024, 20, 8
"""Of one request. A context holds fewer messages; the others are what OpenAI takes, or more."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Body(BaseModel):
    """A request's JSON. Whole numbers are not taken for strings, nor strings for numbers."""

    model_config = ConfigDict(extra="ignore")


class Part(Body):
    """A part of a message. Text alone is taken."""

    type: StrictStr
    text: StrictStr | None = None


class Turn(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[Part] | None = None

    def plain(self, index: int) -> dict[str, str]:
        """Role and text. ApiError for parts that are no text: nothing is ever fetched."""
        texts = []
        for part in self.content if isinstance(self.content, list) else ():
            if part.type not in ("text", "input_text") or part.text is None:
                raise ApiError(
                    400,
                    f"messages[{index}] has a part of type {part.type!r}; this model takes text alone",
                    param=f"messages[{index}].content",
                    code="unsupported_content",
                )
            texts.append(part.text)
        text = self.content if isinstance(self.content, str) else "".join(texts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    """What a stream has beside its text."""

    include_usage: StrictBool = False


class Generation(Body):
    """What all ways to generate have in common. None: the server's default."""

    model: StrictStr | None = None
    max_tokens: StrictInt | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    n: StrictInt | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: dict[StrictStr, Number] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("logit_bias")
    @classmethod
    def _few_biases(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        if given is not None and len(given) > MAX_BIASES:
            raise ValueError(f"{len(given)} biases, {MAX_BIASES} are taken")
        return given

    def sampling(self, default: Sampling) -> Sampling:
        """How tokens are chosen. ApiError names the field and what it may be."""
        limits = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "top_k": (-1, 1 << 31)}
        values = {name: getattr(self, name) for name in limits}
        for name, (low, high) in limits.items():
            if values[name] is not None and not low <= values[name] <= high:
                raise refused(name, values[name], f"{low} to {high}")
        found = {name: getattr(default, name) if value is None else value for name, value in values.items()}
        seed = default.seed if self.seed is None else self.seed & (1 << 64) - 1
        return Sampling(found["temperature"], found["top_p"], max(0, found["top_k"]), found["min_p"], seed)

    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(given) > MAX_STOPS:
            raise refused("stop", f"{len(given)} texts", f"up to {MAX_STOPS}")
        if any(not 0 < len(text) <= MAX_STOP_LENGTH for text in given):
            raise refused("stop", "an empty or a long text", f"1 to {MAX_STOP_LENGTH} characters")
        return given

    def choices(self) -> int:
        """How many answers."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= MAX_CHOICES:
            raise refused("n", count, f"1 to {MAX_CHOICES}")
        return count

    def most(self, default: int | None) -> int | None:
        """Most new tokens; None: as many as fit. -1 is no limit, and more than fit are as many as fit."""
        asked = default if self.max_tokens is None else self.max_tokens
        if asked is None or asked == -1:
            return None
        if asked < 1:
            raise refused("max_tokens", asked, "1 and more, or -1 for no limit")
        return asked

    def penalties(self) -> tuple[float, float, float]:
        """Presence, frequency, repetition."""
        found = []
        for name, low, high, none in (
            ("presence_penalty", -2, 2, 0.0),
            ("frequency_penalty", -2, 2, 0.0),
            ("repetition_penalty", 0.01, 100, 1.0),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise refused(name, value, f"{low} to {high}")
            found.append(none if value is None else float(value))
        return found[0], found[1], found[2]

    def biases(self, vocabulary: int) -> dict[int, float]:
        """Logits added to tokens."""
        found = {}
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and int(token) < vocabulary):
                raise refused("logit_bias", token, f"token ids from 0 to {vocabulary - 1}")
            if not -100 <= bias <= 100:
                raise refused("logit_bias", bias, "-100 to 100")
            found[int(token)] = -math.inf if bias == -100 else bias
        return found


class ResponseFormat(Body):
    """What form an answer has to have."""

    type: StrictStr = "text"


class ChatRequest(Generation):
    """`POST /v1/chat/completions`. `tools` are not looked at: an answer is text."""

    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    response_format: ResponseFormat | None = None

    def plain(self) -> list[dict[str, str]]:
        """The conversation as a template takes it. ApiError where the answer has to have a form."""
        if self.response_format is not None and self.response_format.type != "text":
            raise ApiError(
                400,
                f"response_format {self.response_format.type!r}: this server promises no form; leave it out, or 'text'",
                param="response_format",
                code="unsupported_format",
            )
        return [turn.plain(i) for i, turn in enumerate(self.messages)]

    def alternatives(self) -> int | None:
        """How many likely tokens are told beside each chosen one; None: not even that one's probability."""
        count = self.top_logprobs or 0
        if not 0 <= count <= MAX_TOP_LOGPROBS:
            raise refused("top_logprobs", count, f"0 to {MAX_TOP_LOGPROBS}")
        return count if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`; with a `suffix` what is between the two (fill in the middle)."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr]
    suffix: StrictStr | None = None
    echo: StrictBool | None = None
    logprobs: StrictInt | None = None


def refused(param: str, value: object, allowed: str) -> ApiError:
    """400 for a value that is not allowed."""
    return ApiError(400, f"{param} {value}: allowed is {allowed}", param=param, code="invalid_value")


__all__ = ["ChatRequest", "CompletionRequest", "Generation", "Part", "StreamOptions", "Turn", "refused"]
