"""Real etcd for tests: one server for the run, a clean prefix each; servers and cables of their own for faults."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from podwire.lab.etcd import EtcdServer
from tests.etcd.guarded import Guarded, guarded, need

T = TypeVar("T")
PATIENCE = 120.0  # seconds for a story: a machine that stalls makes two of them many
_PREFIXES = itertools.count()


class Cable:
    """A TCP relay to a server, which can be pulled out and put back: connections break, then are refused.

    `delay` in seconds is for what the server says, from when it is set: a member that is slow to answer.
    """

    def __init__(self, endpoint: str) -> None:
        self._host, _, port = endpoint.removeprefix("http://").rpartition(":")
        self._to = int(port)
        self._port = 0
        self.delay = 0.0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def plug(self) -> None:
        self._server = await asyncio.start_server(self._relay, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def pull(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def __aenter__(self) -> Cable:
        await self.plug()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pull()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._to)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer, back=True))
        finally:
            self._writers -= {writer, far_writer}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: bool = False) -> None:
        try:
            while data := await reader.read(65536):
                if back and self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()


@pytest.fixture(scope="session")
def _shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    _need_etcd()
    with EtcdServer(tmp_path_factory.mktemp("etcd"), dies_with_parent=True) as server:
        yield server


@pytest.fixture
def server(_shared_server: EtcdServer) -> EtcdServer:
    """The server of the whole run: must not be stopped."""
    return _shared_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EtcdServer]:
    """A server for this test, which may do anything to it. Leases may be as short as a second."""
    _need_etcd()
    with EtcdServer(
        tmp_path, dies_with_parent=True, options=("--heartbeat-interval", "10", "--election-timeout", "100")
    ) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """Keys below it are this test's alone."""
    return f"/test-{next(_PREFIXES)}/"


@pytest.fixture
def cable() -> type[Cable]:
    return Cable


@pytest.fixture(scope="session")
def _runner() -> Iterator[asyncio.Runner]:
    """One event loop for all stories, as a daemon has one: grpc.aio loses events when a loop ends before its calls."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def run(_runner: asyncio.Runner) -> Callable[[Coroutine[Any, Any, T]], T]:
    """Runs a story to its end, and what it left running too; one that hangs fails."""

    async def whole(story: Coroutine[Any, Any, T]) -> T:
        try:
            return await asyncio.wait_for(story, PATIENCE)
        finally:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def run_story(story: Coroutine[Any, Any, T]) -> T:
        return _runner.run(whole(story))

    return run_story


@pytest.fixture
def until() -> Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]:
    """Waits until an async condition holds; the story's own limit ends it."""

    async def wait(condition: Callable[[], Awaitable[object]]) -> None:
        while not await condition():  # noqa: ASYNC110 - what is waited for happens in etcd
            await asyncio.sleep(0.01)

    return wait


@pytest.fixture
def own_guarded(tmp_path: Path) -> Iterator[Guarded]:
    """A server with users, for this test alone."""
    with guarded(tmp_path) as server:
        made = Guarded(server)
        made.enable()
        yield made


def _need_etcd() -> None:
    need("etcd")
