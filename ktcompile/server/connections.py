"""uvicorn, with an end to what it would wait for: a request that does not come, and answers after a second signal."""

import asyncio
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 30.0
"""So long after it was opened, or after its last answer, a connection is kept without the whole head of a request."""


class Connection(H11Protocol):
    """Closed where no head of a request comes: each one held would be one less for others."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:  # else the next one has come already
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Server(uvicorn.Server):
    """Ends at once when a second signal comes, of whichever kind."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first one drains."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def server_of(app: Any, drain_s: int) -> Server:
    """A server of this application that says nothing but warnings, and waits `drain_s` for answers at its end."""
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=int(REQUEST_SECONDS),
            timeout_graceful_shutdown=drain_s,
            limit_concurrency=2048,
        )
    )


__all__ = ["REQUEST_SECONDS", "Connection", "Server", "server_of"]
