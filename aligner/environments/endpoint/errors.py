"""`ApiError`: an HTTP error of the endpoint, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error"}
"""HTTP status -> OpenAI's error type; of all others below 500 it is invalid_request_error."""


class ApiError(Exception):
    """What a request is refused with.

    400 names the field at fault (`param`). OpenAI's clients try 408, 409, 429 and 5xx again by themselves, so none of these is
    used for what will not change.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is at fault."""
    return ApiError(400, message, param=param, code=code)
