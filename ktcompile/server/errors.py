"""What goes wrong with a request, as the API says it that the request's path belongs to."""

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Kinds of errors that OpenAI and Anthropic name alike."""

ANTHROPIC_KINDS = {**KINDS, 403: "permission_error", 413: "request_too_large"}


class ApiError(Exception):
    """Answered as `status`; `headers` go with it. `code` and `param` are told where the API has a place for them."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def json(self, path: str = "") -> dict[str, Any]:
        """The body of the answer, or of the last event of a stream, to a request of this path."""
        if path.startswith("/api/"):  # Ollama's
            return {"error": self.message}
        is_theirs = self.status < 500
        if path.startswith("/v1/messages"):  # Anthropic's
            kind = ANTHROPIC_KINDS.get(self.status, "invalid_request_error" if is_theirs else "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = KINDS.get(self.status, "invalid_request_error" if is_theirs else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


__all__ = ["ApiError"]
