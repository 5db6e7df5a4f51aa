"""Three members: one dies, one stands still, most are gone, and nothing is had twice."""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Block, NodeRecord, Pool, decode
from podwire.etcd import EtcdOptions, EtcdSession, EtcdUnavailable
from podwire.etcd.records import Changes, Snapshot, Written
from podwire.lab.etcd import EtcdCluster, EtcdServer
from tests.etcd.insisting import insist

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Until = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]
POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=24)
FIFTY = 50


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed (Debian: apt install etcd-server)")
    with EtcdCluster(tmp_path_factory.mktemp("etcd"), dies_with_parent=True) as made:
        yield made


@pytest.fixture
def cluster(three: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members that serve; whatever a test does to them is mended."""
    yield three
    for member in three.members:
        member.resume()
    three.start()


def connect(*endpoints: str, **more: Any) -> EtcdSession:
    return EtcdSession(EtcdOptions(endpoints=endpoints), **more)


async def leader_of(cluster: EtcdCluster) -> EtcdServer:
    while True:
        for member in cluster.members:
            async with connect(member.endpoint) as etcd:
                status = await insist(etcd.status)
            if status.member == status.leader:
                return member
        await asyncio.sleep(0.05)


def node(name: str) -> NodeRecord:
    return NodeRecord(name=name, node_id=name, addresses=(ipaddress.ip_address("192.0.2.1"),))


@pytest.mark.slow
@pytest.mark.fault("etcd's leader killed while 50 nodes claim", promises=("no block twice",))
def test_the_leader_is_killed_while_fifty_nodes_claim(cluster: EtcdCluster, prefix: str, run: Run) -> None:
    claimed = asyncio.Event()

    async def claim(stack: AsyncExitStack, number: int) -> Block:
        own = cluster.endpoints[number % 3 :] + cluster.endpoints[: number % 3]
        etcd = await stack.enter_async_context(connect(*own))
        registry = EtcdRegistry(etcd, root=prefix)
        block: Block = await insist(lambda: registry.claim_block(POOL, f"n{number}", str(number), 1))
        claimed.set()
        return block

    async def kill(leader: EtcdServer) -> None:
        await claimed.wait()
        leader.kill()

    async def story() -> None:
        leader = await leader_of(cluster)
        async with AsyncExitStack() as stack:
            killing = asyncio.create_task(kill(leader))
            blocks = await asyncio.gather(*(claim(stack, number) for number in range(FIFTY)))
            await killing
            assert leader.pid is None
            assert len({block.cidr for block in blocks}) == FIFTY
            etcd = await stack.enter_async_context(connect(*cluster.endpoints))
            stored = await insist(lambda: etcd.get_prefix(prefix + "blocks/"))
        assert {decode(item.value, Block) for item in stored.items} == set(blocks), "what each was told, and no more"

    run(story())


@pytest.mark.fault("an etcd member that stands still", promises=("another is asked", "no name is lost"))
def test_a_member_that_stands_still_is_left_and_nobodys_lease_is_lost(
    cluster: EtcdCluster, prefix: str, run: Run
) -> None:
    """The member is the one that the session talks to, and the leader: the worst of cases."""

    async def story() -> None:
        leader = await leader_of(cluster)
        others = tuple(endpoint for endpoint in cluster.endpoints if endpoint != leader.endpoint)
        async with connect(leader.endpoint, *others) as etcd, aclosing(etcd.watch_prefix(prefix)) as watch:
            lease = await insist(lambda: etcd.grant(10))
            await insist(lambda: etcd.put(prefix + "kept", b"", lease=lease.id))
            renewal = asyncio.create_task(etcd.keep_alive(lease))
            assert isinstance(await anext(watch), Snapshot)
            leader.pause()
            await insist(lambda: etcd.get(prefix))
            await insist(lambda: etcd.put(prefix + "meanwhile", b""))
            await seen(watch, prefix + "meanwhile")
            assert await insist(lambda: etcd.get(prefix + "kept"))
            assert not renewal.done()
            leader.resume()
            await insist(lambda: etcd.put(prefix + "later", b""))
            await seen(watch, prefix + "later")
            assert await insist(lambda: etcd.get(prefix + "kept"))
            assert etcd.history.breaks == 0, "a member that is behind is not a store that was restored"
            assert not renewal.done()

    run(story())


async def seen(watch: AsyncGenerator[Snapshot | Changes, None], key: str) -> None:
    """Waits until the watch, which goes on without a new snapshot, tells of the key."""
    while True:
        batch = await anext(watch)
        assert isinstance(batch, Changes)
        if any(isinstance(event, Written) and event.item.key == key for event in batch.events):
            return


@pytest.mark.fault("no quorum during a claim", promises=("error 11", "it goes on afterwards"))
def test_without_a_quorum_a_claim_says_try_again_and_what_waits_goes_on_afterwards(
    cluster: EtcdCluster, prefix: str, run: Run
) -> None:
    async def story() -> None:
        async with connect(*cluster.endpoints) as etcd:
            registry = EtcdRegistry(etcd, root=prefix)
            await insist(lambda: registry.enter("a", "id"))
            async with aclosing(registry.watch_nodes()) as peers:
                await insist(lambda: registry.publish(node("a")))
                while "a" not in await anext(peers):
                    pass
                left, *gone = cluster.members
                for member in gone:
                    member.kill()
                waiting = asyncio.ensure_future(anext(peers))
                while True:  # at first the member that is left may still believe in its leader
                    with pytest.raises(EtcdUnavailable) as refused:
                        await registry.claim_block(POOL, "a", "id", 1)
                    if "no leader" in str(refused.value):
                        break
                assert left.pid is not None
                assert not waiting.done()
                for member in gone:
                    member.start()
                block = await insist(lambda: registry.claim_block(POOL, "a", "id", 1))
                assert await insist(lambda: registry.load_blocks("a")) == (block,)
                await insist(lambda: registry.publish(node("b")))
                while "b" not in await waiting:
                    waiting = asyncio.ensure_future(anext(peers))
            assert etcd.history.breaks == 0
            await registry.leave()

    run(story())


@pytest.mark.slow
def test_all_members_down_and_back(cluster: EtcdCluster, prefix: str, run: Run, until: Until) -> None:
    async def story() -> None:
        async with connect(*cluster.endpoints) as etcd:
            registry = EtcdRegistry(etcd, root=prefix, live_s=2)
            await insist(lambda: registry.enter("a", "id"))
            block = await insist(lambda: registry.claim_block(POOL, "a", "id", 1))
            cluster.stop()
            with pytest.raises(EtcdUnavailable):
                await registry.claim_block(POOL, "a", "id", 1)
            cluster.start()

            async def live() -> bool:
                return await insist(lambda: etcd.get(prefix + "live/a")) is not None

            await until(live)
            assert await insist(lambda: registry.load_blocks("a")) == (block,)
            assert etcd.history.breaks == 0
            await registry.leave()

    run(story())
