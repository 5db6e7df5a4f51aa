"""From objects to the kernel: batches in, what has changed out, and nothing that costs more than the change.

    Source ──batches──▶ Intake ──▶ Services ──changed──▶ Renderer ──transactions──▶ Applier ──▶ kernel
                          │                                                           ▲
                          └──▶ Runner: a run soon after, all changes until then ──────┘
                                 │ resync: at the start, after a failure, on drift, periodically
                                 └──▶ conntrack: connections to where nobody is any more

Nothing is rendered before every source has said what there is: a list that is not complete yet would take out what an
earlier process has set up. From then on the API may be away for as long as it likes.

A failed run is repeated with a look at the whole (ApplyFailed), since nobody knows then what the kernel has. What a
balancer is told of this node's endpoints does not wait for it: that an endpoint is gone is true at once.
Connections (`stale`) are looked at after the rules, by a runner of their own: what is cut comes back by the new rules,
and a table of a million connections holds no rule up. A change is no matter of theirs before the kernel has it: a look
meanwhile, for another's sake, would cut what comes back by the old rules, and be the last.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from kube_proxy_lite.intake import Intake, door
from kube_proxy_lite.model import Address, Health, PortKey, PortPlan, Problem, Settings
from kube_proxy_lite.programming import TriggerTimes
from kube_proxy_lite.render.interface import Applier, ApplyFailed, Renderer
from kube_proxy_lite.services import Services
from kube_proxy_lite.stale import Connection, StaleConnections
from podwire.errors import TryAgain
from podwire.kube.kinds import (
    ENDPOINT_SLICES,
    NODES,
    SERVICE_CIDRS,
    SERVICES,
    Wanted,
    one_node,
    proxied_endpoint_slices,
    proxied_services,
)
from podwire.kube.objects import EndpointSlice, Node
from podwire.runner import Runner

_NAMED_AT_ONCE = 100

log = logging.getLogger(__name__)
Key = tuple[str, str]


class Connections(Protocol):
    """The node's connections (apply/conntrack.py)."""

    async def select(self, wanted: Callable[[Iterable[Connection]], list[Connection]]) -> list[Connection]:
        """Those that `wanted`, called in another thread, picks. Raises TryAgain."""
        ...

    async def delete(self, connections: Sequence[Connection]) -> int:
        """Deletes those that are still there. Returns how many. Raises TryAgain."""
        ...


class SyncObserver(Protocol):
    """Is told what happens, for metrics. Must return at once and not raise."""

    def synced(self, seconds: float, resync: bool, changes: int, waited: float) -> None:
        """A run has ended well: how long it took, whether it looked at everything, how many plans had changed, and how
        long the oldest of its changes had waited for the run to end."""

    def failed(self, reason: str) -> None:
        """A run has failed."""

    def cut(self, connections: int) -> None:
        """Connections were cut."""


class ServiceObserver(SyncObserver, Protocol):
    """The same for Services."""

    def noted(self, resource: str, objects: int) -> None:
        """So many objects of a kind have come, changed or gone."""

    def begun(self) -> None:
        """A run has begun; it serves what has come until now."""

    def programmed(self, seconds: Sequence[float]) -> None:
        """How long changes of endpoints took from their cause to the kernel."""

    def looked(self, seconds: float) -> None:
        """A look at connections has ended well."""


class ServiceSync:
    """Keeps this node's kernel at what the cluster's Services say."""

    def __init__(
        self,
        services: Services,
        renderer: Renderer[Any, Any],
        applier: Applier[Any, Any],
        connections: Connections,
        observer: ServiceObserver,
        *,
        period: float = 30.0,
        min_interval: float = 0.0,
        settings_of: Callable[[Services], Settings] | None = None,
        own_addresses: Callable[[], Iterable[Address]] = tuple,
    ) -> None:
        """`period`: seconds between two looks at the whole. `settings_of` makes the renderer's settings from what the
        objects say of the node and the ServiceCIDRs; without it they are those that the renderer was made with.
        `own_addresses` are the node's, on which NodePorts answer."""
        self.services = services
        self.runner = Runner(
            "bringing Services to the kernel", self._run, max_interval=period, min_interval=min_interval
        )
        self.repairer = Runner("looking at connections", self._repair, max_interval=3600.0, min_interval=1.0)
        self._renderer = renderer
        self._applier = applier
        self._connections = connections
        self._observer = observer
        self._settings_of = settings_of
        self._own_addresses = own_addresses
        self.settings = services.settings
        """What the rules are made by now."""
        self._stale = StaleConnections()
        self._triggers = TriggerTimes(time.time())
        self.intake = Intake(
            dict(
                (
                    door(SERVICES, services.set_service, services.drop_service),
                    door(ENDPOINT_SLICES, self._set_slice, services.drop_slice),
                    door(NODES, self._set_node, lambda _key: self._set_node(None)),
                    door(SERVICE_CIDRS, services.set_service_cidr, lambda key: services.drop_service_cidr(key[1])),
                )
            ),
            self.runner.request,
            spared=(SERVICE_CIDRS.resource,),
            noted=observer.noted,
        )
        self._plans: dict[PortKey, PortPlan] = {}
        self._foreseen: list[tuple[Mapping[PortKey, PortPlan | None], Sequence[PortPlan]]] = []
        self._problems: tuple[Problem, ...] = ()
        self._unseen = 0
        self._health_ports: dict[Key, int] = {}
        self.health_changed: Callable[[Mapping[Key, Health | None]], None] = lambda _changed: None
        """Is told which Services' health checks are others than before."""
        self.node_changed: Callable[[Node | None], None] = lambda _node: None
        """Is told the node's own object as it is now, None when it is gone."""
        self.settings_changed: Callable[[], None] = lambda: None
        """Is told that `settings` are others than before."""
        self.synced = asyncio.Event()
        """Is set when the kernel has been brought to what the cluster says."""
        self.synced_at = 0.0
        """When that was the last time, in seconds since the epoch; 0 if never."""

    def wanted(self) -> tuple[Wanted[Any], ...]:
        """What is to be followed."""
        cidrs: Wanted[Any] = Wanted(kind=SERVICE_CIDRS, optional=True)
        return proxied_services(), proxied_endpoint_slices(), one_node(self.services.settings.node), cidrs

    # --- what comes in

    def _set_slice(self, obj: EndpointSlice) -> None:
        self._triggers.take(obj)
        self.services.set_slice(obj)

    def _set_node(self, node: Node | None) -> None:
        self.services.set_node(node)
        self.node_changed(node)

    # --- the kernel

    async def _run(self, resync: bool) -> None:
        began = time.perf_counter()
        self._observer.begun()
        changed = self.services.changed()
        self._unseen += len(changed)
        transactions = self._renderer.update(changed, self.services.changed_cluster_ips())
        transactions += self._reconfigure()
        health = self.services.changed_health()
        transactions += self._accept_health_checks(health)
        doubted = [plan for service in self.services.left_endpoints() for plan in self.services.plans_of(service)]
        self._foreseen.append((changed, doubted))
        self._report_problems()
        try:
            if resync or not self.synced_at:
                transactions = self._renderer.resync(await self._applier.read())
            await self._applier.apply(transactions)
        except ApplyFailed as error:
            self._observer.failed(str(error))
            raise
        finally:
            self.health_changed(health)
        self.synced_at = time.time()
        self.synced.set()
        self._note_stale()
        if self._stale.in_doubt:
            self.repairer.request()
        waited = asyncio.get_running_loop().time() - self.runner.serving
        changes, self._unseen = self._unseen, 0
        self._observer.synced(time.perf_counter() - began, resync, changes, waited)
        self._observer.programmed(self._triggers.done(self.synced_at))

    def _reconfigure(self) -> tuple[Any, ...]:
        settings = self._settings_of(self.services) if self._settings_of else self.settings
        if settings == self.settings:
            return ()
        self.settings = settings
        self.settings_changed()
        return self._renderer.configure(settings)

    def _accept_health_checks(self, changed: Mapping[Key, Health | None]) -> tuple[Any, ...]:
        for key, health in changed.items():
            if health is None:
                self._health_ports.pop(key, None)
            else:
                self._health_ports[key] = health.port
        return self._renderer.accept_health_checks(frozenset(self._health_ports.values())) if changed else ()

    # --- connections

    def _note_stale(self) -> None:
        """The kernel has all that was foreseen."""
        foreseen, self._foreseen = self._foreseen, []
        for changed, doubted in foreseen:
            for key, plan in changed.items():
                before = self._plans.pop(key, None)
                if plan is not None:
                    self._plans[key] = plan
                self._stale.take(before, plan)
            for plan in doubted:
                self._stale.doubt(plan)

    async def _repair(self, resync: bool) -> None:
        began = time.perf_counter()
        if resync:
            self._stale.doubt_all()
        looked_at = self._stale.begin()
        service_cidrs = self.services.service_cidrs
        try:
            own = await asyncio.to_thread(self._node_port_addresses, self.settings)
            found = await self._connections.select(
                lambda all_: self._stale.stale(all_, looked_at, own, self.services.endpoints, service_cidrs)
            )
            cut = await self._connections.delete(found)
        except TryAgain:
            self._stale.again(looked_at)
            raise
        if cut:
            self._observer.cut(cut)
        self._observer.looked(time.perf_counter() - began)

    def _node_port_addresses(self, settings: Settings) -> frozenset[int]:
        """The node's addresses on which NodePorts answer, as numbers."""
        return frozenset(int(each) for each in self._own_addresses() if settings.has_node_ports(each))

    def _report_problems(self) -> None:
        """Names in the log what is new among the objects that cannot be served as they ask."""
        problems = self.services.problems()
        if problems is self._problems:
            return
        new = sorted(set(problems) - set(self._problems))
        for problem in new[:_NAMED_AT_ONCE]:
            log.warning("%s", problem, extra={"fields": {"problem": msgspec.to_builtins(problem)}})
        if len(new) > _NAMED_AT_ONCE:
            log.warning("%d problems more", len(new) - _NAMED_AT_ONCE)
        self._problems = problems
