"""The proxy's parts, put together: what is made of what, in which order it starts, and in which it ends.

    source ──▶ ServiceSync ──▶ kernel          /healthz, /livez, the Services' health ports, /metrics
                  ▲
                  └── NftEvents: somebody else has changed our rules

The rules stay when the proxy ends: connections go on, and new ones are served by what was last known. `cleanup` is
what takes them out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path

import msgspec

from kube_proxy_lite import health
from kube_proxy_lite.apply.addresses import own_addresses
from kube_proxy_lite.apply.conntrack import Conntrack
from kube_proxy_lite.apply.nftevents import NftEvents
from kube_proxy_lite.errors import ModeUnavailable
from kube_proxy_lite.health import Keeping, ServiceHealth
from kube_proxy_lite.metrics import Metrics
from kube_proxy_lite.model import Settings
from kube_proxy_lite.modes import MODES, make_mode
from kube_proxy_lite.services import Services
from kube_proxy_lite.settings import ProxyConfig
from kube_proxy_lite.sync import ServiceSync
from podwire.kube import options
from podwire.kube.api import ApiSource
from podwire.kube.client import Client
from podwire.kube.folder import ManifestSource
from podwire.kube.kinds import one_node
from podwire.kube.source import Source

log = logging.getLogger(__name__)


class Proxy:
    """One node's proxy. Making it does no I/O but reading credentials."""

    def __init__(self, config: ProxyConfig) -> None:
        """Raises ConfigError, ModeUnavailable."""
        self._config = config
        self._metrics = Metrics()
        self._client: Client | None = None
        rules = config.rules()
        self._services = Services(rules)
        mode = make_mode(config.mode, rules)
        self._tables = mode.tables
        self._sync = ServiceSync(
            self._services,
            mode.renderer,
            mode.applier,
            Conntrack(),
            self._metrics,
            period=config.sync_period,
            min_interval=config.min_sync_period,
            settings_of=lambda services: _settings(rules, services),
            own_addresses=own_addresses,
        )
        self._is_own = mode.is_own
        self._keeping = Keeping(2 * config.sync_period, self._oldest_wait, lambda: self._sync.synced_at)
        self._health = ServiceHealth(self._keeping)
        self._sync.health_changed = self._health.take

    async def run(self, stopped: asyncio.Event) -> None:
        """Serves until `stopped` is set. Raises what a part raised that cannot go on."""
        async with contextlib.AsyncExitStack() as stack:
            source = await self._source(stack)
            await self._serve(stack)
            async with asyncio.TaskGroup() as tasks:
                work = [
                    *(tasks.create_task(self._sync.follow(source, wanted)) for wanted in self._sync.wanted()),
                    tasks.create_task(self._follow_node(source)),
                    tasks.create_task(self._sync.runner.run_forever()),
                    tasks.create_task(self._sync.repairer.run_forever()),
                    tasks.create_task(self._health.run_forever()),
                    tasks.create_task(self._watch_drift()),
                ]
                fields = {"node": self._config.node, "mode": self._config.mode.value}
                log.info("started", extra={"fields": fields})
                await stopped.wait()
                for task in work:
                    task.cancel()

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

    async def _watch_drift(self) -> None:
        if not self._tables:
            return
        try:
            await NftEvents(self._tables, self._drifted, self._is_own).watch_forever()
        except OSError as error:
            log.warning("changes by others are found every %g s only: %s", self._config.sync_period, error.strerror)

    def _drifted(self) -> None:
        if self._sync.synced:
            log.warning("somebody else has changed our rules; looking at them again")
            self._metrics.drift.inc()
            self._sync.runner.request(resync=True)

    def _oldest_wait(self) -> float:
        asked = self._sync.runner.requested_at
        return 0.0 if asked is None else asyncio.get_running_loop().time() - asked

    def _refresh(self) -> None:
        self._metrics.problems.set(len(self._services.problems()))
        waited = self._oldest_wait()
        if waited:
            self._metrics.queued.set(time.time() - waited)


async def cleanup() -> None:
    """Takes the rules of every mode out of the kernel, whatever mode made them. Raises the first failure."""
    failures: list[Exception] = []
    for mode in MODES:
        try:
            await make_mode(mode, Settings(node="")).applier.remove()
        except ModeUnavailable:
            continue  # without its program it has no rules
        except Exception as error:  # noqa: BLE001 - the others are to go, too; raised below
            failures.append(error)
    if failures:
        raise failures[0]


def _settings(rules: Settings, services: Services) -> Settings:
    """What the objects add to what the operator has said."""
    return msgspec.structs.replace(rules, service_cidrs=services.service_cidrs)
