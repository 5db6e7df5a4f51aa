"""The daemon's parts, put together: what is made of what, in which order it starts, and in which it ends.

    start   journal ─▶ addresses of the boot before ─▶ no fast path ─▶ restore ─▶ replay queued DELs ─▶ socket ─▶ HTTP
    run     join, converge, supply, reap, replay, reconcile, fast path: a task each; one that dies ends the daemon
    stop    no new calls ─▶ those in flight are finished ─▶ what is held is written down ─▶ the name is given back

The socket opens before the cluster is joined: an ADD gets "try again later" with the reason, which says more than a
refused connection, and DELs are done. The kernel's state stays as it is at the end, and so pods keep talking.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from ipam_daemon import health
from ipam_daemon.agent import Agent
from ipam_daemon.attachments import Attachments
from ipam_daemon.delqueue import DelQueue
from ipam_daemon.etcd_registry import EtcdRegistry
from ipam_daemon.fastpath_keeper import FastPathKeeper
from ipam_daemon.guard import SpoofGuard
from ipam_daemon.held import HeldFile, HeldKeeper
from ipam_daemon.identity import boot_id, node_id
from ipam_daemon.inspection import Inspection
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Attachment, Network
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.podwatch import PodWatch
from ipam_daemon.reconcile import Reconciler
from ipam_daemon.server import AgentService, CniService, end_serving, make_server
from ipam_daemon.settings import Settings
from ipam_daemon.status import Status
from ipam_daemon.wires import Wires
from podwire.errors import PodwireError
from podwire.etcd.session import EtcdSession

log = logging.getLogger(__name__)


class Daemon:
    """One node's daemon. Making it opens the journal and does no other I/O; `close` comes last."""

    def __init__(self, settings: Settings) -> None:
        """The folders of `settings` exist, and no other daemon runs in them."""
        self._settings = settings
        state_dir, boot = Path(settings.state_dir), boot_id()
        self._metrics = metrics = Metrics()
        self._journal = journal = Journal(Path(settings.run_dir) / "journal.db", boot)
        self._thread = thread = NetlinkThread()
        self._guard = guard = SpoofGuard(thread)
        self._fastpath = FastPathKeeper(
            thread,
            lambda: self._agent.plan,
            self._own_wires,
            wanted=settings.fast_path,
            after=settings.fast_path_after,
        )
        self._wires = wires = Wires(thread, guard=guard, dying=self._fastpath.forget, filtered=settings.fast_path)
        self._podwatch = podwatch = PodWatch(settings.network_policy, settings.network_policy_timeout, self._blocks)
        self._attachments = attachments = Attachments(
            journal=journal,
            wires=wires,
            thread=thread,
            metrics=metrics,
            cooldown=settings.cooldown,
            podwatch=podwatch,
        )
        self._session = EtcdSession(settings.etcd, observer=metrics)
        self._registry = EtcdRegistry(self._session)
        self._agent = Agent(
            settings=settings,
            node_id=node_id(state_dir),
            registry=self._registry,
            journal=journal,
            attachments=attachments,
            thread=thread,
            wires=wires,
            metrics=metrics,
        )
        self._held = HeldKeeper(HeldFile(state_dir / "held.json"), journal, attachments, settings.cooldown)
        self._agent.keep_blocks = self._held.keep
        self._queue = DelQueue(settings.queue_dir, attachments, metrics, boot)
        self._reconciler = Reconciler(journal, attachments, metrics)
        self._calls = CniService(attachments, metrics, self._not_ready)

    async def run(self, stopped: asyncio.Event) -> None:
        """Serves until `stopped` is set. Raises what a part raised that cannot go on."""
        self._held.recall()
        await self._fastpath.begin()
        await self._agent.restore()
        await self._queue.replay()
        self._podwatch.adopt(self._journal.attachments())
        status = Status(
            self._settings,
            self._agent,
            self._attachments,
            self._session,
            self._journal,
            self._metrics,
            self._queue,
            lambda: self._thread.run(self._guard.dropped),
            self._fastpath,
        )
        tools = AgentService(status.message, self._journal, self._inspection().run)
        server = make_server(self._settings.socket_path, self._calls, tools, self._podwatch)
        async with contextlib.AsyncExitStack() as stack:
            await server.start()
            stack.push_async_callback(self._leave)
            stack.push_async_callback(end_serving, server, self._calls.drain, self._podwatch)
            if self._settings.http_listen:
                app = health.make_app(self._not_ready, status.refresh_metrics, self._metrics)
                runner = await health.serve(app, self._settings.http_listen)
                stack.push_async_callback(runner.cleanup)
            await self._work(stopped)

    async def close(self) -> None:
        """Closes what is open. Pods do not notice."""
        self._agent.close()
        await self._session.close()
        await self._fastpath.close()
        await self._thread.close()
        self._journal.close()

    async def _work(self, stopped: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(each)
                for each in (
                    self._agent.follow_registry(),
                    self._agent.follow_config(),
                    self._agent.follow_addresses(),
                    self._agent.hold_name(),
                    self._agent.hold_blocks(),
                    self._agent.converge_forever(),
                    self._agent.keeper.run_forever(),
                    self._attachments.reaper.run_forever(),
                    self._queue.replay_forever(),
                    self._held.keep_forever(),
                    self._reconciler.run_forever(self._settings.reconcile_interval),
                    self._fastpath.run_forever(),
                )
            ]
            fields = {"node": self._settings.node, "socket": str(self._settings.socket_path)}
            log.info("started", extra={"fields": fields})
            await stopped.wait()
            for task in work:
                task.cancel()

    def _not_ready(self) -> list[str]:
        """Why an ADD cannot succeed now; empty when it can."""
        return self._agent.not_ready() or list(filter(None, [self._podwatch.hindrance]))

    def _own_wires(self) -> list[Attachment]:
        """Those whose addresses are this node's."""
        addresses = self._attachments.addresses
        return [each for each in self._journal.attachments() if not addresses.is_stranded(each)]

    def _blocks(self) -> list[Network]:
        return [block.cidr for block in self._attachments.addresses.allocator.blocks]

    async def _leave(self) -> None:
        with contextlib.suppress(OSError):
            await self._held.write()
        with contextlib.suppress(PodwireError):
            await self._registry.leave()

    def _inspection(self) -> Inspection:
        return Inspection(
            agent=self._agent,
            attachments=self._attachments,
            journal=self._journal,
            thread=self._thread,
            wires=self._wires,
            session=self._session,
            reconciler=self._reconciler,
            queue=self._queue,
            metrics=self._metrics,
        )
