"""Calls and streams to whichever endpoint of the etcd cluster answers.

    call ── connect ──▶ a line whose channel is READY ── login ──▶ token ── the call itself ──▶ answer
              │ refused, or no connection within 1 s                            │
              ├── next endpoint, each once ────────────── "no leader" ──────────┤ nothing was carried out
              │                                           token refused: again ─┤
              └── next endpoint: reads only ◀──────────── no answer ────────────┘ a write: EtcdUnavailable

Connecting comes first and apart, because a write that never left may go to the next endpoint, while a write whose
answer was lost may have been carried out: that one is not repeated but raised (EtcdUnavailable), and the caller reads.
Reads are repeated. The endpoint that worked last is asked first the next time.

Every call says `hasleader`: a member that has lost its quorum then refuses at once, before it does anything, and not
after the 7 s that etcd gives a proposal. For the time of an election the call goes round; when no member has a leader
by then, there is none. With several endpoints a read waits `TURN_S` for one: a member that is slower is left, with all
that waits on it, for the next.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Protocol

import grpc
import grpc.aio

from podwire.backoff import Clock
from podwire.etcd import wire
from podwire.etcd.errors import (
    AuthFailed,
    Compacted,
    EtcdError,
    EtcdUnavailable,
    NotCarriedOut,
    SessionClosed,
    TokenRefused,
)
from podwire.etcd.history import History
from podwire.etcd.line import CONNECT_S, Line
from podwire.etcd.login import Login, Token
from podwire.etcd.options import EtcdOptions
from podwire.etcd.records import Header

TURN_S = 2.0
ELECTION_S = 2.5  # etcd's default: 1 s without a leader, and up to 2 s from then on
_ELECTION_PAUSE_S = 0.1
_LOGINS = 3  # a call: a user that is being changed gets several tokens in quick succession
_CURRENT = ("Range", "Put", "DeleteRange", "Txn")  # their headers are never behind what was confirmed before
_HAS_LEADER = (("hasleader", "true"),)
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,  # a write to a stream that breaks under it; etcd's own client tries again, too
    grpc.StatusCode.UNKNOWN,  # what etcd has no code for: "context deadline exceeded", when it notices that before us
)
_NOTHING_DONE = ("etcdserver: no leader", "too many requests", "raft proposal dropped")
_BAD_TOKEN = ("invalid auth token", "revision in header is old", "auth store is old")


class Observer(Protocol):
    """Is told of every attempt, for metrics and for tests. Must return at once and not raise."""

    def attempt(self, method: str, endpoint: str, outcome: str, seconds: float) -> None:
        """`outcome` is "ok", "no connection" or a gRPC status; of a stream, what its opening met."""

    def watch(self, prefix: str, event: str) -> None:
        """`event` is "snapshot", "changes" or "lost"."""


class Silent:
    """An observer that does nothing."""

    def attempt(self, method: str, endpoint: str, outcome: str, seconds: float) -> None:
        """Passed over."""

    def watch(self, prefix: str, event: str) -> None:
        """Passed over."""


class Connection:
    """The endpoints of one cluster. Channels are made at the first call, inside the running loop."""

    def __init__(self, options: EtcdOptions, clock: Clock, observer: Observer, call_s: float) -> None:
        self.clock = clock
        self.observer = observer
        self.call_s = call_s
        self.connected = False
        self.last_error = ""
        self.header: Header | None = None
        self.history = History()
        self._options = options
        self._login = Login(options)
        self._lines: list[Line] = []
        self._current = 0
        self._closed = False

    async def call(self, method: str, request: wire.Message, *, repeatable: bool) -> wire.Message:
        """One unary call within `call_s` seconds. Raises EtcdUnavailable, EtcdError or one of its kinds."""
        began = self.clock.now()
        lost = refused = logins = 0
        while True:
            line = await self._connect(method)
            left = began + self.call_s - self.clock.now()
            last = not repeatable or lost + 1 >= len(self._lines)
            token, started = Token(), self.clock.now()
            try:
                token = await self._token(line)
                return await self._attempt(line, method, request, token, left if last else min(left, TURN_S))
            except TokenRefused as error:
                self._login.forget(token)
                logins += 1
                if not self._login.wanted or logins > _LOGINS:
                    raise _refused_login(error, self._login.wanted) from error
            except NotCarriedOut as error:
                self._failed(line, method, str(error), started)
                refused += 1
                if self.clock.now() - began >= min(ELECTION_S, self.call_s):
                    raise
                if refused % len(self._lines) == 0:
                    await self.clock.sleep(_ELECTION_PAUSE_S)
            except EtcdUnavailable as error:
                self._failed(line, method, str(error), started)
                self._login.forget(token)  # a member that has not come as far as the token says nothing at all
                lost += 1
                if last or self.clock.now() - began >= self.call_s:
                    raise

    async def _attempt(
        self, line: Line, method: str, request: wire.Message, token: Token, within: float
    ) -> wire.Message:
        """The call on one line. A line that does not answer in time is given up, if there are others."""
        started, since = self.clock.now(), self.history.mark()
        try:
            async with _Translated(self):
                answer = await line.methods[method](
                    request, timeout=max(0.05, within), metadata=_metadata(method, token)
                )
        except EtcdUnavailable:
            if len(self._lines) > 1 and self.clock.now() - started >= within:
                line.give_up()
            raise
        except EtcdError as error:
            self.observer.attempt(method, line.endpoint, error.code, self.clock.now() - started)
            raise
        self.observer.attempt(method, line.endpoint, "ok", self.clock.now() - started)
        self.heard(answer)
        self.history.heard(wire.header(answer), since, current=method in _CURRENT)
        return answer

    async def stream(self, method: str) -> Stream:
        """Opens a stream in both directions. Raises EtcdUnavailable, AuthFailed."""
        line = await self._connect(method)
        started = self.clock.now()
        try:
            token = await self._token(line)
        except EtcdUnavailable as error:
            self._failed(line, method, str(error), started)
            raise
        self.observer.attempt(method, line.endpoint, "ok", 0.0)
        return Stream(self, line, method, token)

    def heard(self, answer: wire.Message) -> None:
        """An answer has come: etcd is there, and its header says which and how far."""
        self.connected = True
        self.last_error = ""
        self.header = wire.header(answer)

    def refused_token(self, token: Token) -> bool:
        """A stream's token was refused. Whether opening it again may help, since that gets a new one."""
        self._login.forget(token)
        return self._login.wanted and not token.fresh

    async def close(self) -> None:
        """Closes every channel; calls under way end with SessionClosed."""
        self._closed = True
        self.connected = False
        lines, self._lines = self._lines, []
        await asyncio.gather(*(line.close() for line in lines))

    @property
    def closed(self) -> bool:
        return self._closed

    async def _connect(self, method: str) -> Line:
        if not self._lines and not self._closed:
            self._lines = [Line(endpoint, self._options) for endpoint in self._options.endpoints]
        reasons = []
        for _ in self._options.endpoints:
            if self._closed:
                raise SessionClosed("the session with etcd is closed")
            line = self._lines[self._current]
            started = self.clock.now()
            if await line.ready(CONNECT_S):
                return line
            reason = await line.diagnose()
            self._failed(line, method, "no connection", started)
            self.last_error = f"{line.endpoint}: {reason or 'no connection'}"
            reasons.append(f"{line.endpoint}: {reason}" if reason else line.endpoint)
        if self._closed:
            raise SessionClosed("the session with etcd is closed")
        raise EtcdUnavailable(f"etcd cannot be reached at {', '.join(reasons)}")

    async def _token(self, line: Line) -> Token:
        async def ask(user: str, password: str) -> str:
            request = wire.authenticate_request(user, password)
            async with _Translated(self):
                answer = await line.methods["Authenticate"](request, timeout=self.call_s, metadata=_HAS_LEADER)
            return str(answer.token)

        return await self._login.token(ask)

    def _failed(self, line: Line, method: str, why: str, started: float) -> None:
        self.connected = False
        self.last_error = f"{line.endpoint}: {why}"
        self.observer.attempt(method, line.endpoint, why, self.clock.now() - started)
        if self._lines and self._lines[self._current] is line:  # else another call has turned already
            self._current = (self._current + 1) % len(self._lines)

    def stream_failed(self, line: Line, method: str, why: str, *, slow: bool = False) -> None:
        if slow and len(self._lines) > 1:
            line.give_up()
        self._failed(line, method, why, self.clock.now())


class Stream:
    """A stream in both directions, as a context: leaving it cancels the call."""

    def __init__(self, connection: Connection, line: Line, method: str, token: Token) -> None:
        self._connection = connection
        self._line = line
        self._method = method
        self._token = token
        self._since = connection.history.mark()
        self._call = line.methods[method](metadata=_metadata(method, token))
        self._ended = asyncio.Event()
        self._call.add_done_callback(lambda _: self._ended.set())

    async def write(self, request: wire.Message) -> None:
        """Sends one request. Raises EtcdUnavailable when the stream is broken."""
        await self._guarded(self._written(request), None)

    async def _written(self, request: wire.Message) -> None:
        """grpc.aio's write waits for ever when the call ends before its metadata was sent, as when its channel is
        closed just then."""
        steps = [asyncio.ensure_future(each) for each in (self._call.write(request), self._ended.wait())]
        try:
            await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
            if not steps[0].done():
                raise asyncio.InvalidStateError("the call has ended")
            await steps[0]
        finally:
            for each in steps:
                each.cancel()

    async def read(self, within: float | None = None) -> wire.Message:
        """The next answer. Raises EtcdUnavailable when the stream breaks, or nothing comes `within` seconds."""
        answer = await self._guarded(self._call.read(), within)
        if answer is grpc.aio.EOF:
            self._connection.stream_failed(self._line, self._method, "the stream ended")
            raise EtcdUnavailable(f"etcd at {self._line.endpoint} ended the stream")
        self._connection.heard(answer)
        self._connection.history.heard(wire.header(answer), self._since, current=False)
        return answer

    def refused(self, error: EtcdError) -> EtcdError | EtcdUnavailable:
        """What to raise for `error`, which a token that has run out may have caused."""
        if self._connection.refused_token(self._token):
            return NotCarriedOut(str(error))
        return error

    async def _guarded(self, step: Any, within: float | None) -> Any:
        started = self._connection.clock.now()
        try:
            async with _Translated(self._connection), asyncio.timeout(within):
                return await step
        except TokenRefused as error:
            raise self.refused(error) from error
        except EtcdUnavailable as error:
            self._connection.refused_token(self._token)
            slow = within is not None and self._connection.clock.now() - started >= within
            self._connection.stream_failed(self._line, self._method, str(error), slow=slow)
            raise

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.cancel()


class _Translated:
    """A context that turns what grpc.aio raises into our errors.

    grpc.aio ends a call whose channel is closed with CancelledError, which must not be taken for the cancellation of
    the task.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def __aenter__(self) -> None:
        return

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            raise _translate(error) from None
        if isinstance(error, TimeoutError):
            raise EtcdUnavailable("etcd did not answer in time") from None
        if isinstance(error, asyncio.InvalidStateError | grpc.aio.UsageError):
            raise EtcdUnavailable("the stream to etcd is broken") from None
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if not (task and task.cancelling()):
                if self._connection.closed:
                    raise SessionClosed("the session with etcd was closed") from None
                raise EtcdUnavailable("the connection to this endpoint was given up") from None


def _metadata(method: str, token: Token) -> tuple[tuple[str, str], ...]:
    return (_HAS_LEADER if method != "Status" else ()) + token.metadata


def _translate(error: grpc.aio.AioRpcError) -> EtcdError | EtcdUnavailable:
    code, details = error.code(), error.details() or ""
    if any(text in details for text in _NOTHING_DONE):
        return NotCarriedOut(f"etcd cannot: {details}")
    if any(text in details for text in (*_BAD_TOKEN, "user name is empty")):
        return TokenRefused(f"etcd refuses: {code.name}: {details}", code.name)
    if code in _AWAY:
        return EtcdUnavailable(f"etcd does not answer: {code.name}: {details}")
    if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return Compacted(details, code.name)
    return EtcdError(f"etcd refuses: {code.name}: {details}", code.name)


def _refused_login(error: TokenRefused, wanted: bool) -> AuthFailed:
    if wanted:
        return AuthFailed(f"etcd gives a token and does not take it: {error}", error.code)
    return AuthFailed(
        f"etcd demands a user ({error}): set etcd.user and etcd.passwordFile, or a client certificate whose common "
        f"name is a user of etcd",
        error.code,
    )
