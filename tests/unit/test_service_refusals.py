"""What cannot be is passed over and named: hostile and broken objects, and places that two Services ask for."""

from __future__ import annotations

from typing import Any

import pytest

from kube_proxy_lite.validation import Refused, read_address, read_network
from tests.unit.service_objects import key, numbers, places, service, services, slice_of, the_plan

ADDRESSES: dict[str, tuple[str, str]] = {
    "unspecified": ("0.0.0.0", "is unspecified"),
    "loopback": ("127.0.0.1", "is a loopback address"),
    "link-local": ("169.254.1.1", "is a link local address"),
    "multicast": ("224.0.0.1", "is a multicast address"),
    "broadcast": ("255.255.255.255", "is the broadcast address"),
    "no number": ("10.0.0.256", "is not an IP address"),
    "a name": ("example.org", "is not an IP address"),
    "nothing": ("", "is not an IP address"),
    "with a prefix": ("10.0.0.1/32", "is not an IP address"),
    "unspecified, v6": ("::", "is unspecified"),
    "loopback, v6": ("::1", "is a loopback address"),
    "link-local, v6": ("fe80::1", "is a link local address"),
    "multicast, v6": ("ff02::1", "is a multicast address"),
    "disguised": ("::ffff:10.0.0.1", "is an IPv4 address in disguise"),
    "with a zone": ("2001:db8::1%eth0", "has a zone"),
    "with rules for a zone": ('2001:db8::1%"; flush ruleset', "has a zone"),
    "with a second line": ("10.0.0.1\nadd rule", "is not an IP address"),
}


@pytest.mark.parametrize(("text", "why"), ADDRESSES.values(), ids=ADDRESSES.keys())
def test_addresses_that_no_connection_can_go_to(text: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        read_address(text)


FINE = {
    "10.0.0.1": "10.0.0.1",
    "010.000.000.001": "10.0.0.1",
    "0.1.2.3": "0.1.2.3",
    "240.0.0.1": "240.0.0.1",
    "2001:DB8:0::01": "2001:db8::1",
}


@pytest.mark.parametrize(("text", "meant"), FINE.items())
def test_addresses_are_read_as_the_api_server_reads_them(text: str, meant: str) -> None:
    assert str(read_address(text)) == meant


NETWORKS = (
    "10.0.0.0",
    "10.0.0.0/33",
    "10.0.0.0/255.0.0.0",
    "10.0.0.0/",
    "/8",
    "::/129",
    "fe80::%a/64",
    "10.0.0.0/8 x",
    "",
)


@pytest.mark.parametrize("text", NETWORKS)
def test_networks_that_are_none(text: str) -> None:
    with pytest.raises(Refused):
        read_network(text)


def test_networks_with_leading_zeros() -> None:
    assert str(read_network("010.000.0.0/08")) == "10.0.0.0/8"


BAD_SPECS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "a port of 0": ({"ports": [{"port": 0}]}, ["spec.ports.port '0'"], []),
    "a port that is too large": ({"ports": [{"port": 65536}]}, ["spec.ports.port '65536'"], []),
    "a negative port": ({"ports": [{"port": -80}]}, ["spec.ports.port '-80'"], []),
    "an unknown protocol": ({"ports": [{"port": 80, "protocol": "ICMP"}]}, ["spec.ports.protocol 'ICMP'"], []),
    "a protocol in small letters": ({"ports": [{"port": 80, "protocol": "tcp"}]}, ["spec.ports.protocol 'tcp'"], []),
    "a bad port beside a good one": (
        {"ports": [{"name": "bad", "port": 70000}, {"port": 80}]},
        ["spec.ports.port '70000'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a port's name with a quote": ({"ports": [{"name": 'a" drop', "port": 80}]}, ["spec.ports.name 'a\" drop'"], []),
    "two ports of one name": (
        {"ports": [{"port": 80}, {"port": 81}]},
        ["spec.ports.name ''"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a bad node port": (
        {"type": "NodePort", "ports": [{"port": 80, "nodePort": 70000}]},
        ["spec.ports.nodePort '70000'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a bad ClusterIP": ({"clusterIPs": ["10.96.0.300"]}, ["spec.clusterIPs '10.96.0.300'"], []),
    "a bad ClusterIP of the other family": (
        {"clusterIPs": ["10.96.0.10", "fe80::1"]},
        ["spec.clusterIPs 'fe80::1'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "two ClusterIPs of one family": (
        {"clusterIPs": ["10.96.0.10", "10.96.0.11"]},
        ["spec.clusterIPs '10.96.0.11'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "external IPs": (
        {"externalIPs": ["127.0.0.1", "192.0.2.1", "169.254.169.254", "x\ny"]},
        ["spec.externalIPs '127.0.0.1'", "spec.externalIPs '169.254.169.254'", "spec.externalIPs 'x\ufffdy'"],
        ["cluster-ip 10.96.0.10 80", "external-ip 192.0.2.1 80"],
    ),
    "an external IP of a family that it is not of": (
        {"externalIPs": ["2001:db8::1"]},
        ["spec.externalIPs '2001:db8::1'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a balancer's addresses": (
        {"type": "LoadBalancer", "status": [{"ip": "0.0.0.0"}, {"ip": "198.51.100.1"}]},
        ["status.loadBalancer.ingress.ip '0.0.0.0'"],
        ["cluster-ip 10.96.0.10 80", "load-balancer 198.51.100.1 80"],
    ),
    "an unknown type": (
        {"type": "Magic", "ports": [{"port": 80, "nodePort": 30080}]},
        ["spec.type 'Magic'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "an unknown policy": (
        {"internalTrafficPolicy": "local"},
        ["spec.internalTrafficPolicy 'local'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "an unknown affinity": (
        {"sessionAffinity": "Cookie"},
        ["spec.sessionAffinity 'Cookie'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "an affinity of more than a day": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}},
        ["spec.sessionAffinityConfig.clientIP.timeoutSeconds '86401'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "an affinity of no time": (
        {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}},
        ["spec.sessionAffinityConfig.clientIP.timeoutSeconds '0'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
    "a bad port for the health check": (
        {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 99999},
        ["spec.healthCheckNodePort '99999'"],
        ["cluster-ip 10.96.0.10 80"],
    ),
}


@pytest.mark.parametrize(("spec", "problems", "expected"), BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_what_is_wrong_with_a_service_is_named_and_the_rest_stands(
    spec: dict[str, Any], problems: list[str], expected: list[str]
) -> None:
    good = service("good", clusterIPs=["10.96.0.99"])
    state = services(service(**spec), slice_of("1"), good)
    told = state.problems()
    assert [f"{problem.field} {problem.value!r}" for problem in told] == problems
    assert all(str(problem).startswith("Service default/web: ") for problem in told)
    assert places(state.plan(key())) == expected
    assert places(state.plan(key("good"))) == ["cluster-ip 10.96.0.99 80"]
    state.set_service(service())
    assert state.problems() == ()
    assert places(state.plan(key())) == ["cluster-ip 10.96.0.10 80"]
    state.set_service(service(**spec))
    state.drop_service(("default", "web"))
    assert state.problems() == ()


NAMES = {
    "a quote": 'web"',
    "spaces": "web web",
    "a new line": "web\nflush ruleset",
    "a semicolon": "web;",
    "a brace": "web{",
    "capitals": "Web",
    "a hyphen first": "-j",
    "a new line at the end": "web\n",
    "letters that are not ASCII": "wéb",
    "nothing": "",
    "254 characters": "w" * 254,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_that_no_rule_should_hold(name: str) -> None:
    state = services(service(name), service("good", clusterIPs=["10.96.0.11"]), service(namespace=name))
    assert {plan.key for plan in state.plans()} == {key("good")}
    assert {problem.field for problem in state.problems()} == {"metadata.name", "metadata.namespace"}
    assert all("\n" not in str(problem) and len(str(problem)) < 300 for problem in state.problems())


def test_a_long_name_is_fine() -> None:
    long = "w" * 253
    state = services(service(long), slice_of("1", of=long))
    assert numbers(the_plan(state, key(long)).cluster) == [1]


BAD_SLICES: dict[str, tuple[dict[str, Any], list[str], list[int]]] = {
    "addresses of all sorts": (
        {"endpoints": [{"addresses": [text]} for text in ("127.0.0.1", "10.244.0.1", "::1", "fd44::1", "10.0.0.1%a")]},
        ["'10.0.0.1%a' is not an IP address", "'127.0.0.1' is a loopback address", "'::1' is not an IPv4 address"],
        [1],
    ),
    "no address": ({"endpoints": [{"addresses": []}, {"addresses": ["10.244.0.1"]}]}, [], [1]),
    "only the first address counts": ({"endpoints": [{"addresses": ["10.244.0.1", "nonsense"]}]}, [], [1]),
    "a port out of range": ({"ports": [{"port": 99999}, {"port": 0}]}, ["'0' is not in", "'99999' is not in"], []),
    "an unknown protocol": ({"ports": [{"port": 8080, "protocol": "QUIC"}]}, ["'QUIC' is none of"], []),
    "an unknown type of address": ({"addressType": "IPX"}, ["'IPX' is none of"], []),
}


@pytest.mark.parametrize(("body", "problems", "expected"), BAD_SLICES.values(), ids=BAD_SLICES.keys())
def test_what_is_wrong_with_a_slice_is_named_and_the_rest_stands(
    body: dict[str, Any], problems: list[str], expected: list[int]
) -> None:
    state = services(service(), slice_of("1", **body))
    told = [f"{problem.value!r} {problem.why}" for problem in state.problems()]
    for problem in problems:
        assert any(line.startswith(problem) for line in told), told
    assert bool(told) == bool(problems)
    assert numbers(the_plan(state).cluster) == expected
    state.drop_slice(("default", "web-1"))
    assert state.problems() == ()


def test_a_thousand_bad_addresses_are_not_a_thousand_problems() -> None:
    many = slice_of(endpoints=[{"addresses": [f"127.0.0.{number % 256}"]} for number in range(1000)])
    told = services(service(), many).problems()
    assert len(told) == 21
    assert sorted(problem.why for problem in told)[0] == "and 980 more problems of this object"


def test_ten_thousand_endpoints() -> None:
    slices = [
        slice_of(*(f"{number}" for number in range(first, first + 1000)), name=f"web-{first}")
        for first in range(1, 10_001, 1000)
    ]
    plan = the_plan(services(service(), *slices))
    assert numbers(plan.cluster) == list(range(1, 10_001))


OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
A_NODE_PORT: dict[str, Any] = {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]}

# first, second, places of each, what is said of whom
CONFLICTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], list[str], list[str]]] = {
    "a node port goes to the older": (
        {"created": NEW, **A_NODE_PORT},
        {"created": OLD, **A_NODE_PORT},
        ["cluster-ip"],
        ["cluster-ip", "node-port"],
        ["default/a: spec.ports.nodePort '30080/TCP' is taken by default/b"],
    ),
    "of the same age, by name": (
        A_NODE_PORT,
        A_NODE_PORT,
        ["cluster-ip", "node-port"],
        ["cluster-ip"],
        ["default/b: spec.ports.nodePort '30080/TCP' is taken by default/a"],
    ),
    "another protocol is another place": (
        A_NODE_PORT,
        {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080, "protocol": "UDP"}]},
        ["cluster-ip", "node-port"],
        ["cluster-ip", "node-port"],
        [],
    ),
    "a ClusterIP goes before an external IP, though it is newer": (
        {"created": OLD, "externalIPs": ["10.96.0.2"]},
        {"created": NEW},
        ["cluster-ip"],
        ["cluster-ip"],
        ["default/a: spec.ports '10.96.0.2:80/TCP' is taken by default/b"],
    ),
    "another port of that ClusterIP can be had": (
        {"externalIPs": ["10.96.0.2"], "ports": [{"port": 81}]},
        {},
        ["cluster-ip", "external-ip"],
        ["cluster-ip"],
        [],
    ),
    "a balancer goes before an external IP": (
        {"externalIPs": ["198.51.100.1"]},
        {"type": "LoadBalancer", "status": [{"ip": "198.51.100.1"}]},
        ["cluster-ip"],
        ["cluster-ip", "load-balancer"],
        ["default/a: spec.ports '198.51.100.1:80/TCP' is taken by default/b"],
    ),
    "one ClusterIP for two": (
        {"clusterIPs": ["10.96.0.2"]},
        {},
        ["cluster-ip"],
        [],
        ["default/b: spec.ports '10.96.0.2:80/TCP' is taken by default/a"],
    ),
    "v6": (
        {"clusterIPs": ["fd96::2"]},
        {"clusterIPs": ["fd96::2"]},
        ["cluster-ip"],
        [],
        ["default/b: spec.ports '[fd96::2]:80/TCP' is taken by default/a"],
    ),
    "a health check yields to a node port": (
        {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30080},
        A_NODE_PORT,
        ["cluster-ip"],
        ["cluster-ip", "node-port"],
        ["default/a: spec.healthCheckNodePort '30080/TCP' is taken by default/b"],
    ),
}


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(("a", "b", "of_a", "of_b", "said"), CONFLICTS.values(), ids=CONFLICTS.keys())
def test_a_place_goes_to_one(
    a: dict[str, Any], b: dict[str, Any], of_a: list[str], of_b: list[str], said: list[str], turned: bool
) -> None:
    pair = [service("a", **{"clusterIPs": ["10.96.0.1"], **a}), service("b", **{"clusterIPs": ["10.96.0.2"], **b})]
    state = services(*(reversed(pair) if turned else pair))
    version = 6 if "fd96::2" in (a.get("clusterIPs") or ()) else 4

    def kinds(name: str) -> list[str]:
        protocol = (b if name == "b" else a).get("ports", [{}])[0].get("protocol", "TCP")
        return [place.split()[0] for place in places(state.plan(key(name, version=version, protocol=protocol)))]

    assert (kinds("a"), kinds("b")) == (of_a, of_b)
    assert [str(problem) for problem in state.problems()] == [f"Service {line}" for line in said]
    state.drop_service(("default", "b" if said and "/a:" in said[0] else "a"))
    assert state.problems() == ()


def test_a_place_that_is_given_up_goes_to_the_next() -> None:
    state = services(
        *(service(name, clusterIPs=[f"10.96.0.{number}"], **A_NODE_PORT) for number, name in enumerate("abc"))
    )

    def owner() -> list[str]:
        return [plan.key.service for plan in state.plans() if len(plan.frontends) == 2]

    owners = [owner()]
    state.changed()
    state.set_service(service("a", clusterIPs=["10.96.0.0"]))
    assert set(state.changed()) == {key("a"), key("b")}
    owners.append(owner())
    state.drop_service(("default", "b"))
    owners.append(owner())
    state.set_service(service("a", clusterIPs=["10.96.0.0"], **A_NODE_PORT))
    owners.append(owner())
    assert owners == [["a"], ["b"], ["c"], ["a"]]


def test_two_health_checks_of_one_port() -> None:
    checked: dict[str, Any] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}
    state = services(service("a", **checked), service("b", **{**checked, "clusterIPs": ["10.96.0.2"]}))
    assert state.health(("default", "a")) is not None
    assert state.health(("default", "b")) is None
    state.drop_service(("default", "a"))
    assert state.health(("default", "b")) is not None
