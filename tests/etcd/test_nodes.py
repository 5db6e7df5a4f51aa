"""The nodes as etcd has them, and one that is forgotten: against real etcd, with real registries."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from ipam_daemon.model import Block, ClusterConfig, NodeRecord, Pool, encode
from ipam_daemon.nodes import NodeLives, NodeUnknown, forget, list_nodes, read_registered
from ipam_daemon.registry import EtcdRegistry
from podwire.etcd import EtcdOptions, EtcdSession
from podwire.lab.etcd import EtcdServer

POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=26)
Run = Callable[[Coroutine[Any, Any, None]], None]


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
