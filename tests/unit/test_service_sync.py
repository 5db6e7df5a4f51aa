"""When connections are looked at: ServiceSync with a kernel that only notes what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from kube_proxy_lite.model import Settings
from kube_proxy_lite.render.interface import ApplyFailed
from kube_proxy_lite.services import Services
from kube_proxy_lite.stale import Connection
from kube_proxy_lite.sync import ServiceSync
from podwire.kube.kinds import ENDPOINT_SLICES, NODES, SERVICE_CIDRS, SERVICES, Kind
from podwire.kube.source import Batch
from podwire.runner import Runner
from tests.unit.service_objects import HERE, service, slice_of
from tests.unit.test_policy_sync import Connections, until
from tests.unit.test_stale import connection

UDP = [{"port": 53, "protocol": "UDP"}]
PORTS = [{"name": "", "port": 8080, "protocol": "UDP"}]
VIRTUAL, FORMER = ("10.96.0.10", 53), "10.244.0.1"


class Kernel:
    """Renderer and applier in one: takes what has changed, fails as often as told, and waits while it is held."""

    def __init__(self) -> None:
        self.failures = self.attempts = 0
        self.health_ports: frozenset[int] = frozenset()
        self.free = asyncio.Event()
        self.free.set()

    def update(self, changes: Any, cluster_ips: Any) -> tuple[Any, ...]:  # noqa: ARG002
        return ()

    def accept_health_checks(self, ports: frozenset[int]) -> tuple[Any, ...]:
        self.health_ports = ports
        return ()

    def resync(self, listing: None) -> tuple[Any, ...]:  # noqa: ARG002
        return ()

    async def read(self) -> None:
        return None

    async def apply(self, transactions: Sequence[Any]) -> None:  # noqa: ARG002
        self.attempts += 1
        await self.free.wait()
        if self.failures:
            self.failures -= 1
            raise ApplyFailed("not now")


class Table(Connections):
    """Connections, and how often somebody has looked."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    async def select(self, wanted: Callable[[Iterable[Connection]], list[Connection]]) -> list[Connection]:
        self.looks += 1
        return await super().select(wanted)


class Silent:
    """Hears nothing."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_args, **_more: None


class Stage:
    """A node that knows a Service of UDP with an endpoint, and a client that never stops sending."""

    def __init__(self) -> None:
        self.kernel, self.connections = Kernel(), Table()
        kernel: Any = self.kernel
        self.sync = ServiceSync(Services(Settings(node=HERE)), kernel, kernel, self.connections, Silent())
        # without the pause of a second between two looks
        self.sync.repairer = Runner("looking at connections", self.sync._repair, max_interval=3600.0)
        self.client = connection(VIRTUAL, FORMER)

    def say(self, kind: Kind[Any], *objects: Any) -> None:
        self.sync.intake.take(Batch(kind=kind, upserts=objects, synced=True))

    async def begin(self) -> None:
        """Everything is known, in the kernel, and was looked at."""
        self.say(NODES)
        self.say(SERVICE_CIDRS)
        self.say(SERVICES, service(ports=UDP))
        self.say(ENDPOINT_SLICES, slice_of("1", ports=PORTS))
        await until(lambda: self.connections.looks > 0)
        self.connections.table = [self.client]

    async def lose_the_endpoint(self) -> None:
        """The slice is another; the run that says so has begun."""
        attempts = self.kernel.attempts
        self.say(ENDPOINT_SLICES, slice_of("2", ports=PORTS))
        await until(lambda: self.kernel.attempts > attempts)

    async def look(self) -> None:
        """A look that was due for another reason; the client goes on by the rules that are there still."""
        looks = self.connections.looks
        self.sync.repairer.request()
        await until(lambda: self.connections.looks > looks)
        self.connections.table = [self.client]


def play(story: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        stage = Stage()
        work = (stage.sync.runner.run_forever(), stage.sync.repairer.run_forever())
        tasks = [asyncio.create_task(each) for each in work]
        try:
            await story(stage)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_look_before_the_rules_are_there_is_not_the_last() -> None:
    async def story(stage: Stage) -> None:
        await stage.begin()
        stage.kernel.free.clear()
        await stage.lose_the_endpoint()
        await stage.look()
        stage.kernel.free.set()
        await until(lambda: not stage.connections.table)

    play(story)


def test_nor_is_one_while_the_kernel_refuses() -> None:
    async def story(stage: Stage) -> None:
        await stage.begin()
        stage.kernel.failures = 1
        await stage.lose_the_endpoint()
        stage.kernel.free.clear()
        await stage.look()
        stage.kernel.free.set()
        await until(lambda: not stage.connections.table)

    play(story)


def test_the_renderer_knows_all_ports_on_which_health_is_asked_for() -> None:
    async def story(stage: Stage) -> None:
        await stage.begin()
        wish: dict[str, Any] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": [{"port": 80}]}
        balanced = [
            service(name, **wish, healthCheckNodePort=port, clusterIPs=[f"10.96.0.{port - 32000}"])
            for name, port in (("one", 32100), ("two", 32101))
        ]
        stage.say(SERVICES, *balanced)
        await until(lambda: stage.kernel.health_ports == {32100, 32101})
        stage.sync.intake.take(Batch(kind=SERVICES, deletes=(balanced[0].key,), synced=True))
        await until(lambda: stage.kernel.health_ports == {32101})

    play(story)
