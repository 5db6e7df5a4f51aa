"""The gRPC services on the node's socket: CNI for the executable, Agent for tools.

A CNI call that was begun is finished whether or not its caller still waits: the executable may be killed, or give up,
and half a wire is worse than one too many (the runtime deletes what it got no answer for). SIGTERM stops new calls and
waits for those.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec

from ipam_daemon import cni
from ipam_daemon.attachments import Attachments
from ipam_daemon.differences import KINDS, Difference
from ipam_daemon.errors import CniError, Impaired, TryAgainLater, Unavailable, code_of
from ipam_daemon.inspection import Outcome
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.model import Attachment, AttachmentState
from ipam_daemon.podwatch import PodWatch
from ipam_daemon.requests import API_MAX, negotiate, parse_request
from podwire.errors import PodwireError
from podwire.v1 import agent_pb2, agent_pb2_grpc, cni_pb2, cni_pb2_grpc, policy_pb2_grpc

_LARGEST_MESSAGE = 32 << 20  # bytes; the executable refuses configurations long before that
_GRACE = 60.0  # seconds for calls in flight at the end

log = logging.getLogger(__name__)


class CniService(cni_pb2_grpc.CNIServicer):
    """CNI calls. CNI errors are answers, never gRPC statuses."""

    def __init__(self, attachments: Attachments, metrics: Metrics, not_ready: Callable[[], list[str]]) -> None:
        """`not_ready` says why an ADD cannot succeed now; empty when it can."""
        self._attachments = attachments
        self._metrics = metrics
        self._not_ready = not_ready
        self._running: set[asyncio.Task[cni_pb2.CallResponse]] = set()

    async def Call(self, request: cni_pb2.CallRequest, context: Any) -> cni_pb2.CallResponse:  # noqa: N802, ARG002
        """Answers one call; see proto/podwire/v1/cni.proto."""
        task = asyncio.create_task(self._answer(request))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def drain(self) -> None:
        """Waits for calls that are under way, those whose caller has gone included."""
        if self._running:
            await asyncio.wait(self._running)

    async def _answer(self, request: cni_pb2.CallRequest) -> cni_pb2.CallResponse:
        api, code = API_MAX, 0
        command = request.command if request.command in cni.COMMANDS else "other"
        with self._metrics.phase(command, "total"):
            try:
                api = negotiate(request)
                stdout = await self._act(request)
            except Exception as error:
                failure = TryAgainLater(f"the journal: {error}") if isinstance(error, sqlite3.Error) else error
                code = code_of(failure)
                if isinstance(failure, CniError):
                    log.warning("%s failed: %s", request.command, failure, extra={"fields": _fields(request, code)})
                else:
                    log.exception("%s failed", request.command, extra={"fields": _fields(request, code)})
                stdout = cni.error(failure, cni.version_of(request.stdin))
        self._metrics.calls.labels(command, str(code)).inc()
        return cni_pb2.CallResponse(api=api, stdout=stdout, exit_code=1 if code else 0)

    async def _act(self, request: cni_pb2.CallRequest) -> bytes:
        call = parse_request(request)
        if call.command == "ADD":
            return await self._attachments.add(call)
        if call.command == "DEL":
            await self._attachments.delete(call)
        elif call.command == "CHECK":
            await self._attachments.check(call)
        elif call.command == "GC":
            await self._attachments.collect_garbage(call)
        elif reasons := self._not_ready():
            raise (Impaired if self._attachments.fenced else Unavailable)("; ".join(reasons))
        return b""


class AgentService(agent_pb2_grpc.AgentServicer):
    """What the daemon says about itself."""

    def __init__(
        self,
        status: Callable[[], agent_pb2.GetStatusResponse],
        journal: Journal,
        inspect: Callable[[bool, str], Awaitable[Outcome]] | None = None,
    ) -> None:
        """`inspect` looks at the node from all sides, and repairs when it is given True."""
        self._status = status
        self._journal = journal
        self._inspect = inspect

    async def GetStatus(  # noqa: N802
        self,
        request: agent_pb2.GetStatusRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> agent_pb2.GetStatusResponse:
        """The daemon's view of its node."""
        return self._status()

    async def ListAttachments(  # noqa: N802
        self,
        request: agent_pb2.ListAttachmentsRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> agent_pb2.ListAttachmentsResponse:
        """Every attachment in the journal, and every wire that waits for its deletion."""
        attachments = [_to_message(each) for each in self._journal.attachments()]
        releasing = [
            agent_pb2.Attachment(
                host_ifname=each.host_ifname,
                addresses=map(str, each.addresses),
                state=agent_pb2.Attachment.STATE_RELEASING,
            )
            for each in self._journal.releasing()
        ]
        return agent_pb2.ListAttachmentsResponse(attachments=attachments + releasing)

    async def Audit(  # noqa: N802
        self, request: agent_pb2.AuditRequest, context: Any
    ) -> agent_pb2.AuditResponse:
        """What etcd, journal, kernel and runtime do not say the same about; a repair goes on when its caller leaves."""
        if self._inspect is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this daemon does not look at itself")
            raise AssertionError
        try:
            outcome = await asyncio.shield(asyncio.ensure_future(self._inspect(request.fix, request.runtime_endpoint)))
        except PodwireError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise
        return agent_pb2.AuditResponse(
            node=self._status().node,
            differences=map(_difference, outcome.differences),
            done=outcome.done,
            remaining=map(_difference, outcome.remaining),
        )


def _difference(each: Difference) -> agent_pb2.Difference:
    kind = KINDS[each.kind]
    return agent_pb2.Difference(
        kind=each.kind, subject=each.subject, says=each.says, why=kind.why, fix=kind.fix, advice=kind.advice
    )


def make_server(
    socket: Path, cni_service: CniService, agent_service: AgentService, podwatch: PodWatch | None = None
) -> Any:
    """A grpc.aio server on the unix socket at `socket`, readable by root alone; the caller starts it."""
    server = grpc.aio.server(
        options=(("grpc.max_receive_message_length", _LARGEST_MESSAGE), ("grpc.max_send_message_length", -1))
    )
    cni_pb2_grpc.add_CNIServicer_to_server(cni_service, server)  # type: ignore[no-untyped-call]
    agent_pb2_grpc.add_AgentServicer_to_server(agent_service, server)  # type: ignore[no-untyped-call]
    if podwatch is not None:
        policy_pb2_grpc.add_PolicyServicer_to_server(podwatch, server)  # type: ignore[no-untyped-call]
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket}")
    finally:
        os.umask(before)
    return server


async def end_serving(server: Any, drained: Callable[[], Awaitable[object]], podwatch: PodWatch) -> None:
    """Takes no new call, and returns when those in flight are done (`drained`). Proxies stay until then, since ADDs may
    wait for them; their own call has no end, and would be waited for."""
    ending = asyncio.ensure_future(server.stop(_GRACE))
    try:
        await drained()
    finally:
        podwatch.close()
        await ending
        await drained()


_STATES = {
    AttachmentState.ADDING: agent_pb2.Attachment.STATE_ADDING,
    AttachmentState.ATTACHED: agent_pb2.Attachment.STATE_ATTACHED,
}


def _to_message(attachment: Attachment) -> agent_pb2.Attachment:
    return agent_pb2.Attachment(
        network=attachment.key.network,
        container_id=attachment.key.container_id,
        ifname=attachment.key.ifname,
        netns=attachment.netns,
        host_ifname=attachment.host_ifname,
        mac=attachment.mac,
        addresses=map(str, attachment.addresses),
        pod_namespace=attachment.pod.namespace,
        pod_name=attachment.pod.name,
        pod_uid=attachment.pod.uid,
        state=_STATES[attachment.state],
        created=attachment.created,
        port_mappings=[
            agent_pb2.PortMapping(
                protocol=each.protocol,
                host_ip=str(each.host_ip or ""),
                host_port=each.host_port,
                container_port=each.container_port,
            )
            for each in attachment.port_mappings
        ],
        bandwidth=agent_pb2.Bandwidth(**msgspec.structs.asdict(attachment.bandwidth)) if attachment.bandwidth else None,
    )


def _fields(request: cni_pb2.CallRequest, code: int) -> dict[str, object]:
    return {"container": request.container_id, "ifname": request.ifname, "netns": request.netns, "code": code}
