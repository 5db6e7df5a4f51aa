"""Clusters and policies, as data: every test of policies that is a table takes it from here.

Three namespaces x, y, z with the pods a, b, c each, which serve 80 and 81 over TCP, UDP and SCTP under names such as
`serve-80-tcp`. A case is a story in steps; after each step every pair of pods is asked on every port, and what the
oracle (tests/policy_oracle.py) says must be so. `says` are answers that a person has worked out: they hold the oracle,
too.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

Manifest = dict[str, Any]
NAMESPACES, PODS, PORTS, PROTOCOLS = ("x", "y", "z"), ("a", "b", "c"), (80, 81), ("TCP", "UDP", "SCTP")
Answer = tuple[str, str, int, str, bool]  # from "x/a", to "y/b", port, protocol, passes


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """Objects that are put (created or changed) and (kind, namespace, name) that are removed; then what must hold."""

    put: tuple[Manifest, ...] = ()
    remove: tuple[tuple[str, str, str], ...] = ()
    says: tuple[Answer, ...] = ()


def address(namespace: str, pod: str, version: int = 4) -> str:
    """x/a is 10.244.0.10, y/b 10.244.1.11; in IPv6 fd00:10:244::a …"""
    number = 256 * NAMESPACES.index(namespace) + 10 + PODS.index(pod)
    base = "10.244.0.0" if version == 4 else "fd00:10:244::"
    return str(ipaddress.ip_address(base) + number)


def namespace(name: str, **labels: str) -> Manifest:
    """A Namespace, with the label that the API server gives it and, unless others are given, `ns`."""
    all_labels = {"kubernetes.io/metadata.name": name, **(labels or {"ns": name})}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": all_labels}}


def pod(where: str, **labels: str) -> Manifest:
    """The Pod "x/a", with the label `pod` unless others are given."""
    home, name = where.split("/")
    ports = [
        {"name": f"serve-{port}-{protocol.lower()}", "containerPort": port, "protocol": protocol}
        for port in PORTS
        for protocol in PROTOCOLS
    ]
    addresses = [{"ip": address(home, name, version)} for version in (4, 6)]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": home,
            "uid": f"uid-{home}-{name}",
            "labels": labels or {"pod": name},
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"nodeName": f"node{NAMESPACES.index(home) % 2 + 1}", "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": "Running", "podIPs": addresses, "podIP": addresses[0]["ip"]},
    }


def policy(where: str, /, **spec: Any) -> Manifest:
    """The NetworkPolicy "x/name"; `spec` has its keys as keywords, `select` for `podSelector.matchLabels`."""
    home, name = where.split("/")
    select = spec.pop("select", None)
    spec.setdefault("podSelector", {"matchLabels": select} if select else {})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": home},
        "spec": spec,
    }


def pods(**labels: str) -> Manifest:
    """A peer by the labels of pods; without any, every pod."""
    return {"podSelector": {"matchLabels": labels} if labels else {}}


def spaces(**labels: str) -> Manifest:
    """A peer by the labels of namespaces; without any, every namespace."""
    return {"namespaceSelector": {"matchLabels": labels} if labels else {}}


def block(cidr: str, *but: str) -> Manifest:
    """A peer by addresses."""
    return {"ipBlock": {"cidr": cidr, **({"except": list(but)} if but else {})}}


def tcp(port: int | str, end: int | None = None) -> Manifest:
    """A port of TCP."""
    return {"protocol": "TCP", "port": port, **({"endPort": end} if end else {})}


def at(place: str, version: int = 4) -> str:
    """The address of the pod "x/a"."""
    home, name = place.split("/")
    return address(home, name, version)


def one(*put: Manifest, says: tuple[Answer, ...] = ()) -> tuple[Step, ...]:
    """A story of one step."""
    return (Step(put=put, says=says),)


BASE: tuple[Manifest, ...] = (
    *(namespace(name) for name in NAMESPACES),
    *(pod(f"{home}/{name}") for home in NAMESPACES for name in PODS),
)
_CIDR_XA = "10.244.0.10/32"


def yes(source: str, destination: str, port: int = 80, protocol: str = "TCP") -> Answer:
    return source, destination, port, protocol, True


def no(source: str, destination: str, port: int = 80, protocol: str = "TCP") -> Answer:
    return source, destination, port, protocol, False


def _with_address_of(former: str, where: str, **labels: str) -> Manifest:
    """A pod that was created later, and has the addresses of another."""
    name = where.partition("/")[2]
    made = pod(former, **labels)
    return made | {"metadata": made["metadata"] | {"name": name, "uid": f"uid-{name}", "creationTimestamp": "2026-02"}}


def _made_again(where: str, **labels: str) -> Manifest:
    made = pod(where, **labels)
    return made | {"metadata": made["metadata"] | {"uid": "another", "creationTimestamp": "2026-02"}}


def _expr(key: str, operator: str, *values: str) -> Manifest:
    return {"matchExpressions": [{"key": key, "operator": operator, **({"values": list(values)} if values else {})}]}


CASES: dict[str, tuple[Step, ...]] = {
    # --- default and deny
    "no policy": one(says=(yes("x/a", "y/b"), yes("x/a", "x/b", 81, "UDP"))),
    "deny all ingress": one(policy("x/deny"), says=(no("y/a", "x/a"), yes("x/a", "y/a"))),
    "deny all, both ways": one(
        policy("x/deny", policyTypes=["Ingress", "Egress"]),
        says=(no("x/a", "y/a"), no("y/a", "x/a"), yes("x/a", "x/a")),
    ),
    "deny all egress": one(policy("x/deny", policyTypes=["Egress"]), says=(no("x/a", "y/a"), yes("y/a", "x/a"))),
    "types empty, egress rules": one(policy("x/p", egress=[{}]), says=(no("y/a", "x/a"), yes("x/a", "y/a"))),
    "ingress rules without the type are idle": one(
        policy("x/p", policyTypes=["Egress"], ingress=[]), says=(yes("y/a", "x/a"), no("x/a", "y/a"))
    ),
    "deny ingress from other namespaces": one(
        policy("x/p", ingress=[{"from": [pods()]}]), says=(yes("x/b", "x/a"), no("y/b", "x/a"))
    ),
    "deny egress of some pods": one(
        policy("x/p", select={"pod": "a"}, policyTypes=["Egress"]), says=(no("x/a", "x/b"), yes("x/b", "x/a"))
    ),
    "the client's deny goes before the server's allow": one(
        policy("x/out", select={"pod": "a"}, policyTypes=["Egress"]),
        policy("y/in", ingress=[{}]),
        says=(no("x/a", "y/a"), yes("x/b", "y/a")),
    ),
    "allow all ingress": one(policy("x/deny"), policy("x/allow", ingress=[{}]), says=(yes("y/a", "x/a"),)),
    "allow all egress": one(
        policy("x/deny", policyTypes=["Egress"]),
        policy("x/allow", policyTypes=["Egress"], egress=[{}]),
        says=(yes("x/a", "y/a"),),
    ),
    # --- peers
    "from a pod of the own namespace": one(
        policy("x/p", select={"pod": "a"}, ingress=[{"from": [pods(pod="b")]}]),
        says=(yes("x/b", "x/a"), no("x/c", "x/a"), no("y/b", "x/a"), yes("y/b", "x/b")),
    ),
    "from any namespace": one(
        policy("x/p", ingress=[{"from": [spaces()]}]), says=(yes("y/b", "x/a"), yes("z/c", "x/a"))
    ),
    "from one namespace": one(
        policy("x/p", ingress=[{"from": [spaces(ns="y")]}]),
        says=(yes("y/b", "x/a"), no("z/b", "x/a"), no("x/b", "x/a")),
    ),
    "by the name of the namespace": one(
        policy("x/p", ingress=[{"from": [spaces(**{"kubernetes.io/metadata.name": "z"})]}]),
        says=(yes("z/b", "x/a"), no("y/b", "x/a")),
    ),
    "pod and namespace": one(
        policy("x/p", ingress=[{"from": [spaces(ns="y") | pods(pod="b")]}]),
        says=(yes("y/b", "x/a"), no("y/a", "x/a"), no("x/b", "x/a")),
    ),
    "pod or namespace": one(
        policy("x/p", ingress=[{"from": [spaces(ns="y"), pods(pod="b")]}]),
        says=(yes("y/a", "x/a"), yes("x/b", "x/a"), no("x/c", "x/a"), no("z/b", "x/a")),
    ),
    "several of both": one(
        policy("x/p", ingress=[{"from": [spaces(ns="y") | pods(pod="b"), spaces(ns="z") | pods(pod="c")]}]),
        says=(yes("y/b", "x/a"), yes("z/c", "x/a"), no("y/c", "x/a"), no("z/b", "x/a")),
    ),
    "namespaces by expression": one(
        policy("x/p", ingress=[{"from": [{"namespaceSelector": _expr("ns", "NotIn", "x", "z")}]}]),
        says=(yes("y/a", "x/a"), no("z/a", "x/a")),
    ),
    "pods by expression": one(
        policy(
            "x/p",
            podSelector=_expr("pod", "In", "a", "b"),
            ingress=[{"from": [{"podSelector": _expr("pod", "Exists")}]}],
        ),
        says=(yes("x/c", "x/a"), no("y/c", "x/a"), yes("y/c", "x/c")),
    ),
    "an absent label is not in a list": one(
        pod("x/b", other="thing"),
        policy("x/p", select={"pod": "a"}, ingress=[{"from": [{"podSelector": _expr("pod", "NotIn", "c")}]}]),
        says=(yes("x/b", "x/a"), no("x/c", "x/a")),
    ),
    "an absent label does not exist": one(
        pod("x/b", other="thing"),
        policy("x/p", select={"pod": "a"}, ingress=[{"from": [{"podSelector": _expr("pod", "DoesNotExist")}]}]),
        says=(yes("x/b", "x/a"), no("x/c", "x/a")),
    ),
    "egress to a pod elsewhere": one(
        policy("x/p", policyTypes=["Egress"], egress=[{"to": [spaces(ns="y") | pods(pod="a")]}]),
        says=(yes("x/a", "y/a"), no("x/a", "y/b"), no("x/a", "x/b")),
    ),
    "a rule without peers": one(
        policy("x/p", ingress=[{"ports": [tcp(80)], "from": []}]), says=(yes("z/a", "x/a"), no("z/a", "x/a", 81))
    ),
    # --- ports
    "one port": one(
        policy("x/p", ingress=[{"ports": [tcp(81)]}]),
        says=(yes("y/a", "x/a", 81), no("y/a", "x/a", 80), no("y/a", "x/a", 81, "UDP")),
    ),
    "ports of several policies add up": one(
        policy("x/p", ingress=[{"ports": [tcp(80)]}]),
        policy("x/q", ingress=[{"ports": [tcp(81)], "from": [spaces(ns="y")]}]),
        says=(yes("y/a", "x/a", 81), yes("z/a", "x/a", 80), no("z/a", "x/a", 81)),
    ),
    "ports and peers belong together": one(
        policy(
            "x/p",
            ingress=[{"ports": [tcp(80)], "from": [spaces(ns="y")]}, {"ports": [tcp(81)], "from": [spaces(ns="z")]}],
        ),
        says=(yes("y/a", "x/a", 80), no("y/a", "x/a", 81), yes("z/a", "x/a", 81), no("z/a", "x/a", 80)),
    ),
    "a named port": one(
        policy("x/p", ingress=[{"ports": [tcp("serve-81-tcp")]}]), says=(yes("y/a", "x/a", 81), no("y/a", "x/a", 80))
    ),
    "a named port of another protocol": one(
        policy("x/p", ingress=[{"ports": [tcp("serve-81-udp")]}]),
        says=(no("y/a", "x/a", 81), no("y/a", "x/a", 81, "UDP")),
    ),
    "a name that nobody has": one(policy("x/p", ingress=[{"ports": [tcp("nobody")]}]), says=(no("y/a", "x/a"),)),
    "one name, another number behind it": one(
        pod("x/b")
        | {"spec": {"nodeName": "node1", "containers": [{"ports": [{"name": "serve-80-tcp", "containerPort": 81}]}]}},
        policy("x/p", ingress=[{"ports": [tcp("serve-80-tcp")]}]),
        says=(yes("y/a", "x/a", 80), no("y/a", "x/a", 81), yes("y/a", "x/b", 81), no("y/a", "x/b", 80)),
    ),
    "a named port in egress, of pods anywhere": one(
        policy("x/p", policyTypes=["Egress"], egress=[{"ports": [tcp("serve-80-tcp")]}]),
        says=(yes("x/a", "y/a", 80), yes("x/a", "x/b", 80), no("x/a", "y/a", 81)),
    ),
    "a named port in egress, of some pods": one(
        policy("x/p", policyTypes=["Egress"], egress=[{"ports": [tcp("serve-80-tcp")], "to": [spaces(ns="z")]}]),
        says=(yes("x/a", "z/a", 80), no("x/a", "y/a", 80)),
    ),
    "a named port behind a block is nobody's": one(
        policy("x/p", policyTypes=["Egress"], egress=[{"ports": [tcp("serve-80-tcp")], "to": [block("10.0.0.0/8")]}]),
        says=(no("x/a", "z/a", 80),),
    ),
    "any port of a protocol": one(
        policy("x/p", ingress=[{"ports": [{"protocol": "UDP"}]}]),
        says=(yes("y/a", "x/a", 81, "UDP"), no("y/a", "x/a", 81, "TCP")),
    ),
    "a range of ports": one(
        policy("x/p", ingress=[{"ports": [tcp(79, 80)]}]), says=(yes("y/a", "x/a", 80), no("y/a", "x/a", 81))
    ),
    "a range of one": one(
        policy("x/p", ingress=[{"ports": [tcp(81, 81)]}]), says=(yes("y/a", "x/a", 81), no("y/a", "x/a"))
    ),
    "ranges that overlap": one(
        policy("x/p", ingress=[{"ports": [tcp(1, 80), tcp(80, 90)]}]),
        says=(yes("y/a", "x/a", 80), yes("y/a", "x/a", 81)),
    ),
    "SCTP is not TCP": one(
        policy("x/p", ingress=[{"ports": [{"protocol": "SCTP", "port": 80}]}]),
        says=(no("y/a", "x/a", 80, "TCP"), yes("y/a", "x/a", 80, "SCTP")),
    ),
    # --- blocks
    "egress to a block": one(
        policy("x/p", policyTypes=["Egress"], egress=[{"to": [block("10.244.1.0/24")]}]),
        says=(yes("x/a", "y/b"), no("x/a", "z/b")),
    ),
    "ingress from a block": one(
        policy("x/p", ingress=[{"from": [block("10.244.2.11/32")]}]), says=(yes("z/b", "x/a"), no("z/a", "x/a"))
    ),
    "a block with an exception": one(
        policy("x/p", ingress=[{"from": [block("10.244.0.0/16", "10.244.1.0/24")]}]),
        says=(yes("z/b", "x/a"), no("y/b", "x/a")),
    ),
    "an exception holds for its own block alone": one(
        policy("x/p", ingress=[{"from": [block("10.244.0.0/16", "10.244.1.0/24"), block("10.244.1.11/32")]}]),
        says=(yes("y/b", "x/a"), no("y/a", "x/a")),
    ),
    "what one rule excepts another opens": one(
        policy("x/p", ingress=[{"from": [block("10.0.0.0/8", "10.244.1.0/24")]}]),
        policy("x/q", ingress=[{"from": [block("10.244.1.0/24")], "ports": [tcp(81)]}]),
        says=(no("y/b", "x/a", 80), yes("y/b", "x/a", 81)),
    ),
    "blocks that overlap": one(
        policy("x/p", ingress=[{"from": [block("10.244.0.0/16"), block("10.244.1.0/24"), block(_CIDR_XA)]}]),
        says=(yes("y/b", "x/b"), yes("z/b", "x/b"), yes("x/a", "x/b")),
    ),
    "everything of IPv6 and nothing of IPv4": one(
        policy("x/p", ingress=[{"from": [block("::/0")]}]), says=(no("y/b", "x/a"),)
    ),
    "everybody but one": one(
        policy("x/p", ingress=[{"from": [block("0.0.0.0/0", "10.244.2.12/32")]}]),
        says=(yes("z/b", "x/a"), no("z/c", "x/a")),
    ),
    # --- both ways
    "in and out are judged apart": one(
        policy(
            "x/p",
            select={"pod": "a"},
            policyTypes=["Ingress", "Egress"],
            ingress=[{"from": [spaces(ns="y")]}],
            egress=[{"to": [spaces(ns="z")]}],
        ),
        says=(yes("y/a", "x/a"), no("x/a", "y/a"), yes("x/a", "z/a"), no("z/a", "x/a")),
    ),
    "both sides must agree": one(
        policy("x/out", policyTypes=["Egress"], egress=[{"to": [spaces(ns="y")], "ports": [tcp(80)]}]),
        policy("y/in", ingress=[{"from": [spaces(ns="x")], "ports": [tcp(81)]}]),
        says=(no("x/a", "y/a", 80), no("x/a", "y/a", 81)),
    ),
    # --- what changes
    "a policy is changed and removed": (
        Step(put=(policy("x/p"),), says=(no("y/a", "x/a"),)),
        Step(put=(policy("x/p", ingress=[{"from": [spaces(ns="y")]}]),), says=(yes("y/a", "x/a"), no("z/a", "x/a"))),
        Step(remove=(("NetworkPolicy", "x", "p"),), says=(yes("z/a", "x/a"),)),
    ),
    "the label of a namespace changes": (
        Step(put=(policy("x/p", ingress=[{"from": [spaces(team="blue")]}]),), says=(no("y/a", "x/a"),)),
        Step(put=(namespace("y", team="blue"),), says=(yes("y/a", "x/a"),)),
        Step(put=(namespace("y", team="red"),), says=(no("y/a", "x/a"),)),
    ),
    "the label of a client changes": (
        Step(put=(policy("x/p", ingress=[{"from": [spaces() | pods(role="friend")]}]),), says=(no("y/a", "x/a"),)),
        Step(put=(pod("y/a", pod="a", role="friend"),), says=(yes("y/a", "x/a"), no("y/b", "x/a"))),
        Step(put=(pod("y/a"),), says=(no("y/a", "x/a"),)),
    ),
    "the label of a server changes": (
        Step(put=(policy("x/p", select={"guarded": "yes"}),), says=(yes("y/a", "x/a"),)),
        Step(put=(pod("x/a", pod="a", guarded="yes"),), says=(no("y/a", "x/a"), yes("y/a", "x/b"))),
        Step(put=(pod("x/a"),), says=(yes("y/a", "x/a"),)),
    ),
    "a pod comes and goes": (
        Step(put=(policy("x/p", ingress=[{"from": [spaces(ns="y") | pods(pod="b")]}]),), says=(yes("y/b", "x/a"),)),
        Step(remove=(("Pod", "y", "b"),), says=(no("y/b", "x/a"),)),
        Step(put=(pod("y/b"),), says=(yes("y/b", "x/a"),)),
    ),
    "a pod that has ended is nobody": (
        Step(put=(policy("x/p", ingress=[{"from": [spaces(ns="y")]}]),), says=(yes("y/b", "x/a"),)),
        Step(
            put=(pod("y/b") | {"status": {"phase": "Succeeded", "podIPs": [{"ip": address("y", "b")}]}},),
            says=(no("y/b", "x/a"), yes("y/a", "x/a")),
        ),
    ),
    "an address passes to another pod, and the DELETE of the former comes late": (
        Step(put=(policy("x/p", ingress=[{"from": [pods(pod="b")]}]),), says=(yes("x/b", "x/a"), no("x/c", "x/a"))),
        Step(put=(_with_address_of("x/b", "x/new", pod="new"),), says=(no("x/b", "x/a"),)),
        Step(remove=(("Pod", "x", "b"),), says=(no("x/b", "x/a"),)),
        Step(put=(pod("x/b"),), says=(no("x/b", "x/a"),)),
        Step(remove=(("Pod", "x", "new"),), says=(yes("x/b", "x/a"),)),
    ),
    "an address passes between two pods that one set selects": (
        Step(put=(policy("x/p", select={"pod": "a"}, ingress=[{"from": [pods()]}]),), says=(yes("x/b", "x/a"),)),
        Step(put=(_with_address_of("x/b", "x/new", pod="new"),), says=(yes("x/b", "x/a"),)),
        Step(remove=(("Pod", "x", "b"),), says=(yes("x/b", "x/a"),)),
        Step(remove=(("Pod", "x", "new"),), says=(no("x/b", "x/a"),)),
    ),
    "an address passes to another pod that other policies are about": (
        Step(put=(policy("x/p", select={"pod": "b"}),), says=(no("x/a", "x/b"),)),
        Step(put=(_with_address_of("x/b", "x/new", pod="new"),), says=(yes("x/a", "x/b"),)),
        Step(remove=(("Pod", "x", "new"),), says=(no("x/a", "x/b"),)),
    ),
    "a pod is made again under its name": (
        Step(put=(policy("x/p", select={"pod": "b"}),), says=(no("x/a", "x/b"),)),
        Step(put=(_made_again("x/b", pod="other"),), says=(yes("x/a", "x/b"),)),
    ),
    "a namespace comes after its pods": (
        Step(
            remove=(("Namespace", "", "y"),),
            put=(policy("x/p", ingress=[{"from": [spaces()]}]),),
            says=(no("y/a", "x/a"),),
        ),
        Step(put=(namespace("y"),), says=(yes("y/a", "x/a"),)),
    ),
}
