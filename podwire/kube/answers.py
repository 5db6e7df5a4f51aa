"""What an HTTP status of the API means for who asked.

2xx               an answer
401               other credentials, once; then Unauthorized
403 404 400 422   Forbidden, NotFound, BadRequest: until somebody changes something
410               Expired: list again
429               TooManyRequests: wait as long as it says
everything else   ApiUnavailable: the next endpoint, then again after a pause
"""

from __future__ import annotations

import msgspec

from podwire.kube.decode import Status
from podwire.kube.errors import (
    ApiError,
    ApiUnavailable,
    BadRequest,
    Expired,
    Forbidden,
    NotFound,
    TooManyRequests,
    Unauthorized,
)

LONGEST_WAIT_S = 120.0  # of what Retry-After may ask
_REFUSALS: dict[int, type[ApiError]] = {
    400: BadRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 410: Expired, 422: BadRequest
}  # fmt: skip
_TOO_MANY = 429
_status = msgspec.json.Decoder(Status)


def failure(code: int, body: bytes, retry_after: str, where: str) -> ApiError | ApiUnavailable:
    """The error that an answer other than 2xx stands for; `where` is the URL, for the message."""
    status = _read(body)
    words = status.message or status.reason or " ".join(body[:200].decode("utf-8", "replace").split())
    message = f"{where} answers {code}: {words}" if words else f"{where} answers {code}"
    if code in _REFUSALS:
        return _REFUSALS[code](message, code)
    wait = seconds(retry_after)
    if not wait and status.details is not None:
        wait = min(LONGEST_WAIT_S, max(0.0, status.details.retry_after_seconds or 0.0))
    return (TooManyRequests if code == _TOO_MANY else ApiUnavailable)(message, wait)


def seconds(retry_after: str) -> float:
    """What a Retry-After header asks for; the API sends numbers only, so a date counts as absent."""
    text = retry_after.strip()
    return min(LONGEST_WAIT_S, float(text)) if text.isascii() and text.isdigit() else 0.0


def _read(body: bytes) -> Status:
    try:
        return _status.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Status()
