"""When a pod may start, and what is rendered when: PolicySync with a kernel that only notes what it is told."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import msgspec
import pytest

from kube_proxy_lite import policy_sync
from kube_proxy_lite.attached import Attached
from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import Flow
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.policy_sync import PolicySync
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.render.nftables_listing import TableListing
from kube_proxy_lite.render.policy_nftables import PolicyRenderer
from kube_proxy_lite.stale import Connection
from podwire.kube.kinds import KINDS, NAMESPACES, NETWORK_POLICIES, PODS
from podwire.kube.source import Batch, Skipped
from tests.policy_cases import BASE, Manifest, at, namespace, pod, policy

PATIENCE = 90.0
XA = ipaddress.ip_address(at("x/a"))


class Kernel:
    """Takes scripts; fails as often as told, and waits while it is held."""

    def __init__(self) -> None:
        self.scripts: list[str] = []
        self.failures = 0
        self.free = asyncio.Event()
        self.free.set()

    async def apply(self, scripts: Sequence[str]) -> None:
        await self.free.wait()
        if self.failures:
            self.failures -= 1
            raise ApplyFailed("not now")
        self.scripts += scripts

    async def read(self) -> TableListing | None:
        return None

    def is_own(self, pid: int) -> bool:  # noqa: ARG002
        return True

    @property
    def text(self) -> str:
        return "".join(self.scripts)


class Connections:
    """A table of connections."""

    def __init__(self) -> None:
        self.table: list[Connection] = []

    async def select(self, wanted: Callable[[Iterable[Connection]], list[Connection]]) -> list[Connection]:
        return wanted(self.table)

    async def delete(self, connections: Sequence[Connection]) -> int:
        self.table = [each for each in self.table if each not in connections]
        return len(connections)


class Silent:
    def synced(self, seconds: float, resync: bool, changes: int, waited: float) -> None: ...

    def failed(self, reason: str) -> None: ...

    def cut(self, connections: int) -> None: ...


class Stage:
    """A node `node1`, on which the pods of x and z are."""

    def __init__(self, patience: float = 60.0, cut: bool = True) -> None:
        self.kernel, self.connections = Kernel(), Connections()
        self.settled: list[int] = []
        self.sync = PolicySync(
            Policies("node1"),
            "node1",
            PolicyRenderer(),
            self.kernel,  # type: ignore[arg-type]
            self.connections,
            Silent(),
            patience=patience,
            cut=cut,
        )
        self.sync.settle = self._settle
        self.had: dict[int, str] = {}
        """What the kernel had when a pod was settled."""

    def _settle(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self.settled.append(number)
            self.had[number] = self.kernel.text

    def say(self, *manifests: Manifest, synced: bool = True) -> None:
        """The API says these objects, and of every kind whether that is all."""
        for kind in (NAMESPACES, NETWORK_POLICIES, PODS):
            objects = tuple(msgspec.convert(each, kind.model) for each in manifests if each["kind"] == kind.name)
            self.sync.intake.take(Batch(kind=kind, upserts=objects, synced=synced))

    def attach(self, number: int, where: str, uid: str = "", everything: bool = False) -> None:
        """The daemon attaches the pod "x/a"."""
        home, name = where.split("/")
        address = ipaddress.ip_address("10.244.0.99")
        attached = Attached(number=number, namespace=home, name=name, uid=uid, addresses=(address,))
        self.sync.attached([attached], everything)


def play(story: Callable[[Stage], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Runs a story beside the sync's own tasks."""

    async def run() -> None:
        stage = Stage(**settings)
        work = (stage.sync.runner.run_forever(), stage.sync.repairer.run_forever(), stage.sync.settle_forever())
        tasks = [asyncio.create_task(each) for each in work]
        try:
            await story(stage)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the condition is about another task
            await asyncio.sleep(0.005)


async def a_moment() -> None:
    """Time in which something happens that should not, if it does."""
    await asyncio.sleep(0.15)


def test_nothing_is_rendered_before_everything_was_said() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE, policy("x/deny"), synced=False)
        stage.attach(1, "x/a")
        await a_moment()
        assert (stage.kernel.scripts, stage.settled, stage.sync.synced) == ([], [], False)
        stage.say()
        await until(lambda: stage.sync.synced)
        assert str(XA) not in stage.kernel.text.split("add element")[0]
        assert stage.settled == [1]

    play(story)


def test_a_pod_that_the_api_shows_is_settled_by_the_run_that_has_it() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        stage.kernel.free.clear()
        stage.attach(1, "x/a")
        await a_moment()
        assert stage.settled == []
        stage.kernel.free.set()
        await until(lambda: stage.settled == [1])
        assert "10.244.0.99 : goto in_" in stage.kernel.text

    play(story)


def test_a_pod_that_comes_during_a_run_waits_for_the_next() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        stage.kernel.free.clear()
        stage.say(policy("z/deny"))
        await a_moment()
        stage.attach(1, "x/a")
        stage.kernel.free.set()
        await until(lambda: stage.settled == [1])
        assert "10.244.0.99 : goto in_" in stage.had[1]

    play(story)


def test_a_kernel_that_refuses_settles_nobody() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        stage.kernel.failures = 4
        stage.attach(1, "x/a")
        await until(lambda: stage.settled == [1])
        assert "10.244.0.99 : goto in_" in stage.had[1]

    play(story, patience=0.1)


def test_a_pod_that_the_api_does_not_show_starts_closed_when_patience_ends() -> None:
    async def story(stage: Stage) -> None:
        stage.sync.blocks(frozenset({ipaddress.ip_network("10.244.0.0/24")}))
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        now = asyncio.get_running_loop().time()
        stage.attach(1, "x/unheard-of")
        await until(lambda: stage.settled == [1])
        assert asyncio.get_running_loop().time() >= now + 0.5
        assert "local4 { 10.244.0.0/24 }" in stage.kernel.text
        assert "10.244.0.99" not in stage.kernel.text

    play(story, patience=0.5)


def test_a_former_pod_of_the_same_name_is_not_the_one_that_starts() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE)
        await until(lambda: stage.sync.synced)
        stage.attach(1, "x/a", uid="another")
        await a_moment()
        assert stage.settled == []
        made_again = pod("x/a")
        made_again["metadata"]["uid"] = "another"
        stage.say(made_again)
        await until(lambda: stage.settled == [1])

    play(story)


def test_a_static_pod_is_known_by_its_hash() -> None:
    async def story(stage: Stage) -> None:
        static = pod("x/a")
        static["metadata"]["annotations"] = {"kubernetes.io/config.hash": "from-a-file"}
        stage.say(*BASE, static)
        await until(lambda: stage.sync.synced)
        stage.attach(1, "x/a", uid="from-a-file")
        await until(lambda: stage.settled == [1])

    play(story)


def test_addresses_close_when_there_is_a_policy_and_not_before() -> None:
    async def story(stage: Stage) -> None:
        stage.sync.blocks(frozenset({ipaddress.ip_network("10.244.0.0/24")}))
        stage.say(*BASE)
        await until(lambda: stage.sync.synced)
        assert "10.244.0.0/24" not in stage.kernel.text
        stage.say(policy("z/deny"))
        await until(lambda: "add element inet podwire_policy local4 { 10.244.0.0/24 }" in stage.kernel.text)

    play(story)


def test_what_the_daemon_no_longer_has_is_forgotten() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        stage.attach(1, "x/a")
        await until(lambda: "add element inet podwire_policy known4 { 10.244.0.99 }" in stage.kernel.text)
        stage.attach(2, "x/b", everything=True)
        await until(lambda: stage.settled == [1, 2])
        known = stage.sync.policies.pod(("x", "a"))
        assert known is not None
        assert stage.sync.policies.addresses(known)[0] == XA

    play(story)


def test_a_policy_that_cannot_be_decoded_closes_its_namespace_until_it_can() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE)
        await until(lambda: stage.sync.synced)
        garbled = Skipped(key=("x", "bad"), reason="spec.podSelector: expected an object")
        stage.sync.intake.take(Batch(kind=NETWORK_POLICIES, skipped=(garbled,), synced=True))
        policies = stage.sync.policies
        flow = Flow(source=ipaddress.ip_address(at("y/a")), destination=XA, protocol="TCP", port=80)
        assert not judge(policies, flow).allowed
        assert "cannot be decoded" in policies.problems()["x", "bad"][0]
        stage.say(policy("x/bad", ingress=[{}]))
        assert judge(policies, flow).allowed
        stage.sync.intake.take(Batch(kind=NETWORK_POLICIES, skipped=(garbled,), synced=True))
        assert judge(policies, flow).allowed  # what was last read of it holds
        stage.sync.intake.take(Batch(kind=NETWORK_POLICIES, deletes=(("x", "bad"),), synced=True))
        assert not policies.any

    play(story)


def test_a_daemon_that_was_started_again_counts_from_one() -> None:
    async def story(stage: Stage) -> None:
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        stage.attach(1, "x/a")
        await until(lambda: stage.settled == [1])
        stage.attach(1, "x/b", everything=True)
        await until(lambda: stage.settled == [1, 1])
        known = stage.sync.policies.pod(("x", "a"))
        assert known is not None
        assert stage.sync.policies.addresses(known)[0] == XA

    play(story)


def connection(source: str, destination: str, port: int = 80) -> Connection:
    """A TCP connection between two pods."""
    ends = [int(ipaddress.ip_address(at(each))) for each in (source, destination)]
    return Connection(4, "TCP", ends[0], ends[1], port, ends[1], port, f"{source} {destination} {port}".encode())


def test_connections_that_a_change_forbids_are_cut_and_no_others() -> None:
    async def story(stage: Stage) -> None:
        allowed, forbidden = connection("y/a", "x/a", 81), connection("y/a", "x/a", 80)
        elsewhere, begun_from_here = connection("y/a", "z/a"), connection("x/a", "y/a")
        stage.connections.table = [allowed, forbidden, elsewhere, begun_from_here]
        stage.say(*BASE)
        await until(lambda: stage.sync.synced)
        await a_moment()
        assert len(stage.connections.table) == 4
        stage.say(policy("x/only-81", ingress=[{"ports": [{"port": 81}]}]))
        await until(lambda: stage.connections.table == [allowed, elsewhere, begun_from_here])

    play(story)


def test_connections_of_a_pod_that_is_let_in_no_more_are_cut_and_only_they_are_looked_at() -> None:
    async def story(stage: Stage) -> None:
        peers = [
            {"namespaceSelector": {"matchLabels": {"ns": "y"}}, "podSelector": {"matchLabels": {"role": "friend"}}}
        ]
        stage.say(*BASE, pod("y/a", role="friend"), pod("y/b", role="friend"), policy("x/p", ingress=[{"from": peers}]))
        await until(lambda: stage.sync.synced)
        friend, other = connection("y/a", "x/a"), connection("y/b", "x/a")
        odd = connection("y/c", "x/a")  # it cannot be there, so that it stays says that nobody has looked at it
        await a_moment()
        stage.connections.table = [friend, other, odd]
        stage.say(pod("y/a", role="stranger"))
        await until(lambda: stage.connections.table == [other, odd])

    play(story)


def test_a_change_that_only_opens_looks_at_no_connection() -> None:
    async def story(stage: Stage) -> None:
        peers = [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"role": "friend"}}}]
        stage.say(*BASE, policy("x/p", ingress=[{"from": peers, "ports": [{"port": 81}]}]))
        await until(lambda: stage.sync.synced)
        await a_moment()
        odd = connection("y/a", "x/a", 80)
        stage.connections.table = [odd]
        stage.say(pod("y/a", role="friend"))
        await until(lambda: at("y/a") in stage.kernel.text)
        for _ in range(4):  # connections are looked at every 0.25 s at most
            await a_moment()
        assert stage.connections.table == [odd]

    play(story)


def test_connections_go_on_where_cutting_is_off() -> None:
    async def story(stage: Stage) -> None:
        stage.connections.table = [connection("y/a", "x/a")]
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)
        await a_moment()
        assert len(stage.connections.table) == 1

    play(story, cut=False)


def test_where_there_is_a_daemon_nothing_is_rendered_before_it_has_said_who_is_attached() -> None:
    async def story(stage: Stage) -> None:
        stage.sync._has_daemon = lambda: True
        stage.say(*BASE, policy("x/deny"))
        await a_moment()
        assert stage.kernel.scripts == []
        stage.attach(1, "x/a", everything=True)
        await until(lambda: stage.settled == [1])
        assert "10.244.0.99 : goto in_" in stage.kernel.text

    play(story)


def test_a_daemon_that_does_not_say_so_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_sync, "_HEARING", 0.2)

    async def story(stage: Stage) -> None:
        stage.sync._has_daemon = lambda: True
        stage.say(*BASE, policy("x/deny"))
        await until(lambda: stage.sync.synced)

    play(story)


def test_every_kind_that_is_followed_has_its_door() -> None:
    async def story(stage: Stage) -> None:
        assert {each.kind.resource for each in stage.sync.wanted()} < {kind.resource for kind in KINDS}
        stage.say(namespace("late"))
        await until(lambda: stage.sync.synced)

    play(story)
