"""What the API answers when it does not do what was asked: Kubernetes `Status` objects, as typed exceptions.

The same types are raised by the store, turned into HTTP by the server and raised again by the client, so that a
caller in the process and one behind HTTP handle the same thing. Codes and reasons are those of
`k8s.io/apimachinery/pkg/api/errors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from podwire.errors import PodwireError, TryAgain


class ApiError(PodwireError):
    """A failed request. `code` is the HTTP status, `reason` the machine's word for it, `details` names the object."""

    code: ClassVar[int] = 500
    reason: ClassVar[str] = "InternalError"

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})

    def to_object(self) -> dict[str, Any]:
        """The `Status` object (meta/v1) that says this."""
        status: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            status["details"] = self.details
        return status


class BadRequest(ApiError):
    """The request itself cannot be understood."""

    code, reason = 400, "BadRequest"


class Forbidden(ApiError):
    """The request is understood and never allowed."""

    code, reason = 403, "Forbidden"


class NotFound(ApiError):
    """No such object, kind or path."""

    code, reason = 404, "NotFound"


class MethodNotAllowed(ApiError):
    """The path exists and has no such verb."""

    code, reason = 405, "MethodNotAllowed"


class AlreadyExists(ApiError):
    """An object of that name is there already."""

    code, reason = 409, "AlreadyExists"


class Conflict(ApiError):
    """The object has changed since the caller read it: read it again, and repeat."""

    code, reason = 409, "Conflict"


class Gone(ApiError):
    """A resourceVersion is older than the history that is kept: list again."""

    code, reason = 410, "Expired"


class UnsupportedMediaType(ApiError):
    """The body is in a format that is not read here."""

    code, reason = 415, "UnsupportedMediaType"


class Invalid(ApiError):
    """The object was understood and breaks a rule; `details.causes` names each field."""

    code, reason = 422, "Invalid"


class Unreachable(TryAgain):
    """The API server cannot be spoken to."""


KINDS_OF_ERROR: tuple[type[ApiError], ...] = (
    BadRequest,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    AlreadyExists,
    Conflict,
    Gone,
    UnsupportedMediaType,
    Invalid,
)


def from_status(code: int, status: Mapping[str, Any]) -> ApiError:
    """The exception that a `Status` object with HTTP code `code` stands for; an unknown one is a plain ApiError."""
    message = str(status.get("message") or f"the API server answered {code}")
    details = status.get("details") or {}
    same_code = [kind for kind in KINDS_OF_ERROR if kind.code == code]
    for kind in same_code:
        if kind.reason == status.get("reason"):
            return kind(message, details)
    return (same_code[0] if same_code else ApiError)(message, details)
