"""The nodes as etcd has them, and one that is forgotten: against real etcd, with real registries."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Block, ClusterConfig, NodeRecord, Pool, encode
from ipam_daemon.nodes import NodeLives, NodeUnknown, forget, list_nodes, read_registered
from podwire.etcd import EtcdOptions, EtcdSession
from podwire.lab.etcd import EtcdServer

POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=26)
Run = Callable[[Coroutine[Any, Any, None]], None]
Until = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


async def joined(session: EtcdSession, root: str, name: str, blocks: int = 1) -> tuple[EtcdRegistry, NodeRecord]:
    """A node that lives, with so many blocks."""
    registry = EtcdRegistry(session, root=root)
    await registry.agree(ClusterConfig(pools=(POOL,)))
    entry = await registry.enter(name, f"id-{name}")
    claimed = [await registry.claim_block(POOL, name, f"id-{name}", entry.generation) for _ in range(blocks)]
    record = NodeRecord(
        name=name,
        node_id=f"id-{name}",
        addresses=(ipaddress.ip_address("172.31.0.1"),),
        blocks=tuple(block.cidr for block in claimed),
    )
    await registry.publish(record)
    return registry, record


def test_a_node_is_forgotten_when_nobody_lives_under_its_name(server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session:
            gone, record = await joined(session, prefix, "gone", 2)
            stays, other = await joined(session, prefix, "stays")
            with pytest.raises(NodeLives, match=r"machine id-gone \(172\.31\.0\.1\)"):
                await forget(session, "gone", prefix)
            await gone.leave()
            shown = {each.name: each for each in await list_nodes(session, prefix)}
            assert (shown["gone"].live, shown["stays"].live) == ("", "id-stays")
            assert {block.cidr for block in shown["gone"].blocks} == set(record.blocks)
            released = await forget(session, "gone", prefix)
            assert {block.cidr for block in released} == set(record.blocks)
            assert [each.name for each in await list_nodes(session, prefix)] == ["stays"]
            said = await read_registered(session, "stays", prefix)
            assert (said.record, said.live, [each.cidr for each in said.blocks]) == (
                other,
                "id-stays",
                list(other.blocks),
            )
            with pytest.raises(NodeUnknown):
                await forget(session, "gone", prefix)
            await stays.leave()

    run(story())


def test_more_blocks_than_a_transaction_takes(server: EtcdServer, prefix: str, run: Run) -> None:
    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session:
            cidrs = list(ipaddress.IPv4Network("10.0.0.0/16").subnets(new_prefix=24))[:230]
            for cidr in cidrs:
                block = Block(cidr=cidr, pool="default", node="big", node_id="id-big", generation=1)
                await session.put(f"{prefix}blocks/{cidr}", encode(block))
            assert len(await forget(session, "big", prefix)) == 230
            assert await list_nodes(session, prefix) == ()

    run(story())


LEFTOVERS = {
    "a live key that no lease ends": ("live/odd", b'{"nodeId": "id-odd"}'),
    "a damaged record": ("nodes/odd", b"{"),
    "a block without record": (
        "blocks/10.9.0.0/24",
        encode(Block(cidr=ipaddress.ip_network("10.9.0.0/24"), pool="p", node="odd", node_id="x", generation=1)),
    ),
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_what_is_left_of_a_node_is_listed_and_forgotten(server: EtcdServer, prefix: str, run: Run, what: str) -> None:
    key, value = LEFTOVERS[what]

    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session:
            await session.put(prefix + key, value)
            assert [each.name for each in await list_nodes(session, prefix)] == ["odd"]
            await forget(session, "odd", prefix)
            assert await list_nodes(session, prefix) == ()

    run(story())


def test_a_node_that_changes_while_it_is_forgotten_is_looked_at_again(
    server: EtcdServer, prefix: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the reading and the transaction its daemon comes back."""

    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session:
            registry, record = await joined(session, prefix, "back")
            await registry.leave()
            real = session.txn
            entered: list[EtcdRegistry] = []

            async def late(*words: Any) -> Any:
                if not entered:
                    entered.append(EtcdRegistry(session, root=prefix))
                    monkeypatch.setattr(session, "txn", real)
                    await entered[0].enter("back", "id-back")
                return await real(*words)

            monkeypatch.setattr(session, "txn", late)
            with pytest.raises(NodeLives):
                await forget(session, "back", prefix)
            (shown,) = await list_nodes(session, prefix)
            assert shown.record is not None
            assert msgspec.structs.replace(shown.record, published=0.0) == record
            assert [block.cidr for block in shown.blocks] == list(record.blocks)
            await entered[0].leave()

    run(story())


def test_since_when_a_node_does_not_live_is_seen_by_another(
    server: EtcdServer, prefix: str, run: Run, until: Until
) -> None:
    """It stops, comes back, and dies another time: each time the list says since when."""

    async def story() -> None:
        async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session:
            others = [(await joined(session, prefix, name))[0] for name in ("other", "third")]
            began = time.time()

            async def gone() -> float:
                return {each.name: each for each in await list_nodes(session, prefix)}["gone"].gone

            for how in ("stops", "dies"):
                registry, _ = await joined(session, prefix, "gone")
                assert await gone() == 0, "a node that lives is not gone, whatever was before"
                if how == "stops":
                    await registry.leave()
                else:
                    (item,) = (await session.get_prefix(f"{prefix}live/gone")).items
                    await leave_for_dead(registry)
                    await session.revoke(item.lease)
                await until(lambda since=began: later(gone, since))  # type: ignore[misc]
                assert began <= await gone() <= time.time()
                began = time.time()
            await forget(session, "gone", prefix)
            assert await session.get(f"{prefix}gone/gone") is None
            for each in others:
                await each.leave()

    async def later(when: Callable[[], Awaitable[float]], since: float) -> bool:
        return await when() >= since

    run(story())


async def leave_for_dead(registry: EtcdRegistry) -> None:
    """Ends what a killed process would not do any more, and takes nothing out of etcd."""
    assert registry._live is not None
    assert registry._live._task is not None
    registry._live._task.cancel()
    registry._live = None
    await registry.leave()


@pytest.mark.fault("a node that was forgotten comes back", promises=("it joins again", "nobody's claims wait"))
@pytest.mark.parametrize("noticed_by", ["its blocks, which it claims again", "its keys, which it looks after"])
def test_who_was_forgotten_comes_back_without_an_alarm(
    server: EtcdServer, prefix: str, run: Run, noticed_by: str
) -> None:
    async def story() -> None:
        async with (
            EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session,
            EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as far,
        ):
            back, record = await joined(far, prefix, "back", 2)
            blocks = await back.load_blocks("back")
            assert back._live is not None
            assert back._live._lease is not None
            back._live._task.cancel()  # type: ignore[union-attr]
            await session.revoke(back._live._lease.id)
            await forget(session, "back", prefix)
            if noticed_by.startswith("its keys"):
                await back._restoration.look()
            else:
                for block in blocks:
                    assert await back.reclaim_block(block) is None
            assert far.history.breaks == 0
            assert await session.get(f"{prefix}restored") is None
            await back.claim_block(POOL, "back", "id-back", 1)
            await back.publish(record)
            assert await session.get(f"{prefix}forgotten/back") is None
            await session.delete(f"{prefix}nodes/back")
            await back._restoration.look()
            assert far.history.breaks == 1, "what is lost from now on was not given up"
            await back.leave()

    run(story())
