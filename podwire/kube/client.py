"""Requests to whichever endpoint of the API answers.

    open ── credentials ──▶ endpoint ──▶ status ── 2xx ──▶ Answer: bytes as they come
                 ▲             │            ├── 401: other credentials, once
                 └─────────────┼────────────┘
                               ├── no connection, no answer in time, 5xx ──▶ the next endpoint, each once
                               └── 4xx: raised, since another endpoint would say the same

The endpoint that worked last is asked first the next time, by everything that uses the client. Requests are GETs and
may be repeated freely. A connection whose other end is gone without a word is found by TCP keep-alive within 30 s;
whoever reads says how long silence may last (`Answer.read`). Answers come gzipped where the server does that (lists
of more than 128 kB). Proxies of the environment are not used: a node reaches its API directly.

Errors are those of errors.py; `connected` and `last_error` are for health pages.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType

import aiohttp
import msgspec

import podwire
from podwire.backoff import Clock, SystemClock
from podwire.kube import answers
from podwire.kube.access import Access
from podwire.kube.credentials import Credentials, Shown
from podwire.kube.errors import ApiError, ApiUnavailable, Garbled, Silence, TooManyRequests
from podwire.kube.source import Observer, Silent

LARGEST = 256 << 20  # bytes of an answer that is read as a whole
_BURST = 1 << 20  # bytes that are read ahead, and so decoded in one go: 10 ms
_TLS_DOUBT = " (is our certificate missing, or has it expired, or does the server not know its CA?)"
_ERROR_BYTES = 1 << 16


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `connect`: until there is a connection; `answer`: until the headers of an answer; `silence`: between
    two pieces of a body that is read as a whole."""

    connect: float = 3.0
    answer: float = 30.0
    silence: float = 30.0


class Answer:
    """The body of a successful answer, as it comes."""

    def __init__(self, client: Client, server: str, response: aiohttp.ClientResponse) -> None:
        self._client = client
        self._server = server
        self._response = response

    async def read(self, within: float) -> bytes:
        """What has arrived, at least a byte; empty at the end.

        Raises ApiUnavailable when the connection breaks, Silence when nothing comes `within` seconds; the next request
        then goes to another endpoint.
        """
        try:
            async with asyncio.timeout(within):
                return await self._response.content.readany()
        except TimeoutError as error:
            noted = self._client.failed(self._server, "no answer", f"silent for {within:g} s")
            raise Silence(str(noted)) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a chunk that is none
            raise self._client.failed(self._server, "broken off", _words(error)) from error


class Client:
    """The API as `access` says. Connections are made at the first request, inside the running loop."""

    def __init__(
        self,
        access: Access,
        *,
        clock: Clock | None = None,
        observer: Observer | None = None,
        timing: Timing | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.observer = observer or Silent()
        self.connected = False
        self.last_error = ""
        self._access = access
        self._timing = timing or Timing()
        self._credentials = credentials or Credentials(access)
        self._session: aiohttp.ClientSession | None = None
        self._current = 0

    async def get(self, path: str, query: Mapping[str, str], most: int = LARGEST) -> bytearray:
        """A whole answer. Raises ApiUnavailable, ApiError, CredentialsUnavailable; Garbled when it is too large."""
        body = bytearray()
        async with self.open(path, query) as answer:
            while data := await answer.read(self._timing.silence):
                body += data
                if len(body) > most:
                    raise Garbled(f"{path}: an answer of more than {most} bytes")
        return body

    @asynccontextmanager
    async def open(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Answer]:
        """An answer that is read as it comes; leaving the context ends it. Raises as `get`."""
        server, response = await self._begin(path, query)
        try:
            yield Answer(self, server, response)
        finally:
            if response.content.at_eof():
                response.release()
            else:
                response.close()

    async def close(self) -> None:
        """Closes all connections."""
        self.connected = False
        if self._session is not None:
            await self._session.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _begin(self, path: str, query: Mapping[str, str]) -> tuple[str, aiohttp.ClientResponse]:
        errors: list[ApiUnavailable] = []
        renewed = False
        while len(errors) < len(self._access.servers):
            server = self._access.servers[self._current]
            shown = await self._credentials.show()
            try:
                return server, await self._request(server, path, query, shown)
            except TooManyRequests:
                raise
            except ApiUnavailable as error:
                errors.append(error)
            except ApiError as error:
                if error.code != 401 or renewed or not self._credentials.refused(shown):
                    raise
                renewed = True
        wait = max(error.retry_after for error in errors)
        raise ApiUnavailable("; ".join(str(error) for error in errors), wait)

    async def _request(self, server: str, path: str, query: Mapping[str, str], shown: Shown) -> aiohttp.ClientResponse:
        started = self.clock.now()
        try:
            async with asyncio.timeout(self._timing.answer):
                response = await self._made().get(
                    server + path,
                    params=query,
                    headers=shown.headers,
                    ssl=shown.context if server.startswith("https:") else True,
                    server_hostname=self._access.server_name or None,
                    allow_redirects=False,
                )
        except TimeoutError as error:  # aiohttp's own, for connecting, is one too
            spent = self.clock.now() - started
            raise self.failed(server, "no answer", f"no answer within {spent:.3g} s", started) from error
        except (aiohttp.ClientConnectorError, aiohttp.ClientSSLError) as error:
            raise self.failed(server, "no connection", _words(error), started) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            secure = server.startswith("https:") and isinstance(error, aiohttp.ServerDisconnectedError)
            doubt = _TLS_DOUBT if secure else ""
            raise self.failed(server, "no answer", _words(error) + doubt, started) from error
        if response.ok and response.status < 300:
            self.observer.attempt(server, "ok", self.clock.now() - started)
            self.connected, self.last_error = True, ""
            _keep_alive(response)
            return response
        raise await self._refusal(server, path, response, started)

    async def _refusal(
        self, server: str, path: str, response: aiohttp.ClientResponse, started: float
    ) -> ApiError | ApiUnavailable:
        try:
            async with asyncio.timeout(self._timing.silence):
                body = await response.content.read(_ERROR_BYTES)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            body = b""
        finally:
            response.close()
        error = answers.failure(response.status, body, response.headers.get("Retry-After", ""), f"{server}{path}")
        if isinstance(error, ApiUnavailable) and not isinstance(error, TooManyRequests):
            self.failed(server, str(response.status), str(error), started)
        else:
            self.observer.attempt(server, str(response.status), self.clock.now() - started)
            self.connected, self.last_error = True, str(error)
        return error

    def failed(self, server: str, outcome: str, why: str, started: float | None = None) -> ApiUnavailable:
        """Notes that an endpoint failed, and turns to the next. The error that says so."""
        self.connected = False
        self.last_error = why if why.startswith(server) else f"{server}: {why}"
        self.observer.attempt(server, outcome, 0.0 if started is None else self.clock.now() - started)
        if self._access.servers[self._current] == server:  # else another task has turned already
            self._current = (self._current + 1) % len(self._access.servers)
        return ApiUnavailable(self.last_error)

    def _made(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timing.connect),
                headers={"Accept": "application/json", "User-Agent": f"podwire/{podwire.__version__}"},
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=_BURST,
                trust_env=False,
            )
        return self._session


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """A silent connection is probed after 15 s and given up at 30 s, also with bytes of ours that nobody confirms."""
    transport = None if response.connection is None else response.connection.transport
    own = None if transport is None else transport.get_extra_info("socket")
    if own is None or own.family not in (socket.AF_INET, socket.AF_INET6):
        return
    own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3), (socket.TCP_USER_TIMEOUT, 30_000)
    ):  # fmt: skip
        own.setsockopt(socket.IPPROTO_TCP, option, value)


def _words(error: BaseException) -> str:
    """What an exception of aiohttp or the operating system says, in one line."""
    certificate = getattr(error, "certificate_error", None) or error.__cause__ or error
    reason = getattr(certificate, "verify_message", "") or getattr(certificate, "reason", "")
    if isinstance(reason, str) and reason:
        return f"TLS: {reason.rstrip('.').replace('_', ' ').lower()}"
    system = getattr(error, "os_error", None) or error
    text = getattr(system, "strerror", None) or str(system) or type(error).__name__
    return " ".join(str(text).split())
