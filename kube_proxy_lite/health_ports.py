"""The health node ports of Services: how many endpoints has a Service on this node?

A Service of type LoadBalancer with the policy Local has a node port that a balancer asks which nodes have endpoints:
200 with their number where there are some and the proxy keeps up, 503 otherwise. One server a Service that asks for
one, on all addresses, or on those that `nodePortAddresses` says; these are looked up again and again, since the node
may get another. A port that another program has is reported and tried again.

Source: Kubernetes v1.36 documentation, "Create an External Load Balancer", and kube-proxy's behaviour.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from aiohttp import web

from kube_proxy_lite.health import RETRY_SECONDS, Keeping, serve
from kube_proxy_lite.model import Health

Key = tuple[str, str]
Place = tuple[str, int]
ANYWHERE = ("",)
"""All addresses, as `ServiceHealth.hosts` says it."""

log = logging.getLogger(__name__)


class ServiceHealth:
    """The servers, one a port and address."""

    def __init__(self, keeping: Keeping, hosts: Callable[[], Sequence[str]] = lambda: ANYWHERE) -> None:
        """`hosts` says which addresses of the node there are servers on; it may read files."""
        self._keeping = keeping
        self._hosts = hosts
        self._wanted: dict[Key, Health] = {}
        self._runners: dict[Place, tuple[Key, web.AppRunner]] = {}
        self._changed = asyncio.Event()
        self.missing: dict[int, str] = {}
        """Ports that cannot be served, and why."""

    def take(self, changed: Mapping[Key, Health | None]) -> None:
        """These Services' health checks are others than before."""
        for key, health in changed.items():
            if health is None:
                self._wanted.pop(key, None)
            else:
                self._wanted[key] = health
        if changed:
            self._changed.set()

    def look_again(self) -> None:
        """`hosts` may say something else than before."""
        self._changed.set()

    async def run_forever(self) -> None:
        """Serves what is wanted, until cancelled."""
        try:
            while True:
                self._changed.clear()
                hosts = await asyncio.to_thread(self._hosts) if self._wanted else ()
                await self._serve(hosts)
                again = self.missing or (self._wanted and hosts != ANYWHERE)
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_SECONDS if again else None):
                        await self._changed.wait()
        finally:
            for _, runner in self._runners.values():
                await runner.cleanup()
            self._runners.clear()

    async def _serve(self, hosts: Sequence[str]) -> None:
        """Brings the servers to what is wanted, as far as ports can be had."""
        wanted = {(host, health.port): key for key, health in self._wanted.items() for host in hosts}
        for place, (key, runner) in list(self._runners.items()):
            if wanted.get(place) != key:
                del self._runners[place]
                await runner.cleanup()
        missing: dict[int, str] = {}
        for (host, port), key in wanted.items():
            if (host, port) in self._runners:
                continue
            try:
                self._runners[host, port] = key, await serve(self._app(key), f"{host}:{port}")
            except OSError as error:
                missing[port] = why = error.strerror or str(error)
                if self.missing.get(port) != why:
                    words = "health node port %d of %s cannot be served, trying again: %s"
                    log.warning(words, port, "/".join(key), why)
        self.missing = missing

    def _app(self, key: Key) -> web.Application:
        async def answer(_: web.Request) -> web.Response:
            health = self._wanted.get(key)
            ready = health.ready if health else 0
            wrong = self._keeping.unhealthy()
            body = {
                "service": {"namespace": key[0], "name": key[1]},
                "localEndpoints": ready,
                "serviceProxyHealthy": not wrong,
            }
            headers = {"X-Load-Balancing-Endpoint-Weight": str(ready), "X-Content-Type-Options": "nosniff"}
            return web.json_response(body, status=200 if ready and not wrong else 503, headers=headers)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        return app
