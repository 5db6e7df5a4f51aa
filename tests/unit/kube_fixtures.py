"""What the tests of `podwire.kube` share: an API server that does as it is told, a consumer that mirrors, keys."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from ssl import SSLContext
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from podwire.kube.access import Access, User
from podwire.kube.api import Pace
from podwire.kube.client import Client, Timing
from podwire.kube.kinds import Key, T, Wanted
from podwire.kube.source import Batch, Skipped, Source

LIMIT = 90.0  # seconds after which a test that waits has failed
QUICK = Pace(first=0.01, most=0.05, slow=0.05, short=0.05)
IMPATIENT = msgspec.structs.replace(QUICK, mark=1.0, silence=1.5)  # for servers that do not answer
R = TypeVar("R")


def run(story: Callable[[], Awaitable[R]]) -> R:
    """Runs a story to its end, or fails after LIMIT."""

    async def whole() -> R:
        return await asyncio.wait_for(story(), LIMIT)

    return asyncio.run(whole())


# --- objects as JSON --------------------------------------------------------------------------------------------


def service(name: str, version: int, **spec: Any) -> dict[str, Any]:
    """A Service of namespace `default`."""
    metadata = {"name": name, "namespace": "default", "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": {"clusterIP": f"10.96.0.{version % 250}", **spec}}


def event(kind: str, obj: dict[str, Any]) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def mark(version: int, *, ends_list: bool = False) -> bytes:
    """A bookmark."""
    annotations = {"annotations": {"k8s.io/initial-events-end": "true"}} if ends_list else {}
    return event("BOOKMARK", {"kind": "Service", "metadata": {"resourceVersion": str(version), **annotations}})


def listing(version: int, *items: dict[str, Any], token: str = "") -> dict[str, Any]:
    """A page of a list."""
    return {"metadata": {"resourceVersion": str(version), "continue": token}, "items": list(items)}


def status(code: int, reason: str = "", message: str = "") -> dict[str, Any]:
    """A Status, as errors are."""
    return {"kind": "Status", "code": code, "reason": reason, "message": message or reason}


# --- an API server that does as it is told ----------------------------------------------------------------------


class Reply:
    """One answer. `then`: what follows `pieces` ("end", "hang", "drop": the connection is cut); `code` other than 200
    answers with a Status. `gate`: nothing is sent before it is set."""

    def __init__(
        self,
        *pieces: bytes,
        code: int = 200,
        then: str = "end",
        headers: dict[str, str] | None = None,
        gate: asyncio.Event | None = None,
    ) -> None:
        self.pieces, self.code, self.then, self.gate = pieces, code, then, gate
        self.headers = {"Content-Type": "application/json", **(headers or {})}

    @classmethod
    def of(cls, body: dict[str, Any], code: int = 200, **options: Any) -> Reply:
        return cls(json.dumps(body).encode(), code=code, **options)


class Script:
    """Answers the first request with the first reply, and so on; the last one for ever. `asked` are the queries."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[dict[str, str]] = []
        self.authorizations: list[str] = []
        self._ended = asyncio.Event()

    @asynccontextmanager
    async def serving(self, tls: SSLContext | None = None) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
            yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            self._ended.set()
            await runner.cleanup()

    def kinds_of_rounds(self) -> list[str]:
        """What was asked for: `list`, `stream`, `watch VERSION`."""
        return [
            "list" if "watch" not in one else "stream" if "sendInitialEvents" in one
            else f"watch {one.get('resourceVersion', '')}"
            for one in self.asked
        ]  # fmt: skip

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        number = len(self.asked)
        self.asked.append(dict(request.query))
        self.authorizations.append(request.headers.get("Authorization", ""))
        reply = self.replies[min(number, len(self.replies) - 1)]
        response = web.StreamResponse(status=reply.code, headers=reply.headers)
        if reply.then == "no answer":
            await self._ended.wait()
        await response.prepare(request)
        if reply.gate is not None:
            await reply.gate.wait()
        for piece in reply.pieces:
            await response.write(piece)
        if reply.then == "drop":
            assert request.transport is not None
            await asyncio.sleep(0)
            request.transport.abort()
        elif reply.then == "hang":
            await self._ended.wait()
        return response


def client(*urls: str, user: User | None = None, timing: Timing | None = None, **options: Any) -> Client:
    """A client of these servers."""
    access = Access(servers=urls, origin="test", user=user or User())
    return Client(access, timing=timing or Timing(connect=60.0, answer=60.0, silence=60.0), **options)


# --- a consumer -------------------------------------------------------------------------------------------------


class Mirror(Generic[T]):
    """Keeps the objects that a source says there are, and what it said."""

    def __init__(self) -> None:
        self.objects: dict[Key, T] = {}
        self.batches: list[Batch[T]] = []
        self.error: Exception | None = None
        self._changed = asyncio.Condition()

    @property
    def synced(self) -> bool:
        return bool(self.batches) and self.batches[-1].synced

    @property
    def names(self) -> list[str]:
        return sorted(name for _, name in self.objects)

    @property
    def skipped(self) -> list[Skipped]:
        return [one for batch in self.batches for one in batch.skipped]

    def take(self, batch: Batch[T]) -> None:
        keys = [*(obj.key for obj in batch.upserts), *batch.deletes]
        assert len(keys) == len(set(keys)), "a key stands in a batch once"
        assert batch.synced or not self.synced, "synced stays"
        self.batches.append(batch)
        self.objects.update({obj.key: obj for obj in batch.upserts})
        for key in batch.deletes:
            self.objects.pop(key, None)

    async def follow(self, source: Source, wanted: Wanted[T]) -> None:
        try:
            async with aclosing(source.follow(wanted)) as batches:
                async for batch in batches:
                    self.take(batch)
                    await self._tell()
        except Exception as error:
            self.error = error
            await self._tell()
            raise

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until a condition on this mirror holds. Raises what ended its following."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.error is not None or holds())
        if self.error is not None:
            raise self.error

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def mirrored(source: Source, wanted: Wanted[T]) -> AsyncIterator[Mirror[T]]:
    """A mirror that follows a source while the context lasts; what it raises, the context raises."""
    mirror: Mirror[T] = Mirror()
    task = asyncio.create_task(mirror.follow(source, wanted))
    try:
        yield mirror
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()


async def eventually(holds: Callable[[], bool]) -> None:
    """Waits for a condition of something that tells nobody."""
    while not holds():  # noqa: ASYNC110 (there is no event to wait for)
        await asyncio.sleep(0.005)


# --- keys -------------------------------------------------------------------------------------------------------

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """A certificate authority in a folder of its own; what it signs is for 127.0.0.1 and `name`, and for both ends."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.ca = self.folder / "ca.pem"
        self._openssl("req", "-x509", *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", f"/CN={name}")

    def sign(self, name: str, address: str = "IP:127.0.0.1") -> tuple[Path, Path]:
        """The paths of a certificate with this common name, and of its key."""
        self._openssl("req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        extensions = f"subjectAltName={address}\nextendedKeyUsage=serverAuth,clientAuth\n"
        (self.folder / "extensions").write_text(extensions)
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions")
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signer, "-days", "2", "-out", f"{name}.pem")
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)
