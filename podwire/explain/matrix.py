"""Who reaches whom: every pod by every pod, folded so that it can be read. Pure.

    pods ──same labels, ports, blocks──▶ kinds ──judge, kind × kind × port──▶ same rows and columns ──▶ Group

Pods that policies cannot tell apart are asked about once, so a Deployment of a thousand costs what one of two does.
Kinds whose rows and columns are equal, themselves aside, become one group: what is left is what a reader must look at.
A cell says for each port asked about whether it is open, and which rule or policies say so.

**Cost.** Kinds² × ports evaluations of some µs: fifty kinds and two ports take 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from kube_proxy_lite.model import Address, Protocol
from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import BlockSet, Flow
from kube_proxy_lite.policy.pods import PodFacts
from podwire.explain.cluster import Cluster, PortWish

NO_PORT = (PortWish(number=80, protocol="TCP"),)
"""What is asked about a pod that declares no port, when nobody says which."""


class Side(msgspec.Struct, frozen=True):
    """One port of a cell. `port` is as it was asked, so that a name stays one."""

    port: str
    allowed: bool
    why: str


class Cell(msgspec.Struct, frozen=True):
    """From one group to another, by port. Nothing is asked of a pod and itself: then there are none."""

    sides: tuple[Side, ...] = ()

    @property
    def state(self) -> str:
        """`all`, `none` or `some` of the ports are open; `self` when nothing was asked."""
        if not self.sides:
            return "self"
        opened = sum(each.allowed for each in self.sides)
        return "all" if opened == len(self.sides) else "some" if opened else "none"

    @property
    def open_ports(self) -> tuple[str, ...]:
        """The ports that are open."""
        return tuple(each.port for each in self.sides if each.allowed)


class Group(msgspec.Struct, frozen=True):
    """Pods with the same rows and columns, as namespace/name."""

    pods: tuple[str, ...]

    @property
    def label(self) -> str:
        """In a few words: the first pod, and how many more."""
        return self.pods[0] if len(self.pods) == 1 else f"{self.pods[0]} +{len(self.pods) - 1}"


class Matrix(msgspec.Struct, frozen=True):
    """`cells[i][j]` is from group i to group j; the diagonal is from one pod of a group to another."""

    groups: tuple[Group, ...]
    cells: tuple[tuple[Cell, ...], ...]
    problems: tuple[str, ...] = ()


class _Kind(msgspec.Struct):
    """Pods that policies cannot tell apart."""

    pods: list[PodFacts]


def make_matrix(cluster: Cluster, wishes: Sequence[PortWish] = (), namespaces: Iterable[str] = ()) -> Matrix:
    """The matrix of all pods with an address, or of some namespaces' alone. No `wishes`: each pod's declared ports."""
    wanted = frozenset(namespaces)
    pods = [
        pod for pod in cluster.pods() if cluster.policies.addresses(pod) and (not wanted or pod.namespace in wanted)
    ]
    kinds = _kinds(cluster, pods)
    ports = [_ports(cluster, kind.pods[0], wishes) for kind in kinds]
    cells = [[_cell(cluster, source, target, ports[column]) for column, target in enumerate(kinds)] for source in kinds]
    groups = _fold(kinds, cells)
    return Matrix(
        groups=tuple(
            Group(tuple(sorted(f"{pod.namespace}/{pod.name}" for each in members for pod in kinds[each].pods)))
            for members in groups
        ),
        cells=tuple(tuple(_between(cells, row, column) for column in groups) for row in groups),
        problems=cluster.problems(),
    )


def _kinds(cluster: Cluster, pods: Sequence[PodFacts]) -> list[_Kind]:
    blocks = [fact for fact in cluster.policies.state() if isinstance(fact, BlockSet)]
    found: dict[Any, _Kind] = {}
    for pod in pods:
        addresses = cluster.policies.addresses(pod)
        key = (
            pod.namespace,
            frozenset(pod.labels.items()),
            frozenset(pod.ports.items()),
            tuple(sorted(each.version for each in addresses)),
            tuple(tuple(cluster.policies.has(block, each) for each in addresses) for block in blocks),
            _declared(cluster, pod),
        )
        found.setdefault(key, _Kind([])).pods.append(pod)
    return list(found.values())


def _declared(cluster: Cluster, pod: PodFacts) -> tuple[PortWish, ...]:
    obj = cluster.pod((pod.namespace, pod.name))
    ports = [port for container in (obj.spec.containers or () if obj else ()) for port in container.ports or ()]
    known = {PortWish(number=port.container_port, protocol=port.protocol) for port in ports}
    return tuple(sorted(known, key=lambda each: (each.number, each.protocol)))


def _ports(cluster: Cluster, pod: PodFacts, wishes: Sequence[PortWish]) -> list[tuple[str, Protocol, int]]:
    """What is asked about a pod: (as it is called, protocol, number). A name that it does not give is passed over."""
    found = []
    for wish in wishes or _declared(cluster, pod) or NO_PORT:
        if wish.number:
            found.append((str(wish), Protocol(wish.protocol or "TCP"), wish.number))
            continue
        found += [
            (str(wish), protocol, number)
            for (protocol, name), numbers in pod.ports.items()
            if name == wish.name and wish.protocol in ("", protocol)
            for number in numbers
        ]
    return found


def _cell(cluster: Cluster, source: _Kind, target: _Kind, ports: Iterable[tuple[str, Protocol, int]]) -> Cell:
    client, server = source.pods[0], target.pods[-1]
    if client is server:
        return Cell()
    pairs = _pairs(cluster.policies.addresses(client), cluster.policies.addresses(server))
    if not pairs:
        return Cell(tuple(Side(name, False, "they have no family in common") for name, _, _ in ports))
    sides = []
    for name, protocol, port in ports:
        judged = [
            judge(cluster.policies, Flow(source=own, destination=there, protocol=protocol, port=port))
            for own, there in pairs
        ]
        decisive = next((each for each in judged if not each.allowed), judged[0])
        sides.append(Side(name, decisive.allowed, decisive.decided_by.why))
    return Cell(tuple(sides))


def _pairs(own: Iterable[Address], there: Sequence[Address]) -> list[tuple[Address, Address]]:
    return [(each, other) for each in own for other in there if each.version == other.version]


# --- folding ------------------------------------------------------------------------------------------------------


def _fold(kinds: Sequence[_Kind], cells: Sequence[Sequence[Cell]]) -> list[list[int]]:
    """Kinds that are alike, together; in the order of their first pods."""
    marks = [[_mark(cell) for cell in row] for row in cells]
    single = [len(kind.pods) == 1 for kind in kinds]
    groups: list[list[int]] = []
    for kind in range(len(kinds)):
        for group in groups:
            if _alike(marks, single, group, kind):
                group.append(kind)
                break
        else:
            groups.append([kind])
    return groups


def _alike(marks: Sequence[Sequence[Any]], single: Sequence[bool], group: Sequence[int], kind: int) -> bool:
    """Whether a kind has the rows and columns of a group; among themselves all must be alike, too."""
    first = group[0]
    within = marks[first][kind]
    if marks[kind][first] != within:
        return False
    if any(not single[each] and marks[each][each] != within for each in (first, kind)):
        return False
    if len(group) > 1 and marks[group[0]][group[1]] != within:
        return False
    return all(
        marks[first][other] == marks[kind][other] and marks[other][first] == marks[other][kind]
        for other in range(len(marks))
        if other not in (first, kind)
    )


def _mark(cell: Cell) -> Any:
    """What of a cell a reader sees: the names of the ports that are asked, but where all or none of them are open."""
    state = cell.state
    return (state, cell.open_ports) if state == "some" else state


def _between(cells: Sequence[Sequence[Cell]], row: Sequence[int], column: Sequence[int]) -> Cell:
    if row is column and len(row) > 1:
        return cells[row[0]][row[1]]
    return cells[row[0]][column[0]]


# --- for programs -------------------------------------------------------------------------------------------------


def plain(matrix: Matrix) -> dict[str, Any]:
    """The matrix as JSON has it; the keys are stable."""
    return {
        "groups": [{"pods": list(group.pods)} for group in matrix.groups],
        "cells": [
            [
                {
                    "state": cell.state,
                    "ports": [{"port": one.port, "allowed": one.allowed, "why": one.why} for one in cell.sides],
                }
                for cell in row
            ]
            for row in matrix.cells
        ],
        "problems": list(matrix.problems),
    }
