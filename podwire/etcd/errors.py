"""What can go wrong with etcd: it is away (try again), it refuses, or the past that was asked for is compacted."""

from __future__ import annotations

from podwire.errors import PodwireError, TryAgain


class EtcdUnavailable(TryAgain):
    """No endpoint answered. A write may or may not have been carried out; the next read tells."""


class NotCarriedOut(EtcdUnavailable):
    """An endpoint answered that it cannot, before it did anything (it has no leader, it is overloaded)."""


class EtcdError(PodwireError):
    """etcd answered and refused. `code` is the gRPC status in etcd's words, such as PERMISSION_DENIED."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class AuthFailed(EtcdError):
    """etcd does not know the user, the password is another, or a user is demanded and none is configured."""


class TokenRefused(EtcdError):
    """The token is not valid (any more); nothing was carried out. The connection gets a new one by itself."""


class Compacted(EtcdError):
    """The revision asked for is no longer kept."""


class SessionClosed(EtcdError):
    """The session was closed while the call was under way."""
