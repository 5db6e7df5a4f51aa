"""NetworkPolicy from objects to the kernel, and the node's pods held back until theirs is there.

    Source ──batches──▶ Policies ──facts──▶ PolicyRenderer ──scripts──▶ PolicyApplier ──▶ kernel
    daemon ──attached─▶    │                                                                │
       ▲                   └──────────── Runner ──── settled when the run has ended ◀───────┘
       └── settled ──────────────────────────────┘
                                        └── connections that a change forbids are cut

Nothing is rendered before every source has said what there is: until then what an earlier process has left stands. The
daemon is such a source, for `_HEARING` seconds, where there is one: a pod that has just started has its address from it
alone, and without the node's blocks an address that nobody knows would be open. A
pod that the daemon attaches is settled by the run that has its policies, or, when the API has not shown it for
`patience` seconds, as it is: closed, if there is any policy at all.

Connections that were allowed go on by themselves, whatever policies say later, since only their first packet is judged.
So after a change those are judged again whose pod has other rules, or whose peer was allowed by a set that it has
left, in the direction in which they were begun, and what is not allowed any more is deleted: its next packet is a new
connection, and is dropped (`cut` False leaves them). What a change only opens costs no look at connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from kube_proxy_lite.attached import Attached
from kube_proxy_lite.intake import Intake, door
from kube_proxy_lite.model import Address, Network
from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.membership import Fact, Value
from kube_proxy_lite.policy.model import Direction, Flow
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.render.interface import ApplyFailed, PolicyApplier, PolicyRenderer
from kube_proxy_lite.stale import Connection
from kube_proxy_lite.sync import Connections, SyncObserver
from podwire.kube.kinds import NAMESPACES, NETWORK_POLICIES, PODS, Wanted
from podwire.runner import Runner

log = logging.getLogger(__name__)
_HEARING = 5.0
_AT_ONCE = 100  # judgements before others have their turn: 10 ms where a pod has a hundred policies


class PolicySync:
    """Keeps this node's kernel at what the cluster's NetworkPolicies say."""

    def __init__(
        self,
        policies: Policies,
        node: str,
        renderer: PolicyRenderer[Any, Any],
        applier: PolicyApplier[Any, Any],
        connections: Connections,
        observer: SyncObserver,
        *,
        period: float = 30.0,
        patience: float = 2.0,
        cut: bool = True,
        own_addresses: Callable[[], Collection[Address]] = tuple,
        has_daemon: Callable[[], bool] = lambda: False,
    ) -> None:
        """`period`: seconds between two looks at the whole; `own_addresses` are the node's; `has_daemon` says whether
        there is a daemon to hear of."""
        self.policies = policies
        self.runner = Runner("bringing policies to the kernel", self._run, max_interval=period)
        self.repairer = Runner("looking at connections", self._repair, max_interval=3600.0, min_interval=0.25)
        self.settle: Callable[[Iterable[int]], None] = lambda _numbers: None
        """Is told the numbers of pods that may start."""
        self.ran: Callable[[], None] = lambda: None
        """Is called after each run."""
        self.synced_at = 0.0
        self.generation = 0
        """How often the kernel was brought to what the cluster says: what was known before a run is in effect after."""
        self._node = node
        self._renderer = renderer
        self._applier = applier
        self._connections = connections
        self._observer = observer
        self._patience = patience
        self._cut = cut
        self._own_addresses = own_addresses
        self._has_daemon = has_daemon
        self._heard = asyncio.Event()
        self.intake = Intake(
            dict(
                (
                    door(NAMESPACES, policies.set_namespace, policies.drop_namespace),
                    door(NETWORK_POLICIES, policies.set_policy, policies.drop_policy),
                    door(PODS, policies.set_pod, policies.drop_pod),
                )
            ),
            self.runner.request,
            unreadable={NETWORK_POLICIES.resource: policies.set_unreadable},
        )
        self._blocks: frozenset[Network] = frozenset()
        self._attached: dict[int, Attached] = {}
        self._unsettled: dict[int, float] = {}  # number → when its patience ends
        self._narrowed: set[int] = set()  # addresses whose connections a change may forbid, before the kernel has it
        self._doubted: set[int] = set()  # and after

    @property
    def synced(self) -> bool:
        """Whether every source has said what there is, and the kernel has it."""
        return self.intake.complete and bool(self.synced_at)

    def wanted(self) -> tuple[Wanted[Any], ...]:
        """What is to be followed. Policies before pods: a policy that comes to pods is looked at by each of them."""
        return Wanted(kind=NAMESPACES), Wanted(kind=NETWORK_POLICIES), Wanted(kind=PODS)

    def is_own(self, pid: int) -> bool:
        """Whether a process is one that was started here."""
        return self._applier.is_own(pid)

    def _request(self) -> None:
        if self.intake.complete:
            self.runner.request()

    # --- the daemon's pods (attached.Follower)

    def attached(self, pods: Iterable[Attached], everything: bool) -> None:
        """Pods were attached; `everything` that these are all, and that numbers begin anew: a daemon that was started
        again gives them out from the first."""
        former = list(self._attached.values()) if everything else []
        if everything:
            self._attached.clear()
            self._unsettled.clear()
        pods = list(pods)
        deadline = asyncio.get_running_loop().time() + self._patience
        for pod in pods:
            self._attached[pod.number] = pod
            self._unsettled[pod.number] = deadline
            self.policies.attach(pod.key, pod.uid, pod.addresses)
        self._detach(former)
        if everything:
            self._heard.set()
        self._request()

    def gone(self, numbers: Iterable[int]) -> None:
        """Attachments are gone."""
        left = []
        for number in list(numbers):
            self._unsettled.pop(number, None)
            if number in self._attached:
                left.append(self._attached.pop(number))
        self._detach(left)
        self._request()

    def _detach(self, pods: Iterable[Attached]) -> None:
        """Those of `pods` that have no other attachment are the API's to describe again."""
        there = {pod.key for pod in self._attached.values()}
        for pod in pods:
            if pod.key not in there:
                self.policies.detach(pod.key)

    def blocks(self, blocks: frozenset[Network]) -> None:
        """The node's blocks of addresses."""
        if blocks != self._blocks:
            self._blocks = blocks
            self._request()

    async def settle_forever(self) -> None:
        """Lets pods that the API does not show start when their patience ends, until cancelled."""
        while True:
            await asyncio.sleep(self._patience / 4)
            now = asyncio.get_running_loop().time()
            if self.synced:
                late = [each for each, end in self._unsettled.items() if now >= end and not self._is_shown(each)]
                for pod in map(self._attached.__getitem__, late):
                    log.warning("pod %s/%s is not in the API; it starts closed", pod.namespace, pod.name)
                self._let_start(late)

    def _is_shown(self, number: int) -> bool:
        """Whether the API shows the pod that the daemon has attached, and not a former one of its name."""
        pod = self._attached[number]
        known = self.policies.pod(pod.key)
        return known is not None and (not pod.uid or pod.uid in known.uids) and self.policies.is_protected(known)

    def _let_start(self, numbers: list[int]) -> None:
        settled = [number for number in numbers if self._unsettled.pop(number, None) is not None]
        if settled:
            self.settle(settled)

    # --- the kernel

    async def _hear_daemon(self) -> None:
        """Waits until the daemon has said which pods and blocks are the node's."""
        try:
            async with asyncio.timeout(_HEARING if self._has_daemon() else 0):
                await self._heard.wait()
        except TimeoutError:
            if self._has_daemon():
                log.warning("the daemon has not said in %g s which pods are attached; going on without", _HEARING)

    async def _run(self, resync: bool) -> None:
        if not self.synced_at:
            await self._hear_daemon()
        began = time.perf_counter()
        shown = [number for number in self._unsettled if self._is_shown(number)]
        facts = self.policies.drain()
        self._narrowed |= set(_narrowed(facts))
        scripts = self._renderer.update(facts, self._blocks if self.policies.any else frozenset())
        try:
            if resync or not self.synced_at:
                scripts = self._renderer.resync(await self._applier.read())
            await self._applier.apply(scripts)
        except ApplyFailed as error:
            self._observer.failed(str(error))
            raise
        self.synced_at = time.time()
        self.generation += 1
        self._let_start(shown)
        self.ran()
        self._doubted |= self._narrowed
        self._narrowed.clear()
        if self._doubted and self._cut:
            self.repairer.request()
        waited = asyncio.get_running_loop().time() - self.runner.serving
        self._observer.synced(time.perf_counter() - began, resync, len(facts), waited)

    # --- connections

    async def _repair(self, resync: bool) -> None:
        isolated = self.policies.isolated()
        doubted, self._doubted = self._doubted, set()
        if resync:
            doubted |= isolated
        concerned = await self._connections.select(
            lambda found: [
                each
                for each in found
                if (each.source in doubted or each.endpoint in doubted)
                and (each.source in isolated or each.endpoint in isolated)
            ]
        )
        own = dict.fromkeys(self._own_addresses(), self._node)
        alike: dict[tuple[object, ...], list[Connection]] = {}
        for each in concerned:
            alike.setdefault((each.version, each.source, each.endpoint, each.protocol, each.endpoint_port), []).append(
                each
            )
        forbidden: list[Connection] = []
        for number, found in enumerate(alike.values()):
            if self._is_forbidden(found[0], own):
                forbidden += found
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        cut = await self._connections.delete(forbidden)
        if cut:
            self._observer.cut(cut)

    def _is_forbidden(self, connection: Connection, nodes: dict[Address, str]) -> bool:
        """Whether a connection that was begun could not be begun now."""
        make = ipaddress.IPv4Address if connection.version == 4 else ipaddress.IPv6Address
        flow = Flow(
            source=make(connection.source),
            destination=make(connection.endpoint),
            protocol=connection.protocol,
            port=connection.endpoint_port,
        )
        return not judge(self.policies, flow, nodes).allowed


def _narrowed(facts: Mapping[Fact, Value]) -> Iterator[int]:
    """Addresses, as numbers, of pods with another class and of members that have left a set."""
    for fact, value in facts.items():
        if isinstance(fact, tuple):
            kind, what = fact
            if isinstance(kind, Direction) or value is None:
                yield int(what[0] if isinstance(what, tuple) else what)
