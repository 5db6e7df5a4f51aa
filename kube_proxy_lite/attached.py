"""The pods of this node as its daemon attaches them: the proxy's side of the handshake (proto/podwire/v1/policy.proto).

    daemon ──attached, gone, blocks──▶ AttachedPods ──▶ PolicySync ──▶ kernel
       ▲                                                    │
       └───────────────── settled ──────────────────────────┘

A pod is settled when its policies are in the kernel, or when the API has not shown it in time: it then starts closed,
with an address that nobody knows, and opens when the API shows it. A daemon that goes is waited for; what it has
attached stays known, since its pods run on.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Protocol

import grpc
import msgspec

from kube_proxy_lite.model import Address, Network
from podwire.backoff import Backoff
from podwire.v1 import policy_pb2, policy_pb2_grpc

log = logging.getLogger(__name__)


class Attached(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that the daemon has attached. `uid` is the runtime's; empty when it gave none."""

    number: int
    namespace: str
    name: str
    uid: str
    addresses: tuple[Address, ...]

    @property
    def key(self) -> tuple[str, str]:
        """(namespace, name)."""
        return self.namespace, self.name


class Follower(Protocol):
    """Who wants to know."""

    def attached(self, pods: Iterable[Attached], everything: bool) -> None:
        """Pods were attached; `everything` that these are all."""

    def gone(self, numbers: Iterable[int]) -> None:
        """Attachments are gone."""

    def blocks(self, blocks: frozenset[Network]) -> None:
        """The node's blocks of addresses."""


class AttachedPods:
    """The connection with the daemon behind `socket`."""

    def __init__(self, socket: Path, follower: Follower, synced: Callable[[], bool]) -> None:
        """`synced` says whether the cluster's policies are known."""
        self._socket = socket
        self._follower = follower
        self._synced = synced
        self._settled: list[int] = []
        self._news = asyncio.Event()
        self._turn = 0  # which connection it is
        self.connected = False

    def settle(self, numbers: Iterable[int]) -> None:
        """These pods may start."""
        self._settled += numbers
        self._news.set()

    def note_synced(self) -> None:
        """What `synced` says may have changed."""
        self._news.set()

    async def follow_forever(self) -> None:
        """Follows the daemon until cancelled."""
        pauses, said = Backoff(0.1, 2.0), ""
        while True:
            try:
                async with grpc.aio.insecure_channel(f"unix:{self._socket}") as channel:
                    stub = policy_pb2_grpc.PolicyStub(channel)  # type: ignore[no-untyped-call]
                    self._turn += 1
                    async for message in stub.WatchPods(self._requests(self._turn)):
                        if not self.connected:
                            self.connected, said = True, ""
                            pauses.reset()
                            log.info("following the daemon's pods", extra={"fields": {"socket": str(self._socket)}})
                        self._take(message)
            except grpc.aio.AioRpcError as error:
                words = error.details() or error.code().name
                if words != said:
                    log.warning("the daemon behind %s does not answer: %s", self._socket, words)
                    said = words
            self.connected = False
            await asyncio.sleep(pauses.next())

    async def _requests(self, turn: int) -> AsyncIterator[policy_pb2.WatchPodsRequest]:
        """What is said on one connection. gRPC goes on asking for it after its end: then nothing must be taken, and no
        news be cleared, which are the next connection's."""
        while turn == self._turn:
            self._news.clear()
            settled, self._settled = self._settled, []
            yield policy_pb2.WatchPodsRequest(synced=self._synced(), settled=settled)
            await self._news.wait()

    def _take(self, message: policy_pb2.WatchPodsResponse) -> None:
        self._follower.blocks(frozenset(ipaddress.ip_network(block) for block in message.blocks))
        if message.gone:
            self._follower.gone(message.gone)
        if message.attached or message.all:
            self._follower.attached([_read(each) for each in message.attached], message.all)


def _read(pod: policy_pb2.AttachedPod) -> Attached:
    return Attached(
        number=pod.number,
        namespace=pod.namespace,
        name=pod.name,
        uid=pod.uid,
        addresses=tuple(ipaddress.ip_address(each) for each in pod.addresses),
    )
