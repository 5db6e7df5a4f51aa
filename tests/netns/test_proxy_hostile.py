"""Broken and hostile objects, through the API and the real process: the rest stands, no rule has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netns.plain_api import Object
from tests.netns.proxy_fixtures import ProxyStage, clean, endpoints, node, proxy_stage, service, until
from tests.unit.service_cases import LOCAL, REMOTE

INJECTION = '"; flush ruleset; add table ip pwned; #'
WEB = (service("web"), endpoints("web", LOCAL))
TABLES = ["table ip podwire_proxy", "table ip6 podwire_proxy"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyStage]:
    with proxy_stage(tmp_path_factory.mktemp("proxy")) as made:
        yield made


@pytest.fixture
def place(whole: ProxyStage) -> Iterator[ProxyStage]:
    clean(whole)
    yield whole
    clean(whole)


def with_port(name: str, number: int, /, **port: Any) -> Object:
    made = service(name, number)
    made["spec"]["ports"][0].update(port)
    return made


def at_address(name: str, number: int, own: str) -> Object:
    return service(name, number, clusterIP=own, clusterIPs=[own])


def of_hosts(of: str, *hosts: str) -> Object:
    """A slice with these texts for addresses."""
    made = endpoints(of, LOCAL)
    (pattern,) = made["endpoints"]
    made["endpoints"] = [{**pattern, "addresses": [host]} for host in hosts]
    return made


SERVICES: dict[str, Object] = {
    "a name with quotes": service('q"uo"te', 20),
    "a name with spaces": service("a b", 21),
    "a name of several lines": service("a\nb", 22),
    "a name that would be a command": service(INJECTION, 23),
    "a name of 253 characters": service("n" * 253, 24),
    "a port's name that would be a command": with_port("p1", 25, name=INJECTION),
    "a port out of range": with_port("p2", 26, port=70000),
    "a negative port": with_port("p3", 27, port=-1),
    "a node port out of range": service("p4", 28, node_port=99999),
    "a node port that another Service has": service("p5", 29, node_port=30001),
    "an unknown protocol": with_port("p6", 30, protocol="ICMP"),
    "a loopback address": at_address("a1", 31, "127.0.0.1"),
    "a link-local address": at_address("a2", 32, "169.254.169.254"),
    "an address that is none": at_address("a3", 33, INJECTION),
    "an address with a zone": at_address("a4", 34, 'fe80::1%"; flush ruleset'),
    "an external address that is none": service("a5", 35, externalIPs=[INJECTION, "224.0.0.1"]),
    "a source range that is none": service(
        "a6", 36, type="LoadBalancer", loadBalancerSourceRanges=[INJECTION],
        status={"loadBalancer": {"ingress": [{"ip": "203.0.113.36"}]}},
    ),
    "fields that nobody knows": {**service("ok", 37), "future": {"a": [1]}, "metadata": {"name": "ok", "x": "y"}},
}  # fmt: skip
SLICES: dict[str, Object] = {
    "an address of the wrong family": of_hosts("web", "fd00::1"),
    "loopback": of_hosts("web", "127.0.0.1"),
    "link-local": of_hosts("web", "169.254.1.1"),
    "nobody": of_hosts("web", "0.0.0.0"),
    "a command": of_hosts("web", INJECTION),
}
SERVED = {"10.96.0.1": LOCAL, "10.96.0.24": "refuse", "10.96.0.37": "refuse"}


def test_broken_objects_cost_themselves_alone(place: ProxyStage) -> None:
    web = service("web", node_port=30001)
    web["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    place.api.put(web, endpoints("web", LOCAL), node())
    for number, obj in enumerate(SLICES.values()):
        obj["metadata"]["name"] = f"bad-{number}"
    for obj in SERVICES.values():
        obj["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    place.api.put(*SERVICES.values(), *SLICES.values())
    proxy = place.start()
    for to, wanted in SERVED.items():
        assert place.answers(to) == wanted, to
    assert place.answers("10.0.0.1", 30001) == LOCAL
    assert sorted(place.node.run("nft", "list", "tables").splitlines()) == TABLES
    text = place.rules()
    for word in ("127.0.0.1 .", "169.254", "224.0.0.1", "pwned", "70000"):
        assert word not in text, word
    named = "\n".join(each["message"] for each in proxy.said("Service"))
    for name in ("p2", "p3", "p4", "p5", "p6", "a1", "a2", "a3", "a5", "a6"):
        assert f"default/{name}:" in named, name
    for number in range(len(SLICES)):
        assert proxy.said("EndpointSlice", f"bad-{number}"), number
    assert proxy.metric("podwire_proxy_problems") >= 15
    assert proxy.metric("podwire_proxy_sync_failures_total") == 0
    place.api.put(endpoints("web", REMOTE))
    place.served("10.96.0.1", REMOTE)


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_names_get_into_no_rule(place: ProxyStage, mode: str) -> None:
    """Not even by a comment that iptables keeps."""
    hostile = {name: obj for name, obj in SERVICES.items() if "name" in name}
    place.api.put(*WEB, *hostile.values())
    place.api.put(*(endpoints(obj["metadata"]["name"], LOCAL) for obj in hostile.values()))
    place.start(mode=mode)
    assert place.answers() == LOCAL
    text = place.rules()
    assert "pwned" not in text
    assert 'q"uo' not in text


def test_objects_of_the_wrong_types_are_named_and_the_rest_stands(place: ProxyStage) -> None:
    broken: list[Object] = [
        {"kind": "Service", "metadata": {"name": "b1"}, "spec": "none"},
        {"kind": "Service", "metadata": {"name": "b2"}, "spec": {"ports": [{"port": "eighty"}]}},
        {"kind": "EndpointSlice", "metadata": {"name": "b3"}, "endpoints": {"a": 1}},
    ]
    place.api.put(*WEB, *broken)
    proxy = place.start()
    assert place.answers() == LOCAL
    assert proxy.metric("podwire_proxy_objects_left_out_total") == 3
    for obj in broken:
        assert proxy.said(obj["metadata"]["name"])


def test_watches_that_break_in_every_way_are_taken_up(place: ProxyStage) -> None:
    place.api.put(*WEB)
    proxy = place.start()
    whole = json.dumps({"type": "ADDED", "object": service("half", 9)}).encode()
    lines = {
        "truncated": whole[: len(whole) // 2] + b"\n",
        "no JSON": b"\x00\xff{{{\n",
        "deeply nested": b'{"type":"ADDED","object":' + b"[" * 100_000 + b"\n",
        "an event that nobody knows": b'{"type":"PERHAPS","object":{"metadata":{"name":"x"}}}\n',
        "an object without a name": b'{"type":"ADDED","object":{}}\n',
        "long": whole[:-1] + b', "x": "' + b"y" * 3_000_000 + b'"}\n',
    }
    hosts = [LOCAL, REMOTE]
    for turn, (name, line) in enumerate(lines.items()):
        for kind in ("Service", "EndpointSlice"):
            place.api.say(kind, line)
        place.api.put(endpoints("web", hosts[turn % 2 == 0]))
        place.served("10.96.0.1", hosts[turn % 2 == 0])
        assert proxy.alive(), name
    until(lambda: proxy.healthz()[0] == 200)


def test_ten_thousand_endpoints(place: ProxyStage) -> None:
    """In slices of a hundred; then all but one go."""
    slices = []
    for number in range(100):
        made = endpoints("web", *(f"10.{100 + number}.{host // 250}.{1 + host % 250}" for host in range(100)))
        made["metadata"]["name"] = f"many-{number}"
        slices.append(made)
    place.api.put(*WEB)
    proxy = place.start()
    place.api.put(*slices)
    until(lambda: len(place.elements("eps_tcp")) == 10_001)
    for made in slices:
        made["endpoints"] = []
    place.api.put(*slices)
    until(lambda: len(place.elements("eps_tcp")) == 1)
    assert place.answers() == LOCAL
    assert proxy.metric("podwire_proxy_sync_failures_total") == 0
