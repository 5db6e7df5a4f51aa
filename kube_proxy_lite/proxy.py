"""The proxy's parts, put together: what is made of what, in which order it starts, and in which it ends.

    source ──▶ ServiceSync ──▶ kernel          /healthz, /livez, the Services' health ports, /metrics
       │          ▲
       │          └── NftEvents: somebody else has changed our rules
       │          ▼
       └─────▶ PolicySync ───▶ kernel
                  ▲
    daemon ◀──▶ AttachedPods

The rules stay when the proxy ends: connections go on, and new ones are served by what was last known. `cleanup` is
what takes them out.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from kube_proxy_lite.apply.nftevents import NftEvents
from kube_proxy_lite.apply.policy_nftables import PolicyApplier
from kube_proxy_lite.attached import AttachedPods
from kube_proxy_lite.errors import ModeUnavailable
from kube_proxy_lite.health import Keeping, ServiceHealth
from kube_proxy_lite.metrics import Metrics
from kube_proxy_lite.model import Settings
from kube_proxy_lite.modes import MODES, make_mode, need
from kube_proxy_lite.policy.policies import Policies
from kube_proxy_lite.policy_sync import PolicySync
from kube_proxy_lite.render.interface import Applier
from kube_proxy_lite.render.policy_nftables import TABLE as POLICY_TABLE
from kube_proxy_lite.render.policy_nftables import PolicyRenderer
from kube_proxy_lite.services import Services
from kube_proxy_lite.settings import Mode, ProxyConfig
from kube_proxy_lite.sync import ServiceSync
from podwire.kube import options
from podwire.kube.api import ApiSource
from podwire.kube.client import Client
from podwire.kube.folder import ManifestSource
from podwire.kube.kinds import one_node
from podwire.kube.source import Source
from podwire.runner import Runner

log = logging.getLogger(__name__)


class Proxy:
    """One node's proxy. Making it does no I/O but reading credentials."""

    def __init__(self, config: ProxyConfig) -> None:
        """Raises ConfigError, ModeUnavailable."""
        self._config = config
        self._metrics = Metrics()
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
            settings_of=lambda services: _settings(rules, services),
            own_addresses=own_addresses,
        )
        self._policy = self._make_policy() if config.network_policy else None
        self._keeping = Keeping(2 * config.sync_period, self._oldest_wait, self._synced_at)
        self._health = ServiceHealth(self._keeping)
        self._sync.health_changed = self._health.take

    def _make_policy(self) -> PolicySync:
        need("nft", "nftables")
        return PolicySync(
            Policies(self._config.node),
            self._config.node,
            PolicyRenderer(),
            PolicyApplier(),
            Conntrack(),
            self._metrics.policies,
            period=self._config.sync_period,
            cut=self._config.cut_connections,
            own_addresses=own_addresses,
        )

    async def run(self, stopped: asyncio.Event) -> None:
        """Serves until `stopped` is set. Raises what a part raised that cannot go on."""
        async with contextlib.AsyncExitStack() as stack:
            source = await self._source(stack)
            await self._serve(stack)
            async with asyncio.TaskGroup() as tasks:
                work = [tasks.create_task(each) for each in (*self._services_work(source), *self._policy_work(source))]
                fields = {"node": self._config.node, "mode": self._config.mode.value}
                log.info("started", extra={"fields": fields})
                await stopped.wait()
                for task in work:
                    task.cancel()

    def _services_work(self, source: Source) -> Iterator[Coroutine[Any, Any, None]]:
        if self._config.mode is Mode.NONE:
            return
        yield from (self._sync.intake.follow(source, wanted) for wanted in self._sync.wanted())
        yield self._follow_node(source)
        yield self._sync.runner.run_forever()
        yield self._sync.repairer.run_forever()
        yield self._health.run_forever()
        if self._mode.tables:
            yield self._watch_drift(self._mode.tables, self._mode.is_own, self._sync.runner)

    def _policy_work(self, source: Source) -> Iterator[Coroutine[Any, Any, None]]:
        policy = self._policy
        if policy is None:
            return
        attached = AttachedPods(Path(self._config.daemon_socket), policy, lambda: policy.synced)
        policy.settle = attached.settle
        policy.ran = attached.note_synced
        yield from (policy.intake.follow(source, wanted) for wanted in policy.wanted())
        yield attached.follow_forever()
        yield policy.settle_forever()
        yield policy.runner.run_forever()
        yield policy.repairer.run_forever()
        yield self._watch_drift(frozenset({POLICY_TABLE.split()[1]}), policy.is_own, policy.runner)

    async def _source(self, stack: contextlib.AsyncExitStack) -> Source:
        if self._config.manifests:
            return ManifestSource((Path(self._config.manifests),), observer=self._metrics)
        client = Client(options.access(self._config.kubernetes), observer=self._metrics)
        await stack.enter_async_context(client)
        return ApiSource(client)

    async def _serve(self, stack: contextlib.AsyncExitStack) -> None:
        pages = (
            (health.make_app(self._keeping), self._config.health_listen),
            (
                health.make_metrics_app(self._metrics.registry, self._refresh, self._config.mode.value),
                self._config.metrics_listen,
            ),
        )
        for app, listen in pages:
            if listen:
                runner = await health.serve(app, listen)
                stack.push_async_callback(runner.cleanup)

    async def _follow_node(self, source: Source) -> None:
        """The node's own object says when balancers should stop sending here."""
        async with contextlib.aclosing(source.follow(one_node(self._config.node))) as batches:
            async for batch in batches:
                for node in batch.upserts:
                    self._keeping.take_node(node)
                if any(key == ("", self._config.node) for key in batch.deletes):
                    self._keeping.take_node(None)

    async def _watch_drift(self, tables: frozenset[str], is_own: Callable[[int], bool], runner: Runner) -> None:
        """Asks for a look at the whole when somebody else has changed one of our tables."""

        def drifted() -> None:
            log.warning("somebody else has changed our rules; looking at them again")
            self._metrics.drift.inc()
            if runner.begun:
                runner.request(resync=True)

        try:
            await NftEvents(tables, drifted, is_own).watch_forever()
        except OSError as error:
            log.warning("changes by others are found every %g s only: %s", self._config.sync_period, error.strerror)

    def _synced_at(self) -> float:
        """The older of the parts that run."""
        parts = [self._sync.synced_at] if self._config.mode is not Mode.NONE else []
        parts += [self._policy.synced_at] if self._policy else []
        return min(parts, default=time.time())

    def _oldest_wait(self) -> float:
        asked = [self._sync.runner.requested_at, self._policy.runner.requested_at if self._policy else None]
        oldest = min((each for each in asked if each is not None), default=None)
        return 0.0 if oldest is None else asyncio.get_running_loop().time() - oldest

    def _refresh(self) -> None:
        self._metrics.problems.set(len(self._services.problems()))
        waited = self._oldest_wait()
        if waited:
            self._metrics.queued.set(time.time() - waited)


async def cleanup() -> None:
    """Takes the rules of every mode out of the kernel, whatever mode made them. Raises the first failure."""
    failures: list[Exception] = []
    made: list[Callable[[], Any]] = [*(partial(_applier, mode) for mode in MODES), PolicyApplier]
    for make in made:
        try:
            await make().remove()
        except ModeUnavailable:
            continue  # without its program it has no rules
        except Exception as error:  # noqa: BLE001 - the others are to go, too; raised below
            failures.append(error)
    if failures:
        raise failures[0]


def _applier(mode: Mode) -> Applier[Any, Any]:
    return make_mode(mode, Settings(node="")).applier


def _settings(rules: Settings, services: Services) -> Settings:
    """What the objects add to what the operator has said."""
    return msgspec.structs.replace(rules, service_cidrs=services.service_cidrs)
