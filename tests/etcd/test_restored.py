"""A wiped or restored etcd: what was had is claimed again, what is new waits, nobody is forgotten or overwritten."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from ipam_daemon.claims import StoreRestored
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Block, ClusterConfig, NodeRecord, Pool
from ipam_daemon.registry import Registry
from ipam_daemon.registry_fake import FakeRegistry, FakeStore
from podwire.etcd import EtcdOptions, EtcdSession, SystemClock
from podwire.lab.etcd import EtcdServer
from tests.etcd.insisting import insist

Run = Callable[[Coroutine[Any, Any, Any]], Any]
POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=24)
CONFIG = ClusterConfig(pools=(POOL,))
ROOT = "/restored/"
LIVE_S, SETTLE_S = 1, 600  # the latter passes when a story says so


class World(Protocol):
    """A store that can be put back in time, and registries of any number of nodes on it."""

    async def join(self) -> Registry: ...

    async def back_up(self) -> None: ...

    async def restore(self, *, backup: bool) -> None:
        """The store comes back with what the backup has, or with nothing."""

    async def told(self) -> None:
        """Returns when the store has the word of whoever noticed that it was restored."""

    async def settle(self) -> None:
        """The time passes for which new claims wait."""


class Skipping(SystemClock):
    """The real one, which a story can put forward: what it says then has passed."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


class EtcdWorld:
    def __init__(self, server: EtcdServer, backup: Path, stack: AsyncExitStack, live_s: int = LIVE_S) -> None:
        self._server, self._backup, self._stack, self._live_s = server, backup, stack, live_s
        self._clock = Skipping()

    async def join(self) -> Registry:
        options = EtcdOptions(endpoints=(self._server.endpoint,))
        etcd = await self._stack.enter_async_context(EtcdSession(options, clock=self._clock))
        return EtcdRegistry(etcd, root=ROOT, live_s=self._live_s, settle_s=SETTLE_S)

    async def back_up(self) -> None:
        self._server.stop()
        self._server.save(self._backup)
        self._server.start()

    async def restore(self, *, backup: bool) -> None:
        self._server.kill()
        if backup:
            self._server.restore(self._backup)
        else:
            self._server.wipe()
        self._server.start()

    async def told(self) -> None:
        async with EtcdSession(EtcdOptions(endpoints=(self._server.endpoint,))) as etcd:
            while await insist(lambda: etcd.get(f"{ROOT}restored")) is None:  # noqa: ASYNC110 - another session writes it
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """The registries' clocks are put forward, and the key that makes all wait goes, as with its lease."""
        self._clock.ahead += SETTLE_S
        async with EtcdSession(EtcdOptions(endpoints=(self._server.endpoint,))) as etcd:
            await insist(lambda: etcd.delete(f"{ROOT}restored"))


class FakeWorld:
    def __init__(self) -> None:
        self._store = FakeStore()
        self._backup: tuple[Mapping[Any, Block], Mapping[str, NodeRecord]] = ({}, {})

    async def join(self) -> Registry:
        return FakeRegistry(self._store)

    async def back_up(self) -> None:
        self._backup = (dict(self._store.blocks), dict(self._store.nodes))

    async def restore(self, *, backup: bool) -> None:
        self._store.restore(*(self._backup if backup else ()))

    async def told(self) -> None:
        """It has it at once."""

    async def settle(self) -> None:
        self._store.settle()


Tell = Callable[[Callable[[World], Awaitable[None]]], None]


@pytest.fixture(params=["etcd", "fake"])
def tell(request: pytest.FixtureRequest, run: Run, tmp_path: Path) -> Tell:
    """Runs a story in a world of its own."""
    server = request.getfixturevalue("own_server") if request.param == "etcd" else None

    def tell_story(story: Callable[[World], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with AsyncExitStack() as stack:
                await story(FakeWorld() if server is None else EtcdWorld(server, tmp_path / "backup", stack))

        run(whole())

    return tell_story


class Node:
    """A daemon as far as the registry goes."""

    def __init__(self, name: str, registry: Registry) -> None:
        self.name, self.registry = name, registry
        self.blocks: list[Block] = []

    async def join(self) -> None:
        await insist(lambda: self.registry.agree(CONFIG))
        await insist(lambda: self.registry.enter(self.name, f"id-{self.name}"))
        await self.claim()
        await self.publish()

    async def claim(self) -> Block:
        block: Block = await insist(lambda: self.registry.claim_block(POOL, self.name, f"id-{self.name}", 1))
        self.blocks.append(block)
        return block

    async def publish(self) -> None:
        await insist(lambda: self.registry.publish(self.record))

    async def say_again(self) -> list[str | None]:
        """What the agent does after `restored`. Returns who has each block instead."""
        await insist(lambda: self.registry.agree(CONFIG))
        holders = [await insist(lambda b=block: self.registry.reclaim_block(b)) for block in self.blocks]  # type: ignore[misc]
        await self.publish()
        return holders

    @property
    def record(self) -> NodeRecord:
        return NodeRecord(
            name=self.name,
            node_id=f"id-{self.name}",
            addresses=(ipaddress.ip_address("192.0.2.1"),),
            blocks=tuple(block.cidr for block in self.blocks),
        )


async def wait_for_names(watch: Any, wanted: set[str]) -> Mapping[str, NodeRecord]:
    while set(known := await anext(watch)) != wanted:
        pass
    return known  # type: ignore[no-any-return]


@asynccontextmanager
async def nodes(world: World, *names: str) -> AsyncIterator[list[Node]]:
    """Nodes that have joined, with a block each."""
    made = [Node(name, await world.join()) for name in names]
    for each in made:
        await each.join()
    yield made
    for each in made:
        await insist(each.registry.leave)


def test_after_a_wipe_what_was_had_is_claimed_at_once_and_what_is_new_waits(tell: Tell) -> None:
    async def story(world: World) -> None:
        async with nodes(world, "a", "b") as (a, b):
            await world.restore(backup=False)
            await asyncio.gather(a.registry.restored(), b.registry.restored())
            with pytest.raises(StoreRestored, match="wiped or restored"):
                await insist(lambda: a.registry.claim_block(POOL, "a", "id-a", 1))
            assert await a.say_again() == [None]
            stranger = await world.join()  # knows nothing of what was there before
            await insist(lambda: stranger.agree(CONFIG))
            with pytest.raises(StoreRestored):
                await insist(lambda: stranger.claim_block(POOL, "b", "id-c", 1))
            assert await b.say_again() == [None]
            new = await settling(world, patiently(lambda: stranger.claim_block(POOL, "b", "id-c", 1)))
            assert new.cidr not in {block.cidr for block in a.blocks + b.blocks}

    tell(story)


async def patiently(call: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        try:
            return await insist(call)
        except StoreRestored:
            await asyncio.sleep(0.05)


async def settling(world: World, wanted: Awaitable[Any]) -> Any:
    """What comes when the time to wait is over, for those, too, whose word that all must wait came only now."""
    waiting = asyncio.ensure_future(wanted)
    while not waiting.done():
        await world.settle()
        await asyncio.wait({waiting}, timeout=0.2)
    return await waiting


def test_a_backup_that_lacks_a_block_is_told_of_it(tell: Tell) -> None:
    async def story(world: World) -> None:
        async with nodes(world, "a", "b") as (a, b):
            await world.back_up()
            await b.claim()
            await b.publish()
            await world.restore(backup=True)
            await b.registry.restored()
            assert await b.say_again() == [None, None]
            assert await a.say_again() == [None]
            assert set(await b.registry.load_blocks("b")) == set(b.blocks)

    tell(story)


def test_a_block_that_another_has_by_now_is_not_overwritten(tell: Tell) -> None:
    """The backup is of a time when b had what a has now."""

    async def story(world: World) -> None:
        async with nodes(world, "a", "b") as (a, b):
            await world.back_up()
            (given,) = b.blocks
            assert await insist(lambda: b.registry.release_block(given))
            taken = Block(cidr=given.cidr, pool=given.pool, node="a", node_id="id-a", generation=1)
            assert await insist(lambda: a.registry.reclaim_block(taken)) is None
            a.blocks.append(taken)
            await world.restore(backup=True)
            await a.registry.restored()
            assert await a.say_again() == [None, "b"]
            assert given in await b.registry.load_blocks("b")

    tell(story)


def test_peers_stay_until_they_are_back_or_somebody_else_has_their_block(tell: Tell) -> None:
    async def story(world: World) -> None:
        async with nodes(world, "a", "b", "c") as (a, b, c), aclosing(a.registry.watch_nodes()) as watch:
            await wait_for_names(watch, {"a", "b", "c"})
            await world.restore(backup=False)
            await wait_for_names(watch, {"b", "c"})  # a itself is missing, and so it says again who it is
            await a.say_again()
            await wait_for_names(watch, {"a", "b", "c"})
            c.blocks = list(b.blocks)  # c says that it has b's block
            await c.publish()
            await wait_for_names(watch, {"a", "c"})
            await b.publish()
            await wait_for_names(watch, {"a", "b", "c"})

    tell(story)


def test_a_daemon_that_starts_meanwhile_gets_no_list_before_it_is_whole(tell: Tell) -> None:
    async def story(world: World) -> None:
        async with nodes(world, "a", "b") as (a, b):
            seen = a.registry.seen()
            await a.registry.leave()
            await world.restore(backup=False)
            again = Node("a", await world.join())
            again.registry.recall(seen)
            again.blocks = a.blocks
            await insist(lambda: again.registry.agree(CONFIG))
            await again.registry.restored()
            await insist(lambda: again.registry.enter("a", "id-a"))
            assert await again.say_again() == [None]
            async with aclosing(again.registry.watch_nodes()) as watch:
                first = asyncio.ensure_future(anext(watch))
                await b.registry.restored()
                assert await b.say_again() == [None]
                assert not first.done()
                assert set(await settling(world, first)) == {"a", "b"}
            await again.registry.leave()

    tell(story)


def test_a_node_that_finds_a_block_of_its_own_lost_makes_the_others_wait(tell: Tell) -> None:
    """Nothing but the block says that the store was restored: it has come further than before, or this is a restart."""

    async def story(world: World) -> None:
        async with nodes(world, "a") as (a,):
            (block,) = a.blocks
            await a.registry.release_block(block)
            other = await world.join()
            await insist(lambda: other.agree(CONFIG))
            assert await a.registry.reclaim_block(block) is None
            await a.registry.restored()
            await world.told()
            blocks = await asyncio.gather(other.claim_block(POOL, "b", "id-b", 1), return_exceptions=True)
            assert isinstance(blocks[0], StoreRestored)

    tell(story)


# --- of etcd alone ----------------------------------------------------------------------------------------------


def test_who_notices_waits_from_that_moment_on(own_server: EtcdServer, run: Run) -> None:
    """The key that makes the others wait is not there yet."""

    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(own_server.endpoint,))) as etcd:
            registry = EtcdRegistry(etcd, root=ROOT, live_s=LIVE_S, settle_s=SETTLE_S)
            await registry.agree(CONFIG)
            etcd.history.broken("as a test says")
            with pytest.raises(StoreRestored, match="as a test says"):
                await registry.claim_block(POOL, "a", "id-a", 1)

    run(story())


@pytest.mark.parametrize("lost", ["blocks", "nodes"])
def test_a_store_that_has_overtaken_the_old_one_is_known_by_what_it_lacks(
    lost: str, own_server: EtcdServer, run: Run, tmp_path: Path
) -> None:
    """Neither cluster id nor revision says anything; the daemon is connected all the time, as far as it can tell."""

    async def story() -> None:
        async with AsyncExitStack() as stack:
            world = EtcdWorld(own_server, tmp_path / "backup", stack)
            async with nodes(world, "a") as (a,):
                async with EtcdSession(EtcdOptions(endpoints=(own_server.endpoint,))) as etcd:
                    await etcd.delete(f"{ROOT}{lost}/", prefix=True)
                assert lost in await a.registry.restored()
                assert await a.say_again() == [None]
                assert await a.registry.load_blocks("a") == tuple(a.blocks)

    run(story())


def test_a_name_whose_holder_comes_from_the_backup_is_taken_again(
    own_server: EtcdServer, run: Run, tmp_path: Path, until: Any
) -> None:
    """The backup has the name under a former process, or a former machine, with a lease that is good for a while."""

    async def story() -> None:
        async with AsyncExitStack() as stack:
            world = EtcdWorld(own_server, tmp_path / "backup", stack, live_s=3)  # within three of it the former's ends
            former, now, watcher = [await world.join() for _ in range(3)]
            etcd = await stack.enter_async_context(EtcdSession(EtcdOptions(endpoints=(own_server.endpoint,))))
            await former.enter("a", "id-former")
            await world.back_up()
            await insist(former.leave)
            await insist(lambda: now.enter("a", "id-a"))
            await insist(lambda: etcd.put("/so-that-the-revision", b"goes back"))
            lost = asyncio.ensure_future(now.lost())
            await world.restore(backup=True)

            async def ours() -> bool:
                assert not lost.done(), lost.result()
                item = await insist(lambda: etcd.get(f"{ROOT}live/a"))
                return item is not None and b"id-a" in item.value

            await until(ours)
            await now.leave()
            del watcher

    run(story())
