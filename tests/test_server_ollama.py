"""Ollama's API over the embedded model, asked by Ollama's own client and by hand."""

import json
from typing import Any

import httpx
import ollama
import pytest
from served import KEY, QUESTION, STORY, Served, scripted

from ktcompile.request import Finished, Usage

THOUGHT = "This is an easy question. I will answer in one sentence."
ANSWER = "The capital of France is Paris."
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 60}
ASK: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "options": GREEDY}


@pytest.fixture(scope="module")
def client(served: Served) -> ollama.Client:
    return ollama.Client(served.base, headers={"authorization": f"Bearer {KEY}"}, timeout=120)


@pytest.mark.parametrize("think", [None, False, True, "low"])
def test_chat_whole_and_streamed(client: ollama.Client, think: Any) -> None:
    whole = client.chat(**ASK, think=think)
    assert (whole.message.role, whole.message.content, whole.done_reason) == ("assistant", ANSWER, "stop")
    assert whole.message.thinking == (THOUGHT if think else None)
    pieces = list(client.chat(**ASK | {"model": "tiny:latest"}, think=think, stream=True))
    assert [p.done for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(p.message.content or "" for p in pieces) == ANSWER
    assert "".join(p.message.thinking or "" for p in pieces) == (THOUGHT if think else "")
    last = pieces[-1]
    assert (last.prompt_eval_count, last.eval_count) == (whole.prompt_eval_count, whole.eval_count)
    assert last.prompt_eval_count == (13 if think else 11) and last.load_duration == 0
    assert last.eval_duration and last.total_duration and last.total_duration > last.eval_duration > 10**5


def test_generate(client: ollama.Client) -> None:
    prompt = QUESTION[0]["content"]
    whole = client.generate("tiny", prompt, options=GREEDY)
    assert whole.response == ANSWER and whole.prompt_eval_count == 11
    assert "".join(p.response for p in client.generate("tiny", prompt, options=GREEDY, stream=True)) == ANSWER
    assert client.generate("tiny", prompt, options=GREEDY, think=True).thinking == THOUGHT
    told = client.generate("tiny", prompt, system="Be brief.", options=GREEDY)
    assert (told.prompt_eval_count or 0) > 11
    raw = client.generate("tiny", "Once upon a time", raw=True, options=GREEDY | {"num_predict": 8})
    assert raw.response.startswith(",") and (raw.eval_count, raw.done_reason) == (8, "length")


def test_generate_fills_in(served: Served, client: ollama.Client) -> None:
    before, after = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
    filled = client.generate("tiny", before, suffix=after, options=GREEDY | {"num_predict": 8})
    body = {"prompt": before, "suffix": after, "temperature": 0, "max_tokens": 8}
    assert filled.response == served.post("/v1/completions", body).json()["choices"][0]["text"]
    assert "insert" in (client.show("tiny").capabilities or [])


CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_an_answer_has_the_form(client: ollama.Client) -> None:
    assert json.loads(client.chat(**ASK, format=CITY).message.content or "")["city"] in ("Paris", "Rome")
    answer = client.generate("tiny", "A city?", format=CITY, options=GREEDY)
    assert json.loads(answer.response)["city"] in ("Paris", "Rome")
    assert (client.chat(**ASK, format="json").message.content or "").startswith("{")


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
      city: its name
    """
    return f"sunny in {city}"


def test_tools_are_called_and_answer(served: Served, client: ollama.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(f'{{"name": "get_weather", "arguments": {{"city": "{city}"}}}}' for city in ("Paris", "Rome"))
    monkeypatch.setattr(
        served.state.engine, "submit", scripted(Finished("stop", Usage(3, 9)), "<think>a</think>", *text)
    )
    whole = client.chat(**ASK, tools=[get_weather])
    assert [c.function.arguments for c in whole.message.tool_calls or ()] == [{"city": "Paris"}, {"city": "Rome"}]
    assert (whole.message.content, whole.message.thinking, whole.done_reason) == ("", "a", "stop")
    pieces = [p.message for p in client.chat(**ASK, tools=[get_weather], stream=True)]
    calls = [(len(p.tool_calls), p.tool_calls[0]) for p in pieces if p.tool_calls]
    assert calls == [(1, call) for call in whole.message.tool_calls or ()]
    cut = scripted(Finished("length", Usage(3, 9)), *text[:50])
    monkeypatch.setattr(served.state.engine, "submit", cut)
    assert client.chat(**ASK, tools=[get_weather]).message.content == 'get_weather({"city": "Par)'
    pieces = [p.message for p in client.chat(**ASK, tools=[get_weather], stream=True)]
    assert [p.content for p in pieces if p.content] == ['get_weather({"city": "Par)']
    monkeypatch.undo()
    assert whole.message.tool_calls is not None
    called = whole.message.tool_calls[0].function
    result = {"role": "tool", "tool_name": called.name, "content": get_weather(**called.arguments)}
    last = client.chat(**ASK | {"messages": [*QUESTION, whole.message, result]}, tools=[get_weather])
    assert last.done and last.prompt_eval_count and last.prompt_eval_count > 100


def test_options(served: Served, client: ollama.Client) -> None:
    nothing = dict.fromkeys(("options", "tools", "format", "think", "keep_alive")) | {"stream": False}
    before = {"role": "assistant", "content": None, "tool_calls": None}
    assert served.post("/api/chat", ASK | nothing | {"messages": [before, *QUESTION]}).json()["done"]

    def ask(**options: Any) -> ollama.ChatResponse:
        return client.chat("tiny", STORY, options={"num_predict": 12, "num_ctx": 1 << 20, "mirostat": 0} | options)

    assert ask(seed=7, temperature=1).message == ask(seed=7, temperature=1).message
    assert ask(top_k=1, temperature=1).message == ask(temperature=0).message
    assert "Max" not in (ask(temperature=0, stop=["Max"], num_predict=-1).message.content or "")
    assert ask(num_predict=3, repeat_penalty=1.1).eval_count == 3
    assert ask(num_predict=-2, temperature=0).done_reason == ask(num_predict=-1, temperature=0).done_reason


def test_what_it_says_about_itself(served: Served, client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == "tiny" and model.size is not None and model.size > 10**7
    shown = client.show("tiny")
    assert shown.modelinfo == {"general.architecture": "deepseek_v3", "deepseek_v3.context_length": 1024}
    assert shown.capabilities == ["completion", "tools", "insert", "thinking"] and "add_generation_prompt" in (
        shown.template or ""
    )
    assert served.http.get("/api/version").json()["version"].count(".") == 2
    assert client.chat("tiny").done_reason == client.generate("tiny").done_reason == "load"


def test_lines_say_that_they_live(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcompile.server.answers.PING_SECONDS", 1e-4)
    stream = served.post("/api/chat", ASK)
    assert stream.headers["content-type"] == "application/x-ndjson" and stream.headers["cache-control"] == "no-cache"
    lines = [json.loads(line) for line in stream.text.splitlines()]
    assert any(not line["done"] and not line["message"]["content"] for line in lines)
    assert "".join(line["message"]["content"] for line in lines) == ANSWER


@pytest.mark.parametrize(
    ("path", "change", "told"),
    [
        ("chat", {"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role: "),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, "messages[0].images: this"),
        ("chat", {"options": {"temperature": -1}}, "temperature -1"),
        ("chat", {"options": {"num_predict": "5"}}, "options.num_predict: "),
        ("chat", {"options": {"num_predict": 0}}, "max_tokens 0: allowed is 1"),
        ("chat", {"messages": [{"role": "user", "content": "word " * 5000}]}, "the context holds 1024"),
        ("generate", {"prompt": "a", "images": ["aGk="]}, "images: this model takes"),
        ("generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template: "),
        ("generate", {"prompt": "a", "context": [1, 2]}, "context: "),
        ("generate", {"prompt": "a", "raw": True, "format": "json"}, "format: not of a text that goes on"),
        ("chat", {"format": "yaml"}, "format"),
        ("chat", {"format": {"type": "wrong"}}, "format: "),
        ("chat", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)  # fmt: skip
def test_what_is_refused(served: Served, path: str, change: dict[str, Any], told: str) -> None:
    answer = served.post(f"/api/{path}", ASK | change)
    assert answer.status_code == 400 and list(answer.json()) == ["error"] and told in answer.json()["error"]
    assert served.idle()


def test_what_is_not_offered(served: Served, client: ollama.Client) -> None:
    calls = (client.pull, client.push, client.delete, client.create, lambda m: client.copy(m, "b"), client.embed)
    for call in calls:
        with pytest.raises(ollama.ResponseError, match="is not offered: the model that was given") as caught:
            call("tiny")
        assert caught.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="there is 'tiny'") as caught:
        client.chat("llama3", QUESTION)
    assert caught.value.status_code == 404
    keyless = httpx.post(f"{served.base}/api/chat", json=ASK)
    assert (keyless.status_code, keyless.json()) == (401, {"error": "the API key is missing or wrong"})
