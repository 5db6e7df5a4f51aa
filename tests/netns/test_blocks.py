"""More blocks than one: claimed before they run short, returned when they have long been empty, never held twice."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from ipam_daemon.blocks import BlockKeeper
from ipam_daemon.errors import Exhausted, PlumbingFailed, TryAgainLater
from ipam_daemon.held import HeldFile, HeldKeeper
from ipam_daemon.model import Block, ClusterConfig, Pool
from ipam_daemon.registry_fake import FakeRegistry, FakeStore
from podwire.lab import cluster, node, process
from podwire.lab.state import LabState, plan_nodes
from tests.netns.containers import (
    Container,
    add,
    add_again,
    at_once,
    containers,
    know_each_other,
    on_node,
    status,
    wait,
)
from tests.netns.node_fixtures import COOLDOWN, Engine, engine, eventually, play, pods

PATIENCE = 90.0
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    """Two nodes that share sixteen blocks of four pods each, and return an empty one at once."""
    state = LabState(name=f"blocks-{uuid4().hex[:6]}", nodes=plan_nodes(2), pod_cidr="10.250.0.0/25")
    try:
        lab = cluster.up(state)
        for each in lab.nodes:
            configure(lab, each.name, blockIdle=0, cooldown=0)
        yield know_each_other(lab)
    finally:
        cluster.down(state.name)


def configure(lab: LabState, name: str, **changes: object) -> None:
    """Restarts a node's daemon with other settings."""
    file = lab.files.node_path(name, "/etc/podwire") / "ipamd.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))
    node.stop_daemon(lab, name)
    node.start_daemon(lab, name)
    node.wait_daemon(lab, name)


def blocks(lab: LabState, name: str) -> set[str]:
    return {block.cidr for block in status(lab, name).blocks}


def test_a_node_claims_blocks_as_it_fills_and_returns_them_as_it_empties(lab: LabState) -> None:
    with containers(lab, "node1", "grow", 20) as boxes, containers(lab, "node2", "peer", 1) as (peer,):
        peer_address = add(peer).address
        added = at_once([partial(add, each) for each in boxes])
        assert [answer.body for answer in added if answer.error] == []
        held = blocks(lab, "node1")
        addresses = {ipaddress.ip_address(answer.address) for answer in added}
        assert len(addresses) == 20
        assert len(held) >= 5
        assert all(any(address in ipaddress.ip_network(cidr) for cidr in held) for address in addresses)
        assert held.isdisjoint(blocks(lab, "node2"))
        for each in boxes:
            wait(partial(reaches, each, peer_address), f"the peer to know the block of {each.name}")
        for address in addresses - {ipaddress.ip_address(added[0].address)}:
            assert reaches(boxes[0], str(address), 10), "blocks of one node reach each other"
        at_once([partial(each.call, "DEL") for each in (*boxes, peer)])
    process.wait_for(lambda: len(blocks(lab, "node1")) == 1, PATIENCE, "the empty blocks to be returned")
    (left,) = blocks(lab, "node1")
    gateway = [str(ipaddress.ip_interface(f"{_first(left)}/29"))]
    process.wait_for(lambda: gateways(lab, "node1") == gateway, PATIENCE, "the bridge to lose the other gateways")
    process.wait_for(lambda: routes(lab, "node2") == [left], PATIENCE, "the peer to lose the other routes")


def reaches(box: Container, address: str, seconds: int = 1) -> bool:
    return box.run("ping", "-c1", f"-W{seconds}", address).returncode == 0


def gateways(lab: LabState, name: str) -> list[str]:
    shown = on_node(lab, name, "ip", "-4", "-o", "address", "show", "pw0").stdout
    return [line.split()[3] for line in shown.splitlines()]


def routes(lab: LabState, name: str) -> list[str]:
    shown = on_node(lab, name, "ip", "route", "show", "proto", "80").stdout
    return [line.split()[0] for line in shown.splitlines()]


def _first(cidr: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_network(cidr)[1]


@pytest.mark.fault("etcd away, all blocks full", promises=("error 11, quickly", "ADD works once etcd is back"))
def test_without_etcd_a_full_node_is_told_to_try_again_and_goes_on_when_it_is_back(
    lab: LabState, record_property: Record
) -> None:
    with containers(lab, "node1", "away", 6) as boxes:
        etcd = process.recorded(lab.files, cluster.ETCD)
        assert etcd is not None
        etcd.kill()
        assert etcd.wait_gone(PATIENCE)
        try:
            added = [each.call("ADD") for each in boxes]
            assert [answer.error for answer in added] == [0, 0, 0, 0, 11, 11]
            assert "claiming another block" in added[4].body["msg"]
        finally:
            began = time.monotonic()
            cluster.start_etcd(lab)
        add_again(boxes[4], record_property, began)
        assert add(boxes[5]).error == 0
        at_once([partial(each.call, "DEL") for each in boxes])
    process.wait_for(lambda: len(blocks(lab, "node1")) == 1, PATIENCE, "the empty blocks to be returned")


def test_a_node_keeps_to_its_limit(lab: LabState) -> None:
    configure(lab, "node2", maxBlocks=2)
    with containers(lab, "node2", "limit", 10) as boxes:
        added = [add(each) for each in boxes]
        assert [answer.error for answer in added] == [0] * 8 + [100] * 2
        assert "2 blocks of a pool at the most (maxBlocks)" in added[8].body["msg"]
        at_once([partial(each.call, "DEL") for each in boxes])
    configure(lab, "node2", maxBlocks=16)


@pytest.mark.fault(
    "daemon killed on a node with several blocks", promises=("blocks and addresses stay the node's", "no address twice")
)
def test_a_restarted_daemon_knows_all_its_blocks_and_pods(lab: LabState, record_property: Record) -> None:
    with containers(lab, "node1", "again", 10) as (late, *boxes):
        at_once([partial(add, each) for each in boxes])
        before = {block.cidr for block in status(lab, "node1").blocks if block.used}  # an empty one may be returned
        node.kill_daemon(lab, "node1")
        began = time.monotonic()
        node.start_daemon(lab, "node1")
        add_again(late, record_property, began)
        assert sum(block.used for block in status(lab, "node1").blocks) == 10
        assert blocks(lab, "node1") >= before
        at_once([partial(each.call, "DEL") for each in (late, *boxes)])
    process.wait_for(lambda: len(blocks(lab, "node1")) == 1, PATIENCE, "the empty blocks to be returned")


def test_a_block_leaves_what_outlives_a_reboot_before_it_leaves_etcd(tmp_path: Path) -> None:
    """While that cannot be written the block stays this node's: after a power cut it would use it again."""

    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/29") as it:
            store, writable = FakeStore(), False
            registry, pool = FakeRegistry(store), Pool(cidr=ipaddress.ip_network("10.244.1.0/24"), block_size=29)
            file = HeldFile(tmp_path / "held.json")
            held = HeldKeeper(file, it.journal, it.attachments, COOLDOWN)

            async def keep() -> bool:
                return writable and await held.keep()

            async def use(blocks: Sequence[Block]) -> None:
                it.journal.set_blocks(blocks)
                it.attachments.addresses.use_blocks(blocks)

            keeper = keeper_of(it, registry, use, keep)
            first, second = [await registry.claim_block(pool, "node-1", "id-1", 1) for _ in range(2)]
            await use([first, second])
            await held.write()
            keeper.begin(ClusterConfig(pools=(pool,)), [first, second])
            await keeper._round()
            assert it.journal.blocks() == (first,), "it is retired"
            assert set(store.blocks) == {first.cidr, second.cidr}
            writable = True
            await keeper._round()
            assert file.read().blocks == (first,)
            assert set(store.blocks) == {first.cidr}

    play(story)


def keeper_of(
    it: Engine,
    registry: FakeRegistry,
    use: Callable[[Sequence[Block]], Awaitable[None]],
    keep: Callable[[], Awaitable[bool]],
) -> BlockKeeper:
    return BlockKeeper(
        registry=registry,
        attachments=it.attachments,
        claim=lambda pool: registry.claim_block(pool, "node-1", "id-1", 1),
        use=use,
        limit=4,
        idle_s=0,
        keep=keep,
    )


TWO_POOLS = (  # the first has the block that the node has, and no other: 28 pods; the second four blocks of 13
    Pool(cidr=ipaddress.ip_network("10.244.1.0/27"), block_size=27),
    Pool(cidr=ipaddress.ip_network("fd00:1::/122"), block_size=124),
)


@pytest.mark.parametrize("pools", [TWO_POOLS, TWO_POOLS[::-1]], ids=["looked at first", "looked at last"])
def test_a_pool_without_a_free_block_keeps_the_other_family_from_nothing(
    tmp_path: Path, pools: tuple[Pool, ...]
) -> None:
    """Its last addresses are handed out, too, and only then it is the one that an ADD is refused for."""

    async def story() -> None:
        async with engine(tmp_path, str(TWO_POOLS[0].cidr)) as it:
            registry, addresses = FakeRegistry(FakeStore()), it.attachments.addresses

            async def keep() -> bool:
                return True

            async def use(blocks: Sequence[Block]) -> None:
                addresses.use_blocks(blocks)

            keeper = keeper_of(it, registry, use, keep)
            first = [await registry.claim_block(pool, "node-1", "id-1", 1) for pool in pools]
            await use(first)
            keeper.begin(ClusterConfig(pools=pools), first)
            added = 0

            async def fill() -> None:
                nonlocal added
                while True:
                    try:
                        addresses.allocate(())
                        added += 1
                    except Exhausted as shortage:
                        await keeper.more(shortage)

            with pytest.raises(Exhausted, match=r"/27: 28 used.* pool default \(10\.244\.1\.0/27\) has no free") as why:
                await fill()
            assert added == 28
            assert "fd00" not in str(why.value)

    play(story)


@pytest.mark.slow
def test_a_block_that_the_kernel_refuses_is_tried_again(tmp_path: Path) -> None:
    """An nft that gives no answer within its time, say: the daemon lives, an ADD is told to come again."""

    async def story() -> None:
        async with engine(tmp_path, "10.244.1.0/29") as it:
            registry, pool = FakeRegistry(FakeStore()), Pool(cidr=ipaddress.ip_network("10.244.1.0/24"), block_size=29)
            refused, obstacle = 0, "nft gave no answer within 10 s"

            async def keep() -> bool:
                return True

            async def use(blocks: Sequence[Block]) -> None:
                nonlocal refused
                if obstacle:
                    refused += 1
                    raise PlumbingFailed(obstacle)
                it.attachments.addresses.use_blocks(blocks)

            keeper = keeper_of(it, registry, use, keep)
            keeper.begin(ClusterConfig(pools=(pool,)), it.attachments.addresses.allocator.blocks)
            with pods(4) as full:
                for each in full:
                    await it.add(each.name, each.path)
                with pytest.raises(TryAgainLater, match="claiming another block: nft gave no answer"):
                    await keeper.more(Exhausted("all in use"))
                running = asyncio.ensure_future(keeper.run_forever())
                before = refused
                await eventually(lambda: refused > before or running.done())
                assert not running.done(), running.exception()
                obstacle = ""
                await eventually(lambda: len(it.attachments.addresses.allocator.blocks) > 1 or running.done())
                assert not running.done(), running.exception()
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running

    play(story)
