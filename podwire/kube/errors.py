"""What can go wrong with the Kubernetes API: it is away (try again), it refuses, or the past asked for is forgotten."""

from __future__ import annotations

from podwire.errors import PodwireError, TryAgain


class ApiUnavailable(TryAgain):
    """No endpoint answered, or an answer broke off. `retry_after` is how many seconds the server asked for, if any."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Silence(ApiUnavailable):
    """The connection stands and says nothing."""


class TooManyRequests(ApiUnavailable):
    """429: the server is well, and wants to be left alone for `retry_after` seconds."""


class CredentialsUnavailable(TryAgain):
    """A token, a certificate or a plugin's answer cannot be had now; the file may be being replaced."""


class Garbled(TryAgain):
    """An answer that is not what the API says: no JSON, a line without end. What it meant is lost, so list again."""


class ApiError(PodwireError):
    """The API answered and refused. `code` is the HTTP status."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class BadRequest(ApiError):
    """400, 422: the server does not take the request, or not these parameters."""


class Unauthorized(ApiError):
    """401: the server does not know who we are, also with new credentials."""


class Forbidden(ApiError):
    """403: it knows, and we may not."""


class NotFound(ApiError):
    """404: the server has no such kind."""


class Expired(ApiError):
    """410: a resourceVersion or a continue token is older than what the server remembers."""


class NotStreamed(ApiError):
    """The server does not give lists as streams."""
