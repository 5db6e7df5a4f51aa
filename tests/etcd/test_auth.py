"""Users and roles: tokens that go away, passwords that change, and what a node's role may not do."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from ipam_daemon.claims import ConfigMissing
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.model import Block, ClusterConfig, NodeRecord, Pool, encode
from ipam_daemon.registry import ROOT
from podwire.config import ConfigError
from podwire.etcd import AuthFailed, EtcdError, EtcdOptions, EtcdSession
from podwire.etcd.records import Changes, Snapshot, Written
from podwire.lab.etcd import EtcdServer
from tests.etcd.guarded import Guarded, guarded
from tests.etcd.insisting import insist

Run = Callable[[Coroutine[Any, Any, Any]], Any]
POOL = Pool(cidr=ipaddress.ip_network("10.244.0.0/16"), block_size=24)
CONFIG = ClusterConfig(pools=(POOL,))


def connect(server: EtcdServer, user: str = "", password: str = "", *, call_s: float = 5.0, **more: Any) -> EtcdSession:
    return EtcdSession(EtcdOptions(endpoints=(server.endpoint,), user=user, password=password, **more), call_s=call_s)


@pytest.fixture
def node(own_guarded: Guarded, tmp_path: Path) -> Guarded:
    """A server on which a node "a" has its role, as the user "a" with the password in the file `password`."""
    (tmp_path / "password").write_text("open-sesame\n")
    own_guarded.recipe("a", "--password-file", str(tmp_path / "password"))
    return own_guarded


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The same, for all tests that change nothing of users and server."""
    folder = tmp_path_factory.mktemp("etcd")
    (folder / "password").write_text("open-sesame\n")
    with guarded(folder) as server:
        made = Guarded(server)
        made.enable()
        made.recipe("a", "--password-file", str(folder / "password"))
        yield made


async def told(watch: AsyncGenerator[Snapshot | Changes, None], key: str) -> None:
    """Waits until the watch tells that the key was written."""
    async for batch in watch:
        if isinstance(batch, Changes) and any(isinstance(e, Written) and e.item.key == key for e in batch.events):
            return


def test_a_server_that_restarts_knows_no_token_and_nobody_minds(node: Guarded, run: Run) -> None:
    key = f"{ROOT}nodes/a"

    async def story() -> None:
        async with (
            connect(node.server, "a", "open-sesame") as etcd,
            aclosing(etcd.watch_prefix(f"{ROOT}nodes/")) as watch,
        ):
            await anext(watch)
            await etcd.put(key, b"1")
            await told(watch, key)
            node.server.kill()
            node.server.start()
            await insist(lambda: etcd.put(key, b"2"))
            await told(watch, key)

    run(story())


def test_a_watch_that_is_alone_gets_a_new_token_too(node: Guarded, run: Run) -> None:
    key = f"{ROOT}nodes/a"

    async def story() -> None:
        async with (
            connect(node.server, "root", "secret") as other,
            connect(node.server, "a", "open-sesame") as etcd,
            aclosing(etcd.watch_prefix(f"{ROOT}nodes/")) as watch,
        ):
            await anext(watch)
            telling = asyncio.create_task(told(watch, key))
            node.server.kill()
            node.server.start()
            await insist(lambda: other.put(key, b"1"))
            await telling

    run(story())


def test_a_wiped_server_that_knows_users_again_is_logged_in_to_again(node: Guarded, tmp_path: Path, run: Run) -> None:
    """The old token is of a raft index that the server has yet to reach, and it would wait for that."""
    key = f"{ROOT}nodes/a"

    async def story() -> None:
        async with connect(node.server, "a", "open-sesame", call_s=1.0) as etcd:
            for _ in range(50):
                await insist(lambda: etcd.put(key, b"1"))
            node.server.kill()
            node.server.wipe()
            node.server.start()
            fresh = Guarded(node.server)
            fresh.enable()
            fresh.recipe("a", "--password-file", str(tmp_path / "password"))
            await insist(lambda: etcd.put(key, b"2"))
            assert etcd.history.breaks == 1

    run(story())


class Outcomes:
    """An observer that keeps what came of each attempt."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def attempt(self, method: str, endpoint: str, outcome: str, seconds: float) -> None:
        del method, endpoint, seconds
        self.seen.append(outcome)

    def watch(self, prefix: str, event: str) -> None:
        """Not of interest."""


@pytest.mark.slow
def test_a_token_that_has_run_out_is_replaced(tmp_path: Path, run: Run) -> None:
    with guarded(tmp_path, "--auth-token-ttl", "1") as server:
        made = Guarded(server)
        made.enable()

        attempts = Outcomes()

        async def story() -> None:
            options = EtcdOptions(endpoints=(server.endpoint,), user="root", password="secret")
            async with EtcdSession(options, observer=attempts) as etcd:
                while "UNAUTHENTICATED" not in attempts.seen:
                    await etcd.get("/a")
                    await asyncio.sleep(1.2)  # a token's life begins anew with each use

        run(story())
        assert attempts.seen[-1] == "ok"


def test_a_wrong_password_is_said_at_once_and_is_no_outage(settled: Guarded, run: Run) -> None:
    async def story() -> None:
        async with connect(settled.server, "a", "open-barley") as etcd:
            with pytest.raises(AuthFailed, match=r"user 'a'.*wrong user or password"):
                await etcd.get(ROOT)
            with pytest.raises(AuthFailed):
                await anext(etcd.watch_prefix(ROOT))

    run(story())


def test_no_user_where_one_is_needed_says_what_to_set(settled: Guarded, run: Run) -> None:
    async def story() -> None:
        async with connect(settled.server) as etcd:
            with pytest.raises(AuthFailed, match=r"demands a user.*passwordFile"):
                await etcd.get(ROOT)

    run(story())


def test_a_user_is_not_minded_where_none_is_needed(server: EtcdServer, run: Run, prefix: str) -> None:
    async def story() -> None:
        async with connect(server, "a", "open-sesame") as etcd:
            await etcd.put(prefix, b"")

    run(story())


def test_a_password_that_changes_is_read_again(node: Guarded, tmp_path: Path, run: Run) -> None:
    password = tmp_path / "password"

    async def story() -> None:
        async with connect(node.server, "a", password_file=str(password)) as etcd:
            await etcd.put(f"{ROOT}nodes/a", b"1")
            password.write_text("open-barley\n")
            node.etcdctl("user", "delete", "a")  # its tokens go with it
            node.recipe("b", "--user", "a", "--password-file", str(password))
            await etcd.put(f"{ROOT}nodes/b", b"2")
            password.unlink()
            node.etcdctl("user", "delete", "a")
            with pytest.raises(ConfigError, match="passwordFile"):
                await etcd.put(f"{ROOT}nodes/b", b"3")

    run(story())


OTHERS = {
    "another node's record": f"{ROOT}nodes/b",
    "a record of which its own name is the beginning": f"{ROOT}nodes/ab",
    "another node's name": f"{ROOT}live/b",
    "the configuration": f"{ROOT}config",
    "what is not Podwire's": "/registry/secrets",
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_nodes_role_does_not_write(what: str, settled: Guarded, run: Run) -> None:
    async def story() -> None:
        async with connect(settled.server, "a", "open-sesame") as etcd:
            with pytest.raises(EtcdError) as refused:
                await etcd.put(OTHERS[what], b"mine")
            assert refused.value.code == "PERMISSION_DENIED"
            await etcd.put(f"{ROOT}nodes/a", b"mine")

    run(story())


def test_a_node_without_its_role_cannot_be_had_under_another_name(settled: Guarded, run: Run) -> None:
    record = NodeRecord(name="b", node_id="id", addresses=(ipaddress.ip_address("192.0.2.1"),))

    async def story() -> None:
        async with connect(settled.server, "a", "open-sesame") as etcd:
            registry = EtcdRegistry(etcd)
            for call in (lambda: registry.enter("b", "id"), lambda: registry.publish(record)):
                with pytest.raises(EtcdError) as refused:
                    await call()
                assert refused.value.code == "PERMISSION_DENIED"

    run(story())


def test_a_configuration_that_a_node_may_not_write_is_waited_for(node: Guarded, run: Run) -> None:
    async def story() -> None:
        async with connect(node.server, "a", "open-sesame") as etcd:
            registry = EtcdRegistry(etcd)
            with pytest.raises(ConfigMissing, match=r"10\.244\.0\.0/16.*as an administrator") as missing:
                await registry.agree(CONFIG)
            assert encode(CONFIG).decode() in str(missing.value)
            node.etcdctl("put", f"{ROOT}config", encode(CONFIG).decode())
            assert await registry.agree(CONFIG) == CONFIG

    run(story())


def test_the_configuration_in_the_documentation_is_what_a_daemon_writes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "etcd.md").read_text()
    assert f"etcdctl put {ROOT}config '{encode(CONFIG).decode()}'" in text


def test_a_node_with_its_role_tells_the_others_that_the_store_was_restored(
    node: Guarded, run: Run, until: Callable[..., Awaitable[None]]
) -> None:
    block = Block(cidr=ipaddress.ip_network("10.244.3.0/24"), pool="default", node="a", node_id="id", generation=1)

    async def story() -> None:
        async with connect(node.server, "a", "open-sesame") as etcd:
            registry = EtcdRegistry(etcd)
            assert await registry.reclaim_block(block) is None
            await registry.restored()
            await until(lambda: etcd.get(f"{ROOT}restored"))
            await registry.leave()

    run(story())
