"""`/healthz`, `/readyz` and `/metrics` over HTTP, for the kubelet and Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from ipam_daemon.metrics import Metrics


def make_app(
    not_ready: Callable[[], list[str]], refresh: Callable[[], Awaitable[None]], metrics: Metrics
) -> web.Application:
    """The web application. `not_ready` says why the node is not ready; `refresh` brings gauges up to date.

    `/healthz` answers 200 as long as the event loop turns; `/readyz` 200 while an ADD can succeed, 503 with the reasons
    otherwise; `/metrics` is in the Prometheus text format.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        reasons = not_ready()
        return web.Response(status=503 if reasons else 200, text="\n".join(reasons or ["ok"]) + "\n")

    async def scrape(_: web.Request) -> web.Response:
        await refresh()
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", scrape)])
    return app


async def serve(app: web.Application, listen: str) -> web.AppRunner:
    """Serves `app` on `listen` ("address:port") until the runner is cleaned up. Raises OSError when it cannot."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    await web.TCPSite(runner, host.strip("[]"), int(port)).start()
    return runner
