"""What others ask the proxy over HTTP: is it alive, does it keep up, what are its numbers.

`/livez` answers 200 while the event loop turns. `/healthz` 200 while what was asked for is done in time, and 503, with
the reason, when the oldest change waits for longer than `late` seconds, nothing has been brought to the kernel yet, or
the node is about to go: deleted, or tainted by the cluster autoscaler, so that load balancers stop sending here while
connections drain. The body is JSON with the times, as kube-proxy's is.

Ports are shared with whoever else of the same user asks for sharing (SO_REUSEPORT), so that during an upgrade the new
process answers beside the old one, and no check meets a closed port. One that another program has is reported, and
tried again: that Services work is worth more than that somebody is told so.

Source: kube-proxy v1.36's behaviour.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from podwire.kube.objects import Node

DELETION_TAINT = "ToBeDeletedByClusterAutoscaler"
RETRY_SECONDS = 5.0

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


def make_app(keeping: Keeping, answered: Callable[[str, int], None]) -> web.Application:
    """`/healthz` and `/livez`. `answered` is told the page and the status of each answer."""

    async def healthz(_: web.Request) -> web.Response:
        return state("healthz", keeping.unhealthy() or keeping.node_leaves)

    async def livez(_: web.Request) -> web.Response:
        return state("livez", "")

    def state(page: str, wrong: str) -> web.Response:
        answer = _state(keeping, wrong)
        answered(page, answer.status)
        return answer

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
    """Serves `app` on `listen` ("address:port", all addresses without one) until the runner is cleaned up.

    Raises OSError when it cannot.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]") or None, int(port), reuse_port=True).start()
    except OSError:
        await runner.cleanup()
        raise
    return runner


async def serve_forever(app: Callable[[], web.Application], listen: str, what: str) -> None:
    """Serves what `app` makes until cancelled; as soon as the port can be had."""
    said = ""
    while True:
        try:
            runner = await serve(app(), listen)
            break
        except OSError as error:
            if str(error) != said:
                log.warning("%s cannot be served on %s, trying again: %s", what, listen, error.strerror or error)
            said = str(error)
            await asyncio.sleep(RETRY_SECONDS)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _state(keeping: Keeping, wrong: str) -> web.Response:
    synced_at = keeping.synced_at()
    body = {
        "lastUpdated": datetime.fromtimestamp(synced_at, UTC).isoformat() if synced_at else None,
        "currentTime": datetime.fromtimestamp(time.time(), UTC).isoformat(),
        "nodeEligible": not keeping.node_leaves,
        "reason": wrong,
    }
    return web.json_response(body, status=503 if wrong else 200)
