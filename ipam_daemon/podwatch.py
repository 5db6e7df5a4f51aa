"""No pod starts before its policies are in the kernel: the daemon's side of the handshake with the node's proxy.

    ADD ─▶ announce ──(number, pod, addresses)──▶ proxy ─▶ policies ─▶ kernel
     ▲                                              │
     └───────────── settled ◀──────(number)─────────┘        DEL ─▶ withdraw ──(gone)──▶ proxy

An ADD announces its pod before it makes the wire, so that the proxy works while the wire is made, and waits for the
number to come back before it answers. Until then the kernel drops what the pod sends and what is sent to it, if there
is any policy (an address of the node's blocks that nobody knows). It does not wait when the runtime has not named the
pod (there is no policy about it), or when policies are off (setting `networkPolicy`). Without a proxy that is connected
and knows the cluster, or without its answer, the ADD ends after `timeout` seconds with "try again later".

A proxy that comes, or comes back, is told everything. Several may be connected for a moment, while one takes over from
another; the first that answers counts, since both see the same cluster and write the same rules. One that does not
listen is let go when a thousand messages wait for it. Numbers begin at the time since boot, so that no process of the
daemon uses one of an earlier process: a proxy outlives it, and may answer late.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from ipam_daemon.errors import DeletedMeanwhile, TryAgainLater
from ipam_daemon.identity import boottime_ns
from ipam_daemon.model import Attachment, AttachmentKey, Network
from podwire.v1 import policy_pb2, policy_pb2_grpc

_MOST_NEWS = 1000


class _Watcher:
    """A proxy that is connected. None among its news ends its call."""

    def __init__(self) -> None:
        self.synced = False
        self.news: asyncio.Queue[policy_pb2.WatchPodsResponse | None] = asyncio.Queue()


class PodWatch(policy_pb2_grpc.PolicyServicer):
    """Tells proxies of pods, and ADDs when they are settled."""

    def __init__(self, enabled: bool, timeout: float = 10.0, blocks: Callable[[], Iterable[Network]] = tuple) -> None:
        """`timeout` is how many seconds an ADD waits; `blocks` are the node's."""
        self.enabled = enabled
        self._timeout = timeout
        self._blocks = blocks
        self._number = boottime_ns()
        self._pods: dict[AttachmentKey, policy_pb2.AttachedPod] = {}
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._watchers: set[_Watcher] = set()

    @property
    def hindrance(self) -> str:
        """Why no pod can be settled now; empty when one can, or need not be."""
        if not self.enabled or any(watcher.synced for watcher in self._watchers):
            return ""
        if not self._watchers:
            return "networkPolicy is on, and no podwire-proxy is connected"
        return "podwire-proxy does not know the cluster's policies yet"

    # --- what the daemon says

    def adopt(self, attachments: Iterable[Attachment]) -> None:
        """Pods that an earlier daemon has attached."""
        for attachment in attachments:
            if attachment.pod.name:
                self._add(attachment)

    def announce(self, attachment: Attachment) -> None:
        """An ADD is under way."""
        if self.enabled and attachment.pod.name:
            pod = self._add(attachment)
            self._waiting[pod.number] = asyncio.get_running_loop().create_future()
            self._tell(policy_pb2.WatchPodsResponse(attached=[pod]))

    async def settled(self, attachment: Attachment) -> None:
        """Returns when the policies of an announced pod are in the kernel. Raises TryAgainLater when they are not in
        time. The caller withdraws the pod then."""
        pod = self._pods.get(attachment.key)
        waiting = self._waiting.get(pod.number) if pod else None
        if pod is None or waiting is None:
            return
        try:
            async with asyncio.timeout(self._timeout):
                await waiting
        except TimeoutError as error:
            reason = self.hindrance or "podwire-proxy has not said that the pod's policies are in the kernel"
            raise TryAgainLater(f"{attachment.key}: {reason}, after {self._timeout:g} s") from error
        finally:
            self._waiting.pop(pod.number, None)

    def interrupt(self, key: AttachmentKey) -> None:
        """An ADD that waits for its pod goes on at once: its DEL has come, and it finds that out."""
        pod = self._pods.get(key)
        waiting = self._waiting.get(pod.number) if pod else None
        if waiting is not None and not waiting.done():
            waiting.set_exception(DeletedMeanwhile(f"{key} was deleted while its policies were awaited"))
            waiting.exception()  # asked for, should the ADD fail before it waits

    def withdraw(self, key: AttachmentKey) -> None:
        """The attachment is gone, or will not be; one that was never announced is fine."""
        pod = self._pods.pop(key, None)
        if pod is not None:
            self._waiting.pop(pod.number, None)
            self._tell(policy_pb2.WatchPodsResponse(gone=[pod.number]))

    def blocks_changed(self) -> None:
        """The node has got a block, or returned one."""
        self._tell(policy_pb2.WatchPodsResponse())

    def close(self) -> None:
        """The daemon ends: proxies are let go."""
        for watcher in tuple(self._watchers):
            self._let_go(watcher)

    def _let_go(self, watcher: _Watcher) -> None:
        while not watcher.news.empty():
            watcher.news.get_nowait()
        watcher.news.put_nowait(None)
        self._watchers.discard(watcher)

    def _add(self, attachment: Attachment) -> policy_pb2.AttachedPod:
        self._number += 1
        pod = policy_pb2.AttachedPod(
            number=self._number,
            namespace=attachment.pod.namespace,
            name=attachment.pod.name,
            uid=attachment.pod.uid,
            addresses=[str(each.ip) for each in attachment.addresses],
        )
        self._pods[attachment.key] = pod
        return pod

    def _tell(self, news: policy_pb2.WatchPodsResponse) -> None:
        for watcher in tuple(self._watchers):
            watcher.news.put_nowait(self._with_blocks(news))
            if watcher.news.qsize() > _MOST_NEWS:
                self._let_go(watcher)

    def _with_blocks(self, news: policy_pb2.WatchPodsResponse) -> policy_pb2.WatchPodsResponse:
        del news.blocks[:]
        news.blocks.extend(map(str, self._blocks()))
        return news

    # --- what proxies say

    async def WatchPods(  # noqa: N802
        self,
        request_iterator: AsyncIterator[policy_pb2.WatchPodsRequest],
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[policy_pb2.WatchPodsResponse]:
        """Serves one proxy until it goes; see proto/podwire/v1/policy.proto."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        listening = asyncio.create_task(self._listen(watcher, request_iterator))
        try:
            yield self._with_blocks(policy_pb2.WatchPodsResponse(all=True, attached=self._pods.values()))
            listening.add_done_callback(lambda _: watcher.news.put_nowait(None))
            while (news := await watcher.news.get()) is not None:
                yield news
        finally:
            self._watchers.discard(watcher)
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    async def _listen(self, watcher: _Watcher, requests: AsyncIterator[policy_pb2.WatchPodsRequest]) -> None:
        async for request in requests:
            watcher.synced = request.synced
            for number in request.settled:
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)
