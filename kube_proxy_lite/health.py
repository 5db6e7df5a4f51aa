"""What others ask the proxy over HTTP: is it alive, does it keep up, and how many endpoints has a Service here.

`/livez` answers 200 while the event loop turns. `/healthz` 200 while what was asked for is done in time, and 503, with
the reason, when the oldest change waits for longer than `late` seconds, nothing has been brought to the kernel yet, or
the node is about to go: deleted, or tainted by the cluster autoscaler, so that load balancers stop sending here while
connections drain. The body is JSON with the times, as kube-proxy's is.

A Service of type LoadBalancer with the policy Local has a node port that a balancer asks which nodes have endpoints:
200 with their number where there are some and the proxy keeps up, 503 otherwise. One server a Service that asks for
one, on all addresses; a port that another program has is reported and tried again.

Source: Kubernetes v1.36 documentation, "Create an External Load Balancer", and kube-proxy's behaviour.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from kube_proxy_lite.model import Health
from podwire.kube.objects import Node

DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"
_RETRY_SECONDS = 5.0
Key = tuple[str, str]

log = logging.getLogger(__name__)


class Keeping:
    """Whether the proxy keeps up. `late` is in seconds."""

    def __init__(self, late: float, oldest_wait: Callable[[], float], synced_at: Callable[[], float]) -> None:
        """`oldest_wait` says for how many seconds the oldest change that is not in the kernel has waited; `synced_at`
        when the kernel was last brought to what the cluster says, in seconds since the epoch, 0 if never."""
        self._late = late
        self._oldest_wait = oldest_wait
        self.synced_at = synced_at
        self.node_leaves = ""
        """Why no balancer should send here any more; empty while the node stays."""

    def take_node(self, node: Node | None) -> None:
        """The node's own object, None when it is gone."""
        if node is None or node.metadata.deletion_timestamp:
            self.node_leaves = "the node is being deleted"
        elif any(taint.key == DELETION_TAINT for taint in node.spec.taints or ()):
            self.node_leaves = f"the node has the taint {DELETION_TAINT}"
        else:
            self.node_leaves = ""

    def unhealthy(self) -> str:
        """Why the rules of this node cannot be trusted to be up to date; empty when they can."""
        if not self.synced_at():
            return "the Services of the cluster are not in the kernel yet"
        waited = self._oldest_wait()
        return f"a change has been waiting for {waited:.0f} s" if waited > self._late else ""


def make_app(keeping: Keeping) -> web.Application:
    """`/healthz` and `/livez`."""

    async def healthz(_: web.Request) -> web.Response:
        return _state(keeping, keeping.unhealthy() or keeping.node_leaves)

    async def livez(_: web.Request) -> web.Response:
        return _state(keeping, "")

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/livez", livez)])
    return app


def make_metrics_app(registry: CollectorRegistry, refresh: Callable[[], None], mode: str) -> web.Application:
    """`/metrics`, and `/proxyMode`, which tools that know kube-proxy ask for."""

    async def scrape(_: web.Request) -> web.Response:
        refresh()
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def proxy_mode(_: web.Request) -> web.Response:
        return web.Response(text=mode)

    app = web.Application()
    app.add_routes([web.get("/metrics", scrape), web.get("/proxyMode", proxy_mode)])
    return app


async def serve(app: web.Application, listen: str) -> web.AppRunner:
    """Serves `app` on `listen` ("address:port") until the runner is cleaned up. Raises OSError when it cannot."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    await web.TCPSite(runner, host.strip("[]") or None, int(port)).start()
    return runner


def _state(keeping: Keeping, wrong: str) -> web.Response:
    synced_at = keeping.synced_at()
    body = {
        "lastUpdated": datetime.fromtimestamp(synced_at, UTC).isoformat() if synced_at else None,
        "currentTime": datetime.fromtimestamp(time.time(), UTC).isoformat(),
        "nodeEligible": not keeping.node_leaves,
        "reason": wrong,
    }
    return web.json_response(body, status=503 if wrong else 200)


class ServiceHealth:
    """The health node ports of Services."""

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self._wanted: dict[Key, Health] = {}
        self._runners: dict[int, tuple[Key, web.AppRunner]] = {}
        self._changed = asyncio.Event()

    def take(self, changed: Mapping[Key, Health | None]) -> None:
        """These Services' health checks are others than before."""
        for key, health in changed.items():
            if health is None:
                self._wanted.pop(key, None)
            else:
                self._wanted[key] = health
        if changed:
            self._changed.set()

    async def run_forever(self) -> None:
        """Serves what is wanted, until cancelled."""
        try:
            while True:
                self._changed.clear()
                if await self._serve():
                    await self._changed.wait()
                else:
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            for _, runner in self._runners.values():
                await runner.cleanup()
            self._runners.clear()

    async def _serve(self) -> bool:
        """Brings the servers to what is wanted. False when a port could not be had."""
        wanted = {health.port: key for key, health in self._wanted.items()}
        for port, (key, runner) in list(self._runners.items()):
            if wanted.get(port) != key:
                del self._runners[port]
                await runner.cleanup()
        complete = True
        for port, key in wanted.items():
            if port not in self._runners:
                try:
                    self._runners[port] = key, await serve(self._app(key), f":{port}")
                except OSError as error:
                    complete = False
                    log.warning("health node port %d of %s cannot be served: %s", port, "/".join(key), error.strerror)
        return complete

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
