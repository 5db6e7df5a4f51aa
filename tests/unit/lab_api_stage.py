"""What tests of the lab's API over HTTP share: a server on loopback with its store, and a story told to it.

A story is asynchronous and speaks plain HTTP (`serve`), or synchronous work with the client (`with_client`), in a
thread of its own. Either way the server is new, in this process, and gone afterwards.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp

from podwire.lab.api.client import Client
from podwire.lab.api.server import ApiServer
from podwire.lab.api.store import Store

T = TypeVar("T")
PODS_PATH = "/api/v1/namespaces/default/pods"
WIDGETS_PATH = "/apis/example.org/v1/namespaces/default/widgets"
LIMIT = 90.0  # seconds after which a test that waits has failed


def pod(name: str = "web", **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"containers": [{"name": "c", "image": "x"}]}}


class Api:
    """A server with its store, and a session to talk to it."""

    def __init__(self, store: Store, url: str, session: aiohttp.ClientSession) -> None:
        self.store, self.url, self._session = store, url, session

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        options.setdefault("headers", {"Content-Type": "application/json"})
        async with self._session.request(method, self.url + path, data=data, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text

    async def patch(self, path: str, kind: str, body: Any, query: str = "") -> tuple[int, Any]:
        return await self.call("PATCH", f"{path}{query}", body, headers={"Content-Type": f"application/{kind}"})

    def watch(self, path: str, query: str = "") -> Any:
        return self._session.get(f"{self.url}{path}?watch=1&{query}")


def serve(story: Callable[[Api], Awaitable[T]], *, history: int = 4096, bookmark_seconds: float = 60.0) -> T:
    async def whole() -> T:
        store = Store(history=history)
        server = ApiServer(store, bookmark_seconds=bookmark_seconds)
        async with server.serving() as url, aiohttp.ClientSession() as session:
            return await asyncio.wait_for(story(Api(store, url, session)), LIMIT)

    return asyncio.run(whole())


def with_client(work: Callable[[Client], T], store: Store | None = None) -> T:
    """Runs synchronous work against a server in this process, in a thread of its own."""

    async def whole() -> T:
        async with ApiServer(store or Store()).serving() as url:
            return await asyncio.wait_for(asyncio.to_thread(work, Client(url)), LIMIT)

    return asyncio.run(whole())
