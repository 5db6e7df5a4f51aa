"""Two nodes with pods, by Podwire and by hand: what throughput and latency are measured on.

    node 1: client, server        client ─ bridge ─ server                              same node
    node 2: server                client ─ bridge ─ VXLAN or route ═ wire ═ … server    across

By hand is what `ip` makes of the same devices and nothing else: a bridge with the pods' gateway, veths, a VXLAN device
with the other node's entries or a plain route. No firewall, no masquerade, nothing that filters or tracks connections;
or, with `masquerade`, the least that a node of a cluster has: one rule that hides pods which leave it, and what bridged
packets meet (`bridge-nf-call-iptables`, as Kubernetes asks for).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench.contender import IFNAME
from bench.podwire_node import PodwireNode, daemon_on, etcd_on
from bench.process import BenchFailed, run
from bench.stage import Namespace, Stage

SAME, ACROSS = "same node", "across nodes"
_UNDERLAY_MTU, _VXLAN_OVERHEAD = 1500, 50
_REACHED_WITHIN, _KNOWN_WITHIN = 20.0, 60.0  # seconds
_MASQUERADE = (
    "add table ip hand",
    "add chain ip hand leaving { type nat hook postrouting priority srcnat; }",
    "add rule ip hand leaving ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade",
)
_MACS = {1: "0a:00:00:00:00:01", 2: "0a:00:00:00:00:02"}


class Pods(msgspec.Struct, frozen=True, kw_only=True):
    """Whose they are, where the client is, and which servers it has, by path: namespace and address."""

    owner: str
    client: Namespace
    servers: dict[str, tuple[Namespace, str]]


@contextlib.contextmanager
def podwire_pods(stage: Stage, owner: str, name: str, backend: str, *, fast: bool = True) -> Iterator[Pods]:
    """Two nodes with the real daemon; when it has a fast path, it knows the pods."""
    nodes = stage.segment(name)
    with contextlib.ExitStack() as stack:
        etcd = stack.enter_context(etcd_on(stage, nodes[0], f"{name}-1", "192.0.2.1"))
        one, two = (
            stack.enter_context(
                daemon_on(
                    stage,
                    node,
                    f"{name}-{number}",
                    etcd,
                    {"nodeAddresses": [f"192.0.2.{number}"], "backend": {"type": backend}, "fastPath": fast},
                )
            )
            for number, node in enumerate(nodes, 1)
        )
        client, near, far = stage.pods(3)
        one.contender.add(client)
        beside, across = one.contender.add(near), two.contender.add(far)
        pods = Pods(
            owner=owner,
            client=client,
            servers={
                place: (pod, added.result["ips"][0]["address"].split("/")[0])
                for place, pod, added in ((SAME, near, beside), (ACROSS, far, across))
            },
        )
        _wait_reached(pods)
        for node, known in ((one, 2), (two, 1)) if fast else ():
            _wait_known(node, known)
        yield pods


def hand_pods(stage: Stage, owner: str, name: str, *, vxlan: bool, masquerade: bool = False) -> Pods:
    """Two nodes that `ip` has set up. They go with the stage."""
    nodes, mtu = stage.segment(name), _UNDERLAY_MTU - (_VXLAN_OVERHEAD if vxlan else 0)
    client, near, far = stage.pods(3)
    for number, node in enumerate(nodes, 1):
        _make_node(stage, node, number, mtu, vxlan=vxlan)
        _set_filters(node, masquerade=masquerade)
    for node, number, host, pod in ((nodes[0], 1, 3, client), (nodes[0], 1, 4, near), (nodes[1], 2, 3, far)):
        _attach(stage, node, number, host, pod, mtu)
    pods = Pods(owner=owner, client=client, servers={SAME: (near, "10.244.1.4"), ACROSS: (far, "10.244.2.3")})
    _wait_reached(pods)
    return pods


def _make_node(stage: Stage, node: Namespace, number: int, mtu: int, *, vxlan: bool) -> None:
    other = 3 - number
    commands = [
        "link add br0 type bridge",
        f"address add 10.244.{number}.1/24 dev br0",
        f"link set br0 mtu {mtu} up",
    ]
    if vxlan:
        commands += [
            f"link add vx0 address {_MACS[number]} mtu {mtu} type vxlan "
            f"id 1 dstport 4789 local 192.0.2.{number} nolearning",
            f"address add 10.244.{number}.2/32 dev vx0",
            "link set vx0 up",
            f"neigh add 10.244.{other}.2 lladdr {_MACS[other]} dev vx0 nud permanent",
            f"route add 10.244.{other}.0/24 via 10.244.{other}.2 dev vx0 onlink",
        ]
    else:
        commands.append(f"route add 10.244.{other}.0/24 via 192.0.2.{other}")
    stage.ip(node, commands)
    if vxlan:
        entry = f"fdb append {_MACS[other]} dev vx0 dst 192.0.2.{other} self permanent"
        _check(node, ["/usr/sbin/bridge", *entry.split()])


def _set_filters(node: Namespace, *, masquerade: bool) -> None:
    values = {"ipv4/ip_forward": "1"}
    values |= dict.fromkeys(("bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"), str(int(masquerade)))
    with node.entered():
        for path, value in values.items():
            with contextlib.suppress(FileNotFoundError):
                Path(f"/proc/sys/net/{path}").write_text(value)
    if masquerade:
        for words in _MASQUERADE:
            _check(node, ["/usr/sbin/nft", *words.split()])


def _attach(stage: Stage, node: Namespace, number: int, host: int, pod: Namespace, mtu: int) -> None:
    stage.ip(
        node,
        [
            f"link add veth{host} mtu {mtu} type veth peer name {IFNAME} mtu {mtu} netns {pod.name}",
            f"link set veth{host} master br0 up",
        ],
    )
    stage.ip(
        pod,
        [
            "link set lo up",
            f"address add 10.244.{number}.{host}/24 dev {IFNAME}",
            f"link set {IFNAME} up",
            f"route add default via 10.244.{number}.1",
        ],
    )


def _check(node: Namespace, command: list[str]) -> None:
    with node.entered():
        done = run(command, {})
    if done.exit_code:
        raise BenchFailed(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")


def _wait_known(node: PodwireNode, pods: int) -> None:
    deadline, wanted = time.monotonic() + _KNOWN_WITHIN, f"\npodwire_fast_path_pods {pods:.1f}\n"
    while wanted not in node.get("/metrics")[1]:
        if time.monotonic() > deadline:
            raise BenchFailed(f"the fast path does not know {pods} pods after {_KNOWN_WITHIN:g} s")
        time.sleep(0.2)


def _wait_reached(pods: Pods) -> None:
    for place, (_, address) in pods.servers.items():
        deadline = time.monotonic() + _REACHED_WITHIN
        with pods.client.entered():
            while run(["/usr/bin/ping", "-n", "-c", "1", "-W", "1", address], {}).exit_code:
                if time.monotonic() > deadline:
                    raise BenchFailed(f"{pods.owner}: {address} ({place}) is not reached")
