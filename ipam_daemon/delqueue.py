"""DELs that the executable could not deliver, replayed.

While the daemon is away the executable writes each DEL to a file and tells the runtime that it succeeded (DESIGN.md
§3), so what lies here is owed. It is replayed before the daemon takes its first call, and again every few seconds, for
an executable that lost its patience with a daemon that was only slow. A file goes when its DEL is done; one that cannot
be read is set aside and counted, and what the kernel refuses is owed until it does not. DELs of an earlier boot are
done: their namespaces died with it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

from google.protobuf.message import DecodeError

from ipam_daemon.attachments import Attachments
from ipam_daemon.errors import CniError
from ipam_daemon.faults import point
from ipam_daemon.identity import sync_directory
from ipam_daemon.metrics import Metrics
from ipam_daemon.requests import parse_request
from podwire.v1 import cni_pb2

_INTERVAL = 2.0

log = logging.getLogger(__name__)


class DelQueue:
    """The queue's folder, from the daemon's side."""

    def __init__(self, directory: Path, attachments: Attachments, metrics: Metrics, boot_id: str) -> None:
        self._directory = directory
        self._attachments = attachments
        self._metrics = metrics
        self._boot_id = boot_id

    async def replay(self) -> int:
        """Does every DEL that waits, oldest first. Returns how many are done."""
        done = 0
        for path in self._waiting():
            result = await self._replay_one(path)
            self._metrics.replayed.labels(result).inc()
            if result != "later" and self._put_away(path, result):
                done += 1
        if done:
            sync_directory(self._directory)
        return done

    def _put_away(self, path: Path, result: str) -> bool:
        """False when the file has to stay, on a disk that cannot be written: it is done once more, and harmlessly."""
        try:
            if result == "bad":
                path.rename(path.with_suffix(".bad"))
                return False
            point("queue.replayed")
            path.unlink(missing_ok=True)
            point("queue.removed")
        except OSError as error:
            log.warning("a queued DEL is done, and its file stays: %s", error, extra={"fields": {"file": path.name}})
            return False
        return True

    @property
    def waiting(self) -> tuple[str, ...]:
        """The files of the DELs that are owed, oldest first."""
        return tuple(path.name for path in self._waiting())

    @property
    def unreadable(self) -> tuple[str, ...]:
        """The files that were set aside."""
        return tuple(sorted(path.name for path in self._directory.glob("*.bad")))

    def _waiting(self) -> list[Path]:
        return sorted(self._directory.glob("*.del"))

    async def replay_forever(self) -> None:
        """Replays every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            await self.replay()

    async def _replay_one(self, path: Path) -> str:
        try:
            request = _read(path)
            if request.boot_id != self._boot_id:
                return "earlier-boot"
            call = parse_request(request)
        except FileNotFoundError:
            return "done"
        except OSError as error:
            return _later(path, error)
        except (DecodeError, CniError) as error:
            log.error("a queued DEL cannot be done: %s", error, extra={"fields": {"file": path.name}})
            return "bad"
        try:
            await self._attachments.delete(call)
        except (CniError, OSError, sqlite3.Error) as error:
            return _later(path, error)
        log.info("replayed a queued DEL", extra={"fields": {"file": path.name, "container": request.container_id}})
        return "done"


def _later(path: Path, error: Exception) -> str:
    log.warning("a queued DEL waits: %s", error, extra={"fields": {"file": path.name}})
    return "later"


def _read(path: Path) -> cni_pb2.CallRequest:
    return cni_pb2.CallRequest.FromString(path.read_bytes())
