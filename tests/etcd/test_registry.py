"""The registry's stories, each against real etcd and against the fake."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol

import msgspec
import pytest

from ipam_daemon.claims import ConfigMismatch, NodeNameTaken, PoolExhausted
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Backend, BackendType, ClusterConfig, NodeRecord, Pool, encode
from ipam_daemon.registry import ROOT, Registry
from ipam_daemon.registry_fake import FakeRegistry, FakeStore
from podwire.config import ConfigError
from podwire.errors import TryAgain
from podwire.etcd import EtcdOptions, EtcdSession, EtcdUnavailable
from podwire.lab.etcd import EtcdServer
from tests.etcd.guarded import Guarded, guarded

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Join = Callable[[], Awaitable[Registry]]
FEW = Pool(cidr=ipaddress.ip_network("10.244.0.0/22"), block_size=24)
POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=24)


class World(Protocol):
    """A store, on which any number of nodes have a registry each."""

    async def join(self) -> Registry: ...

    async def cut_off(self) -> Registry:
        """A registry that cannot reach the store."""

    async def crash(self, registry: Registry) -> None:
        """Its process is killed; its lease has not run out yet."""


class EtcdWorld:
    def __init__(self, server: EtcdServer, prefix: str, stack: AsyncExitStack, user: str = "") -> None:
        self.server, self.prefix, self.stack, self._user = server, prefix, stack, user
        self.sessions: dict[int, EtcdSession] = {}

    async def join(self) -> Registry:
        return await self._registry(self.server.endpoint)

    async def cut_off(self) -> Registry:
        return await self._registry("http://127.0.0.1:1")

    async def crash(self, registry: Registry) -> None:
        await self.sessions[id(registry)].close()

    async def _registry(self, endpoint: str) -> Registry:
        options = EtcdOptions(endpoints=(endpoint,), user=self._user, password=self._user)
        session = await self.stack.enter_async_context(EtcdSession(options))
        registry = EtcdRegistry(session, root=self.prefix)
        self.sessions[id(registry)] = session
        return registry


class FakeWorld:
    def __init__(self) -> None:
        self.store = FakeStore()

    async def join(self) -> Registry:
        return FakeRegistry(self.store)

    async def cut_off(self) -> Registry:
        self.store.away = True
        return FakeRegistry(self.store)

    async def crash(self, registry: Registry) -> None:
        """A fake has no process to kill."""


@pytest.fixture(scope="module")
def with_roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """An etcd on which the user "nodes" has the roles of the nodes a, b and c, and no other."""
    folder = tmp_path_factory.mktemp("etcd")
    with guarded(folder) as server:
        made = Guarded(server)
        made.enable()
        (folder / "password").write_text("nodes")
        made.recipe("a", "--user", "nodes", "--password-file", str(folder / "password"))
        for name in ("b", "c"):
            made.recipe(name)
            made.etcdctl("user", "grant-role", "nodes", f"podwire-{name}")
        yield made


@pytest.fixture(params=["etcd", "roles", "fake"])
def tell(request: pytest.FixtureRequest, run: Run, prefix: str) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Runs a story in a world of its own."""
    user = ""
    if request.param == "roles":
        with_roles = request.getfixturevalue("with_roles")
        server, prefix, user = with_roles.server, ROOT, "nodes"
        with_roles.etcdctl("del", "--prefix", ROOT)
        with_roles.etcdctl("put", f"{ROOT}config", encode(CONFIG).decode())  # nodes only read it
    else:
        server = request.getfixturevalue("server") if request.param == "etcd" else None

    def tell_story(story: Callable[[World], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with AsyncExitStack() as stack:
                await story(FakeWorld() if server is None else EtcdWorld(server, prefix, stack, user))

        run(whole())

    return tell_story


Tell = Callable[[Callable[[World], Awaitable[None]]], None]


def node(name: str, node_id: str, generation: int = 1, last: int = 1) -> NodeRecord:
    return NodeRecord(
        name=name, node_id=node_id, generation=generation, addresses=(ipaddress.ip_address(f"192.0.2.{last}"),)
    )


# --- configuration ----------------------------------------------------------------------------------------------

CONFIG = ClusterConfig(pools=(POOL,))
MISMATCHES = {
    "another block size": (
        ClusterConfig(pools=(Pool(cidr=POOL.cidr, block_size=26),)),
        ["pools[0].blockSize is 26", "but 24 in the cluster's", "set it to 24 here", "config"],
    ),
    "another pool": (ClusterConfig(pools=(FEW,)), ['pools[0].cidr is "10.244.0.0/22"', '"10.244.0.0/16"']),
    "one pool more": (ClusterConfig(pools=(POOL, FEW)), ["pools[1] is {", "but not set in the cluster's"]),
    "no pool": (ClusterConfig(), ["pools[0] is not set", "10.244.0.0/16"]),
}


def test_the_first_node_writes_the_configuration_and_the_others_find_it(tell: Tell) -> None:
    async def story(world: World) -> None:
        assert await (await world.join()).agree(CONFIG) == CONFIG
        assert await (await world.join()).agree(CONFIG) == CONFIG

    tell(story)


def test_a_node_with_another_backend_takes_the_clusters(tell: Tell) -> None:
    async def story(world: World) -> None:
        await (await world.join()).agree(CONFIG)
        other = ClusterConfig(pools=(POOL,), backend=Backend(type=BackendType.DIRECT, port=8472))
        assert await (await world.join()).agree(other) == CONFIG

    tell(story)


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_node_that_disagrees_is_told_where(name: str, tell: Tell) -> None:
    ours, parts = MISMATCHES[name]

    async def story(world: World) -> None:
        await (await world.join()).agree(CONFIG)
        with pytest.raises(ConfigMismatch) as mismatch:
            await (await world.join()).agree(ours)
        assert [part for part in parts if part not in str(mismatch.value)] == [], mismatch.value

    tell(story)


# --- names ------------------------------------------------------------------------------------------------------


def test_a_new_node_is_of_generation_one(tell: Tell) -> None:
    async def story(world: World) -> None:
        one = await world.join()
        entry = await one.enter("a", "id-1")
        assert (entry.name, entry.node_id, entry.generation, entry.reowned) == ("a", "id-1", 1, ())
        await one.leave()

    tell(story)


def test_a_live_name_is_refused_and_the_holder_named(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two = await world.join(), await world.join()
        await one.enter("a", "id-1")
        await one.publish(node("a", "id-1", last=7))
        with pytest.raises(NodeNameTaken, match=r"'a'.*id-1.*192\.0\.2\.7"):
            await two.enter("a", "id-2")
        await two.enter("b", "id-2")
        await one.leave()
        await two.leave()

    tell(story)


def test_the_next_process_of_the_same_machine_takes_over_at_once(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two = await world.join(), await world.join()
        await one.enter("a", "id-1")
        await one.publish(node("a", "id-1"))
        block = await one.claim_block(POOL, "a", "id-1", 1)
        await world.crash(one)
        entry = await two.enter("a", "id-1")
        assert (entry.generation, entry.reowned) == (1, ())
        assert await two.load_blocks("a") == (block,)
        await two.leave()

    tell(story)


def test_of_two_processes_on_one_machine_the_elder_is_told_that_it_has_lost(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two = await world.join(), await world.join()
        await one.enter("a", "id-1")
        await two.enter("a", "id-1")
        assert isinstance(await one.lost(), NodeNameTaken)
        await one.leave()
        with pytest.raises(NodeNameTaken):
            await (await world.join()).enter("a", "id-2")
        await two.leave()

    tell(story)


def test_a_replaced_machine_gets_the_next_generation_and_the_blocks(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two, other = [await world.join() for _ in range(3)]
        await one.enter("a", "id-1")
        await one.publish(node("a", "id-1"))
        blocks = {(await one.claim_block(POOL, "a", "id-1", 1)).cidr for _ in range(3)}
        theirs = await other.claim_block(POOL, "b", "id-9", 1)
        await one.leave()

        entry = await two.enter("a", "id-2")
        assert (entry.generation, {block.cidr for block in entry.reowned}) == (2, blocks)
        owners = {(block.node_id, block.generation) for block in await two.load_blocks("a")}
        assert owners == {("id-2", 2)}
        assert await two.load_blocks("b") == (theirs,)
        await two.leave()

        again = await two.enter("a", "id-2")
        assert (again.generation, again.reowned) == (2, ()), "before it has published: the same answer"
        await two.leave()

    tell(story)


# --- blocks -----------------------------------------------------------------------------------------------------


def test_a_pool_is_given_out_once_and_then_exhausted(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two = await world.join(), await world.join()
        blocks = [await side.claim_block(FEW, name, name, 1) for side, name in ((one, "a"), (two, "b")) * 2]
        assert {block.cidr for block in blocks} == set(FEW.blocks())
        with pytest.raises(PoolExhausted, match=r"pool default \(10\.244\.0\.0/22\).*all 4 of size /24.*4 claimed"):
            await one.claim_block(FEW, "a", "a", 1)
        assert await two.release_block(blocks[1])
        assert (await one.claim_block(FEW, "a", "a", 1)).cidr == blocks[1].cidr

    tell(story)


def test_pools_of_both_families_are_independent(tell: Tell) -> None:
    six = Pool(name="six", cidr=ipaddress.ip_network("fd00:10::/48"), block_size=122)

    async def story(world: World) -> None:
        one = await world.join()
        claimed = [await one.claim_block(pool, "a", "id", 1) for pool in (POOL, six, six)]
        assert [(block.pool, block.cidr.version, block.cidr.prefixlen) for block in claimed] == [
            ("default", 4, 24),
            ("six", 6, 122),
            ("six", 6, 122),
        ]
        assert len({block.cidr for block in claimed}) == 3
        assert set(await one.load_blocks("a")) == set(claimed)

    tell(story)


@pytest.mark.parametrize(("first", "then"), [(24, 26), (26, 24), (22, 24), (24, 22)])
def test_a_block_of_another_size_is_stepped_around(first: int, then: int, tell: Tell) -> None:
    async def story(world: World) -> None:
        one = await world.join()
        cidr = ipaddress.ip_network("10.244.0.0/20")
        old = [await one.claim_block(Pool(cidr=cidr, block_size=first), "a", "id", 1) for _ in range(2)]
        new = []
        with contextlib.suppress(PoolExhausted):
            while True:
                new.append(await one.claim_block(Pool(cidr=cidr, block_size=then), "a", "id", 1))
        blocks = [block.cidr for block in old + new]
        crossing = [(a, b) for a in blocks for b in blocks if a != b and a.overlaps(b)]
        assert new
        assert crossing == []

    tell(story)


def test_a_block_size_that_does_not_fit_is_a_configuration_error(tell: Tell) -> None:
    async def story(world: World) -> None:
        with pytest.raises(ConfigError, match=r"blockSize 20 does not fit 10\.244\.0\.0/22: it must be from 22 to 32"):
            await (await world.join()).claim_block(Pool(cidr=FEW.cidr, block_size=20), "a", "id", 1)

    tell(story)


def test_a_block_is_released_by_its_owner_alone(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two = await world.join(), await world.join()
        await one.publish(node("a", "id-1"))
        old = await one.claim_block(POOL, "a", "id-1", 1)
        (new,) = (await two.enter("a", "id-2")).reowned
        assert not await one.release_block(old), "the former machine, late"
        assert await two.load_blocks("a") == (new,)
        assert await two.release_block(new)
        assert not await two.release_block(new), "there is nothing left"
        await two.leave()

    tell(story)


def test_a_machine_that_gets_another_name_takes_its_blocks_along_when_the_former_has_ended(tell: Tell) -> None:
    async def story(world: World) -> None:
        former, latter, other = [await world.join() for _ in range(3)]
        await former.enter("a", "id-1")
        block = await former.claim_block(POOL, "a", "id-1", 1)
        await latter.enter("b", "id-1")
        mine = msgspec.structs.replace(block, node="b")
        with pytest.raises(TryAgain, match="node 'a' has it, which lives"):
            await latter.reclaim_block(mine)
        assert await other.load_blocks("a") == (block,), "a copy of a machine takes nothing from it"
        await former.leave()
        assert await latter.reclaim_block(mine) is None
        assert (await other.load_blocks("a"), await other.load_blocks("b")) == ((), (mine,))
        assert await other.reclaim_block(msgspec.structs.replace(block, node="c", node_id="id-9")) == "b"
        await latter.leave()

    tell(story)


# --- nodes ------------------------------------------------------------------------------------------------------

PUBLISHING = {
    "a new name": (None, node("a", "id-1"), True),
    "its own record, changed": (node("a", "id-1"), node("a", "id-1", last=9), True),
    "a former machine's record": (node("a", "id-1"), node("a", "id-2", generation=2), True),
    "another machine's of the same generation": (node("a", "id-1"), node("a", "id-2"), False),
    "its successor's record": (node("a", "id-2", generation=2), node("a", "id-1"), False),
}


@pytest.mark.parametrize("name", PUBLISHING)
def test_publishing_over(name: str, tell: Tell) -> None:
    stored, record, allowed = PUBLISHING[name]

    async def story(world: World) -> None:
        one = await world.join()
        if stored is not None:
            await one.publish(stored)
        try:
            await one.publish(record)
            assert allowed
        except NodeNameTaken:
            assert not allowed
        async with aclosing(one.watch_nodes()) as watch:
            assert (await anext(watch))["a"] == (record if allowed else stored)

    tell(story)


def test_watching_nodes_tells_all_of_them_each_time(tell: Tell) -> None:
    async def story(world: World) -> None:
        one, two = await world.join(), await world.join()
        await one.publish(node("a", "id-1"))
        async with aclosing(two.watch_nodes()) as watch:
            first = await anext(watch)
            assert first == {"a": node("a", "id-1")}
            await one.publish(node("b", "id-2", last=2))
            assert dict(await anext(watch)) == {"a": node("a", "id-1"), "b": node("b", "id-2", last=2)}
            assert set(first) == {"a"}, "what was handed out does not change"

    tell(story)


def test_many_changes_while_nobody_looks_come_as_few(tell: Tell) -> None:
    async def story(world: World) -> None:
        one = await world.join()
        async with aclosing(one.watch_nodes()) as watch:
            assert dict(await anext(watch)) == {}
            for number in range(200):
                await one.publish(node("a", "id-1", last=number))
            looks = 1
            while (await anext(watch))["a"].addresses != node("a", "id-1", last=199).addresses:
                looks += 1
            assert looks < 20

    tell(story)


# --- outages ----------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "agree": lambda registry: registry.agree(CONFIG),
    "enter": lambda registry: registry.enter("a", "id"),
    "load_blocks": lambda registry: registry.load_blocks("a"),
    "claim_block": lambda registry: registry.claim_block(POOL, "a", "id", 1),
    "publish": lambda registry: registry.publish(node("a", "id")),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_etcd_the_answer_is_try_again(name: str, tell: Tell) -> None:
    async def story(world: World) -> None:
        with pytest.raises(EtcdUnavailable):
            await CALLS[name](await world.cut_off())

    tell(story)


# --- of etcd alone ----------------------------------------------------------------------------------------------


def test_a_damaged_record_is_left_out_and_reported_once(
    server: EtcdServer, prefix: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as etcd:
            registry = EtcdRegistry(etcd, root=prefix)
            await registry.publish(node("a", "id-1"))
            await etcd.put(prefix + "nodes/broken", b'{"name": "broken"')
            await etcd.put(prefix + "nodes/b", (await etcd.get(prefix + "nodes/a")).value)  # type: ignore[union-attr]
            async with aclosing(registry.watch_nodes()) as watch:
                assert set(await anext(watch)) == {"a"}
                await etcd.put(prefix + "nodes/broken", b"\xff")
                await registry.publish(node("c", "id-3"))
                while set(await anext(watch)) != {"a", "c"}:
                    pass

    with caplog.at_level(logging.ERROR, "ipam_daemon.etcd_registry"):
        run(story())
    told = [record.getMessage().split(":")[0] for record in caplog.records]
    assert sorted(told) == ["node record 'b' is skipped", "node record 'broken' is skipped"]
