"""What never reaches the server's code: foreign hosts, wrong keys, large, packed and endless bodies."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from ktcompile.server import guard
from ktcompile.server.guard import LOOPBACK, Guard


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it was given."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(app: Any, path: str = "/v1/models", host: str = "localhost", **given: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}:8000") as client:
            return await client.request(given.pop("method", "POST"), path, **given)

    return asyncio.run(run())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_its_own_hosts(host: str) -> None:
    assert ask(Guard(echo, key=None, hosts=LOOPBACK), host=host, content=b"abc").content == b"abc"


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io"])
def test_a_foreign_host(host: str) -> None:
    answer = ask(Guard(echo, key=None, hosts=LOOPBACK), host=host)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host"
    assert ask(Guard(echo, key=None, hosts=None), host=host).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Bearer secret-and-more"}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"x-api-key": "sécret".encode()}, 401),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer  secret"}, 200),
        ({"x-api-key": "secret"}, 200),
    ],
)
def test_the_key(headers: dict[str, Any], status: int) -> None:
    app = Guard(echo, key="secret", hosts=None)
    assert ask(app, headers=headers).status_code == status
    assert ask(app, "/v1/models?key=secret", headers={}).status_code == 401
    assert ask(app, "/health", method="GET").status_code == 200


def test_a_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 100)
    app = Guard(echo, key=None, hosts=None)
    assert ask(app, content=b"x" * 100).status_code == 200
    assert ask(app, content=b"x" * 101).status_code == 413

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 30

    assert ask(app, content=endless()).json()["error"]["code"] == "body_too_large"
    assert ask(app, headers={"content-encoding": "gzip"}, content=b"x").status_code == 415


def test_a_slow_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(60)

    assert ask(Guard(echo, key=None, hosts=None), content=slow()).status_code == 408
