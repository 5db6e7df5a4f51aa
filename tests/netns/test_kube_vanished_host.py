"""A watch whose server vanishes without a word, as when its machine loses power: no packet says that anything ended."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, aclosing

import pytest

from podwire import netns
from podwire.kube.access import Access
from podwire.kube.api import ApiSource
from podwire.kube.client import Client
from podwire.kube.kinds import proxied_services
from podwire.lab.api.kinds import SERVICES
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store
from tests.netns.node_fixtures import Netns

LIMIT = 300.0
SERVERS = ("10.9.1.1", "10.9.2.1")


def within(path: str, work: Callable[[], None]) -> threading.Thread:
    """A thread that has entered a namespace for good."""

    def run() -> None:
        fd = netns.open_netns(path)
        try:
            with netns.inside(fd):
                work()
        finally:
            os.close(fd)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def listeners(path: str) -> list[socket.socket]:
    found: list[socket.socket] = []
    within(path, lambda: found.extend(socket.create_server((address, 6443)) for address in SERVERS)).join()
    return found


def wired(stack: ExitStack) -> tuple[Netns, Netns]:
    """Servers and a node, with a cable for each server."""
    servers, node = stack.enter_context(Netns("servers")), stack.enter_context(Netns("node"))
    for number, address in enumerate(SERVERS):
        servers.ip("link", "add", f"c{number}", "type", "veth", "peer", "name", f"c{number}", "netns", node.name)
        for where, own in ((servers, address), (node, f"{address[:-1]}2")):
            where.ip("address", "add", f"{own}/24", "dev", f"c{number}")
            where.ip("link", "set", f"c{number}", "up")
    return servers, node


class Names:
    """The Services that a source knows, as another thread may read them."""

    def __init__(self) -> None:
        self.known: frozenset[str] = frozenset()
        self.stop = asyncio.Event()

    def follow(self) -> None:
        asyncio.run(self._whole())

    async def _whole(self) -> None:
        self.loop = asyncio.get_running_loop()
        task = asyncio.create_task(self._follow())
        await self.stop.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        access = Access(servers=tuple(f"http://{address}:6443" for address in SERVERS), origin="test")
        async with Client(access) as client, aclosing(ApiSource(client).follow(proxied_services())) as batches:
            async for batch in batches:
                self.known |= {obj.metadata.name for obj in batch.upserts}

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)


def made(name: str) -> dict[str, object]:
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {"ports": [{"port": 80}]}}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT):
        while not holds():  # noqa: ASYNC110 (another thread does it)
            await asyncio.sleep(0.05)


@pytest.mark.slow
def test_a_watch_goes_on_at_the_next_endpoint_when_its_host_vanishes() -> None:
    async def story(servers: Netns, node: Netns) -> None:
        store = Store()
        async with AsyncExitStack() as stack:
            for listener in listeners(servers.path):
                await stack.enter_async_context(ApiServer(store, bookmark_seconds=3600).serving(listener=listener))
            names = Names()
            thread = within(node.path, names.follow)
            try:
                store.create(SERVICES, made("before"))
                await until(lambda: names.known == {"before"})
                servers.ip("route", "add", "blackhole", f"{SERVERS[0][:-1]}2/32")
                store.create(SERVICES, made("after"))
                await until(lambda: names.known == {"before", "after"})
            finally:
                names.end()
                await asyncio.to_thread(thread.join)

    with ExitStack() as stack:
        asyncio.run(story(*wired(stack)))
