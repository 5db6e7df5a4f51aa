"""What the daemon says about itself: the Agent service's status and the gauges, from the same facts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import podwire
from ipam_daemon.agent import Agent
from ipam_daemon.attachments import Attachments
from ipam_daemon.delqueue import DelQueue
from ipam_daemon.errors import CniError
from ipam_daemon.fastpath_keeper import FastPathKeeper
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.settings import Settings
from podwire.etcd.session import EtcdSession
from podwire.v1 import agent_pb2

_REPAIRS = 20
_MOST = 2**32 - 1  # of the message's fields
_STATES = ("used", "releasing", "cooling", "reserved", "free")


class Status:
    """A view over the daemon's parts; it holds nothing itself."""

    def __init__(
        self,
        settings: Settings,
        agent: Agent,
        attachments: Attachments,
        session: EtcdSession,
        journal: Journal,
        metrics: Metrics,
        queue: DelQueue,
        dropped: Callable[[], Awaitable[Mapping[str, int]]],
        fastpath: FastPathKeeper,
    ) -> None:
        """`dropped` asks the kernel how many frames were dropped for which reason."""
        self._settings = settings
        self._agent = agent
        self._attachments = attachments
        self._session = session
        self._journal = journal
        self._metrics = metrics
        self._queue = queue
        self._dropped = dropped
        self._fastpath = fastpath

    def message(self) -> agent_pb2.GetStatusResponse:
        """The status as the Agent service gives it."""
        reasons = self._agent.not_ready()
        return agent_pb2.GetStatusResponse(
            node=self._settings.node,
            version=podwire.__version__,
            addresses=map(str, self._agent.addresses),
            blocks=[
                agent_pb2.BlockStatus(
                    cidr=str(use.block.cidr),
                    pool=use.block.pool,
                    **{state: min(getattr(use, state), _MOST) for state in _STATES},
                )
                for use in self._attachments.addresses.uses()
            ],
            etcd=agent_pb2.EtcdStatus(
                connected=self._session.connected,
                endpoints=self._settings.etcd.endpoints,
                error=self._session.last_error or "",
            ),
            peers=self._agent.peer_count,
            ready=not reasons,
            reasons=reasons,
            mtu=self._attachments.mtu,
            waiting_dels=len(self._queue.waiting),
            releasing_wires=len(self._journal.releasing()),
            obstacle=self._agent.keeper.obstacle,
            backend=self._agent.backend,
            notes=self._agent.notes(),
            fast_path=self._fastpath.state,
            peer_nodes=[
                agent_pb2.Peer(name=each.name, addresses=map(str, each.addresses), blocks=map(str, each.blocks))
                for each in self._agent.peers
            ],
            repairs=[
                agent_pb2.Repair(at=each.at, what=each.what, detail=each.detail)
                for each in list(self._metrics.recent)[-_REPAIRS:]
            ],
        )

    async def refresh_metrics(self) -> None:
        """Brings the gauges up to date, for a scrape."""
        metrics = self._metrics
        with suppress(CniError):  # the table may be gone for now
            metrics.spoofed.values = await self._dropped()
        with suppress(OSError):
            metrics.fast_packets.values = self._fastpath.taken()
        metrics.fast_pods.set(self._fastpath.known)
        for use in self._attachments.addresses.uses():
            for state in _STATES:
                metrics.addresses.labels(use.block.pool, str(use.block.cidr), state).set(getattr(use, state))
        metrics.attachments.set(len(self._journal.attachments()))
        metrics.releasing_wires.set(len(self._journal.releasing()))
        metrics.peers.set(self._agent.peer_count)
        metrics.etcd_connected.set(1 if self._session.connected else 0)
        metrics.ready.set(0 if self._agent.not_ready() else 1)
