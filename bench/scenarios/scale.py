"""A large cluster, as one node of it meets it: 5,000 other nodes, 250 pods of its own, 256 nodes that start at once.

    etcd is filled ─▶ daemon's exec ─▶ 5,000 routes ─▶ memory settles ─▶ 100 nodes join and leave ─▶ 250 pods

The other nodes are what one node sees of them: their records and blocks in a real etcd, written before its daemon
starts (bench/crowd.py), and one by one while it runs. The clock for a start runs from before the daemon's exec until
the kernel tells of the last route, with VTEP, FDB entry and nft elements before it; for a node that joins from before
the record is written to etcd until the kernel tells of its route. The pods come, go, and others come, three times: the
last 25 are a quarter of a second, in which a machine of two cores may do anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgspec

from bench.contender import Added, Contender
from bench.podwire_node import Memory, prepared_node
from bench.process import BenchFailed
from bench.report import Bound, Report, Table, milliseconds
from bench.scenarios.memory import settled
from bench.stage import Namespace, Stage
from bench.statistic import median, percentile
from podwire.lab.etcd import EtcdServer

_FULL = 5000
_EDGE = 25  # pods
_SERIES = 3
_POOL = {"cidr": "10.0.0.0/9"}
_WITHIN = 120.0  # seconds

Seconds = list[float]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds; `memory` by what there was when it was read; `bytes` in etcd of one node."""

    nodes: int
    pods: int
    claimants: int
    bytes: float
    programmed: float
    joined: Seconds
    left: Seconds
    adds: list[Seconds]  # one for each time that the node was filled
    claimed: float
    memory: dict[str, Memory]


def run(stage: Stage, rounds: int) -> Report:
    """`rounds` is how many other nodes there are; with fewer than 5,000 all else is less, too."""
    found = _measure(stage, rounds, *((200, 250, 256) if rounds >= _FULL else (20, 50, 32)))
    return Report(
        tables=(_nodes(found), _memory(found), _cost(found)),
        bounds=_bounds(found),
        samples={
            "joined": found.joined,
            "left": found.left,
            **{f"ADD {number}": each for number, each in enumerate(found.adds, 1)},
            "programmed": [found.programmed],
            "claimed": [found.claimed],
        },
    )


def _measure(stage: Stage, nodes: int, joins: int, pods: int, claimants: int) -> Measured:
    with prepared_node(stage, "alone", lambda *_: None, {"pools": [_POOL]}) as node:
        alone = settled(node)
    filled: dict[str, Any] = {}
    watching: list[subprocess.Popen[str]] = []

    def prepare(namespace: Namespace, etcd: EtcdServer) -> None:
        filled.update(_crowd(namespace, etcd, "fill", nodes))
        watching.append(_start(namespace, etcd, "programmed", nodes))
        _first_line(watching[0])

    with prepared_node(stage, "scale", prepare, {"pools": [_POOL]}) as node:
        programmed = _end(watching[0])["at"] - node.began
        full = settled(node)
        joined = _crowd(node.namespace, node.etcd, "join", nodes, joins)
        added = [node.contender.add(pod) for pod in stage.pods(pods)]
        busy, series = settled(node), [[each.finished.seconds for each in added]]
        for _ in range(1, _SERIES):
            _remove(node.contender, added)
            settled(node)
            added = [node.contender.add(pod) for pod in stage.pods(pods)]
            series.append([each.finished.seconds for each in added])
        claims = _crowd(node.namespace, node.etcd, "claim", claimants)
    if claims["blocks"] != claimants:
        raise BenchFailed(f"{claimants} nodes have claimed {claims['blocks']} different blocks")
    return Measured(
        nodes=nodes,
        pods=pods,
        claimants=claimants,
        bytes=filled["bytes"],
        programmed=programmed,
        joined=joined["joined"],
        left=joined["left"],
        adds=series,
        claimed=claims["seconds"],
        memory={"alone": alone, f"with {nodes} other nodes": full, f"and {joins} joins and {pods} pods later": busy},
    )


# --- the report -------------------------------------------------------------------------------------------------------


def _nodes(found: Measured) -> Table:
    return Table(
        title=f"{found.nodes} other nodes, ms",
        columns=("", "median", "p99", "slowest"),
        rows=(
            ("daemon's exec to the last of their routes", milliseconds(found.programmed), "", ""),
            ("one joins: record in etcd to route in the kernel", *_spread(found.joined)),
            ("one leaves: record deleted to route gone", *_spread(found.left)),
            (
                f"{found.claimants} nodes enter, claim and publish at once",
                milliseconds(found.claimed),
                "",
                "",
            ),
        ),
    )


def _memory(found: Measured) -> Table:
    columns = ("VmRSS", "Pss", "VmHWM")
    return Table(
        title="The daemon's memory, MB (10⁶ bytes), settled",
        columns=("", *columns),
        rows=tuple((name, *(f"{each[column]:.1f}" for column in columns)) for name, each in found.memory.items()),
    )


def _cost(found: Measured) -> Table:
    alone, full, busy = (each["VmRSS"] * 1000 for each in found.memory.values())
    return Table(
        title="What one more costs",
        columns=("", "a node", "a pod"),
        rows=(
            ("bytes in etcd", f"{found.bytes:.0f}", "0"),
            ("entries in the kernels of the other nodes", "4 each", "0"),
            ("the daemon's memory, kB", f"{(full - alone) / found.nodes:.1f}", f"{(busy - full) / found.pods:.1f}"),
            (
                "ms",
                f"{found.programmed / found.nodes * 1000:.2f}",
                milliseconds(median(list(chain.from_iterable(found.adds)))),
            ),
        ),
        notes=(
            "The four entries are a route, a neighbour, an FDB entry and an element of an nft set. The time of a node "
            "is its share of a daemon's start, that of a pod its ADD. A pod's memory has in it what the joins have "
            "left.",
        ),
    )


def _bounds(found: Measured) -> tuple[Bound, ...]:
    edge = min(_EDGE, found.pods // 2)
    first, last = (median([s for each in found.adds for s in each[part]]) for part in (slice(edge), slice(-edge, None)))
    joined = percentile(found.joined, 99) * 1000
    memory = tuple(found.memory.values())[1]
    others = f"{found.nodes} other nodes"
    return (
        Bound(what=f"from the daemon's exec to the routes to {others}", measured=found.programmed, limit=3, unit="s"),
        Bound(what=f"a node joins, beside {others}, p99", measured=joined, limit=100, unit="ms"),
        *(
            Bound(what=f"the daemon's {key} with {others}", measured=memory[key], limit=140, unit="MB")
            for key in ("VmRSS", "Pss")
        ),
        Bound(what=f"the last {edge} ADD of {found.pods} pods, of the first", measured=last / first, limit=1.2),
        Bound(what=f"{found.claimants} nodes claim at once", measured=found.claimed, limit=5, unit="s"),
    )


def _remove(contender: Contender, added: Iterable[Added]) -> None:
    for each in added:
        contender.detach(each)
    for each in added:
        contender.wait_gone(each)


def _spread(seconds: Seconds) -> tuple[str, str, str]:
    return milliseconds(median(seconds)), milliseconds(percentile(seconds, 99)), milliseconds(max(seconds))


# --- the other nodes --------------------------------------------------------------------------------------------------


def _crowd(namespace: Namespace, etcd: EtcdServer, what: str, *numbers: int) -> dict[str, Any]:
    return _end(_start(namespace, etcd, what, *numbers))


def _start(namespace: Namespace, etcd: EtcdServer, what: str, *numbers: int) -> subprocess.Popen[str]:
    entering = ("ip", "netns", "exec", namespace.name, "setpriv", "--pdeathsig", "KILL", "--")
    command = (*entering, sys.executable, "-m", "bench.crowd", etcd.endpoint, what, *map(str, numbers))
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        said, _ = process.communicate(timeout=_WITHIN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        said = ""
    if process.returncode:
        raise BenchFailed(f"the other nodes failed: {said}")
    return dict(json.loads(said.splitlines()[-1]))


def _first_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None, "it was made a pipe"
    process.stdout.readline()
