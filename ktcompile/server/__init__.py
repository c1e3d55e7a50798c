"""An HTTP server over one model: OpenAI's API, what llama.cpp's clients ask, and a page to chat on.

`create_app` makes the application of a `State`, `serve` runs it and loads the model meanwhile. The engine runs on a
thread of its own: a request can fail, it cannot take the engine along.
"""

import errno
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ktcompile.errors import CapacityError, KtransError, RulesError, TemplateError
from ktcompile.server import anthropic, infill, llama, ollama, openai
from ktcompile.server.connections import server_of
from ktcompile.server.errors import ApiError
from ktcompile.server.guard import LOOPBACK, Guard
from ktcompile.server.metrics import Metrics
from ktcompile.server.state import State
from ktcompile.version import __version__

DRAIN_SECONDS = 30
"""So long answers may go on after SIGTERM; a second one ends them at once."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any that is free. RulesError where another program has the port."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        what = "another program has it; give another one" if error.errno == errno.EADDRINUSE else error.strerror
        raise RulesError(f"--host {host} --port {port}: {what}") from error


def create_app(state: State, *, key: str | None = None, hosts: tuple[str, ...] | None = LOOPBACK) -> Guard:
    """The application. `key`: what every request but those for health must bring. `hosts`: see `Guard`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        state.draining = True
        if state.engine is not None:
            state.engine.stop()

    app = FastAPI(
        title="ktrans", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.served = state
    app.state.metrics = metrics = Metrics(state)
    app.include_router(llama.router)
    app.include_router(openai.router)
    app.include_router(infill.router)
    app.include_router(anthropic.router)
    app.include_router(ollama.router)
    _pages(app, state)

    @app.get("/metrics")
    async def scraped() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.json(request.url.path), error.status, error.headers)

    @app.exception_handler(KtransError)
    async def unusable(request: Request, error: KtransError) -> Response:
        codes = {TemplateError: "template_error", CapacityError: "context_length_exceeded"}
        return await told(request, ApiError(400, str(error), code=codes.get(type(error), "invalid_value")))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            what = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
            return await told(request, ApiError(400, what, code="invalid_value"))
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return await told(request, ApiError(400, f"{where}: {first['msg']}", param=where, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return await told(request, ApiError(error.status_code, what))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return await told(request, ApiError(500, f"{type(error).__name__}: {error}", code="internal_error"))

    return Guard(app, key=key, hosts=hosts)


def _pages(app: FastAPI, state: State) -> None:
    """The page to chat on, and what its second tab shows."""
    html = (files("ktcompile.server") / "page.html").read_text(encoding="utf-8")
    seen: deque[tuple[float, int]] = deque(maxlen=64)

    @app.get("/")
    async def page() -> HTMLResponse:
        policy = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
        policy += "frame-ancestors 'none'"
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @app.get("/placement")
    async def placement() -> PlainTextResponse:
        state.ready()
        return PlainTextResponse(state.page)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        engine = state.ready()
        now, work = engine.statistics, engine.model.work()
        at = time.monotonic()
        seen.append((at, now.said))
        then, said = next(((t, s) for t, s in seen if at - t <= 5), seen[-1])
        return {
            "running": now.running,
            "waiting": now.waiting,
            "pages": now.pages,
            "pages_used": now.used,
            "prompt_tokens": now.prompts,
            "cached_tokens": now.reused,
            "generation_tokens": now.said,
            "steps": now.steps,
            "tokens_per_second": (now.said - said) / (at - then) if at > then else 0.0,
            "at": at,  # of the counts below, in seconds
            "seconds": {"in steps": now.step_s, "in the model": now.model_s},
            "cpu_moe_seconds": work.cpu_moe_s,
            "gpu_seconds": work.gpu_s,
            "expert_bytes_read": work.expert_bytes,
        }


def serve(
    state: State,
    load: Callable[[State], None],
    *,
    listener: socket.socket,
    key: str | None,
    hosts: tuple[str, ...] | None,
    ready: Callable[[], None],
) -> None:
    """Serve at `listener` until SIGTERM or Ctrl-C. `load` fills the state, on a thread of its own, before `ready`."""

    def loading() -> None:
        try:
            load(state)
        except Exception as error:  # told to whoever asks, and on the terminal
            state.failed = f"{error}" or type(error).__name__
            server.should_exit = True
            return
        ready()
        _ = state.grammars  # so that nobody waits for it

    server = server_of(create_app(state, key=key, hosts=hosts), DRAIN_SECONDS)
    threading.Thread(target=loading, name="load", daemon=True).start()
    server.run(sockets=[listener])


__all__ = ["DRAIN_SECONDS", "LOOPBACK", "State", "create_app", "listen", "serve"]
