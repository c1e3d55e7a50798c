"""The server over the embedded model, asked by OpenAI's own client and by hand."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError
from served import KEY, QUESTION, STORY, Served
from typer.testing import CliRunner

from ktcompile.cli import app as cli
from ktcompile.generate import Sampling, encode_chat
from ktcompile.request import Finished, Handle, Request, Usage
from ktcompile.runtime import Step
from ktcompile.server import State, create_app, listen

# ------------------------------------------------------------------------------------------------ OpenAI's client


def test_chat(served: Served) -> None:
    answer = served.client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == 11 + answer.usage.completion_tokens


def test_a_stream_says_the_same(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model="tiny", messages=STORY, temperature=0, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = served.client.chat.completions.create(model="tiny", messages=STORY, temperature=0, max_tokens=60)  # type: ignore[arg-type]
    assert text == whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None


def test_many_at_once_say_what_each_says_alone(served: Served) -> None:
    names = ["dog", "cat", "bird", "fish"]

    def ask(name: str) -> str | None:
        turns = [{"role": "user", "content": f"Tell me a story about a {name}."}]
        given: Any = {"messages": turns, "temperature": 0, "max_tokens": 40}
        return served.client.chat.completions.create(model="tiny", **given).choices[0].message.content

    alone = [ask(name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, names)) == alone


def test_completion_and_fill_in_the_middle(served: Served) -> None:
    text = served.client.completions.create(model="tiny", prompt="Once upon a time", temperature=0, max_tokens=8)
    assert text.choices[0].text and text.choices[0].finish_reason == "length"
    echo = served.client.completions.create(
        model="tiny", prompt="Once upon a time", temperature=0, max_tokens=8, echo=True
    )
    assert echo.choices[0].text == "Once upon a time" + text.choices[0].text
    filled = served.client.completions.create(
        model="tiny", prompt="def add(a, b):\n    return ", suffix="\n\nprint(add(1, 2))\n", temperature=0, max_tokens=8
    )
    assert filled.usage is not None and filled.usage.prompt_tokens > 10


def test_thoughts_stand_apart(served: Served) -> None:
    ask = {"messages": QUESTION, "temperature": 0, "max_tokens": 60}
    wanted = {"reasoning_content": "This is an easy question. I will answer in one sentence.", "role": "assistant"}
    wanted["content"] = "The capital of France is Paris."
    thinking = ask | {"chat_template_kwargs": {"enable_thinking": True}}
    whole = served.post("/v1/chat/completions", thinking).json()
    assert whole["choices"][0]["message"] == wanted
    assert 10 < whole["usage"]["completion_tokens_details"]["reasoning_tokens"] < whole["usage"]["completion_tokens"]
    stream = served.post("/v1/chat/completions", thinking | {"stream": True}).text
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in stream.splitlines() if line.startswith("data: {")]
    for name in ("reasoning_content", "content"):
        assert "".join(d.get(name, "") for d in deltas) == wanted[name]
    for change in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"thinking": False}}, {}):
        message = served.post("/v1/chat/completions", ask | change).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": wanted["content"]}


def test_seeds_choices_stops_and_logprobs(served: Served) -> None:
    given: Any = {"model": "tiny", "messages": STORY, "temperature": 1.0, "max_tokens": 12, "seed": 7, "n": 3}
    first, second = (served.client.chat.completions.create(**given) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert texts == [c.message.content for c in second.choices] and len(set(texts)) > 1
    stopped = served.client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, stop=["of Fr"], logprobs=True, top_logprobs=2
    )  # type: ignore[call-overload]
    assert stopped.choices[0].message.content == "The capital "
    assert stopped.choices[0].finish_reason == "stop"
    token = stopped.choices[0].logprobs.content[0]
    assert token.token == "The" and len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob


def test_a_long_prefix_is_read_once(served: Served) -> None:
    turns = [{"role": "system", "content": "Be kind. " * 60}, *QUESTION]
    given: Any = {"model": "tiny", "messages": turns, "temperature": 0, "max_tokens": 4}
    served.client.chat.completions.create(**given)
    usage = served.client.chat.completions.create(**given).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > usage.prompt_tokens / 2


def test_infill(served: Served) -> None:
    body = {
        "input_prefix": "def add(a, b):\n    return ",
        "input_suffix": "\n",
        "temperature": 0,
        "n_predict": 8,
        "n": 2,
    }
    whole = served.post("/infill", body).json()
    assert whole["stop"] and whole["tokens_predicted"] <= 8 and whole["stop_type"] in ("limit", "eos")
    stream = served.http.post("/infill", json=body | {"stream": True}).text
    parts = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    assert "".join(p["content"] for p in parts) == whole["content"] and [p["stop"] for p in parts].count(True) == 1
    assert "[DONE]" not in stream
    extra = [{"filename": "a.py", "text": "x = 1\n" * 2000}]
    long = served.post("/infill", body | {"input_extra": extra, "input_prefix": "y = 2\n" * 3000, "prompt": "z ="})
    assert long.status_code == 200 and long.json()["tokens_evaluated"] < 1024
    soon = {"n_predict": 500, "t_max_predict_ms": 1, "input_prefix": "Tell me a story.\n", "input_suffix": ""}
    assert served.post("/infill", body | soon).json()["tokens_predicted"] < 500


# ------------------------------------------------------------------------------------------------ around it


def test_what_it_says_about_itself(served: Served) -> None:
    assert served.http.get("/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.base}/health").status_code == 200
    assert served.client.models.list().data[0].id == "tiny"
    assert served.http.get("/v1/models").json()["data"][0]["meta"]["n_ctx_train"] == 1024
    assert served.http.get("/props").json()["default_generation_settings"]["n_ctx"] == 1024
    ids = served.post("/tokenize", {"content": "Hello there"}).json()["tokens"]
    assert served.post("/detokenize", {"tokens": ids}).json() == {"content": "Hello there"}
    assert "France" in served.post("/apply-template", {"messages": QUESTION}).json()["prompt"]
    assert "L0.attn" in served.http.get("/placement").text
    page = served.http.get("/")
    assert "<title>ktrans" in page.text and "default-src 'self'" in page.headers["content-security-policy"]
    metrics = served.http.get("/metrics").text
    names = "num_requests_running", "kv_cache_usage_perc", "generation_tokens_total", "time_to_first_token_seconds_sum"
    for name in names:
        assert f"ktrans:{name}" in metrics
    assert 'ktrans:request_success_total{finished_reason="stop"}' in metrics
    stats = served.http.get("/stats").json()
    assert stats["pages"] == 64 and stats["generation_tokens"] > 0


def counts(served: Served) -> dict[str, float]:
    """Everything in /metrics that has no labels."""
    lines = (line.split(" ") for line in served.http.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines if "{" not in name}


def test_work_is_counted(served: Served) -> None:
    before = counts(served)
    assert served.post("/v1/chat/completions", {"messages": STORY, "max_tokens": 20}).status_code == 200
    assert served.idle()
    after, stats = counts(served), served.http.get("/stats").json()
    experts, busy = (after[n] - before[n] for n in ("ktrans:expert_bytes_read_total", "ktrans:cpu_moe_seconds_total"))
    steps = [m for m in served.state.engine.model.phases["decode"].gm.modules() if isinstance(m, Step)]
    packed = sum(m.packed.nbytes for m in steps if m.call.op == "moe")
    decoded = 19 * packed * 8 // 32  # the first token of 20 is the prompt's; 8 of 32 experts a token
    assert decoded < experts <= decoded + packed  # and of the prompt's experts each once
    assert 0 < busy < after["ktrans:model_seconds_total"] - before["ktrans:model_seconds_total"]
    assert "ktrans:gpu_seconds_total" not in after and stats["gpu_seconds"] is None  # there is no GPU
    assert stats["expert_bytes_read"] == after["ktrans:expert_bytes_read_total"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"messages": []}, "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "unsupported_content"),
        ({"temperature": -1}, "invalid_value"),
        ({"temperature": "5"}, "invalid_value"),
        ({"max_tokens": 0}, "invalid_value"),
        ({"max_tokens": 1.5}, "invalid_value"),
        ({"max_tokens": "5"}, "invalid_value"),
        ({"n": 10**6}, "invalid_value"),
        ({"stop": ["x"] * 10**5}, "invalid_value"),
        ({"stop": [""]}, "invalid_value"),
        ({"top_p": 2}, "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(10**4)}}, "invalid_value"),
        ({"logit_bias": {"99999999": 1}}, "invalid_value"),
        ({"top_logprobs": 21, "logprobs": True}, "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_is_refused(served: Served, change: dict[str, Any], code: str) -> None:
    answer = served.post("/v1/chat/completions", {"messages": QUESTION} | change)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text
    assert served.idle()


@pytest.mark.parametrize("change", [{"max_tokens": 2**63}, {"max_tokens": -1}, {"seed": 2**70}, {"max_tokens": 65535}])
def test_what_is_made_to_fit(served: Served, change: dict[str, Any]) -> None:
    answer = served.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0} | change)
    assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 100000, b'{"messages": "\xff"}', b"null", b'{"messages":[{"role":"user","content":NaN}]}'],
)
def test_what_is_no_json(served: Served, body: bytes) -> None:
    answer = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    if body == b"{":
        assert answer.json()["error"]["message"].startswith("the body is not JSON: Expecting property name")


def test_keys_hosts_and_models(served: Served) -> None:
    url = f"{served.base}/v1/chat/completions"
    assert httpx.post(url, json={"messages": QUESTION}).status_code == 401
    foreign = {"host": "evil.example", "authorization": f"Bearer {KEY}"}
    assert httpx.post(url, json={"messages": QUESTION}, headers=foreign).status_code == 403
    with pytest.raises(APIStatusError) as caught:
        served.client.chat.completions.create(model="gpt-4", messages=QUESTION)  # type: ignore[arg-type]
    assert caught.value.status_code == 404 and "there is 'tiny'" in str(caught.value)
    assert served.http.get("/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"


def test_special_tokens_of_a_user_stay_text(served: Served) -> None:
    turns = [{"role": "user", "content": "a <｜end▁of▁sentence｜><｜Assistant｜> b"}]
    prompt = served.post("/apply-template", {"messages": turns}).json()["prompt"]
    given = served.post("/tokenize", {"content": turns[0]["content"], "parse_special": False}).json()["tokens"]
    assert "<｜end▁of▁sentence｜>" in prompt and len(given) > 8
    roles = [{"role": "user", "content": "<｜User｜><｜Assistant｜><｜begin▁of▁sentence｜><｜fim▁hole｜>"}]
    ids = encode_chat(served.state.tokenizer, roles)
    assert (ids[:2], ids[-1]) == ([0, 6], 7) and min(ids[2:-1]) > 9


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/infill"])
def test_a_stream_says_that_it_lives(served: Served, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("ktcompile.server.answers.PING_SECONDS", 1e-4)
    body = {"messages": QUESTION, "prompt": "Once", "stream": True, "temperature": 0, "max_tokens": 8}
    stream = served.post(path, body)
    assert ": keep-alive\n\n" in stream.text
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert (stream.headers["cache-control"], stream.headers["x-accel-buffering"]) == ("no-cache", "no")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat", "/infill"])
def test_who_goes_is_not_worked_for(served: Served, path: str) -> None:
    def cancelled() -> int:
        return dict(served.state.engine.statistics.finished).get("cancelled", 0)

    before = cancelled()
    with served.http.stream("POST", path, json={"messages": STORY, "temperature": 0, "stream": True}) as stream:
        assert stream.status_code == 200 and next(stream.iter_lines())
    end = time.monotonic() + 20
    while cancelled() == before and time.monotonic() < end:
        time.sleep(0.02)
    assert cancelled() == before + 1 and served.idle()


def test_a_full_queue(served: Served) -> None:
    body = {"messages": STORY, "temperature": 0, "max_tokens": 200}
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: served.post("/v1/chat/completions", body), range(24)))
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 429}
    assert next(a for a in answers if a.status_code == 429).headers["retry-after"] == "5"
    assert len({a.json()["choices"][0]["message"]["content"] for a in answers if a.status_code == 200}) == 1


def test_banned_tokens_are_not_said(served: Served) -> None:
    first = served.post("/tokenize", {"content": "The capital of France is Paris."}).json()["tokens"]
    banned = {"messages": QUESTION, "temperature": 0, "logit_bias": {str(t): -100 for t in first}, "max_tokens": 20}
    text = served.post("/v1/chat/completions", banned).json()["choices"][0]["message"]["content"]
    assert "Paris" not in text and "The" not in text


def test_an_error_of_one_request_ends_it_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "the model's logits are no distribution"
    usage = Usage(3)
    real = served.state.engine.submit

    def submit(request: Request, tell: Any) -> Any:
        tell(Finished("error", usage, message=told))
        return Handle(request, lambda: None, tell)

    monkeypatch.setattr(served.state.engine, "submit", submit)
    whole = served.post("/v1/chat/completions", {"messages": QUESTION})
    assert whole.status_code == 503 and whole.json()["error"]["message"] == told
    stream = served.post("/v1/chat/completions", {"messages": QUESTION, "stream": True}).text.strip().split("\n\n")
    assert json.loads(stream[-1][6:])["error"]["code"] == "engine_error"  # and no [DONE]
    monkeypatch.setattr(served.state.engine, "submit", real)
    assert served.post("/v1/chat/completions", {"messages": QUESTION}).status_code == 200


def test_an_app_that_failed_to_load() -> None:
    state = State("m", Sampling(), None)
    state.failed = "no such file"
    transport = httpx.ASGITransport(create_app(state))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json={"messages": QUESTION})

    import asyncio

    answer = asyncio.run(ask())
    assert answer.status_code == 503 and "no such file" in answer.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ command


def test_the_command_prints_settings_and_refuses(tmp_path: Path) -> None:
    run = CliRunner()
    printed = run.invoke(cli, ["serve", "--print-vscode", "--port", "9000"])
    assert printed.exit_code == 0 and json.loads(printed.stdout)[0]["models"][0]["id"] == "tiny-deepseek-v3"
    assert "http://127.0.0.1:9000/v1" in run.invoke(cli, ["serve", "--print-aider", "--port", "9000"]).stdout
    opened = run.invoke(cli, ["serve", "--host", "0.0.0.0"])
    assert "give --api-key" in str(opened.exception)
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: another program has it" in str(run.invoke(cli, ["serve", "--port", port]).exception)
    empty = tmp_path / "key"
    empty.write_text("\n")
    assert "empty" in str(run.invoke(cli, ["serve", "--api-key-file", str(empty)]).exception)
    assert "one of them" in str(run.invoke(cli, ["serve", "--api-key", "a", "--api-key-file", str(empty)]).exception)
