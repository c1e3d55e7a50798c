"""What clients send: the fields that are used, with their limits. Unknown ones are accepted and left alone."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator

from ktcompile.sampling import Sampling
from ktcompile.server.errors import ApiError
from ktcompile.server.prompt import Form
from ktcompile.server.tools import Tool, Tools

MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH, MAX_BIASES, MAX_TOP_LOGPROBS, MAX_CHOICES = 2048, 16, 256, 1024, 20, 8
MAX_TOOLS = 256
"""Of one request. A context holds fewer messages; the others are what OpenAI takes, or more."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Body(BaseModel):
    """A request's JSON. Whole numbers are not taken for strings, nor strings for numbers."""

    model_config = ConfigDict(extra="ignore")


class Part(Body):
    """A part of a message. Text alone is taken."""

    type: StrictStr
    text: StrictStr | None = None


class CalledFunction(Body):
    """A function that was called, with its arguments as text."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(Body):
    """A call of an earlier answer."""

    id: StrictStr = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Turn(Body):
    """A message of a conversation. A `tool` message is the result of the call `tool_call_id`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[Part] | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: StrictStr | None = None
    name: StrictStr | None = None

    def plain(self, index: int) -> dict[str, Any]:
        """What `prompt_of` takes. ApiError for parts that are no text: nothing is ever fetched."""
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
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.role == "assistant" and self.tool_calls:
            found["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role == "tool":
            found |= {k: v for k, v in (("tool_call_id", self.tool_call_id), ("name", self.name)) if v is not None}
        return found


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

    @field_validator("logit_bias", mode="before")  # before each of a million is looked at
    @classmethod
    def _few_biases(cls, given: object) -> object:
        if isinstance(given, dict) and len(given) > MAX_BIASES:
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


class Function(Body):
    """A function that may be called."""

    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class OfferedTool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """By its name."""

    name: StrictStr


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """The form of an answer."""

    name: StrictStr = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Body):
    """What form an answer has to have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    def form(self) -> Form | None:
        """The form. ApiError for a schema that is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Form({"type": "object"})
        if self.json_schema is None:
            raise refused("response_format", "json_schema without a schema", "{type, json_schema: {name, schema}}")
        return Form(self.json_schema.schema_, bool(self.json_schema.strict))


class TemplateSwitches(Body):
    """Of what is given to the model's template: whether to think, by the names that templates have for it."""

    thinking: StrictBool | None = None
    enable_thinking: StrictBool | None = None


class Calling(Body):
    """What an answer may call."""

    tools: list[OfferedTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    def may_call(self) -> Tools:
        """The tools. ApiError for names that are none or stand twice, and for a choice that is not there."""
        given = [tool.function for tool in self.tools or ()]
        choice = self.tool_choice or "auto"
        for i, function in enumerate(given):
            if not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,128}", function.name):
                raise refused(f"tools[{i}].function.name", repr(function.name), "1 to 128 letters, digits, _ - . : /")
        names = [function.name for function in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise refused("tools", f"{twice[0]!r} twice", "each name once")
        only = choice.function.name if isinstance(choice, NamedTool) else None
        if only is not None and only not in names:
            raise refused(
                "tool_choice", repr(only), f"the tools of the request: {', '.join(names) or 'there are none'}"
            )
        if choice == "required" and not names:
            raise refused("tool_choice", "'required' without tools", "a request with tools")
        if choice == "none":
            return Tools()
        tools = tuple(Tool(f.name, f.description or "", f.parameters, bool(f.strict)) for f in given)
        return Tools(tools, choice != "auto", only, self.parallel_tool_calls is not False)


class ChatRequest(Generation, Calling):
    """`POST /v1/chat/completions`."""

    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: StrictStr | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    functions: Any = None
    function_call: Any = None

    def think(self) -> bool | None:
        """Whether the answer begins with a thought; None: as the server was started."""
        given = self.chat_template_kwargs or TemplateSwitches()
        found = given.thinking if given.enable_thinking is None else given.enable_thinking
        return False if found is None and self.reasoning_effort == "none" else found

    def plain(self) -> list[dict[str, Any]]:
        """The conversation as `prompt_of` takes it."""
        return [turn.plain(i) for i, turn in enumerate(self.messages)]

    def form(self) -> Form | None:
        """The form that an answer must have."""
        return None if self.response_format is None else self.response_format.form()

    def may_call(self) -> Tools:
        """The tools. ApiError for what was before there were tools."""
        if self.functions is not None or self.function_call is not None:
            what = "functions and function_call are not taken; give the same as tools and tool_choice"
            raise ApiError(400, what, param="functions", code="unsupported_parameter")
        return super().may_call()

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


__all__ = [
    "Calling",
    "ChatRequest",
    "CompletionRequest",
    "Generation",
    "Part",
    "StreamOptions",
    "TemplateSwitches",
    "Turn",
    "refused",
]
