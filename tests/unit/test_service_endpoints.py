"""Which endpoints a connection goes to: readiness, termination, traffic policies, hints, duplicates.

Each case is a list of endpoints in the words of `service_objects`, and who is chosen for Cluster and for Local.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.service_objects import (
    HERE,
    key,
    node,
    numbers,
    service,
    services,
    slice_of,
    the_plan,
)

Case = tuple[tuple[str, ...], list[int], list[int]]
LOCAL: dict[str, Any] = {
    "type": "NodePort",
    "ports": [{"port": 80, "nodePort": 30080}],
    "externalTrafficPolicy": "Local",
}

STATES: dict[str, Case] = {
    "nobody": ((), [], []),
    "the ready": (("1", "2 here"), [1, 2], [2]),
    "conditions that are absent are those of the healthy": (("1 bare", "2 here bare"), [1, 2], [2]),
    "not the unready": (("1 unready", "2 here"), [2], [2]),
    "nobody is ready": (("1 unready", "2 here unready"), [], []),
    "not who drains while others are ready": (("1", "2 here draining", "3 here"), [1, 3], [3]),
    "all drain": (("1 draining", "2 here draining"), [1, 2], [2]),
    "all drain or are unready": (("1 draining", "2 here draining", "3 unready"), [1, 2], [2]),
    "who drains and no longer serves is gone": (("1 dead", "2 here dead"), [], []),
    "some drain, some are dead": (("1 dead", "2 here draining", "3 here dead"), [2], [2]),
    "each policy falls back for itself": (("1", "2 here draining", "3 here unready", "4 draining"), [1], [2]),
    "nobody is here": (("1", "2"), [1, 2], []),
    "all drain elsewhere": (("1 draining", "2 draining"), [1, 2], []),
    "all are here": (("1 here", "2 here"), [1, 2], [1, 2]),
    "published though it is not ready": (("1 published", "2 here published"), [1, 2], [2]),
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("endpoints", "cluster", "local"), STATES.values(), ids=STATES.keys())
def test_readiness_and_termination(
    endpoints: tuple[str, ...], cluster: list[int], local: list[int], version: int
) -> None:
    state = services(service(version=version, **LOCAL), slice_of(*endpoints, version=version))
    plan = the_plan(state, key(version=version))
    assert (numbers(plan.cluster), numbers(plan.local)) == (cluster, local)
    assert {backend.port for backend in plan.cluster} <= {8080}


FOUR = ("1 zone:a", "2 zone:b", "3 zone:c", "4 zone:a")
HINTS: dict[str, tuple[str | None, tuple[str, ...], list[int], list[int]]] = {
    "those of our zone": ("a", FOUR, [1, 4], []),
    "our zone has one": ("c", FOUR, [3], []),
    "nobody is for our zone": ("d", FOUR, [1, 2, 3, 4], []),
    "we have no zone": (None, FOUR, [1, 2, 3, 4], []),
    "our zone's name is empty": ("", FOUR, [1, 2, 3, 4], []),
    "a hint for the zone without a name": ("", ("1 zone:", "2 zone:a"), [1, 2], []),
    "one has no hint": ("a", ("1 zone:a", "2 zone:b", "3", "4 zone:a"), [1, 2, 3, 4], []),
    "one that is not ready has no hint": ("a", ("1 zone:a", "2 zone:b", "3 unready"), [1], []),
    "one that drains has no hint": ("a", ("1 zone:a", "2 zone:b", "3 draining"), [1], []),
    "no hints": ("a", ("1", "2"), [1, 2], []),
    "one for several zones": (
        "c",
        ("1 zone:a zone:b zone:c", "2 zone:b zone:c", "3 zone:b", "4 zone:c"),
        [1, 2, 4],
        [],
    ),
    "an unready one of our zone": ("a", ("1 zone:a", "2 zone:b", "4 zone:a unready"), [1], []),
    "our zone has unready ones only": ("a", ("1 zone:a unready", "2 zone:b", "3 zone:c"), [2, 3], []),
    "all drain, hints do not count": ("a", ("1 zone:a draining", "2 zone:b draining"), [1, 2], []),
    "hints do not count for Local": ("a", ("1 here zone:a", "2 here zone:b", "3 zone:c", "4 zone:a"), [1, 4], [1, 2]),
    "ours are all for another zone": ("a", ("1 here zone:b", "2 zone:a"), [2], [1]),
    "Local and Cluster overlap": ("a", ("1 here zone:a", "2 here zone:b", "3 zone:a", "4 zone:b"), [1, 3], [1, 2]),
    "those for our node": (None, (f"1 node:{HERE}", "2 node:node-b"), [1], []),
    "those for our node, in our zone": ("a", (f"1 node:{HERE} zone:a", "2 node:node-b zone:a"), [1], []),
    "nobody is for our node, the zone counts": ("a", ("1 node:node-b zone:a", "2 node:node-c zone:b"), [1], []),
    "nobody is for our node nor zone": ("c", ("1 node:node-b zone:a", "2 node:node-c zone:b"), [1, 2], []),
    "one has no hint for nodes, the zone counts": ("a", (f"1 node:{HERE} zone:b", "2 zone:a"), [2], []),
    "one has no hint for nodes, nor for zones": ("a", (f"1 node:{HERE}", "2 zone:a"), [1, 2], []),
    "two for our node": (None, (f"1 node:{HERE}", f"2 node:{HERE}", "3 node:node-b"), [1, 2], []),
    "for several nodes": (None, (f"1 node:node-b node:{HERE}", "2 node:node-b"), [1], []),
    "our node's one is unready": ("a", (f"1 node:{HERE} zone:a unready", "2 node:node-b zone:a"), [2], []),
    "our node's one drains": ("a", (f"1 node:{HERE} zone:a draining", "2 node:node-b zone:b"), [2], []),
    "for our node, from another": (None, (f"1 node:{HERE}", "2 here node:node-b"), [1], [2]),
    "published ones are ready ones": ("a", ("1 zone:a published", "2 zone:b published"), [1], []),
    "one endpoint, for another zone": ("b", ("1 zone:a",), [1], []),
    "one endpoint, for ours": ("a", ("1 zone:a",), [1], []),
    "names of zones are compared as they are": ("A", ("1 zone:a", "2 zone:b"), [1, 2], []),
    "nobody": ("a", (), [], []),
}


@pytest.mark.parametrize(("zone", "endpoints", "cluster", "local"), HINTS.values(), ids=HINTS.keys())
def test_hints(zone: str | None, endpoints: tuple[str, ...], cluster: list[int], local: list[int]) -> None:
    plan = the_plan(services(service(**LOCAL), slice_of(*endpoints), node(zone=zone)))
    assert (numbers(plan.cluster), numbers(plan.local)) == (cluster, local)


def test_a_zone_is_followed() -> None:
    state = services(service(), slice_of(*FOUR))
    chosen = []
    for own in (node(zone="a"), node(zone="b"), node("node-b", zone="c"), node(zone=None), None):
        state.set_node(own)
        chosen.append(numbers(the_plan(state).cluster))
    assert chosen == [[1, 4], [2], [2], [1, 2, 3, 4], [1, 2, 3, 4]]


SLICES: dict[str, tuple[tuple[str, ...], tuple[str, ...], list[int], list[int]]] = {
    "several slices are one": (("1", "3"), ("2 here",), [1, 2, 3], [2]),
    "one that moves counts once": (("1", "2"), ("2", "3"), [1, 2, 3], []),
    "whose new pod is ready": (("1 draining",), ("1",), [1], []),
    "whose new pod is not ready": (("1 draining",), ("1 unready",), [], []),
    "whose new pod is elsewhere": (("1 here draining",), ("1",), [1], []),
    "ready in one": (("1 unready",), ("1",), [1], []),
    "here in one": (("1",), ("1 here",), [1], [1]),
    "a hint for each, but a doubled one": (("1 zone:a", "2 zone:b"), ("1",), [1], []),
    "twice in one slice": (("1 unready", "1", "1 draining"), (), [1], []),
}


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(("first", "second", "cluster", "local"), SLICES.values(), ids=SLICES.keys())
def test_slices_together(
    first: tuple[str, ...], second: tuple[str, ...], cluster: list[int], local: list[int], turned: bool
) -> None:
    pair = [slice_of(*first, name="web-1"), slice_of(*second, name="web-2")]
    plan = the_plan(services(service(**LOCAL), node(zone="a"), *(reversed(pair) if turned else pair)))
    assert (numbers(plan.cluster), numbers(plan.local)) == (cluster, local)


PORTS: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    "by name": ([{"name": "http", "port": 8080}, {"name": "metrics", "port": 9090}], [8080]),
    "a slice without a protocol says TCP": ([{"name": "http", "port": 8080, "protocol": None}], [8080]),
    "another protocol": ([{"name": "http", "port": 8080, "protocol": "UDP"}], []),
    "another name": ([{"name": "https", "port": 8080}], []),
    "no name": ([{"name": None, "port": 8080}], []),
    "no number": ([{"name": "http", "port": None}], []),
    "two numbers": ([{"name": "http", "port": 8081}, {"name": "http", "port": 8080}], [8080, 8081]),
    "the same twice": ([{"name": "http", "port": 8080}, {"name": "http", "port": 8080}], [8080]),
}


@pytest.mark.parametrize(("ports", "expected"), PORTS.values(), ids=PORTS.keys())
def test_ports_are_found_by_name(ports: list[dict[str, Any]], expected: list[int]) -> None:
    web = service(ports=[{"name": "http", "port": 80}])
    plan = the_plan(services(web, slice_of("1", ports=ports)), key(port="http"))
    assert [backend.port for backend in plan.cluster] == expected


def test_a_named_port_may_be_another_number_in_each_slice() -> None:
    web = service(ports=[{"name": "http", "port": 80, "targetPort": "http"}])
    old = slice_of("1", "2", name="old", ports=[{"name": "http", "port": 8080}])
    new = slice_of("2", "3", name="new", ports=[{"name": "http", "port": 9090}])
    plan = the_plan(services(web, old, new), key(port="http"))
    assert [(number, each.port) for number, each in zip(numbers(plan.cluster), plan.cluster, strict=True)] == [
        (1, 8080),
        (2, 8080),
        (2, 9090),
        (3, 9090),
    ]


def test_endpoints_are_those_of_the_family() -> None:
    web = service(clusterIPs=["10.96.0.10", "fd96::10"])
    state = services(web, slice_of("1", version=4), slice_of("2", name="web-6", version=6))
    assert numbers(the_plan(state).cluster) == [1]
    assert numbers(the_plan(state, key(version=6)).cluster) == [2]


def test_slices_that_are_for_nobody() -> None:
    state = services(
        service(),
        slice_of("1"),
        slice_of("2", name="headless", labels={"service.kubernetes.io/headless": ""}),
        slice_of("3", name="names", addressType="FQDN"),
        slice_of("4", name="another-namespace", namespace="other"),
        slice_of("5", name="unlabelled", labels={"kubernetes.io/service-name": ""}),
    )
    assert numbers(the_plan(state).cluster) == [1]
    assert state.problems() == ()


HEALTH: dict[str, tuple[tuple[str, ...], int]] = {
    "nobody": ((), 0),
    "those of this node": (("1 here", "2 here", "3"), 2),
    "not who drains": (("1 here", "2 here draining"), 1),
    "only who drains": (("1 here draining",), 0),
    "not the unready": (("1 here unready", "2 here"), 1),
}


@pytest.mark.parametrize(("endpoints", "ready"), HEALTH.values(), ids=HEALTH.keys())
def test_what_a_balancer_is_told(endpoints: tuple[str, ...], ready: int) -> None:
    balanced: dict[str, Any] = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000}
    two_ports: dict[str, Any] = {
        "clusterIPs": ["10.96.0.10", "fd96::10"],
        "ports": [{"port": 80}, {"name": "b", "port": 81}],
    }
    both = [slice_of(*endpoints, name=f"web-{version}", version=version) for version in (4, 6)]
    state = services(service(**balanced, **two_ports), *both)
    health = state.health(("default", "web"))
    assert health is not None
    assert (health.port, health.ready) == (32000, ready)
    state.set_service(service(**{**balanced, "externalTrafficPolicy": "Cluster"}))
    assert state.health(("default", "web")) is None
    assert state.changed_health() == {("default", "web"): None}
