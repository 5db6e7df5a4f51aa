"""A Kubernetes API for one proxy: lists and watches of objects that it was given, and changes when it is told to.

    python -m bench.synthetic_api PORT FOLDER

FOLDER has a file for each kind, named as the last part of its path (`services`), with an object a line, encoded before
anybody asks for it: what is measured is who reads them. Lists are given as streams and in chunks, as a server since
1.32 does; nothing is selected, so the folder has only what the proxy wants. A process of its own in the node's
namespace.

Commands are lines on standard input, of words with tabs between, and each has a line of JSON as its answer:

    put  PLURAL  ADDED|MODIFIED|DELETED  OBJECT    an event for who watches → when it was sent
    then …                                          the same, sent together with the command that follows
    listed                                          → when the last byte of each kind's list was sent

Times are of CLOCK_MONOTONIC, which all processes of the machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from aiohttp import web

from podwire.kube.decode import END_OF_LIST

_PIECE = 1 << 20  # bytes that are sent at once
_BOOKMARKS = 30.0  # seconds
_FIRST_VERSION = 1000


class Collection:
    """The objects of a kind, encoded."""

    def __init__(self, path: Path | None) -> None:
        self.encoded = path.read_bytes().splitlines() if path else []
        self.watchers: set[web.StreamResponse] = set()
        self.listed = 0.0

    def page(self, start: int, limit: int) -> bytes:
        """A chunk of the list."""
        part = self.encoded[start : start + limit] if limit else self.encoded[start:]
        end = start + len(part)
        token = str(end) if end < len(self.encoded) else ""
        metadata = json.dumps({"resourceVersion": str(_FIRST_VERSION), "continue": token}).encode()
        return b'{"kind":"List","apiVersion":"v1","metadata":%b,"items":[%b]}' % (metadata, b",".join(part))

    async def stream(self, response: web.StreamResponse) -> None:
        """All there is, as the beginning of a watch."""
        pieces: list[bytes] = []
        size = 0
        for each in self.encoded:
            pieces += (b'{"type":"ADDED","object":', each, b"}\n")
            size += len(each)
            if size > _PIECE:
                await response.write(b"".join(pieces))
                pieces, size = [], 0
        await response.write(b"".join((*pieces, _bookmark(end=True))))


class Server:
    """The kinds by plural, and the version of the last change."""

    def __init__(self, folder: Path) -> None:
        self._collections = {path.name: Collection(path) for path in folder.iterdir()}
        self._version = _FIRST_VERSION

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """A list or a watch."""
        collection = self._collections.setdefault(request.path.rpartition("/")[2], Collection(None))
        query = request.query
        if query.get("watch") == "true":
            return await self._watch(request, collection)
        body = collection.page(int(query.get("continue") or 0), int(query.get("limit") or 0))
        collection.listed = time.monotonic()
        return web.Response(body=body, content_type="application/json")

    async def _watch(self, request: web.Request, collection: Collection) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        if request.query.get("sendInitialEvents") == "true":
            await collection.stream(response)
            collection.listed = time.monotonic()
        collection.watchers.add(response)
        try:
            while True:
                await asyncio.sleep(_BOOKMARKS)
                await response.write(_bookmark(version=self._version))
        finally:
            collection.watchers.discard(response)

    async def command(self, lines: list[list[bytes]]) -> object:
        """Carries a command out, with those that were to be sent with it."""
        if lines[-1][0] == b"listed":
            return {name: each.listed for name, each in self._collections.items()}
        at = time.monotonic()
        for _, plural, kind, encoded in lines:
            self._version += 1
            encoded = encoded.replace(b'"resourceVersion":"1"', b'"resourceVersion":"%d"' % self._version, 1)
            for watcher in self._collections[plural.decode()].watchers:
                await watcher.write(b'{"type":"%b","object":%b}\n' % (kind, encoded))
        return at


def _bookmark(*, version: int = _FIRST_VERSION, end: bool = False) -> bytes:
    metadata: dict[str, object] = {"resourceVersion": str(version)}
    if end:
        metadata["annotations"] = {END_OF_LIST: "true"}
    return json.dumps({"type": "BOOKMARK", "object": {"metadata": metadata}}).encode() + b"\n"


async def _main(port: int, folder: Path) -> None:
    server = Server(folder)
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(json.dumps("serving"), flush=True)
    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    waiting: list[list[bytes]] = []
    while line := await reader.readline():
        words = line.rstrip(b"\n").split(b"\t")
        waiting.append(words)
        if words[0] != b"then":
            print(json.dumps(await server.command(waiting)), flush=True)
            waiting = []


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), Path(sys.argv[2])))
