"""Calls and streams to whichever endpoint of the etcd cluster answers.

    call ── connect ──▶ a line whose channel is READY ── the call itself ──▶ answer
              │ refused, or no connection within 1 s          │ UNAVAILABLE, DEADLINE_EXCEEDED
              └── next endpoint, each once ───────────────────┘

Connecting comes first and apart, because a write that never left may go to the next endpoint, while a write whose
answer was lost may have been carried out: that one is not repeated but raised (EtcdUnavailable), and the caller reads.
Reads are repeated. The endpoint that worked last is asked first the next time.

gRPC reconnects a channel by itself, at most once a second; a call meets a channel without connection at once, so a
server that is away costs the caller's own back-off and no loop. Dead peers are found by HTTP/2 pings (10 s + 5 s), a
member without a leader by the `hasleader` metadata on streams, which makes etcd end them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import grpc
import grpc.aio

from podwire.config import ConfigError
from podwire.etcd import wire
from podwire.etcd.backoff import Clock
from podwire.etcd.errors import Compacted, EtcdError, EtcdUnavailable, SessionClosed
from podwire.etcd.options import EtcdOptions, parse_endpoint
from podwire.etcd.records import Header

CONNECT_S = 1.0
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", int(CONNECT_S * 1000)),  # gRPC takes it as the time to connect, too
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),  # etcd's server refuses less than 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.use_local_subchannel_pool", 1),  # a session shares no connection, and no back-off, with another
    ("grpc.enable_http_proxy", 0),
)
_READY = grpc.ChannelConnectivity.READY
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,  # a write to a stream that breaks under it; etcd's own client tries again, too
)
_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


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


class Line:
    """One endpoint: its channel and the calls on it."""

    def __init__(self, endpoint: str, options: EtcdOptions) -> None:
        self.endpoint, secure = parse_endpoint(endpoint, options.tls)
        if secure:
            self.channel = grpc.aio.secure_channel(self.endpoint, _credentials(options), _CHANNEL_OPTIONS)
        else:
            self.channel = grpc.aio.insecure_channel(self.endpoint, _CHANNEL_OPTIONS)
        self.methods: dict[str, Callable[..., Any]] = wire.methods(self.channel)

    async def ready(self, within: float) -> bool:
        """True as soon as there is a connection, False as soon as it is clear that there is none."""
        try:
            async with asyncio.timeout(within):
                while (state := self.channel.get_state(try_to_connect=True)) is not _READY:
                    if state in _FAILED:
                        return False
                    await self.channel.wait_for_state_change(state)
        except TimeoutError:
            return False
        return True


class Connection:
    """The endpoints of one cluster. Channels are made at the first call, inside the running loop."""

    def __init__(self, options: EtcdOptions, clock: Clock, observer: Observer, call_s: float) -> None:
        self.clock = clock
        self.observer = observer
        self.call_s = call_s
        self.connected = False
        self.last_error = ""
        self.header: Header | None = None
        self._options = options
        self._lines: list[Line] = []
        self._current = 0
        self._closed = False

    async def call(self, method: str, request: wire.Message, *, repeatable: bool) -> wire.Message:
        """One unary call within `call_s` seconds. Raises EtcdUnavailable, EtcdError or one of its kinds."""
        deadline = self.clock.now() + self.call_s
        attempts = len(self._options.endpoints)
        while True:
            line = await self._connect(method)
            attempts -= 1
            started = self.clock.now()
            try:
                async with _Translated(self):
                    answer = await line.methods[method](request, timeout=max(0.05, deadline - started))
            except EtcdUnavailable as error:
                self._failed(line, method, str(error), started)
                if not repeatable or attempts <= 0 or self.clock.now() >= deadline:
                    raise
            except EtcdError as error:
                self.observer.attempt(method, line.endpoint, error.code, self.clock.now() - started)
                raise
            else:
                self.observer.attempt(method, line.endpoint, "ok", self.clock.now() - started)
                self.heard(answer)
                return answer

    async def stream(self, method: str) -> Stream:
        """Opens a stream in both directions. Raises EtcdUnavailable."""
        line = await self._connect(method)
        self.observer.attempt(method, line.endpoint, "ok", 0.0)
        return Stream(self, line, method)

    def heard(self, answer: wire.Message) -> None:
        """An answer has come: etcd is there, and its header says which and how far."""
        self.connected = True
        self.last_error = ""
        self.header = wire.header(answer)

    async def close(self) -> None:
        """Closes every channel; calls under way end with SessionClosed."""
        self._closed = True
        self.connected = False
        lines, self._lines = self._lines, []
        await asyncio.gather(*(line.channel.close() for line in lines))

    @property
    def closed(self) -> bool:
        return self._closed

    async def _connect(self, method: str) -> Line:
        if self._closed:
            raise SessionClosed("the session with etcd is closed")
        if not self._lines:
            self._lines = [Line(endpoint, self._options) for endpoint in self._options.endpoints]
        for _ in self._lines:
            line = self._lines[self._current]
            started = self.clock.now()
            if await line.ready(CONNECT_S):
                return line
            if self._closed:
                raise SessionClosed("the session with etcd is closed")
            self._failed(line, method, "no connection", started)
        raise EtcdUnavailable(f"etcd cannot be reached at {', '.join(line.endpoint for line in self._lines)}")

    def _failed(self, line: Line, method: str, why: str, started: float) -> None:
        self.connected = False
        self.last_error = f"{line.endpoint}: {why}"
        self.observer.attempt(method, line.endpoint, why, self.clock.now() - started)
        if self._lines and self._lines[self._current] is line:  # else another call has turned already
            self._current = (self._current + 1) % len(self._lines)

    def stream_failed(self, line: Line, method: str, why: str) -> None:
        self._failed(line, method, why, self.clock.now())


class Stream:
    """A stream in both directions, as a context: leaving it cancels the call."""

    def __init__(self, connection: Connection, line: Line, method: str) -> None:
        self._connection = connection
        self._line = line
        self._method = method
        self._call = line.methods[method](metadata=(("hasleader", "true"),))

    async def write(self, request: wire.Message) -> None:
        """Sends one request. Raises EtcdUnavailable when the stream is broken."""
        await self._guarded(self._call.write(request), None)

    async def read(self, within: float | None = None) -> wire.Message:
        """The next answer. Raises EtcdUnavailable when the stream breaks, or nothing comes `within` seconds."""
        answer = await self._guarded(self._call.read(), within)
        if answer is grpc.aio.EOF:
            self._connection.stream_failed(self._line, self._method, "the stream ended")
            raise EtcdUnavailable(f"etcd at {self._line.endpoint} ended the stream")
        self._connection.heard(answer)
        return answer

    async def _guarded(self, step: Any, within: float | None) -> Any:
        try:
            async with _Translated(self._connection), asyncio.timeout(within):
                return await step
        except EtcdUnavailable as error:
            self._connection.stream_failed(self._line, self._method, str(error))
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
            if self._connection.closed and not (task and task.cancelling()):
                raise SessionClosed("the session with etcd was closed") from None


def _translate(error: grpc.aio.AioRpcError) -> EtcdError | EtcdUnavailable:
    code, details = error.code(), error.details() or ""
    if code in _AWAY or "too many requests" in details:
        return EtcdUnavailable(f"etcd does not answer: {code.name}: {details}")
    if code is grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return Compacted(details, code.name)
    return EtcdError(f"etcd refuses: {code.name}: {details}", code.name)


def _credentials(options: EtcdOptions) -> Any:
    def pem(path: str) -> bytes | None:
        try:
            return Path(path).read_bytes() if path else None
        except OSError as error:
            raise ConfigError(f"etcd: {path}: cannot be read: {error.strerror}") from error

    return grpc.ssl_channel_credentials(pem(options.ca), pem(options.key), pem(options.cert))
