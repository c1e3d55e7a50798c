"""What no client should send, and clients that behave badly: a clear error, and the server lives on (SERVER.md).

Where each case of SERVER.md is tested; `test_every_case_has_its_test` looks whether it is there.

abuse 1    test_hostile_files: test_gguf test_gguf_cut_at_every_byte test_one_wrong_byte_is_refused_or_harmless
           test_the_whole_corpus_in_a_process_of_its_own
abuse 2    test_hostile_files: test_safetensors test_safetensors_cut_at_every_byte test_an_index_that_leaves_the_folder
           test_missing_swapped_and_extra_shards
abuse 3    test_hostile_files: test_configurations_that_make_no_sense test_no_code_of_a_model_is_run
           test_a_tokenizer_of_a_gigabyte test_rules test_rules_that_a_model_refuses
           test_rules: test_bombs_end_quickly
abuse 4    test_template: test_attacks
           test_server_abuse: test_a_template_that_does_harm
abuse 5    test_server_abuse: test_parameters test_a_million_biases
           test_server: test_what_is_refused test_what_is_made_to_fit
           test_engine: test_errors_are_of_one_request
abuse 6    test_server_abuse: test_messages test_nothing_is_fetched
           test_server: test_special_tokens_of_a_user_stay_text
abuse 8    test_server_abuse: test_two_gigabytes test_an_endless_body test_a_packed_body test_other_content_types
           test_deep_json test_ten_thousand_headers test_a_thousand_idle_connections test_slow_heads
           test_server_guard: test_a_slow_body
           test_server: test_what_is_no_json
abuse 9    test_server_guard: test_the_key
           test_server_process: test_it_keeps_secrets
           test_server_abuse: test_labels_are_fixed
faults     test_packed_cache: test_killed_while_writing_leaves_nothing_under_the_name
           test_server_process: test_killed_while_loading test_a_strange_environment test_a_signal_drains
           test_a_second_signal_ends_it
           test_convert: test_a_disk_that_becomes_full_leaves_nothing
           test_weights_file: test_a_file_that_becomes_shorter_is_an_error_and_no_signal
           test_hostile_files: test_shards_that_do_not_belong_together test_a_file_that_becomes_shorter
           test_place: test_too_small
           test_server_abuse: test_out_of_memory_in_the_middle test_who_leaves test_who_does_not_read
           test_engine: test_cancel test_a_short_prompt_beside_a_long_one
           test_one_that_finds_no_pages_is_passed_and_not_forgotten test_the_loop_survives_itself
           test_server: test_a_full_queue
           test_cli: test_ctrl_c_stops_the_answer_not_the_program
           test_engine_model: test_together
           test_server_soak: test_mixed_requests
"""

import json
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served import KEY, QUESTION, STORY, Served, running
from timing import within

from ktcompile.backends.torch_mla import TorchMLA
from ktcompile.server import connections

HERE = Path(__file__).parent


def test_every_case_has_its_test() -> None:
    assert __doc__ is not None
    known: dict[str, str] = {}
    file = ""
    for word in re.findall(r"\btest_\w+:?", __doc__.split("looks whether it is there.")[1]):
        if word.endswith(":"):
            file = word[:-1]
            continue
        text = known.setdefault(file, (HERE / f"{file}.py").read_text())
        assert f"def {word}(" in text, f"{file} has no {word}"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    yield from running()


@pytest.fixture(autouse=True)
def lives_on(served: Served) -> Iterator[None]:
    """After each test: no page is used, and the next request works."""
    yield
    assert served.idle()
    answer = served.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0})
    assert answer.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."


def refused(answer: httpx.Response, status: int, code: str | None) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) < 2000
    return str(error["message"])


def ask(served: Served, **change: Any) -> httpx.Response:
    return served.post("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 3} | change)


def raw(served: Served, head: str, *, length: int | None = None) -> socket.socket:
    """A connection on which the head of a POST was sent."""
    made = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    size = "" if length is None else f"Content-Length: {length}\r\n"
    lines = f"Host: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n{size}{head}\r\n"
    made.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}".encode())
    return made


def status_of(connection: socket.socket) -> int:
    """The status of what comes, 0 where it is closed instead."""
    try:
        return int(connection.recv(4096).split(b" ")[1])
    except (ConnectionError, IndexError):
        return 0


# ------------------------------------------------------------------------------------------------ templates


def test_a_template_that_does_harm(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are answered meanwhile."""
    tokenizer = served.state.tokenizer
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", endless)
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        asked = pool.submit(ask, served)
        other = served.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 3})
        assert other.status_code == 200
        message = refused(asked.result(), 400, "template_error")
    assert "longer than 1.5 s" in message and time.perf_counter() - start < 2 + 1
    monkeypatch.setattr(tokenizer, "chat_template", "{{ ''.__class__.__mro__ }}")
    assert "is unsafe" in refused(ask(served), 400, "template_error")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    assert refused(ask(served, stream=True), 400, "template_error").endswith("roles must alternate")


# ------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1e308},
        {"temperature": None, "top_p": -0.1},
        {"min_p": 1.5},
        {"top_k": 2**70},
        {"n": 0},
        {"n": -1},
        {"max_tokens": -2},
        {"max_tokens": -(2**63)},
        {"max_tokens": True},
        {"seed": "7"},
        {"stop": ["x" * 10**6]},
        {"stop": {"a": 1}},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 1e9}},
        {"logit_bias": {str(i): -100 for i in range(6144)}},
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
        {"stream": "yes"},
        {"messages": "hello"},
        {"messages": {}},
    ],
    ids=str,
)
def test_parameters(served: Served, change: dict[str, Any]) -> None:
    refused(ask(served, **change), 400, "invalid_value")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[]"])
def test_numbers_that_are_none(served: Served, text: str) -> None:
    body = json.dumps({"messages": QUESTION, "temperature": 0.5}).replace("0.5", text)
    answer = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    refused(answer, 400, "invalid_value")


def test_a_million_biases(served: Served) -> None:
    start = time.perf_counter()
    message = refused(ask(served, logit_bias={str(i): 1 for i in range(10**6)}), 400, "invalid_value")
    assert "1000000 biases, 1024 are taken" in message and time.perf_counter() - start < 10


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ([{"role": "user", "content": "a"}] * 10**5, 400, "invalid_value"),
        ([{"role": "user", "content": 5}], 400, "invalid_value"),
        ([{"role": "user", "content": [{"type": "text"}]}], 400, "unsupported_content"),
        ([{"role": "user", "content": "x" * (50 << 20)}], 413, "body_too_large"),
        ([{"content": "a"}], 400, "invalid_value"),
        ([None], 400, "invalid_value"),
    ],
    ids=["many", "number", "no text", "50 MB", "no role", "null"],
)
def test_messages(served: Served, messages: list[Any], status: int, code: str) -> None:
    start = time.perf_counter()
    refused(ask(served, messages=messages), status, code)
    assert time.perf_counter() - start < 10


def test_a_word_of_eight_million_letters(served: Served) -> None:
    """More than the context holds for sure, so nobody counts its tokens; where they are asked for, others go on."""
    word = "a" * (8 << 20)
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": word}]}),
                       ("/v1/completions", {"prompt": word})):  # fmt: skip
        assert within(1, lambda path=path, body=body: refused(served.post(path, body), 400, "context_length_exceeded"))
    with ThreadPoolExecutor(1) as aside:
        counted = aside.submit(served.post, "/tokenize", {"content": word})
        time.sleep(0.3)
        assert within(1, lambda: served.http.get("/health").raise_for_status())
        assert not counted.done() and len(counted.result().json()["tokens"]) > 1 << 20


def test_lone_surrogates(served: Served) -> None:
    """JSON can hold half a character; text cannot."""
    bodies = (
        ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a \\ud800 b"}]}'),
        ("/v1/completions", '{"prompt": "a \\udfff"}'),
        ("/infill", '{"input_prefix": "a \\udfff"}'),
        ("/tokenize", '{"content": "\\ud83d"}'),
    )
    for path, body in bodies:
        answer = served.http.post(path, content=body, headers={"content-type": "application/json"})
        assert refused(answer, 400, "invalid_value"), path


@pytest.mark.parametrize("content", ["a\x00b", "", None, "\u202e\ufeff", "\U0010ffff" * 9, "<｜end▁of▁sentence｜>" * 9])
def test_strange_text_is_text(served: Served, content: str | None) -> None:
    answer = ask(served, messages=[{"role": "user", "content": content}])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "URL"}},
        {"type": "input_image", "image_url": "URL"},
        {"type": "file", "file": {"file_data": "URL"}},
        {"type": "input_audio", "input_audio": {"data": "URL", "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    ],
)
def test_nothing_is_fetched(served: Served, part: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        given = json.loads(json.dumps(part).replace("URL", url))
        message = refused(ask(served, messages=[{"role": "user", "content": [given]}]), 400, "unsupported_content")
        assert part["type"] in message and "root:" not in message
        with pytest.raises(TimeoutError):
            listener.accept()


# ------------------------------------------------------------------------------------------------ bodies, connections


def test_two_gigabytes(served: Served) -> None:
    """Refused by its length: nothing of it is read."""
    start = time.perf_counter()
    with closing(raw(served, "", length=2 << 30)) as connection:
        assert status_of(connection) == 413
    assert time.perf_counter() - start < 2
    for length in ("-1", "1e3", "99999999999999999999999"):
        with closing(raw(served, f"Content-Length: {length}\r\n")) as connection:
            assert status_of(connection) in (400, 413)


def test_an_endless_body(served: Served) -> None:
    """Read up to what is taken, and no further."""
    sent = 0
    with closing(raw(served, "Transfer-Encoding: chunked\r\n")) as connection:
        try:
            while sent < 256 << 20:
                connection.sendall(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")
                sent += 1 << 16
        except ConnectionError:
            pass
    assert 16 << 20 <= sent < 128 << 20


def test_a_packed_body(served: Served) -> None:
    answer = served.http.post("/v1/chat/completions", content=b"x", headers={"content-encoding": "gzip"})
    assert "send plain JSON" in refused(answer, 415, None)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
def test_other_content_types(served: Served, kind: str) -> None:
    body = json.dumps({"messages": QUESTION})
    answer = served.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    refused(answer, 400, "invalid_value")


@pytest.mark.parametrize("field", ["messages", "metadata", "content"])
def test_deep_json(served: Served, field: str) -> None:
    """10^5 deep, where it is looked at and where it is not."""
    deep = "[" * 10**5 + "]" * 10**5
    body = f'{{"messages": {deep}}}' if field == "messages" else '{"messages": [{"role": "user", "content": "a"}]'
    if field == "metadata":
        body += f', "metadata": {deep}}}'
    if field == "content":
        body = f'{{"messages": [{{"role": "user", "content": {deep}}}]}}'
    start = time.perf_counter()
    answer = served.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert time.perf_counter() - start < 2


def test_ten_thousand_headers(served: Served) -> None:
    with closing(raw(served, "".join(f"X-{i}: {i}\r\n" for i in range(10**4)), length=0)) as connection:
        assert status_of(connection) in (0, 400, 431)


def test_a_thousand_idle_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take nothing from others, and are closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if wanted < 2200:
        pytest.fail(f"{hard} open files are allowed here; both ends of 1000 connections need 2200")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 5.0)
    idle = [socket.create_connection(("127.0.0.1", served.port), timeout=30) for _ in range(1000)]
    try:
        start = time.perf_counter()
        assert ask(served).status_code == 200
        assert time.perf_counter() - start < 5
        assert {connection.recv(1) for connection in idle} == {b""}
        assert time.perf_counter() - start < 20
    finally:
        for connection in idle:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_slow_heads(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that comes byte by byte, from the beginning or after a first request, does not hold its connection."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.6)
    for first in (b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
            if first:
                connection.sendall(first)
                assert status_of(connection) == 200
            start = time.perf_counter()
            assert is_closed(connection)
            assert 0.4 < time.perf_counter() - start < 5


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side closes it while a head comes, twenty bytes a second, a thousand in all."""
    try:
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    except ConnectionError:
        return True
    return False


def test_an_answer_may_take_longer_than_a_head(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.2)
    with httpx.Client(base_url=served.base, headers=served.http.headers, timeout=60) as http:
        body = {"messages": STORY, "temperature": 0, "max_tokens": 200}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] > 100


def test_labels_are_fixed(served: Served) -> None:
    """Nothing that a client says comes into the metrics."""
    ask(served, model="evil\nmodel", user="evil-user")
    served.http.get("/evil-path")
    text = served.http.get("/metrics").text
    assert "evil" not in text and KEY not in text
    labels = set(re.findall(r'(\w+)="', text))
    assert labels <= {"finished_reason", "le"}


# ------------------------------------------------------------------------------------------------ faults


def until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_out_of_memory_in_the_middle(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """That request is 503, its pages are free, those beside it say what they would have said."""
    real = TorchMLA.__call__

    def full(self: TorchMLA, packed: Any, region: Any, *inputs: Any) -> Any:
        if inputs[0].numel() // inputs[0].shape[-1] > 4:  # a piece of a prompt, however small
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
        return real(self, packed, region, *inputs)

    body = {"messages": QUESTION, "temperature": 0}
    story = {"messages": STORY, "temperature": 0, "max_tokens": 200}
    alone = served.post("/v1/chat/completions", story).json()["choices"][0]["message"]["content"]
    served.state.engine.clear_prefixes()
    said = served.state.engine.statistics.said
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        beside = pool.submit(served.post, "/v1/chat/completions", story)
        assert until(lambda: served.state.engine.statistics.said > said)
        patch.setattr(TorchMLA, "__call__", full)
        long = {"messages": [{"role": "user", "content": "never seen before " * 30}]}
        assert "out of memory" in refused(served.post("/v1/chat/completions", long), 503, "out_of_memory")
        stream = served.post("/v1/chat/completions", long | {"stream": True}).text.strip().split("\n\n")
        assert json.loads(stream[-1][6:])["error"]["code"] == "out_of_memory"
        assert beside.result().json()["choices"][0]["message"]["content"] == alone
    assert served.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize("when", ["queue", "prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves(served: Served, when: str, stream: bool) -> None:
    """Work for it stops, whatever else is done."""
    engine = served.state.engine
    engine.clear_prefixes()
    finished = dict(engine.statistics.finished).get("cancelled", 0)
    body: dict[str, Any] = {"messages": STORY, "temperature": 0, "stream": stream}
    if when == "prefill":
        body["messages"] = [{"role": "user", "content": f"{time.monotonic()} is " * 60}]
    others = []
    if when == "queue":
        for count in range(1, 9):
            others.append(raw_request(served, body | {"stream": True, "max_tokens": 90}))
            assert until(lambda count=count: engine.statistics.running == count)
    leaving = raw_request(served, body)
    shown = {"queue": lambda s: s.waiting, "prefill": lambda s: s.running, "decode": lambda s: s.running}[when]
    assert until(lambda: shown(engine.statistics) >= 1)
    if when == "decode":
        said = engine.statistics.said
        assert until(lambda: engine.statistics.said > said)
    leaving.close()
    assert until(lambda: dict(engine.statistics.finished).get("cancelled", 0) > finished, 5)
    if when == "queue":
        assert engine.statistics.waiting == 0 and engine.statistics.running > 0, "it never ran"
    for other in others:
        other.close()


def raw_request(served: Served, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent."""
    content = json.dumps(body).encode()
    made = raw(served, "", length=len(content))
    made.sendall(content)
    return made


def test_who_does_not_read(served: Served) -> None:
    """Their answers wait, others' do not."""
    body = {"messages": STORY, "temperature": 0, "stream": True, "logprobs": True, "top_logprobs": 20}
    deaf = []
    for _ in range(4):
        made = raw_request(served, body)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.append(made)
    assert until(lambda: served.state.engine.statistics.running >= 1)
    assert ask(served, temperature=0).status_code == 200
    assert served.idle(), "what they asked for is made, and waits for them"
    for made in deaf:
        made.close()
