"""Tools and forms of answers: what the model is told, what it must write, and what OpenAI's own client makes of it."""

import copy
import json
import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from conftest import Golden
from openai import BadRequestError
from pydantic import BaseModel, ConfigDict, TypeAdapter
from served import QUESTION, Served
from timing import within

from ktcompile.checkpoint import open_checkpoint
from ktcompile.errors import KtransError
from ktcompile.generate import Sampling
from ktcompile.request import Finished, Piece, Usage
from ktcompile.server import State
from ktcompile.server.calls import DEEPSEEK, DEEPSEEK_V3, HERMES, PLAIN
from ktcompile.server.prompt import Form, prompt_of
from ktcompile.server.tools import Template, Tool, Tools
from ktcompile.text import Text

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
OFFERED = (Tool("get_weather", "Weather of a city.", WEATHER, True), Tool("get_time"))
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Bath and York?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": f"c{i}",
                "type": "function",
                "function": {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'},
            }
            for i, city in enumerate(["Bath", "York"])
        ],
    },
    {"role": "tool", "tool_call_id": "c0", "content": "rain"},
    {"role": "tool", "tool_call_id": "c1", "content": "sun"},
]

# As these models' own templates write calls, and nothing else of them.
_CALLS = "{% for m in messages %}[{{ m.role }}]{{ m.content if m.content is not none }}"
DEEPSEEK_V3_SOURCE = _CALLS + (
    "{% if m.role == 'assistant' and m.content is none %}<｜tool▁calls▁begin｜>{% for t in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + t['type'] + '<｜tool▁sep｜>' + t['function']['name'] + '\\n' + '```json' + '\\n' + "
    "t['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>' }}"
    "{{ '' if loop.last else '\\n' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}{% endfor %}"
)
DEEPSEEK_SOURCE = _CALLS + (
    "{% if m.role == 'assistant' and m.content is none %}<｜tool▁calls▁begin｜>{% for t in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + t['function']['name'] + '<｜tool▁sep｜>' + t['function']['arguments'] + "
    "'<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}{% endfor %}"
)
HERMES_SOURCE = (
    "{% if tools %}# Tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n"
    '<tool_call>\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\n</tool_call>\n{% endif %}'
    + _CALLS
    + '{% for t in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ t.function.name }}", "arguments": '
    "{{ t.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}"
)
OTHER_SOURCE = "{% for t in tools or [] %}<function={{ t }}>{% endfor %}" + _CALLS + "{% endfor %}"
SOURCES = {
    "deepseek_v3": (DEEPSEEK_V3_SOURCE, DEEPSEEK_V3),
    "deepseek": (DEEPSEEK_SOURCE, DEEPSEEK),
    "hermes": (HERMES_SOURCE, HERMES),
    "other": (OTHER_SOURCE, PLAIN),
}


def state_with(source: str, *special: str) -> State:
    """A server's state without an engine: the embedded model's tokens and another template."""
    checkpoint = open_checkpoint()
    tokenizer = copy.deepcopy(checkpoint.tokenizer)
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.chat_template = source
    state = State("m", Sampling(), tokenizer=tokenizer, stop_tokens=frozenset({1}))
    config = SimpleNamespace(vocab_size=len(tokenizer))
    model = SimpleNamespace(config=config)
    state.engine = SimpleNamespace(tokenizer=tokenizer.backend_tokenizer, model=model, context=4096)
    return state


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_model_is_told(name: str, golden: Golden) -> None:
    source, format = SOURCES[name]
    assert Template.of(source).format == format
    state = state_with(source)
    prompt = prompt_of(state, TURNS, Tools(OFFERED))
    golden(f"tools_{name}", state.tokenizer.decode(prompt.ids) + "\n")


@pytest.mark.parametrize(
    "tools", [Tools(OFFERED, True), Tools(OFFERED, True, "get_time"), Tools(OFFERED, True, None, False)]
)
@pytest.mark.parametrize("name", SOURCES)
def test_what_it_must_write_is_read(name: str, tools: Tools) -> None:
    """Whatever of the allowed tokens comes, it is calls of these tools, with arguments as their schemas say."""
    source, _ = SOURCES[name]
    special = [mark for mark in ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁end｜>", "<tool_call>") if mark in source]
    state = state_with(source, *special)
    prompt = prompt_of(state, TURNS[:2], tools)
    assert prompt.grammar is not None and prompt.say >= set(map(state.tokenizer.convert_tokens_to_ids, special))
    for seed in range(4):
        draw, matcher, tokens = random.Random(seed), prompt.grammar.matcher(), list[int]()
        while not matcher.is_complete:
            allowed = matcher.allowed().nonzero().flatten().tolist()
            if 1 in allowed and draw.random() < 0.5:
                break
            tokens.append(draw.choice([t for t in allowed if t != 1]))
            matcher.push(tokens[-1])
        said = Text(state.tokenizer.backend_tokenizer, [], True, prompt.say)
        text = "".join(map(said.push, tokens))
        deltas = prompt.deltas()
        found = deltas.of(Piece(text, 0, 0.0)) + deltas.of(Finished("stop", Usage(1)))
        names = [d.text for d in found if d.kind == "call"]
        assert (
            names
            and not any(d.kind == "text" for d in found)
            and deltas.reason(Finished("stop", Usage(1))) == "tool_calls"
        )
        assert len(names) == 1 or tools.parallel
        for i, called in enumerate(names):
            assert tools.only in (None, called)
            arguments = json.loads("".join(d.text for d in found if d.kind == "arguments" and d.call == i))
            assert arguments == {} if called == "get_time" else arguments["days"] in (1, 2, 3)


def test_special_tokens_of_tools_stay_text() -> None:
    """In what is told of them, and in calls and results."""
    end = "<｜end▁of▁sentence｜>"
    state = state_with(HERMES_SOURCE)
    call = {"id": "c", "type": "function", "function": {"name": "get_time", "arguments": f'{{"a": "{end}"}}'}}
    turns = [*QUESTION, {"role": "assistant", "content": end, "tool_calls": [call]}, {"role": "tool", "content": end}]
    prompt = prompt_of(state, turns, Tools((Tool("get_time", f"Time{end}", {"properties": {end: {}}}),)))
    text = state.tokenizer.decode(prompt.ids)
    assert text.count(end) == 5 and state.tokenizer.eos_token_id not in prompt.ids


def test_a_thought_may_come_first() -> None:
    """As it must where the prompt ends inside of one."""
    state = state_with("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>\\n' if not tools }}")
    prompt = prompt_of(state, QUESTION, form=Form(WEATHER, True))
    assert prompt.thinks and prompt.grammar is not None
    for text, fits in (("so </think>\n\n{", True), ("so </think> no", False)):
        matcher = prompt.grammar.matcher()
        ids = state.tokenizer(text, add_special_tokens=False)["input_ids"]
        with nullcontext() if fits else pytest.raises(KtransError, match="grammar"):
            for token in ids:
                matcher.push(token)


# ------------------------------------------------------------------------------------------------ OpenAI's client


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    given = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **given, **more}}


TOOLS = [tool("get_weather", WEATHER, description="Weather of a city.", strict=True), tool("get_time")]


def ask(served: Served, **given: Any) -> Any:
    given = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 200} | given
    return served.client.chat.completions.create(**given)


class Short(BaseModel):
    """openai-python makes the schema of it."""

    kind: Literal["a", "b"]
    flag: bool


class Weather(BaseModel):
    """What the schema says."""

    model_config = ConfigDict(extra="forbid")
    city: str
    days: int


def test_text_where_tools_may_be_called(served: Served) -> None:
    free = ask(served, tools=TOOLS, max_tokens=8).choices[0]
    assert free.message.content and not free.message.tool_calls and free.finish_reason == "length"
    none = ask(served, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.content == "The capital of France is Paris." and none.finish_reason == "stop"


def test_required_and_named_calls(served: Served) -> None:
    choice = ask(served, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.type == "function" and call.id.startswith("call_")
    if call.function.name == "get_weather":
        Weather.model_validate_json(call.function.arguments)
    named = {"type": "function", "function": {"name": "get_time"}}
    choices = ask(served, tools=TOOLS, tool_choice=named, parallel_tool_calls=False, n=2, temperature=1, seed=1).choices
    calls = [choice.message.tool_calls[0] for choice in choices]
    assert [(c.function.name, c.function.arguments) for c in calls] == [("get_time", "{}")] * 2
    assert calls[0].id != calls[1].id


def test_a_streamed_call_is_the_whole_one(served: Served) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    given: dict[str, Any] = {"tools": TOOLS, "tool_choice": named, "parallel_tool_calls": False}
    (call,) = ask(served, **given).choices[0].message.tool_calls
    choices = [chunk.choices[0] for chunk in ask(served, **given, stream=True)]
    pieces = [piece for choice in choices for piece in choice.delta.tool_calls or ()]
    assert (pieces[0].function.name, pieces[0].type, pieces[0].function.arguments) == ("get_weather", "function", "")
    assert pieces[0].id and not any(p.id or p.function.name for p in pieces[1:])
    assert {p.index for p in pieces} == {0} and len(pieces) > 3
    assert "".join(p.function.arguments for p in pieces) == call.function.arguments
    assert choices[-1].finish_reason == "tool_calls" and not any(c.delta.content for c in choices)


def test_results_go_back(served: Served) -> None:
    first = ask(served, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "It is sunny."}
    turns = [*QUESTION, first.model_dump(exclude_none=True), result]
    assert ask(served, messages=turns, tools=TOOLS, max_tokens=8).choices[0].message.content
    null = [*QUESTION, first.model_dump(), result]  # content: null
    prompt = served.post("/apply-template", {"messages": null, "tools": TOOLS}).json()["prompt"]
    assert '"name": "get_time", "parameters"' in prompt and prompt.count('{"name": "NAME"') == 1
    assert f"Result of {first.tool_calls[0].function.name}: It is sunny." in prompt


def test_json_of_a_schema(served: Served) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": WEATHER}}
    choice = ask(served, response_format=form).choices[0]
    assert choice.finish_reason == "stop"
    Weather.model_validate_json(choice.message.content)
    given: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 200, "temperature": 1.0, "seed": 5, "n": 3}
    parsed = served.client.chat.completions.parse(response_format=Short, **given)
    assert all(choice.message.parsed.kind in ("a", "b") for choice in parsed.choices)
    texts = "".join(c.choices[0].delta.content or "" for c in ask(served, response_format=form, stream=True))
    assert texts == choice.message.content


def test_a_json_object(served: Served) -> None:
    choice = ask(served, response_format={"type": "json_object"}, temperature=1.5, seed=3, max_tokens=200).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(TypeAdapter(dict).validate_json(choice.message.content), dict)
    assert choice.message.content.startswith("{")


NAMED_F = {"type": "function", "function": {"name": "f"}}
REMOTE = {"$ref": "http://127.0.0.1:9/"}
UNKNOWN = {"properties": {"a": {"not": {}}}}


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"tools": [tool(f"f{i}") for i in range(10**4)]}, "tools", "invalid_value"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [tool("f"), tool("f")]}, "tools", "invalid_value"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type", "invalid_value"),
        ({"tools": TOOLS, "tool_choice": NAMED_F}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"tools": [tool("f"), tool("g", REMOTE)], "tool_choice": "required"}, "tools[1]", "invalid_schema"),
        ({"tools": [tool("f", UNKNOWN, strict=True)], "tool_choice": "required"}, "tools[0]", "invalid_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_refused(served: Served, change: dict[str, Any], param: str, code: str) -> None:
    def refused() -> None:
        with pytest.raises(BadRequestError) as caught:
            ask(served, **change)
        assert (caught.value.param, caught.value.code) == (param, code), str(caught.value)

    assert within(1, refused)


def test_schemas_that_would_take_minutes(served: Served) -> None:
    """Refused in a second; whoever is answered meanwhile does not notice."""
    deep = '{"properties": {"a": ' * 10**4 + "{}" + "}}" * 10**4
    body = '{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": '
    json_type = {"content-type": "application/json"}
    answer = served.http.post("/v1/chat/completions", content=f'{body}{{"schema": {deep}}}}}}}', headers=json_type)
    assert answer.status_code == 400
    multiples = {"allOf": [{"type": "integer", "multipleOf": i} for i in range(100, 105)]}
    levels: dict[str, Any] = {}
    for _ in range(80):
        levels = {"type": "object", "properties": {"a": levels}}
    for schema, why in ((multiples, "takes more than"), (levels, "levels"), ({"$ref": "#"}, "schema")):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

        def refused(form: Any = form, why: str = why) -> None:
            with pytest.raises(BadRequestError, match=why) as caught:
                ask(served, response_format=form)
            assert caught.value.param == "response_format"

        assert within(1, refused) and served.idle()
    assert ask(served, max_tokens=4).choices[0].message.content
