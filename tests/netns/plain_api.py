"""An API that takes whatever it is given: no validation, no defaults, one counter of versions. For hostile objects,
broken watches, and outages; it listens in a namespace of the test, and runs on a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from aiohttp import web

from podwire import netns
from podwire.kube.kinds import KINDS, Kind

PORT = 6443
_LIMIT = 60.0
_KINDS: dict[str, Kind[Any]] = {kind.name: kind for kind in KINDS}
Object = dict[str, Any]
T = TypeVar("T")


def inside(path: str, work: Callable[[], T]) -> T:
    """What `work` gives, done by a thread that has entered the namespace at `path`. Sockets made there stay there."""
    found: list[T] = []
    wrong: list[BaseException] = []

    def run() -> None:
        fd = netns.open_netns(path)
        try:
            with netns.inside(fd):
                found.append(work())
        except BaseException as error:  # noqa: BLE001 - it is raised below
            wrong.append(error)
        finally:
            os.close(fd)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if wrong:
        raise wrong[0]
    return found[0]


class PlainApi:
    """On 127.0.0.1:6443 of the namespace at `path`, from the beginning of the block to its end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._objects: dict[str, dict[tuple[str, str], Object]] = {kind.path: {} for kind in KINDS}
        self._log: list[tuple[int, str, bytes]] = []
        self._version = 1
        self._news = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self._watches: set[asyncio.Task[Any]] = set()
        self.refused: dict[str, int] = {}
        """Status by path, for kinds that are not to be read."""

    def __enter__(self) -> PlainApi:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- from the test's thread

    def start(self) -> None:
        """Listens again."""
        listener = inside(self._path, lambda: socket.create_server(("127.0.0.1", PORT)))
        self._do(self._start(listener))

    def stop(self) -> None:
        """Is away: connections are cut, new ones refused."""
        self._do(self._stop())

    def put(self, *objects: Object) -> None:
        """These objects are so from now on."""
        self._do(self._put(objects))

    def drop(self, kind: str, name: str, namespace: str = "default") -> None:
        """This object is gone."""
        self._do(self._drop(_KINDS[kind], (namespace if _KINDS[kind].namespaced else "", name)))

    def clear(self) -> None:
        """No object any more."""
        for kind in KINDS:
            for namespace, name in list(self._objects[kind.path]):
                self.drop(kind.name, name, namespace)
        self.refused.clear()

    def say(self, kind: str, line: bytes) -> None:
        """Whoever watches the kind gets these bytes."""
        self._do(self._say(_KINDS[kind].path, line))

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_LIMIT)

    # --- on the API's

    async def _start(self, listener: socket.socket) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def _stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner:
            await runner.cleanup()
        for task in self._watches:
            task.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    async def _put(self, objects: tuple[Object, ...]) -> None:
        for obj in objects:
            kind = _KINDS[obj["kind"]]
            metadata = obj["metadata"]
            key = (metadata.setdefault("namespace", "default") if kind.namespaced else "", metadata["name"])
            known = self._objects[kind.path]
            self._version += 1
            metadata["resourceVersion"] = str(self._version)
            self._tell(kind.path, "MODIFIED" if key in known else "ADDED", obj)
            known[key] = obj
        await self._notify()

    async def _drop(self, kind: Kind[Any], key: tuple[str, str]) -> None:
        obj = self._objects[kind.path].pop(key)
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        self._tell(kind.path, "DELETED", obj)
        await self._notify()

    async def _say(self, path: str, line: bytes) -> None:
        self._version += 1
        self._log.append((self._version, path, line))
        await self._notify()

    def _tell(self, path: str, event: str, obj: Object) -> None:
        self._log.append((self._version, path, json.dumps({"type": event, "object": obj}).encode() + b"\n"))

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in self.refused or path not in self._objects:
            status = self.refused.get(path, 404)
            return web.json_response({"kind": "Status", "code": status, "reason": "", "message": "no"}, status=status)
        if "sendInitialEvents" in request.query:
            return web.json_response({"kind": "Status", "code": 422, "message": "not here"}, status=422)
        if "watch" in request.query:
            return await self._watch(request, path)
        name = request.query.get("fieldSelector", "").rpartition("=")[2]
        items = [obj for (_, own), obj in self._objects[path].items() if name in ("", own)]
        return web.json_response({"metadata": {"resourceVersion": str(self._version)}, "items": items})

    async def _watch(self, request: web.Request, path: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        seen = int(request.query["resourceVersion"])
        with suppress(ConnectionResetError):
            while True:
                new = [each for each in self._log if each[0] > seen and each[1] == path]
                seen = self._version
                for _, _, line in new:
                    await response.write(line)
                async with self._news:
                    await self._news.wait_for(lambda: self._version > seen)  # noqa: B023
        return response
