"""Anthropic's API over the embedded model, asked by Anthropic's own client and by hand."""

import json
import socket
from typing import Any

import anthropic
import httpx
import pytest
from served import KEY, QUESTION, STORY, Served, scripted

from ktcompile.errors import BusyError
from ktcompile.request import Finished, Usage

THOUGHT = "This is an easy question. I will answer in one sentence."
ANSWER = "The capital of France is Paris."
BODY: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 60, "temperature": 0}
ASK = {k: v for k, v in BODY.items() if k != "temperature"} | {"extra_body": {"temperature": 0, "n": 3, "unknown": 1}}
"""The client has no temperature any more; the API has."""


@pytest.fixture(scope="module")
def client(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.base, api_key=KEY, max_retries=0, timeout=120)


def test_a_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**ASK)
    assert [(b.type, b.text) for b in answer.content] == [("text", ANSWER)]
    assert (answer.role, answer.stop_reason, answer.stop_sequence) == ("assistant", "end_turn", None)
    assert answer.usage.input_tokens == 11 and answer.usage.output_tokens == 10
    again = client.messages.create(**ASK | {"messages": [{"role": "user", "content": "What is this? " * 40}]})
    assert again.usage.cache_read_input_tokens == 0
    again = client.messages.create(**ASK | {"messages": [{"role": "user", "content": "What is this? " * 40}]})
    usage = again.usage
    assert usage.cache_read_input_tokens and usage.cache_read_input_tokens > 10 * usage.input_tokens > 0


@pytest.mark.parametrize("think", [False, True])
def test_a_stream_says_the_same(client: anthropic.Anthropic, think: bool) -> None:
    thinking: dict[str, Any] = {"type": "enabled", "budget_tokens": 1024} if think else {"type": "disabled"}
    whole = client.messages.create(**ASK, thinking=thinking)
    with client.messages.stream(**ASK, thinking=thinking) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert streamed.content[-1].text == ANSWER and streamed.stop_reason == whole.stop_reason == "end_turn"
    assert [b.type for b in whole.content] == (["thinking", "text"] if think else ["text"])
    assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
    assert whole.content[-1].text == ANSWER and (not think or whole.content[0].thinking == THOUGHT)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == len(whole.content)


def test_the_events_of_a_stream(served: Served) -> None:
    stream = served.post("/v1/messages", BODY | {"stream": True, "thinking": {"type": "enabled"}, "max_tokens": 24})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-cache"
    blocks = [block.split("\n") for block in stream.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    assert events[0]["message"]["usage"]["input_tokens"] == 13 and events[0]["message"]["content"] == []
    assert events[1] == {"type": "ping"}
    assert events[2]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[3]["delta"] == {"type": "thinking_delta", "thinking": "This"}
    assert [e["index"] for e in events if "index" in e] == sorted(e["index"] for e in events if "index" in e)
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 24


def test_a_stream_says_that_it_lives(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktcompile.server.answers.PING_SECONDS", 1e-4)
    stream = served.post("/v1/messages", BODY | {"stream": True})
    assert stream.text.count('event: ping\ndata: {"type": "ping"}\n\n') > 1


def test_systems_blocks_and_stops(served: Served, client: anthropic.Anthropic) -> None:
    names = ("tools", "tool_choice", "system", "thinking", "output_config", "stop_sequences", "stream")
    assert served.post("/v1/messages", BODY | dict.fromkeys(names)).json()["content"][0]["text"] == ANSWER
    stopped = client.messages.create(**ASK, stop_sequences=["of Fr"])
    assert stopped.content[0].text == "The capital "
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "of Fr")
    cut = client.messages.create(**ASK | {"messages": STORY, "max_tokens": 5})
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 5
    text, turns = (
        [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        QUESTION[0]["content"],
    )
    counts = [
        client.messages.count_tokens(model="tiny", messages=messages, system=system).input_tokens
        for system, messages in (
            ("Be brief.", QUESTION),
            (text, [{"role": "user", "content": [{"type": "text", "text": turns}]}]),
        )
    ]
    assert counts[0] == counts[1] > client.messages.count_tokens(model="tiny", messages=QUESTION).input_tokens == 11  # type: ignore[arg-type]
    thought = {"type": "thinking", "thinking": "long ago " * 50, "signature": ""}
    said = {"type": "text", "text": ANSWER}
    turns = [*QUESTION, {"role": "assistant", "content": [thought, said]}, *QUESTION]
    plain = [*QUESTION, {"role": "assistant", "content": ANSWER}, *QUESTION]
    assert len({client.messages.count_tokens(model="tiny", messages=m).input_tokens for m in (turns, plain)}) == 1


WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
                     "additionalProperties": False},
}  # fmt: skip


def test_a_tool_is_called_and_answers(client: anthropic.Anthropic) -> None:
    must = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    ask: Any = ASK | {"tools": [WEATHER], "tool_choice": must}
    whole = client.messages.create(**ask)
    (call,) = whole.content
    assert call.type == "tool_use" and call.name == "get_weather" and call.input["city"] in ("Paris", "Rome")
    assert whole.stop_reason == "tool_use"
    with client.messages.stream(**ask) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.type, streamed.name, streamed.input) == (call.type, call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    more = [{"role": "assistant", "content": [call.to_dict()]}, {"role": "user", "content": [result]}]
    both: Any = ASK | {"tools": [WEATHER], "messages": [*QUESTION, *more]}
    usage = client.messages.create(**both).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) > whole.usage.input_tokens
    assert client.messages.create(**ask | {"tool_choice": {"type": "none"}}).content[0].text == ANSWER


def test_an_answer_has_the_form(client: anthropic.Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "schema": WEATHER["input_schema"]}}
    answer = client.messages.create(**ASK, output_config=form)
    assert json.loads(answer.content[0].text)["city"] in ("Paris", "Rome") and answer.stop_reason == "end_turn"


CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'


@pytest.mark.parametrize(
    ("text", "reason", "blocks"),
    [
        (f"<think>so</think>{CALL}", "tool_use", ["thinking", "tool_use"]),
        (f"{CALL}\n{CALL}", "tool_use", ["tool_use", "tool_use"]),
        (CALL[:-7], "max_tokens", ["text"]),
        ("no", "end_turn", ["text"]),
    ],
)
def test_blocks(served: Served, monkeypatch: pytest.MonkeyPatch, text: str, reason: str, blocks: list[str]) -> None:
    end = Finished("length" if reason == "max_tokens" else "stop", Usage(3, 5))
    monkeypatch.setattr(served.state.engine, "submit", scripted(end, *text))
    body = BODY | {"tools": [WEATHER]}
    whole = served.post("/v1/messages", body).json()
    assert ([b["type"] for b in whole["content"]], whole["stop_reason"]) == (blocks, reason)
    assert all(b["input"] == {"city": "Paris"} for b in whole["content"] if b["type"] == "tool_use")
    assert reason != "max_tokens" or whole["content"][0]["text"] == 'get_weather({"city": "P)'
    stream = served.post("/v1/messages", body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    starts = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert starts == (["tool_use"] if reason == "max_tokens" else blocks)
    pieces = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(pieces) == {"max_tokens": '{"city": "P', "end_turn": ""}.get(
        reason, '{"city": "Paris"}' * starts.count("tool_use")
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "The"}]}, "the last message is the assistant's"),
        ({"temperature": "1"}, "temperature: "),
        ({"max_tokens": 0}, "max_tokens 0: allowed is 1"),
        ({"stop_sequences": ["x"] * 100}, "stop 100 texts"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "nothing is run here"),
        ({"tools": [WEATHER, WEATHER]}, "'get_weather' twice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice 'other'"),
        ({"tools": [WEATHER | {"input_schema": {"type": "wrong"}}], "tool_choice": {"type": "any"}}, "tools[0]: "),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "the context holds 1024"),
    ],
)  # fmt: skip
def test_what_is_refused(client: anthropic.Anthropic, change: dict[str, Any], told: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(**ASK | {"extra_body": {"temperature": 0} | change})
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert told in body["error"]["message"]


@pytest.mark.parametrize("kind", ["image", "document"])
def test_no_picture_is_fetched(served: Served, client: anthropic.Anthropic, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.3)
        source = {"type": "url", "url": f"http://127.0.0.1:{elsewhere.getsockname()[1]}/a.png"}
        with pytest.raises(anthropic.BadRequestError, match=f"messages\\[0\\] has a part of type '{kind}'"):
            client.messages.create(
                **ASK | {"messages": [{"role": "user", "content": [{"type": kind, "source": source}]}]}
            )
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert served.idle()


def test_keys_models_and_lost_ways(served: Served, client: anthropic.Anthropic) -> None:
    answer = httpx.post(f"{served.base}/v1/messages", json=BODY, headers={"x-api-key": "wrong"})
    told = {"type": "authentication_error", "message": "the API key is missing or wrong"}
    assert (answer.status_code, answer.json()) == (401, {"type": "error", "error": told})
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(anthropic.NotFoundError, match="there is 'tiny'"):
        client.messages.create(**ASK | {"model": "claude"})
    lost = served.http.get("/v1/messages/batches")
    assert (lost.status_code, lost.json()["error"]["type"]) == (404, "not_found_error")


def test_a_full_queue_and_a_model_that_loads(
    served: Served, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: Any) -> None:
        raise BusyError("4 requests wait")

    monkeypatch.setattr(served.state.engine, "submit", submit)
    with pytest.raises(anthropic.RateLimitError, match=r"rate_limit_error.*4 requests wait") as caught:
        client.messages.create(**ASK)
    assert caught.value.response.headers["retry-after"] == "5"
    monkeypatch.setattr(served.state, "engine", None)
    with pytest.raises(anthropic.InternalServerError, match=r"api_error.*loading: "):
        client.messages.create(**ASK)


def test_an_error_of_a_stream_ends_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.state.engine, "submit", scripted(Finished("error", Usage(3), message="no more")))
    last = served.post("/v1/messages", BODY | {"stream": True}).text.strip().split("\n\n")[-1]
    name, data = last.split("\n")
    assert name == "event: error" and json.loads(data[6:])["error"] == {"type": "api_error", "message": "no more"}
