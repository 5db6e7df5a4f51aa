"""At which places a Service answers: types, families, balancers, source ranges, affinity, and what changes them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from kube_proxy_lite.model import PortKey
from tests.unit.service_objects import key, node, places, service, service_cidr, services, slice_of, the_plan

NODE_PORT: dict[str, Any] = {"ports": [{"port": 80, "nodePort": 30080}]}
BALANCED: dict[str, Any] = {"type": "LoadBalancer", **NODE_PORT}
RANGED: dict[str, Any] = {"type": "LoadBalancer", "status": [{"ip": "198.51.100.1"}]}

PLACES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a ClusterIP": ({}, ["cluster-ip 10.96.0.10 80"]),
    "internal Local": ({"internalTrafficPolicy": "Local"}, ["cluster-ip 10.96.0.10 80 local"]),
    "external Local means nothing to a ClusterIP": (
        {"externalTrafficPolicy": "Local"},
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a NodePort": ({"type": "NodePort", **NODE_PORT}, ["cluster-ip 10.96.0.10 80", "node-port * 30080"]),
    "a NodePort, external Local": (
        {"type": "NodePort", **NODE_PORT, "externalTrafficPolicy": "Local"},
        ["cluster-ip 10.96.0.10 80", "node-port * 30080 local"],
    ),
    "a node port that is left over": (NODE_PORT, ["cluster-ip 10.96.0.10 80"]),
    "a balancer that has no address yet": (BALANCED, ["cluster-ip 10.96.0.10 80", "node-port * 30080"]),
    "a balancer": (
        {**BALANCED, "status": [{"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "VIP"}]},
        [
            "cluster-ip 10.96.0.10 80",
            "load-balancer 198.51.100.1 80",
            "load-balancer 198.51.100.2 80",
            "node-port * 30080",
        ],
    ),
    "a balancer without node ports": (
        {**RANGED, "allocateLoadBalancerNodePorts": False},
        ["cluster-ip 10.96.0.10 80", "load-balancer 198.51.100.1 80"],
    ),
    "a balancer that is a proxy": (
        {**BALANCED, "status": [{"ip": "198.51.100.1", "ipMode": "Proxy"}]},
        ["cluster-ip 10.96.0.10 80", "node-port * 30080"],
    ),
    "a balancer with a name": (
        {**BALANCED, "status": [{"hostname": "lb.example.org"}]},
        ["cluster-ip 10.96.0.10 80", "node-port * 30080"],
    ),
    "a balancer of another family": (
        {**RANGED, "status": [{"ip": "2001:db8::1"}]},
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a balancer's address that is left over": (
        {"type": "NodePort", **NODE_PORT, "status": [{"ip": "198.51.100.1"}]},
        ["cluster-ip 10.96.0.10 80", "node-port * 30080"],
    ),
    "external IPs": (
        {"externalIPs": ["192.0.2.2", "192.0.2.1", "192.0.2.2"], "externalTrafficPolicy": "Local"},
        ["cluster-ip 10.96.0.10 80", "external-ip 192.0.2.1 80 local", "external-ip 192.0.2.2 80 local"],
    ),
    "an external IP that is the balancer's is the balancer's": (
        {**RANGED, "externalIPs": ["198.51.100.1"], "loadBalancerSourceRanges": ["203.0.113.0/24"]},
        ["cluster-ip 10.96.0.10 80", "load-balancer 198.51.100.1 80 from 203.0.113.0/24"],
    ),
    "an external IP that is the ClusterIP is the ClusterIP": (
        {"externalIPs": ["10.96.0.10"], "externalTrafficPolicy": "Local"},
        ["cluster-ip 10.96.0.10 80"],
    ),
    "clusterIP alone, as before dual stack": (
        {"clusterIPs": None, "clusterIP": "10.96.0.11"},
        ["cluster-ip 10.96.0.11 80"],
    ),
}


@pytest.mark.parametrize(("spec", "expected"), PLACES.values(), ids=PLACES.keys())
def test_places(spec: dict[str, Any], expected: list[str]) -> None:
    state = services(service(**spec), slice_of("1"))
    assert places(state.plan(key())) == expected
    assert state.problems() == ()


RANGES: dict[str, tuple[list[str] | None, str]] = {
    "none": (None, ""),
    "white space around it": ([" 203.0.113.0/24\t"], " from 203.0.113.0/24"),
    "host bits": (["203.0.113.77/24"], " from 203.0.113.0/24"),
    "sorted, each once, what is in another left out": (
        ["203.0.113.0/24", "192.0.2.7/32", "203.0.113.128/25", "192.0.2.7/32"],
        " from 192.0.2.7/32,203.0.113.0/24",
    ),
    "everybody": (["0.0.0.0/0"], ""),
    "everybody, among others": (["203.0.113.0/24", "0.0.0.0/0"], ""),
    "everybody of the other family": (["203.0.113.0/24", "::/0"], " from 203.0.113.0/24"),
    "the other family alone": (["2001:db8::/32"], ""),
    "one that cannot be read beside one that can": (["203.0.113.0/24", "nonsense"], " from 203.0.113.0/24"),
    "the node is in them, so the address is, too": (
        ["172.31.0.0/16"],
        " from 172.31.0.0/16,198.51.100.1/32",
    ),
    "the node and the address are in them": (
        ["172.31.0.0/16", "198.51.100.0/24"],
        " from 172.31.0.0/16,198.51.100.0/24",
    ),
}


@pytest.mark.parametrize(("ranges", "expected"), RANGES.values(), ids=RANGES.keys())
def test_source_ranges(ranges: list[str] | None, expected: str) -> None:
    web = service(**RANGED, loadBalancerSourceRanges=ranges)
    state = services(web, node(addresses=["172.31.0.2", "fd31::2"]))
    assert places(state.plan(key())) == ["cluster-ip 10.96.0.10 80", f"load-balancer 198.51.100.1 80{expected}"]


def test_a_node_that_gets_another_address_is_let_in_or_not() -> None:
    state = services(service(**RANGED, loadBalancerSourceRanges=["172.31.0.0/16"]), slice_of("1"))
    seen = []
    for addresses in ([], ["172.31.0.2"], ["172.32.0.2"]):
        state.set_node(node(addresses=addresses))
        seen.append([str(network) for network in the_plan(state).frontends[1].source_ranges])
    assert seen == [["172.31.0.0/16"], ["172.31.0.0/16", "198.51.100.1/32"], ["172.31.0.0/16"]]


def test_ranges_of_which_none_can_be_read_open_nothing() -> None:
    state = services(service(**RANGED, loadBalancerSourceRanges=["203.0.113.0"]))
    assert places(state.plan(key())) == ["cluster-ip 10.96.0.10 80"]
    assert [problem.field for problem in state.problems()] == ["spec.loadBalancerSourceRanges"]


AFFINITY: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 0),
    "said to be none": ({"sessionAffinity": "None"}, 0),
    "three hours unless it says": ({"sessionAffinity": "ClientIP"}, 10800),
    "as long as it says": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}}},
        7,
    ),
    "a day at most": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86400}}},
        86400,
    ),
    "a timeout without affinity": ({"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 7}}}, 0),
}


@pytest.mark.parametrize(("spec", "seconds"), AFFINITY.values(), ids=AFFINITY.keys())
def test_affinity(spec: dict[str, Any], seconds: int) -> None:
    assert the_plan(services(service(**spec))).affinity == seconds


NOT_OURS: dict[str, dict[str, Any]] = {
    "headless": {"clusterIPs": ["None"], "clusterIP": "None"},
    "without an address yet": {"clusterIPs": None, "clusterIP": ""},
    "a name elsewhere": {"type": "ExternalName", "clusterIPs": None, "externalName": "example.org"},
    "another proxy's": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}},
    "another proxy's, without a name": {"labels": {"service.kubernetes.io/service-proxy-name": ""}},
    "labelled headless": {"labels": {"service.kubernetes.io/headless": ""}},
}


@pytest.mark.parametrize("spec", NOT_OURS.values(), ids=NOT_OURS.keys())
def test_services_that_are_not_for_this_proxy_come_and_go(spec: dict[str, Any]) -> None:
    cluster_ip = ipaddress.ip_address("10.96.0.10")
    state = services(slice_of("1"), service(**spec))
    assert list(state.plans()) == []
    state.set_service(service())
    plan = the_plan(state)
    assert state.changed() == {key(): plan}
    assert state.changed_cluster_ips() == {cluster_ip: True}
    state.set_service(service(**spec))
    assert state.changed() == {key(): None}
    assert state.changed_cluster_ips() == {cluster_ip: False}
    assert state.problems() == ()


def test_families_and_protocols_are_ports_of_their_own() -> None:
    dns = service(
        clusterIPs=["10.96.0.53", "fd96::53"],
        ports=[
            {"name": "dns", "port": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
            {"name": "dns", "port": 53, "protocol": "SCTP"},
        ],
    )
    state = services(dns)
    expected: set[PortKey] = {
        key(port=port, protocol=protocol, version=version)
        for port, protocol in (("dns", "UDP"), ("dns-tcp", "TCP"), ("dns", "SCTP"))
        for version in (4, 6)
    }
    assert {plan.key for plan in state.plans()} == expected
    assert places(state.plan(key(port="dns", protocol="SCTP", version=6))) == ["cluster-ip fd96::53 53"]
    assert state.problems() == ()


def test_a_service_changes_its_type() -> None:
    state = services(slice_of("1"))
    seen = []
    for spec in (
        {},
        {"type": "NodePort", **NODE_PORT},
        {**BALANCED, "status": [{"ip": "198.51.100.1"}]},
        {"type": "ExternalName", "clusterIPs": None},
        {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30081}]},
        {},
    ):
        state.set_service(service(**spec))
        seen.append([kind.split()[0] for kind in places(state.changed()[key()])])
    assert seen == [
        ["cluster-ip"],
        ["cluster-ip", "node-port"],
        ["cluster-ip", "load-balancer", "node-port"],
        [],
        ["cluster-ip", "node-port"],
        ["cluster-ip"],
    ]


def test_a_change_is_told_once_and_only_if_it_is_one() -> None:
    state = services(service(), service("other", clusterIPs=["10.96.0.11"]), slice_of("1"))
    assert set(state.changed()) == {key(), key("other")}
    assert state.changed() == {}
    state.set_service(service(selector={"app": "another"}))
    state.set_slice(slice_of("1"))
    state.set_slice(slice_of("3 unready", name="web-2"))
    state.drop_slice(("default", "never-seen"))
    state.drop_service(("default", "never-seen"))
    assert state.changed() == {}
    state.set_slice(slice_of("1", "2"))
    assert set(state.changed()) == {key()}
    state.drop_service(("default", "web"))
    state.drop_slice(("default", "web-1"))
    assert state.changed() == {key(): None}


def test_a_slice_goes_over_to_another_service() -> None:
    state = services(service(), service("other", clusterIPs=["10.96.0.11"]), slice_of("1"))
    state.changed()
    state.set_slice(slice_of("1", of="other"))
    changed = {of: len(plan.cluster) if plan else None for of, plan in state.changed().items()}
    assert changed == {key(): 0, key("other"): 1}
    state.set_slice(slice_of("1", labels={"kubernetes.io/service-name": ""}))
    assert set(state.changed()) == {key("other")}


def test_what_is_dropped_is_forgotten() -> None:
    """A cluster in which Services come and go for years has no more to remember for it."""
    state = services(node(addresses=["172.31.0.2"]))
    for name in ("a", "b"):
        state.set_service(service(name, type="NodePort", ports=[{"port": 80, "nodePort": 30080}, {"port": 0}]))
        state.set_slice(slice_of("1", name=f"{name}-1", of=name, ports=[{"port": 0}]))
    for name in ("a", "b"):
        state.drop_service(("default", name))
        state.drop_slice(("default", f"{name}-1"))
    state.changed(), state.changed_cluster_ips(), state.left_endpoints()
    kept = {**vars(state), **vars(state._claims)}
    assert [name for name, value in kept.items() if isinstance(value, dict | set) and value] == []


def test_cluster_ips_are_known_without_a_port_that_can_be_served() -> None:
    state = services(service(ports=[]), service("twin", ports=[{"port": 0}]))
    address = ipaddress.ip_address("10.96.0.10")
    assert state.cluster_ips == {address}
    assert state.changed_cluster_ips() == {address: True}
    state.drop_service(("default", "web"))
    assert state.changed_cluster_ips() == {}
    state.drop_service(("default", "twin"))
    assert state.changed_cluster_ips() == {address: False}
    assert state.cluster_ips == frozenset()


def test_what_the_cluster_and_the_node_say_of_networks() -> None:
    state = services(node(addresses=["172.31.0.2", "fd31::2"], cidrs=["10.244.3.0/24", "fd44:3::/64"]))
    assert [str(each) for each in state.node_addresses] == ["172.31.0.2", "fd31::2"]
    assert [str(each) for each in state.pod_cidrs] == ["10.244.3.0/24", "fd44:3::/64"]
    state.set_service_cidr(service_cidr("kubernetes", "10.96.0.0/16", "fd96::/112"))
    state.set_service_cidr(service_cidr("more", "10.97.0.0/16", "10.96.0.0/24"))
    assert [str(each) for each in state.service_cidrs] == ["10.96.0.0/15", "fd96::/112"]
    state.drop_service_cidr("kubernetes")
    assert [str(each) for each in state.service_cidrs] == ["10.96.0.0/24", "10.97.0.0/16"]
    state.set_node(None)
    assert (state.node_addresses, state.pod_cidrs) == ((), ())
