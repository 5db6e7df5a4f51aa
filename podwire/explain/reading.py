"""Runs what a path asks for, in a lab or on a node, and finds out what is known of nodes. I/O.

    lab    every node and every pod's namespace can be entered: the whole way is read back
    node   this node and its pods alone; what is on others is what the API and the daemon's peers say, and marked so

Nothing is changed and nothing is sent: `ip`, `bridge`, `nft`, `ss` and `sysctl` are asked what there is.
"""

from __future__ import annotations

import ipaddress
import shlex
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import grpc

from ipam_daemon.allocator import Layout
from ipam_daemon.plan import mac_of
from kube_proxy_lite.model import Address
from podwire.errors import PodwireError
from podwire.explain.cluster import Cluster, Place, PlaceKind, read_port
from podwire.explain.hops import Ask, Key, NodeFacts, Reading, Steps, T, Where
from podwire.explain.objects import Objects
from podwire.explain.path import Path as Found
from podwire.explain.path import walk
from podwire.v1 import agent_pb2, agent_pb2_grpc

_SECONDS = 10.0
_ASK_SECONDS = 2.0


class Reader(Protocol):
    """Runs commands where they are asked for."""

    def read(self, ask: Ask) -> Reading:
        """What the command says, or why it cannot be run there. Never raises."""
        ...

    def nodes(self) -> dict[str, NodeFacts]:
        """What is known of each node."""
        ...


def run(steps: Steps[T], reader: Reader) -> T:
    """Runs a plan to its end. A command that is asked for twice is run once."""
    said: dict[Ask, Reading] = {}
    try:
        ask = next(steps)
        while True:
            if ask not in said:
                said[ask] = reader.read(ask)
            ask = steps.send(said[ask])
    except StopIteration as end:
        result: T = end.value
        return result


def explain(objects: Objects, reader: Reader, source: str, target: str, port: str, namespace: str = "default") -> Found:
    """The path between two places of a cluster. Raises PodwireError for places and ports that there are not."""
    start = _source(Cluster(objects), source, namespace)
    nodes = reader.nodes()
    cluster = Cluster(objects, start.node)
    _note_nodes(cluster, nodes)
    return run(walk(cluster, nodes, start, cluster.place(target, namespace), read_port(port)), reader)


def _source(cluster: Cluster, words: str, namespace: str) -> Place:
    found = cluster.place(words, namespace, source=True)
    if found.kind is not PlaceKind.POD:
        raise PodwireError(f"{words} is no pod: a path begins at a pod, whose network can be looked into")
    return found


def _note_nodes(cluster: Cluster, nodes: dict[str, NodeFacts]) -> None:
    """Tunnels' addresses and those on the underlay are their nodes'."""
    for facts in nodes.values():
        for address in (*facts.addresses, *facts.vteps):
            cluster.node_addresses[address] = facts.name


class LabReader:
    """A lab of this machine."""

    def __init__(self, name: str) -> None:
        """Raises PodwireError when there is no such lab."""
        from podwire.lab import state

        self._lab = state.load(name)

    def read(self, ask: Ask) -> Reading:
        """See Reader."""
        from podwire.lab import node

        command = self._command(ask)
        try:
            netns = self._netns(ask.where)
            if netns is not None and not netns.exists():
                return Reading(seen=False, text=f"there is no namespace of {ask.where}", command=command)
            return _run([*node.enter_command(self._lab, ask.where.node, netns), *ask.words], command)
        except PodwireError as error:
            return Reading(seen=False, text=str(error), command=command)

    def _netns(self, where: Where) -> Path | None:
        return self._lab.pod_netns(*where.pod) if where.pod else None

    def _command(self, ask: Ask) -> str:
        words = shlex.join(ask.words)
        if ask.where.pod is None:
            return f"podwire lab node --name {self._lab.name} {ask.where.node} -- {words}"
        namespace, pod = ask.where.pod
        return f"podwire lab exec --name {self._lab.name} -n {namespace} {pod} -- {words}"

    def nodes(self) -> dict[str, NodeFacts]:
        """See Reader. What a daemon that is down does not say, its peers do."""
        said = {each.name: ask_daemon(self._lab.files.ipamd_socket(each.name)) for each in self._lab.nodes}
        statuses = [status for status, _ in said.values() if status is not None]
        found = node_facts(statuses, {name: trouble for name, (_, trouble) in said.items()})
        for each in self._lab.nodes:
            found.setdefault(
                each.name,
                NodeFacts(name=each.name, addresses=_addresses(each.addresses), trouble=said[each.name][1]),
            )
        return found


class NodeReader:
    """The node that this runs on."""

    def __init__(self, daemon: Path, node: str = "") -> None:
        """`node` is this node's name; default: what its daemon says, or else the host's name."""
        self._status, self._trouble = ask_daemon(daemon)
        self._netns = _attached(daemon) if self._status is not None else {}
        self.node = node or (self._status.node if self._status else socket.gethostname().lower())

    def read(self, ask: Ask) -> Reading:
        """See Reader."""
        command = shlex.join(ask.words)
        if ask.where.node != self.node:
            return Reading(seen=False, text=f"it is on {ask.where.node}", command=command)
        if ask.where.pod is None:
            return _run(list(ask.words), command)
        netns = self._netns.get(ask.where.pod)
        if netns is None:
            why = (
                f"the daemon does not answer: {self._trouble}" if self._trouble else f"the daemon knows no {ask.where}"
            )
            return Reading(seen=False, text=why, command=command)
        enter = ["nsenter", f"--net={netns}", "--"]
        return _run([*enter, *ask.words], shlex.join([*enter, *ask.words]))

    def nodes(self) -> dict[str, NodeFacts]:
        """See Reader."""
        if self._status is None:
            return {self.node: NodeFacts(name=self.node, trouble=self._trouble)}
        return node_facts([self._status], {})


def _run(words: list[str], command: str) -> Reading:
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except OSError as error:
        return Reading(seen=False, text=f"{words[0]} cannot be run: {error.strerror}", command=command)
    except subprocess.TimeoutExpired:
        return Reading(seen=False, text=f"it did not end within {_SECONDS:.0f} s", command=command)
    if done.returncode == 127:  # what nsenter says of a command that is not there
        return Reading(seen=False, text=done.stderr.strip(), command=command)
    text = done.stdout if done.returncode == 0 else done.stderr or done.stdout
    return Reading(code=done.returncode, text=text, command=command)


# --- daemons ------------------------------------------------------------------------------------------------------


def ask_daemon(path: Path) -> tuple[agent_pb2.GetStatusResponse | None, str]:
    """What the daemon says of itself, or why it does not, in words."""
    if not path.exists():
        return None, f"there is no {path}"
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        try:
            return stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=_ASK_SECONDS), ""
        except grpc.RpcError as error:
            return (
                None,
                "nobody answers on its socket" if error.code() is grpc.StatusCode.UNAVAILABLE else error.details(),
            )


def _attached(path: Path) -> Mapping[Key, str]:
    """Pod → the path of its network namespace."""
    with grpc.insecure_channel(f"unix:{path}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)  # type: ignore[no-untyped-call]
        try:
            listed = stub.ListAttachments(agent_pb2.ListAttachmentsRequest(), timeout=_ASK_SECONDS)
        except grpc.RpcError:
            return {}
    return {(each.pod_namespace, each.pod_name): each.netns for each in listed.attachments if each.netns}


def node_facts(
    statuses: Iterable[agent_pb2.GetStatusResponse | None], troubles: Mapping[str, str]
) -> dict[str, NodeFacts]:
    """What daemons say of themselves and of their peers, by node; what a node says of itself counts."""
    said: dict[str, tuple[list[str], list[str]]] = {}
    for status in statuses:
        for peer in status.peer_nodes if status else ():
            said.setdefault(peer.name, (list(peer.addresses), list(peer.blocks)))
    for status in statuses:
        if status is not None:
            said[status.node] = list(status.addresses), [block.cidr for block in status.blocks]
    return {name: _facts(name, *lists, troubles.get(name, "")) for name, lists in said.items()}


def _facts(name: str, addresses: Iterable[str], blocks: Iterable[str], trouble: str) -> NodeFacts:
    vteps = [Layout.of(ipaddress.ip_network(block)).vtep for block in blocks]
    return NodeFacts(
        name=name,
        addresses=_addresses(addresses),
        blocks=tuple(blocks),
        vteps=tuple(vteps),
        macs=tuple(dict.fromkeys(map(mac_of, vteps))),
        trouble=trouble,
    )


def _addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    return tuple(ipaddress.ip_address(text) for text in texts)
