"""etcd stopped and started again: what goes on meanwhile, and how soon all is as it should be afterwards.

    killed ──▶ 12 s, longer than the lease ──▶ the node fills ──▶ error 11 ──▶ etcd's exec ──▶ serving ──▶ converged
               ADD and DEL in the node's block    a block is wanted               another node writes its record,
                                                                                  the node's lease is revoked

Everything "after the start" counts from before etcd's exec, so its own start is in it. What has to be there at the end:
the daemon says that it is connected; the node's live key is held, under another lease (the old one is revoked as soon
as etcd serves, as if it had run out meanwhile); the route to a node that published itself just then is in the kernel;
and the ADD for which there was no address has one, out of a block that was claimed after the outage.

etcd is asked and told over its JSON gateway (/v3/kv/…), from within the node's namespace: no client of Podwire's, whose
waiting between attempts is what is measured.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import json
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.podwire_node import PodwireNode, podwire_node
from bench.process import BenchFailed
from bench.report import Bound, Report, Table, milliseconds
from bench.stage import Namespace, Stage
from bench.statistic import median
from ipam_daemon.model import Block, encode
from ipam_daemon.plan import plan_record
from ipam_daemon.registry import ROOT
from podwire.cli.agent import agent
from podwire.errors import PodwireError
from podwire.v1 import agent_pb2

_NODE = "outage"
_BLOCK = 4  # pods of a /29
_AWAY = 12.0  # seconds, longer than the lease
_REFUSALS = 3
_WITHIN = 60.0
_POLL = 0.005
_ETCD = ("127.0.0.1", 2379)
_CONVERGED = {
    "the daemon is connected": "connected",
    "its live key is held again": "live",
    "another node's new record is in the kernel": "route",
    "the ADD that waited for a block has an address": "claim",
}

Samples = dict[str, list[float]]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how often etcd is stopped."""
    samples: Samples = {}
    changes = {"pools": [{"cidr": "10.244.0.0/16", "blockSize": 29}], "blockIdle": 0, "cooldown": 0}
    with podwire_node(stage, _NODE, **changes) as node:
        pods = stage.pods(_BLOCK + 1)
        for number in range(rounds):
            _round(node, pods, number, samples)
    rows = [(f"{command} while etcd is away, in the node's block", command) for command in ("ADD", "DEL")]
    rows += [("error 11 when a block would have to be claimed", "refused"), ("etcd serves", "serving")]
    rows += [(f"  {what}", name) for what, name in _CONVERGED.items()]
    rows.append(("everything has converged", "all"))
    table = Table(
        title=f"etcd away for {_AWAY:g} s, ms, {rounds} times",
        columns=("", "median", "most"),
        rows=tuple(
            (what, milliseconds(median(samples[name])), milliseconds(max(samples[name]))) for what, name in rows
        ),
        notes=("From etcd serves on, times count from etcd's exec.",),
    )
    return Report(
        tables=(table,),
        bounds=(
            Bound(what="error 11 when no block can be claimed", measured=max(samples["refused"]), limit=2.5, unit="s"),
            Bound(what="all converges after an outage of etcd", measured=median(samples["all"]), limit=5, unit="s"),
        ),
        samples=samples,
    )


def _round(node: PodwireNode, pods: list[Namespace], number: int, samples: Samples) -> None:
    contender, (*inside, waiting) = node.contender, pods
    _until(lambda: len(_status(node).blocks) == 1, "one block")
    lease = _live_lease(node)
    node.etcd.kill()
    stopped = time.monotonic()
    added = [contender.add(pod) for pod in inside]
    gone = contender.delete(added.pop())
    _until(lambda: not any(block.releasing for block in _status(node).blocks), "the address")
    added.append(contender.add(inside[-1]))
    samples.setdefault("ADD", []).extend(each.finished.seconds for each in added)
    samples.setdefault("DEL", []).append(gone.finished.seconds)
    for _ in range(_REFUSALS):
        finished, code = contender.refused(waiting)
        if code != 11:
            raise BenchFailed(f"with etcd away and all addresses taken an ADD ended with {code}, not with 11")
        samples.setdefault("refused", []).append(finished.seconds)
    time.sleep(max(0.0, stopped + _AWAY - time.monotonic()))
    found, late = _come_back(node, waiting, lease, number)
    for name, seconds in found.items():
        samples.setdefault(name, []).append(seconds)
    samples.setdefault("all", []).append(max(found.values()))
    for each in (*added, late):
        contender.delete(each)


def _come_back(node: PodwireNode, waiting: Namespace, lease: int, number: int) -> tuple[Mapping[str, float], Any]:
    """Starts etcd, and returns after how many seconds what was so, and the pod that had waited."""
    attached: list[Any] = []
    began = time.monotonic()

    def insist() -> None:
        while not attached and time.monotonic() < began + _WITHIN:
            with contextlib.suppress(BenchFailed):  # error 11, until there is a block
                attached.append(node.contender.attach(waiting))
                found["claim"] = time.monotonic() - began

    found: dict[str, float] = {}
    node.etcd.start(wait=False)
    claiming = threading.Thread(target=insist)
    claiming.start()
    block = ipaddress.ip_network(f"10.244.{number}.248/29")
    conditions: dict[str, Callable[[], bool]] = {
        "connected": lambda: _status(node).etcd.connected,
        "live": lambda: _live_lease(node) not in (0, lease),
        "route": lambda: _has_route(node.contender.node, block),
    }
    try:
        _until(lambda: _revoke(node, lease), "etcd to serve")
        found["serving"] = time.monotonic() - began
        _put(node, "peer", block)
        while conditions and time.monotonic() < began + _WITHIN:
            for name in [name for name, holds in conditions.items() if holds()]:
                del conditions[name]
                found[name] = time.monotonic() - began
            time.sleep(_POLL)
    finally:
        claiming.join()
    if conditions or not attached:
        raise BenchFailed(f"{_WITHIN:g} s after the start of etcd still not so: {', '.join(conditions) or 'claim'}")
    return found, node.contender.prove(attached[0])


def _until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _WITHIN
    while not holds():
        if time.monotonic() > deadline:
            raise BenchFailed(f"waited {_WITHIN:g} s for {what}")
        time.sleep(_POLL)


# --- the daemon, the kernel, etcd -------------------------------------------------------------------------------------


def _status(node: PodwireNode) -> agent_pb2.GetStatusResponse:
    try:
        with agent(node.socket) as stub:
            answer: agent_pb2.GetStatusResponse = stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=5)
            return answer
    except PodwireError as error:
        raise BenchFailed(str(error)) from error


def _has_route(namespace: Namespace, block: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    """Whether the namespace's main table has a route to the IPv4 block (/proc/net/route has it in host order)."""
    wanted = f"{struct.unpack('=I', block.network_address.packed)[0]:08X}"
    with namespace.entered(), open("/proc/thread-self/net/route", encoding="ascii") as table:
        return any(line.split()[1] == wanted for line in table)


def _live_lease(node: PodwireNode) -> int:
    """The lease of the node's live key; 0 when there is no key, or no etcd."""
    answer = _etcd(node, "kv/range", {"key": _text(f"{ROOT}live/{_NODE}")})
    return int(answer["kvs"][0].get("lease", 0)) if answer and answer.get("kvs") else 0


def _revoke(node: PodwireNode, lease: int) -> bool:
    """Ends the lease. Whether etcd answered."""
    return _etcd(node, "lease/revoke", {"ID": str(lease)}) is not None


def _put(node: PodwireNode, name: str, block: ipaddress.IPv4Network | ipaddress.IPv6Network) -> None:
    """Another node's record, as its daemon would write it."""
    claimed = Block(cidr=block, pool="default", node=name, node_id=f"id-{name}", generation=1)
    record = plan_record(name, claimed.node_id, 1, (ipaddress.ip_address("192.0.2.2"),), (claimed,), "")
    request = {"key": _text(f"{ROOT}nodes/{name}"), "value": base64.b64encode(encode(record)).decode()}
    if _etcd(node, "kv/put", request) is None:
        raise BenchFailed("etcd does not answer any more")


def _text(key: str) -> str:
    return base64.b64encode(key.encode()).decode()


def _etcd(node: PodwireNode, call: str, request: Mapping[str, object]) -> dict[str, Any] | None:
    """One call of etcd's JSON gateway; None when it does not answer, or cannot yet."""
    connection = http.client.HTTPConnection(*_ETCD, timeout=5)
    with node.contender.node.entered(), contextlib.closing(connection):
        try:
            connection.request("POST", f"/v3/{call}", json.dumps(request))
            answer = connection.getresponse()
            body = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
    return dict(body) if answer.status == 200 else None
