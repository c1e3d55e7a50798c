"""What every request passes before its body is looked at: host, key, size. Plain ASGI, nothing of FastAPI."""

import asyncio
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from ktcompile.server.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 16 << 20
"""Of a request's body: far more text than any context holds."""

BODY_SECONDS = 30.0
"""A body that has not come by then is not waited for."""

REST_SECONDS, REST_BYTES = 1.0, 64 << 20
"""So much of a refused body is still taken. A connection closed before would often be told of, and its answer not."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

OPEN_PATHS = ("/", "/health", "/v1/health")
"""Answered without a key: the page, which knows nothing and asks for it, and health, for whoever watches the server."""


class Guard:
    """Middleware: 403 for a foreign Host, 401 without the key, 413 for a large body, 408 for a slow one.

    `hosts` are those a browser may have in its address line; None: any. Without it a page of another site could reach
    a server on loopback by a name that resolves there.
    """

    def __init__(self, app: Any, *, key: str | None, hosts: tuple[str, ...] | None) -> None:
        self.app, self.key, self.hosts = app, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its whole body read, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
            self._check(scope["path"], headers)
            body = await asyncio.wait_for(_body(headers, receive), BODY_SECONDS)
        except TimeoutError:
            late = ApiError(408, f"the body did not come within {BODY_SECONDS:g} s")
            await answer(receive, send, scope["path"], late)
            return
        except ApiError as error:
            await answer(receive, send, scope["path"], error)
            return
        if body is None:  # the client is gone
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(given, None) or await receive()

        await self.app(scope, replay, send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").lower()
        if self.hosts is not None and host not in self.hosts:
            raise ApiError(403, f"the host {host!r} is not one of this server's: {', '.join(self.hosts)}", code="host")
        if self.key is None or path in OPEN_PATHS:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


async def _body(headers: dict[str, str], receive: Receive) -> bytes | None:
    """All of it; None where the client went away."""
    if headers.get("content-encoding", "identity") not in ("identity", ""):
        raise ApiError(415, f"content-encoding {headers['content-encoding']!r} is not taken; send plain JSON")
    length = headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise ApiError(413, f"the body has {length} bytes, {MAX_BODY_BYTES} are taken", code="body_too_large")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the body has more than {MAX_BODY_BYTES} bytes", code="body_too_large")
        if not message.get("more_body", False):
            return b"".join(parts)


async def answer(receive: Receive, send: Send, path: str, error: ApiError) -> None:
    """Send an error as JSON, and close when the rest of the body has come: many clients read no answer before that."""
    body = json.dumps(error.json(path)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    pairs = [(k.lower().encode(), v.encode()) for k, v in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(TimeoutError):
        await asyncio.wait_for(_dropped(receive), REST_SECONDS)
    await send({"type": "http.response.body", "body": b""})


async def _dropped(receive: Receive) -> None:
    """Read what is left of the body, REST_BYTES of it."""
    size = 0
    while size < REST_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body", False):
            return


__all__ = ["BODY_SECONDS", "LOOPBACK", "MAX_BODY_BYTES", "OPEN_PATHS", "Guard", "answer"]
