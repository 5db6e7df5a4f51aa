"""The proxy's parts, put together: what is made of what, in which order it starts, and in which it ends.

    source ──▶ ServiceSync ──▶ kernel          /healthz, /livez, the Services' health ports, /metrics
       │          ▲
       │          └── NftEvents ▸ Drift: somebody else has changed our rules
       │          ▼
       └─────▶ PolicySync ───▶ kernel
                  ▲
    daemon ◀──▶ AttachedPods

The rules stay when the proxy ends: connections go on, and new ones are served by what was last known. So a new process
may begin while the old one still runs; both say the same, and who finds something done has nothing to do. `--cleanup`
is what takes rules out (modes.remove_all_but).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from kube_proxy_lite import health
from kube_proxy_lite.apply.addresses import own_addresses
from kube_proxy_lite.apply.conntrack import Conntrack
from kube_proxy_lite.apply.nftevents import NftEvents, Touches
from kube_proxy_lite.apply.sysctls import set_conntrack
from kube_proxy_lite.attached import AttachedPods
from kube_proxy_lite.drift import Drift
from kube_proxy_lite.health import Keeping
from kube_proxy_lite.health_ports import ANYWHERE, ServiceHealth
from kube_proxy_lite.metrics import Metrics
from kube_proxy_lite.model import Network, Settings
from kube_proxy_lite.modes import make_mode, make_policy, remove_all_but
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.policy_sync import PolicySync
from kube_proxy_lite.services import Services
from kube_proxy_lite.settings import Mode, ProxyConfig
from kube_proxy_lite.sync import ServiceSync
from podwire.backoff import Backoff
from podwire.errors import TryAgain
from podwire.kube import options
from podwire.kube.api import ApiSource
from podwire.kube.client import Client
from podwire.kube.folder import ManifestSource
from podwire.kube.source import Source
from podwire.runner import Runner

_NOWHERE: tuple[Network, ...] = (ipaddress.ip_network("0.0.0.0/32"), ipaddress.ip_network("::/128"))
"""Networks in which no node has an address."""

log = logging.getLogger(__name__)


class Proxy:
    """One node's proxy. Making it does no I/O but reading credentials."""

    def __init__(self, config: ProxyConfig) -> None:
        """Raises ConfigError, ModeUnavailable."""
        self._config = config
        self._metrics = Metrics(config.mode.value)
        rules = config.rules()
        self._services = Services(rules)
        self._mode = mode = make_mode(config.mode, rules)
        self._sync = ServiceSync(
            self._services,
            mode.renderer,
            mode.applier,
            Conntrack(),
            self._metrics.services,
            period=config.sync_period,
            min_interval=config.min_sync_period,
            settings_of=partial(settings_now, config, rules),
            own_addresses=own_addresses,
        )
        self._policies_there = asyncio.Event()
        self._policy = self._make_policy() if config.network_policy else None
        self._keeping = Keeping(2 * config.sync_period, self._oldest_wait, self._synced_at)
        self._health = ServiceHealth(self._keeping, self._health_hosts)
        self._sync.health_changed = self._health.take
        self._sync.node_changed = self._keeping.take_node
        self._sync.settings_changed = self._health.look_again

    def _make_policy(self) -> PolicySync:
        made = make_policy(self._config.mode)
        self._policy_touches = made.touches
        return PolicySync(
            Policies(self._config.node),
            self._config.node,
            made.renderer,
            made.applier,
            Conntrack(),
            self._metrics.policies,
            period=self._config.sync_period,
            cut=self._config.cut_connections,
            own_addresses=own_addresses,
            has_daemon=Path(self._config.daemon_socket).exists,
        )

    async def run(self, stopped: asyncio.Event) -> None:
        """Serves until `stopped` is set. Raises what a part raised that cannot go on."""
        set_conntrack(self._config.conntrack)
        async with contextlib.AsyncExitStack() as stack:
            source = await self._source(stack)
            parts = (self._services_work(source), self._policy_work(source), self._pages())
            async with asyncio.TaskGroup() as tasks:
                work = [tasks.create_task(each) for part in parts for each in part]
                work.append(tasks.create_task(self._clear_other_modes()))
                fields = {"node": self._config.node, "mode": self._config.mode.value}
                log.info("started", extra={"fields": fields})
                await stopped.wait()
                for task in work:
                    task.cancel()

    def _services_work(self, source: Source) -> Iterator[Coroutine[Any, Any, None]]:
        if self._config.mode is Mode.NONE:
            return
        sync, mode = self._sync, self._mode
        yield from (sync.intake.follow(source, wanted) for wanted in sync.wanted())
        yield sync.runner.run_forever()
        yield sync.repairer.run_forever()
        yield self._health.run_forever()
        if mode.touches:
            yield self._watch_drift("services", mode.touches, mode.is_own, sync.runner)

    def _policy_work(self, source: Source) -> Iterator[Coroutine[Any, Any, None]]:
        policy = self._policy
        if policy is None:
            return
        attached = AttachedPods(Path(self._config.daemon_socket), policy, lambda: policy.synced)
        policy.settle = attached.settle
        policy.ran = partial(self._policies_ran, policy, attached)
        yield from (policy.intake.follow(source, wanted) for wanted in policy.wanted())
        yield attached.follow_forever()
        yield policy.settle_forever()
        yield policy.runner.run_forever()
        yield policy.repairer.run_forever()
        yield self._watch_drift("policies", self._policy_touches, policy.is_own, policy.runner)

    def _policies_ran(self, policy: PolicySync, attached: AttachedPods) -> None:
        attached.note_synced()
        if policy.synced:
            self._policies_there.set()

    def _pages(self) -> Iterator[Coroutine[Any, Any, None]]:
        config, metrics = self._config, self._metrics
        checks = partial(health.make_app, self._keeping, metrics.answered)
        numbers = partial(health.make_metrics_app, metrics.registry, self._refresh, config.mode.value)
        if config.health_listen:
            yield health.serve_forever(checks, config.health_listen, "/healthz")
        if config.metrics_listen:
            yield health.serve_forever(numbers, config.metrics_listen, "/metrics")

    async def _source(self, stack: contextlib.AsyncExitStack) -> Source:
        if self._config.manifests:
            return ManifestSource((Path(self._config.manifests),), observer=self._metrics)
        client = Client(options.access(self._config.kubernetes), observer=self._metrics)
        await stack.enter_async_context(client)
        return ApiSource(client)

    async def _watch_drift(self, rules: str, touches: Touches, is_own: Callable[[int], bool], runner: Runner) -> None:
        """Asks for a look at the whole when somebody else has changed our rules."""
        drift = Drift(runner, self._metrics.drift.labels(rules).inc)
        try:
            await NftEvents(touches, drift.note, is_own).watch_forever()
        except OSError as error:
            log.warning("changes by others are found every %g s only: %s", self._config.sync_period, error.strerror)

    async def _clear_other_modes(self) -> None:
        """Once this mode's rules are there."""
        if self._config.mode is not Mode.NONE:
            await self._sync.synced.wait()
        if self._policy is not None:
            await self._policies_there.wait()
        pauses = Backoff(1.0, 60.0)
        while True:
            try:
                await remove_all_but(self._config.mode, self._config.network_policy)
                return
            except TryAgain as error:
                log.warning("rules of another mode cannot be removed, trying again: %s", error)
                await asyncio.sleep(pauses.next())

    def _synced_at(self) -> float:
        """The older of the parts that run."""
        parts = [self._sync.synced_at] if self._config.mode is not Mode.NONE else []
        parts += [self._policy.synced_at] if self._policy else []
        return min(parts, default=time.time())

    def _oldest_wait(self) -> float:
        asked = [self._sync.runner.requested_at, self._policy.runner.requested_at if self._policy else None]
        oldest = min((each for each in asked if each is not None), default=None)
        return 0.0 if oldest is None else asyncio.get_running_loop().time() - oldest

    def _health_hosts(self) -> tuple[str, ...]:
        """Where health node ports are: where NodePorts are, which is all addresses unless the operator says which."""
        settings = self._sync.settings
        if not settings.node_port_addresses:
            return ANYWHERE
        own = (each for each in own_addresses() if settings.has_node_ports(each) and not each.is_link_local)
        return tuple(sorted(map(str, own)))

    def _refresh(self) -> None:
        """Numbers that are looked up when somebody asks."""
        self._metrics.problems.set(len(self._services.problems()))
        self._metrics.health_ports_missing.set(len(self._health.missing))
        for policy, ports in self._services.without_local_endpoints().items():
            self._metrics.no_local_endpoints.labels(policy).set(ports)


def settings_now(config: ProxyConfig, rules: Settings, services: Services) -> Settings:
    """What the operator has said, with what the objects say of the cluster and the node: followed as it changes."""
    found = msgspec.structs.replace(rules, service_cidrs=services.service_cidrs)
    if config.node_cidrs:
        cidrs = tuple(dict.fromkeys((*rules.cluster_cidrs, *services.pod_cidrs)))
        found = msgspec.structs.replace(found, cluster_cidrs=cidrs)
    if config.node_ports_primary:
        own = tuple(ipaddress.ip_network(address) for address in services.node_addresses)
        versions = {network.version for network in own}
        # of a family in which the node has none, NodePorts answer nowhere: no network at all would mean everywhere
        own += tuple(network for network in _NOWHERE if network.version not in versions)
        found = msgspec.structs.replace(found, node_port_addresses=own)
    return found
