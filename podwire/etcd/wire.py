"""Our values to and from etcd's protobuf messages: the one module that imports `pyetcd`.

Only its generated stubs are used (docs/adr/0002-etcd-session.md). They carry no types, so everything that leaves this
module is one of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyetcd import etcdrpc as rpc

from podwire.etcd.records import (
    Compare,
    Delete,
    Deleted,
    Get,
    Header,
    Item,
    MemberStatus,
    Operation,
    Put,
    Target,
    TxnResult,
    Written,
)

Message = Any  # a protobuf message

_TARGETS = {Target.VERSION: rpc.Compare.VERSION, Target.MOD_REVISION: rpc.Compare.MOD, Target.VALUE: rpc.Compare.VALUE}
_PUT = 0  # mvccpb.Event.EventType


def methods(channel: Any) -> dict[str, Callable[..., Any]]:
    """The calls that the session makes, by etcd's name for them, on a channel."""
    kv, lease, watch = rpc.KVStub(channel), rpc.LeaseStub(channel), rpc.WatchStub(channel)
    auth, maintenance = rpc.AuthStub(channel), rpc.MaintenanceStub(channel)
    return {
        "Range": kv.Range,
        "Put": kv.Put,
        "DeleteRange": kv.DeleteRange,
        "Txn": kv.Txn,
        "Compact": kv.Compact,
        "LeaseGrant": lease.LeaseGrant,
        "LeaseRevoke": lease.LeaseRevoke,
        "LeaseKeepAlive": lease.LeaseKeepAlive,
        "Watch": watch.Watch,
        "Authenticate": auth.Authenticate,
        "Status": maintenance.Status,
    }


def authenticate_request(user: str, password: str) -> Message:
    return rpc.AuthenticateRequest(name=user, password=password)


def status_request() -> Message:
    return rpc.StatusRequest()


def raw(key: str) -> bytes:
    """A key as etcd has it."""
    return key.encode("utf-8", "surrogateescape")


def after_prefix(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`; etcd's `\\0` (to the end) when there is none."""
    stem = raw(prefix).rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def header(message: Message) -> Header:
    return Header(message.header.cluster_id, message.header.revision)


def member_status(message: Message) -> MemberStatus:
    return MemberStatus(message.header.member_id, message.leader, message.version)


def item(pair: Message) -> Item:
    return Item(
        key=pair.key.decode("utf-8", "surrogateescape"),
        value=pair.value,
        mod_revision=pair.mod_revision,
        create_revision=pair.create_revision,
        lease=pair.lease,
    )


def range_request(
    start: bytes, end: bytes = b"", *, limit: int = 0, revision: int = 0, keys_only: bool = False
) -> Message:
    """`end` empty: one key. `revision` 0: the newest."""
    return rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=revision, keys_only=keys_only)


def put_request(put: Put) -> Message:
    return rpc.PutRequest(key=raw(put.key), value=put.value, lease=put.lease)


def delete_request(key: str, *, prefix: bool = False) -> Message:
    return rpc.DeleteRangeRequest(key=raw(key), range_end=after_prefix(key) if prefix else b"")


def compact_request(revision: int) -> Message:
    return rpc.CompactionRequest(revision=revision, physical=True)


def grant_request(ttl: int) -> Message:
    return rpc.LeaseGrantRequest(TTL=ttl)


def revoke_request(lease: int) -> Message:
    return rpc.LeaseRevokeRequest(ID=lease)


def keep_alive_request(lease: int) -> Message:
    return rpc.LeaseKeepAliveRequest(ID=lease)


def watch_request(prefix: str, start_revision: int) -> Message:
    """`progress_notify`: etcd tells its revision now and then, lest a quiet watch fall behind compaction."""
    create = rpc.WatchCreateRequest(
        key=raw(prefix), range_end=after_prefix(prefix), start_revision=start_revision, progress_notify=True
    )
    return rpc.WatchRequest(create_request=create)


def event(message: Message) -> Written | Deleted:
    if message.type == _PUT:
        return Written(item(message.kv))
    return Deleted(item(message.kv).key)


def txn_request(when: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation]) -> Message:
    return rpc.TxnRequest(
        compare=[_compare(comparison) for comparison in when],
        success=[_operation(operation) for operation in then],
        failure=[_operation(operation) for operation in otherwise],
    )


def txn_result(message: Message, then: Sequence[Operation], otherwise: Sequence[Operation]) -> TxnResult:
    branch = then if message.succeeded else otherwise
    found = tuple(
        item(response.response_range.kvs[0]) if response.response_range.kvs else None
        for operation, response in zip(branch, message.responses, strict=True)
        if isinstance(operation, Get)
    )
    return TxnResult(message.succeeded, message.header.revision, found)


def _compare(comparison: Compare) -> Message:
    operand = {comparison.target.value: comparison.operand}
    return rpc.Compare(result=rpc.Compare.EQUAL, target=_TARGETS[comparison.target], key=raw(comparison.key), **operand)


def _operation(operation: Operation) -> Message:
    if isinstance(operation, Get):
        return rpc.RequestOp(request_range=range_request(raw(operation.key)))
    if isinstance(operation, Put):
        return rpc.RequestOp(request_put=put_request(operation))
    assert isinstance(operation, Delete)
    return rpc.RequestOp(request_delete_range=delete_request(operation.key))
