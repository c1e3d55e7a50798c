"""What goes wrong with a request, as OpenAI's API says it."""

from typing import Any


class ApiError(Exception):
    """Answered as `status` with `{"error": {"message", "type", "param", "code"}}`; `headers` go with it."""

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

    @property
    def type(self) -> str:
        """OpenAI's kind of error for the status."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def json(self) -> dict[str, Any]:
        """The body of the answer, or of the last event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


__all__ = ["ApiError"]
