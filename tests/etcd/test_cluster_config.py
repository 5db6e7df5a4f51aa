"""The cluster's configuration while daemons run: who changes the backend, and who follows. Against real etcd."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from ipam_daemon.claims import ConfigMissing, RecordDamaged
from ipam_daemon.cluster import change_backend, read_config
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Backend, BackendType, ClusterConfig, Pool
from podwire.config import ConfigError
from podwire.etcd import EtcdOptions, EtcdSession
from podwire.lab.etcd import EtcdServer

POOLS = tuple(Pool(cidr=ipaddress.ip_network(text)) for text in ("10.244.0.0/16", "fd00:10:244::/56"))
CONFIG = ClusterConfig(pools=POOLS)
DIRECT = ClusterConfig(pools=POOLS, backend=Backend(type=BackendType.DIRECT))
Run = Callable[[Coroutine[Any, Any, None]], None]
Story = Callable[[EtcdSession, str], Awaitable[None]]
Tell = Callable[[Story], None]


@pytest.fixture
def tell(server: EtcdServer, prefix: str, run: Run) -> Tell:
    """Runs a story with a session."""

    def tell_story(story: Story) -> None:
        async def whole() -> None:
            async with EtcdSession(EtcdOptions(endpoints=(server.endpoint,))) as session:
                await story(session, prefix)

        run(whole())

    return tell_story


def test_every_daemon_hears_of_another_backend_once(tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        registry = EtcdRegistry(session, root=root)
        await registry.agree(CONFIG)
        heard: list[ClusterConfig] = []
        async with aclosing(registry.watch_config()) as configs:
            heard.append(await anext(configs))
            for kind in ("direct", "direct", "auto"):
                await change_backend(session, {"type": kind}, root)
            heard += [await anext(configs) for _ in range(2)]
        assert [str(each.backend.type) for each in heard] == ["vxlan", "direct", "auto"]

    tell(story)


def test_what_cannot_be_read_is_passed_over_and_what_is_deleted_still_holds(tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        registry = EtcdRegistry(session, root=root)
        await registry.agree(CONFIG)
        async with aclosing(registry.watch_config()) as configs:
            assert await anext(configs) == CONFIG
            await session.put(f"{root}config", b"{")
            await session.delete(f"{root}config")
            await registry.agree(DIRECT)
            assert await anext(configs) == DIRECT

    tell(story)


def test_a_block_is_claimed_as_well_after_the_change(tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        registry = EtcdRegistry(session, root=root)
        await registry.agree(CONFIG)
        await change_backend(session, {"type": "direct"}, root)
        entry = await registry.enter("a", "id-a")
        for pool in POOLS:
            block = await registry.claim_block(pool, "a", "id-a", entry.generation)
            assert pool.has(block)
        assert await registry.agree(CONFIG) == DIRECT

    tell(story)


def test_a_change_keeps_what_it_is_not_about(tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        await EtcdRegistry(session, root=root).agree(CONFIG)
        item = await session.get(f"{root}config")
        assert item is not None
        newer = {**msgspec.json.decode(item.value), "fromTheFuture": [1, 2]}
        await session.put(f"{root}config", msgspec.json.encode(newer))
        before, after = await change_backend(session, {"vni": 7}, root)
        assert (before, after) == (Backend(), Backend(vni=7))
        item = await session.get(f"{root}config")
        assert item is not None
        assert msgspec.json.decode(item.value) == newer | {"backend": {"type": "vxlan", "vni": 7, "port": 4789}}
        assert (await read_config(session, root)).backend == after

    tell(story)


def test_two_who_change_at_once_both_succeed(tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        await EtcdRegistry(session, root=root).agree(CONFIG)
        await asyncio.gather(
            change_backend(session, {"type": "auto"}, root), change_backend(session, {"vni": 9, "port": 8472}, root)
        )
        assert (await read_config(session, root)).backend == Backend(type=BackendType.AUTO, vni=9, port=8472)

    tell(story)


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "another kind": ({"type": "geneve"}, "geneve"),
    "an id of 25 bits": ({"vni": 1 << 24}, "backend.vni is 16777216"),
    "no port": ({"port": 0}, "backend.port is 0"),
    "an id that is text": ({"vni": "one"}, "vni"),
}


@pytest.mark.parametrize(("wanted", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_no_backend_can_be_is_refused(wanted: dict[str, object], says: str, tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        await EtcdRegistry(session, root=root).agree(CONFIG)
        with pytest.raises(ConfigError, match=says):
            await change_backend(session, wanted, root)
        assert await read_config(session, root) == CONFIG

    tell(story)


def test_without_a_configuration_that_can_be_read_nothing_is_written(tell: Tell) -> None:
    async def story(session: EtcdSession, root: str) -> None:
        with pytest.raises(ConfigMissing, match="the first daemon writes it"):
            await change_backend(session, {"type": "auto"}, root)
        await session.put(f"{root}config", b"{")
        with pytest.raises(RecordDamaged):
            await change_backend(session, {"type": "auto"}, root)

    tell(story)
