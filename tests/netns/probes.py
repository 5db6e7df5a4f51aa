"""Probes between network namespaces, all at once, from one process: which flows are open, refused, or answer nothing.

A socket belongs to the namespace that it was opened in, so each is opened by a thread that is there for that moment,
and used by the event loop like any other. A TCP probe connects, a UDP one sends and waits for the echo. A probe that
gets no answer is given up after `TIMEOUT` seconds; one that should have had one is asked again, for longer.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from podwire.netns import inside

TIMEOUT, PATIENCE = 0.25, 30.0
_RESET = struct.pack("ii", 1, 0)
T = TypeVar("T")


class Outcome(StrEnum):
    OPEN = "open"
    REFUSED = "refused"
    TIMEOUT = "timeout"


class Probe(NamedTuple):
    """From a namespace (its name under /run/netns) to an address."""

    source: str
    address: str
    protocol: str
    port: int


class Prober:
    """Servers and probes in namespaces. Use as a context manager; it closes what it has opened."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._namespaces: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.AbstractServer | asyncio.DatagramTransport] = []

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()
        self._threads.shutdown()
        for fd in self._namespaces.values():
            os.close(fd)

    def serve(self, namespace: str, ports: Iterable[int], versions: Iterable[int] = (4, 6)) -> None:
        """Listens on TCP and UDP ports in a namespace, on all addresses."""
        for version in versions:
            for port in ports:
                self._loop.run_until_complete(self._serve(namespace, port, version))

    async def _serve(self, namespace: str, port: int, version: int) -> None:
        family, anywhere = (socket.AF_INET, "0.0.0.0") if version == 4 else (socket.AF_INET6, "::")

        def listening(kind: socket.SocketKind) -> socket.socket:
            made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
            if version == 6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((anywhere, port))
            return made

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        stream = self._in(namespace, lambda: listening(socket.SOCK_STREAM))
        self._servers.append(await asyncio.start_server(accepted, sock=stream, backlog=512))
        datagrams = self._in(namespace, lambda: listening(socket.SOCK_DGRAM))
        transport, _ = await self._loop.create_datagram_endpoint(_Echo, sock=datagrams)
        self._servers.append(transport)

    def run(self, probes: Iterable[Probe], expected: Mapping[Probe, Outcome]) -> dict[Probe, Outcome]:
        """What became of all probes, at once. One that is expected to be answered and was not is tried again."""
        return self._loop.run_until_complete(self._run(list(probes), expected))

    async def _run(self, probes: list[Probe], expected: Mapping[Probe, Outcome]) -> dict[Probe, Outcome]:
        outcomes = dict(zip(probes, await asyncio.gather(*(self._ask(each, TIMEOUT) for each in probes)), strict=True))
        late = [
            each
            for each, outcome in outcomes.items()
            if outcome is Outcome.TIMEOUT and expected.get(each, Outcome.OPEN) is not Outcome.TIMEOUT
        ]
        for start in range(0, len(late), 32):
            part = late[start : start + 32]
            outcomes.update(zip(part, await asyncio.gather(*(self._ask(each, PATIENCE) for each in part)), strict=True))
        return outcomes

    async def _ask(self, probe: Probe, seconds: float) -> Outcome:
        family = socket.AF_INET6 if ":" in probe.address else socket.AF_INET
        kind = socket.SOCK_STREAM if probe.protocol == "TCP" else socket.SOCK_DGRAM
        made = self._in(probe.source, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK))
        with made:
            try:
                return await asyncio.wait_for(self._talk(made, probe), seconds)
            except TimeoutError:
                return Outcome.TIMEOUT
            except ConnectionRefusedError:
                return Outcome.REFUSED
            except OSError as error:
                if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM):
                    return Outcome.REFUSED
                raise

    async def _talk(self, made: socket.socket, probe: Probe) -> Outcome:
        await self._loop.sock_connect(made, (probe.address, probe.port))
        if probe.protocol == "TCP":
            with suppress(OSError):
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        else:
            answer = asyncio.ensure_future(self._loop.sock_recv(made, 16))
            try:
                while not answer.done():  # as TCP does by itself: a neighbour that is not known yet loses datagrams
                    await self._loop.sock_sendall(made, b"?")
                    await asyncio.wait({answer}, timeout=1.0)
                answer.result()
            finally:
                answer.cancel()
        return Outcome.OPEN

    def _in(self, namespace: str, make: Callable[[], T]) -> T:
        if namespace not in self._namespaces:
            self._namespaces[namespace] = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
        fd = self._namespaces[namespace]

        def entered() -> T:
            with inside(fd):
                return make()

        return self._threads.submit(entered).result()


class _Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        self._transport.sendto(data, peer)
