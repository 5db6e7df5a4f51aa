"""User and password: one token for the whole cluster, got when it is first needed and again when it is refused.

etcd's simple tokens live five minutes beyond their last use and in each member's memory alone: a member that restarts
may know none. So a refused token is the ordinary case, not an error: nothing was carried out, and the request is sent
again under a new one. A token names the raft index at which it was given, and a member that has not come as far,
because it was wiped, keeps the request waiting: so no token outlives a request that was not answered. A login costs
etcd a bcrypt (50 ms and more), so calls that wait for one share it.

Without `user` nothing is sent, and etcd takes the common name of the client's certificate for the user, if it checks
certificates.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from podwire.etcd.errors import AuthFailed, EtcdError, EtcdUnavailable, NotCarriedOut
from podwire.etcd.options import EtcdOptions

log = logging.getLogger(__name__)
Ask = Callable[[str, str], Awaitable[str]]


class Token(msgspec.Struct, frozen=True):
    """`text` is empty when etcd asks for none. `fresh`: it was got for this very request."""

    text: str = ""
    fresh: bool = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self.text),) if self.text else ()


class Login:
    """The token of a session. It belongs to one event loop."""

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        self._token: str | None = None
        self._lock = asyncio.Lock()

    @property
    def wanted(self) -> bool:
        """Whether a user is configured."""
        return bool(self._options.user)

    async def token(self, ask: Ask) -> Token:
        """The token to send; `ask(user, password)` gets one from an endpoint.

        Raises AuthFailed, ConfigError for a password file that is not there, NotCarriedOut when etcd does not answer.
        """
        if not self.wanted:
            return Token()
        async with self._lock:
            if self._token is not None:
                return Token(self._token)
            try:
                self._token = await ask(self._options.user, self._options.read_password())
            except EtcdUnavailable as error:
                raise NotCarriedOut(str(error)) from error
            except EtcdError as error:
                if "authentication is not enabled" not in str(error):
                    raise AuthFailed(
                        f"etcd does not let user {self._options.user!r} in: wrong user or password ({error.code})",
                        error.code,
                    ) from error
                log.warning("etcd's authentication is off: user %r is not needed", self._options.user)
                self._token = ""
            return Token(self._token, fresh=True)

    def forget(self, token: Token) -> None:
        """`token` was refused: the next call logs in, unless another has meanwhile."""
        if self._token == token.text:
            self._token = None
