"""What goes wrong with a request, in OpenAI's format."""

from typing import Any

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """An answer other than 200.

    Args:
        status: The HTTP status.
        message: What is wrong, what is allowed and what to do next.
        param: The field of the request that is wrong.
        code: A word for programs.
        retry_after_s: When the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    @property
    def content(self) -> dict[str, Any]:
        """The answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": TYPES.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}
