"""The registry under races and outages, on real etcd."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any

import pytest

from ipam_daemon.claims import ConfigMismatch, NodeNameTaken, PoolExhausted
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import ClusterConfig, NodeRecord, Pool
from podwire.etcd import EtcdOptions, EtcdSession, EtcdUnavailable
from podwire.lab.etcd import EtcdServer
from tests.etcd.insisting import insist

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Until = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]
POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=24)
FIFTY = 50


def connect(endpoint: str) -> EtcdSession:
    return EtcdSession(EtcdOptions(endpoints=(endpoint,)))


def node(name: str, node_id: str, generation: int = 1) -> NodeRecord:
    return NodeRecord(name=name, node_id=node_id, generation=generation, addresses=(ipaddress.ip_address("192.0.2.1"),))


@pytest.mark.parametrize("cidr", ["10.244.0.0/16", "10.244.0.0/18", "fd00:10::/58"])
def test_fifty_nodes_race_and_no_block_is_had_twice(cidr: str, server: EtcdServer, prefix: str, run: Run) -> None:
    """/18 and /58 have 64 blocks: the nodes meet often."""
    network = ipaddress.ip_network(cidr)
    pool = Pool(cidr=network, block_size=24 if network.version == 4 else 64)

    async def claim(number: int) -> Any:
        async with connect(server.endpoint) as etcd:
            registry = EtcdRegistry(etcd, root=prefix)
            return await insist(lambda: registry.claim_block(pool, f"node-{number}", str(number), 1))

    async def story() -> None:
        blocks = await asyncio.gather(*(claim(number) for number in range(FIFTY)))
        assert len({block.cidr for block in blocks}) == FIFTY
        async with connect(server.endpoint) as etcd:
            stored = [(await EtcdRegistry(etcd, root=prefix).load_blocks(block.node)) for block in blocks]
        assert stored == [(block,) for block in blocks], "etcd says what each was told"

    run(story())


def test_of_fifty_nodes_racing_for_thirty_two_blocks_thirty_two_win(server: EtcdServer, prefix: str, run: Run) -> None:
    pool = Pool(cidr=ipaddress.ip_network("10.244.0.0/19"), block_size=24)

    async def story() -> None:
        async with AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(connect(server.endpoint)) for _ in range(FIFTY)]
            registries = [EtcdRegistry(etcd, root=prefix) for etcd in sessions]
            claims = (
                insist(partial(registry.claim_block, pool, f"node-{number}", str(number), 1))
                for number, registry in enumerate(registries)
            )
            answers = await asyncio.gather(*claims, return_exceptions=True)
        won = {answer.cidr for answer in answers if not isinstance(answer, BaseException)}
        assert won == set(pool.blocks())
        assert sum(isinstance(answer, PoolExhausted) for answer in answers) == FIFTY - 32

    run(story())


def test_of_twenty_machines_that_enter_at_once_one_gets_the_name(server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        async with connect(server.endpoint) as etcd:
            registries = [EtcdRegistry(etcd, root=prefix) for _ in range(20)]
            answers = await asyncio.gather(
                *(registry.enter("a", f"id-{number}") for number, registry in enumerate(registries)),
                return_exceptions=True,
            )
            refused = [isinstance(answer, NodeNameTaken) for answer in answers]
            assert sum(refused) == 19, answers
            await registries[refused.index(False)].leave()
            assert (await etcd.get_prefix(prefix + "live/")).items == ()

    run(story())


@pytest.mark.fault("the answer to a claim is lost", promises=("the block is found again",))
@pytest.mark.parametrize("broken", [True, False], ids=["the connection broke", "an ADD waited no longer"])
def test_a_claim_whose_answer_was_lost_is_found_again(server: EtcdServer, prefix: str, run: Run, broken: bool) -> None:
    async def story() -> None:
        async with connect(server.endpoint) as etcd:
            registry = EtcdRegistry(etcd, root=prefix)
            txn = etcd.txn

            async def carried_out_but_unheard(*arguments: Any) -> Any:
                await txn(*arguments)
                if broken:
                    raise EtcdUnavailable("the connection broke")
                await asyncio.sleep(3600)

            etcd.txn = carried_out_but_unheard  # type: ignore[method-assign, assignment]
            with pytest.raises(EtcdUnavailable if broken else TimeoutError):
                await asyncio.wait_for(registry.claim_block(POOL, "a", "id", 1), 60 if broken else 2)
            etcd.txn = txn  # type: ignore[method-assign]
            block = await registry.claim_block(POOL, "a", "id", 1)
            assert await registry.load_blocks("a") == (block,), "one block, not two"

    run(story())


def test_no_claim_under_a_configuration_that_has_changed(server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        config = ClusterConfig(pools=(POOL,))
        changed = ClusterConfig(pools=(Pool(cidr=POOL.cidr, block_size=26),))
        async with connect(server.endpoint) as etcd:
            old, new = EtcdRegistry(etcd, root=prefix), EtcdRegistry(etcd, root=prefix)
            await old.agree(config)
            await old.claim_block(POOL, "a", "id", 1)
            await etcd.delete(prefix + "config")
            await old.claim_block(POOL, "a", "id", 1)  # nobody has changed it: written again
            await etcd.delete(prefix + "config")
            await new.agree(changed)
            with pytest.raises(ConfigMismatch, match="blockSize is 24"):
                await old.claim_block(POOL, "a", "id", 1)
            assert len(await new.load_blocks("a")) == 2

    run(story())


class Outage:
    """A node behind a cable, and an observer beside it."""

    def __init__(self, far: EtcdSession, line: Any, near: EtcdSession, prefix: str, until: Until) -> None:
        self.far, self.line, self.prefix, self._until = far, line, prefix, until
        self.registry = EtcdRegistry(near, root=prefix, live_s=60)
        self.other = EtcdRegistry(far, root=prefix, live_s=60)

    async def live(self) -> bool:
        return await self.far.get(self.prefix + "live/a") is not None

    async def gone(self) -> bool:
        return not await self.live()

    async def outlast_the_lease(self) -> None:
        """The lease ends when it is told to: one that is short enough to wait for ends, too, while a machine stalls."""
        await self.line.pull()
        held = await self.far.get(self.prefix + "live/a")
        assert held is not None
        await self.far.revoke(held.lease)
        await self._until(self.gone)


@pytest.fixture
def outage(own_server: EtcdServer, prefix: str, run: Run, cable: Any, until: Until) -> Callable[..., None]:
    def tell(story: Callable[[Outage], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with (
                cable(own_server.endpoint) as line,
                connect(own_server.endpoint) as far,
                connect(line.endpoint) as near,
            ):
                await story(Outage(far, line, near, prefix, until))

        run(whole())

    return tell


@pytest.mark.fault("etcd away for longer than a lease", promises=("the name is taken again",))
def test_after_an_outage_longer_than_the_lease_the_name_is_taken_again(outage: Any, until: Until) -> None:
    async def story(scene: Outage) -> None:
        await scene.registry.enter("a", "id-1")
        await scene.outlast_the_lease()
        await scene.line.plug()
        await until(scene.live)
        with pytest.raises(NodeNameTaken):
            await scene.other.enter("a", "id-2")
        await scene.registry.leave()
        assert await scene.gone()

    outage(story)


@pytest.mark.fault("a live key deleted by hand", promises=("it is written again",))
@pytest.mark.parametrize("how", ["the key alone", "its lease, and the key with it"])
def test_a_live_key_that_somebody_deleted_is_written_again(
    server: EtcdServer, prefix: str, run: Run, until: Until, how: str
) -> None:
    """The lease lives on, and would for hours: its own renewal does not miss the key."""

    async def story() -> None:
        async with connect(server.endpoint) as etcd, connect(server.endpoint) as hand:
            registry, longer = (EtcdRegistry(etcd, root=prefix, live_s=3600) for _ in range(2))
            await registry.enter("a", "id-1")
            await longer.enter("a2", "id-1")  # a name that begins with the other's
            for _ in range(2):
                before = await hand.get(prefix + "live/a")
                assert before is not None
                await (hand.delete(prefix + "live/a") if how == "the key alone" else hand.revoke(before.lease))
                await until(partial(hand.get, prefix + "live/a"))
                after = await hand.get(prefix + "live/a")
                assert after is not None
                assert after.lease not in (0, before.lease)
            assert etcd.history.breaks == 0
            await registry.leave()
            await longer.leave()

    run(story())


@pytest.mark.fault("the node's name taken during an outage", promises=("who took it keeps it, the other ends",))
def test_who_took_the_name_during_the_outage_keeps_it(outage: Any) -> None:
    async def story(scene: Outage) -> None:
        await scene.registry.enter("a", "id-1")
        await scene.registry.publish(node("a", "id-1"))
        await scene.outlast_the_lease()
        assert (await scene.other.enter("a", "id-2")).generation == 2
        await scene.line.plug()
        assert "id-2" in str(await scene.registry.lost())
        assert await scene.live()
        await scene.registry.leave()
        assert await scene.live(), "the loser's leaving does not touch the winner's key"
        await scene.other.leave()

    outage(story)


def test_who_took_the_name_and_left_again_keeps_it_too(outage: Any) -> None:
    async def story(scene: Outage) -> None:
        await scene.registry.enter("a", "id-1")
        await scene.registry.publish(node("a", "id-1"))
        await scene.outlast_the_lease()
        entry = await scene.other.enter("a", "id-2")
        await scene.other.publish(node("a", "id-2", entry.generation))
        await scene.other.leave()
        await scene.line.plug()
        assert "id-2" in str(await scene.registry.lost())
        assert await scene.gone()
        await scene.registry.leave()

    outage(story)


@pytest.mark.fault("etcd restarted, then wiped", promises=("the name stays live",))
def test_a_restart_and_a_wipe_of_etcd_leave_the_name_live(
    own_server: EtcdServer, prefix: str, run: Run, until: Until
) -> None:
    async def story() -> None:
        async with connect(own_server.endpoint) as etcd:
            registry = EtcdRegistry(etcd, root=prefix, live_s=1)
            await registry.enter("a", "id-1")

            async def live() -> bool:
                try:
                    return await etcd.get(prefix + "live/a") is not None
                except EtcdUnavailable:
                    return False

            own_server.kill()
            own_server.start()
            await until(live)
            own_server.kill()
            own_server.wipe()
            own_server.start()
            await until(live)
            await registry.leave()

    run(story())


def test_peers_are_followed_through_a_restart_and_a_compaction(
    own_server: EtcdServer, prefix: str, run: Run, cable: Any
) -> None:
    async def story() -> None:
        async with (
            cable(own_server.endpoint) as line,
            connect(own_server.endpoint) as far,
            connect(line.endpoint) as near,
            aclosing(EtcdRegistry(near, root=prefix).watch_nodes()) as watch,
        ):
            other = EtcdRegistry(far, root=prefix)
            await other.publish(node("a", "id-1"))
            while set(await anext(watch)) != {"a"}:
                pass
            await line.pull()
            own_server.kill()
            own_server.start()
            while True:
                try:
                    await far.delete(prefix + "nodes/a")
                    await other.publish(node("b", "id-2"))
                    break
                except EtcdUnavailable:
                    await asyncio.sleep(0.01)
            await far.compact((await far.get_prefix(prefix)).revision)
            await line.plug()
            while set(await anext(watch)) != {"b"}:
                pass

    run(story())
