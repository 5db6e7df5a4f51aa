"""An ADD that waits for its pod's policies, and what comes meanwhile: its DEL, one of an earlier attempt, a block."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ipam_daemon.errors import DeletedMeanwhile
from ipam_daemon.identity import boottime_ns
from ipam_daemon.podwatch import PodWatch
from podwire.v1 import policy_pb2
from tests.netns.node_fixtures import Engine, Netns, Node, block, hold, key, play, pods

CIDR = ipaddress.ip_network("10.244.1.0/28")
PATIENCE = 120.0


class Proxy:
    """A proxy's call, without the socket: what it is told, and what it says."""

    def __init__(self, watch: PodWatch) -> None:
        self._says: asyncio.Queue[policy_pb2.WatchPodsRequest] = asyncio.Queue()
        self._stream = watch.WatchPods(self._requests(), None)

    async def _requests(self) -> AsyncIterator[policy_pb2.WatchPodsRequest]:
        while True:
            yield await self._says.get()

    async def hears(self) -> policy_pb2.WatchPodsResponse:
        return await asyncio.wait_for(anext(self._stream), PATIENCE)

    def settle(self, number: int) -> None:
        self._says.put_nowait(policy_pb2.WatchPodsRequest(synced=True, settled=[number]))

    async def end(self) -> None:
        await self._stream.aclose()  # type: ignore[attr-defined]


@asynccontextmanager
async def stage(folder: Path) -> AsyncIterator[tuple[Engine, Proxy, Netns]]:
    """A node where policies are on, its proxy, and a pod."""
    async with Node() as node:
        watch = PodWatch(True, PATIENCE, lambda: [each.cidr for each in it.attachments.addresses.allocator.blocks])
        it = Engine(node, folder, CIDR, podwatch=watch)
        await it.start()
        proxy = Proxy(watch)
        assert (await proxy.hears()).all
        try:
            with pods(1) as (pod,):
                yield it, proxy, pod
        finally:
            await proxy.end()
            it.journal.close()


def waits(it: Engine, pod: Netns) -> asyncio.Task[object]:
    return asyncio.create_task(it.add("a", pod.path))


async def attached(proxy: Proxy) -> int:
    """The number of the pod that the proxy is told of."""
    while not (told := await proxy.hears()).attached:
        pass
    return int(told.attached[0].number)


def test_a_del_ends_the_wait_of_its_add(tmp_path: Path) -> None:
    async def story() -> None:
        async with stage(tmp_path) as (it, proxy, pod):
            adding = waits(it, pod)
            await attached(proxy)
            await it.delete("a")
            with pytest.raises(DeletedMeanwhile):
                await adding
            assert it.journal.attachments() == ()

    play(story)


def test_a_late_del_of_an_earlier_attempt_does_not(tmp_path: Path) -> None:
    """It was queued while no daemon ran, say; the pod that is being added is another."""

    async def story() -> None:
        async with stage(tmp_path) as (it, proxy, pod):
            earlier = boottime_ns()
            adding = waits(it, pod)
            number = await attached(proxy)
            deleting = asyncio.create_task(it.delete("a", issued_ns=earlier))
            await asyncio.sleep(0.1)
            assert not adding.done()
            proxy.settle(number)
            await adding
            await deleting
            assert it.journal.get(key("a")) is not None

    play(story)


def test_a_del_that_came_while_the_wire_was_made_is_not_kept_waiting(tmp_path: Path) -> None:
    async def story() -> None:
        async with stage(tmp_path) as (it, proxy, pod):
            goes_on = await hold(it.node)
            adding = waits(it, pod)
            await attached(proxy)
            it.attachments._turns.bury(key("a"), boottime_ns())  # as a DEL does that finds no row yet
            goes_on.set()
            with pytest.raises(DeletedMeanwhile):
                await asyncio.wait_for(adding, PATIENCE / 2)

    play(story)


def test_a_block_that_comes_or_goes_is_told_without_a_pod(tmp_path: Path) -> None:
    """A returned block is soon another node's, whose pods' traffic is not for this node to drop."""

    async def story() -> None:
        async with stage(tmp_path) as (it, proxy, _):
            other = block(ipaddress.ip_network("10.244.2.0/28"))
            for blocks in ([block(CIDR), other], [block(CIDR)]):
                it.attachments.addresses.use_blocks(blocks)
                wanted = sorted(str(each.cidr) for each in blocks)
                while sorted((await proxy.hears()).blocks) != wanted:
                    pass

    play(story)
