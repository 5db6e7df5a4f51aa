"""What policies mean: every case of tests/policy_cases.py, in every pair of pods, against the oracle."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import Flow
from kube_proxy_lite.policy.policies import Policies
from podwire.kube import objects
from tests.policy_cases import BASE, CASES, NAMESPACES, PODS, PORTS, PROTOCOLS, Manifest, Step, at, pod, policy
from tests.policy_oracle import World

KINDS: dict[str, Any] = {
    "Pod": objects.Pod,
    "Namespace": objects.Namespace,
    "NetworkPolicy": objects.NetworkPolicy,
}
PLACES = [f"{home}/{name}" for home in NAMESPACES for name in PODS]


def put(policies: Policies, manifest: Manifest) -> None:
    """Sets an object as the watch would deliver it."""
    decoded = msgspec.convert(manifest, KINDS[manifest["kind"]])
    setters: dict[str, Any] = {
        "Pod": policies.set_pod,
        "Namespace": policies.set_namespace,
        "NetworkPolicy": policies.set_policy,
    }
    setters[manifest["kind"]](decoded)


def remove(policies: Policies, kind: str, namespace: str, name: str) -> None:
    {"Pod": policies.drop_pod, "Namespace": policies.drop_namespace, "NetworkPolicy": policies.drop_policy}[kind](
        (namespace, name)
    )


def flow(source: str, destination: str, protocol: str, port: int) -> Flow:
    """A flow between two addresses."""
    ends = (ipaddress.ip_address(each) for each in (source, destination))
    return Flow(source=next(ends), destination=next(ends), protocol=protocol, port=port)


def take(world: World, policies: Policies, step: Step) -> None:
    for kind, namespace, name in step.remove:
        world.remove(kind, namespace, name)
        remove(policies, kind, namespace, name)
    for manifest in step.put:
        world.put(manifest)
        put(policies, manifest)


def started(node: str | None = None) -> tuple[World, Policies]:
    policies = Policies(node)
    for manifest in BASE:
        put(policies, manifest)
    return World(BASE), policies


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
def test_every_pair_is_judged_as_the_oracle_judges(steps: tuple[Step, ...]) -> None:
    world, policies = started()
    for step in steps:
        take(world, policies, step)
        for source, destination, port, protocol, passes in step.says:
            ends = [at(place) for place in (source, destination)]
            assert world.allows(ends[0], ends[1], protocol, port) is passes, (source, destination, port, protocol)
        wrong = [
            (source, destination, protocol, port, version)
            for source, destination in itertools.product(PLACES, repeat=2)
            for protocol, port, version in itertools.product(PROTOCOLS, PORTS, (4, 6))
            for ends in [[at(place, version) for place in (source, destination)]]
            if judge(policies, flow(ends[0], ends[1], protocol, port)).allowed
            is not world.allows(ends[0], ends[1], protocol, port)
        ]
        assert wrong == []


@pytest.mark.parametrize("steps", CASES.values(), ids=CASES.keys())
def test_what_changed_adds_up_to_what_there_is(steps: tuple[Step, ...]) -> None:
    world, policies = started("node1")
    known = dict(policies.drain())
    for step in steps:
        take(world, policies, step)
        known.update(policies.drain())
        assert {fact: value for fact, value in known.items() if value is not None} == policies.state()
        fresh = Policies("node1")
        for manifest in world.objects.values():
            put(fresh, manifest)
        assert fresh.state() == policies.state()


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a cidr that is none": (
        {"ingress": [{"from": [{"ipBlock": {"cidr": "10.244.1.0/99"}}]}]},
        "ingress[0].from[0].ipBlock.cidr",
    ),
    "an exception that is none": (
        {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["bad"]}}]}]},
        "except[0] is 'bad'",
    ),
    "a peer that says nothing": ({"ingress": [{"from": [{}]}]}, "says neither"),
    "a peer that says both": (
        {"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]},
        "says both",
    ),
    "an operator that is none": (
        {
            "ingress": [
                {"from": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like", "values": ["b"]}]}}]}
            ]
        },
        "'Like'",
    ),
    "a protocol that is none": ({"ingress": [{"ports": [{"protocol": "ICMP"}]}]}, "'ICMP'"),
    "a range that ends before it begins": ({"ingress": [{"ports": [{"port": 90, "endPort": 80}]}]}, "90 to 80"),
    "a range from a name": ({"ingress": [{"ports": [{"port": "http", "endPort": 80}]}]}, "'http'"),
    "a type that is none": ({"policyTypes": ["Sideways"]}, "'Sideways'"),
}


@pytest.mark.parametrize(("spec", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_understood_opens_nothing_and_is_named(spec: dict[str, Any], words: str) -> None:
    _, policies = started()
    put(policies, policy("x/broken", **spec))
    (problem,) = policies.problems()["x", "broken"]
    assert words in problem
    assert not judge(policies, flow(at("y/b"), at("x/a"), "TCP", 80)).allowed
    assert judge(policies, flow(at("x/a"), at("x/a"), "TCP", 80)).allowed


def test_a_broken_peer_leaves_the_others_as_they_are() -> None:
    _, policies = started()
    peers = [{"ipBlock": {"cidr": "nonsense"}}, {"namespaceSelector": {"matchLabels": {"ns": "y"}}}]
    put(policies, policy("x/half", ingress=[{"from": peers}]))
    assert judge(policies, flow(at("y/b"), at("x/a"), "TCP", 80)).allowed
    assert not judge(policies, flow(at("z/b"), at("x/a"), "TCP", 80)).allowed


@pytest.mark.parametrize("cidr", ["10.244.01.0/24", "10.244.1.7/24", " 10.244.1.0/24"])
def test_networks_are_read_as_old_objects_write_them(cidr: str) -> None:
    _, policies = started()
    put(policies, policy("x/p", ingress=[{"from": [{"ipBlock": {"cidr": cidr}}]}]))
    assert not policies.problems()
    assert judge(policies, flow(at("y/b"), at("x/a"), "TCP", 80)).allowed


def test_a_ruling_names_the_rule_or_the_policies() -> None:
    _, policies = started()
    put(policies, policy("x/p", ingress=[{"ports": [{"port": 81}]}, {"ports": [{"port": 80}]}]))
    opened = judge(policies, flow(at("y/b"), at("x/a"), "TCP", 80)).decided_by
    assert (opened.allowed, opened.why) == (True, "rule 2 of x/p allows it")
    closed = judge(policies, flow(at("y/b"), at("x/a"), "UDP", 80)).decided_by
    assert (closed.allowed, closed.why) == (False, "x/a is isolated for ingress by x/p, and no rule allows it")


def test_a_pod_and_its_own_node_always_reach_each_other_and_others_do_not() -> None:
    _, policies = started()
    put(policies, policy("x/deny", policyTypes=["Ingress", "Egress"]))
    nodes = {ipaddress.ip_address("172.31.0.11"): "node1", ipaddress.ip_address("172.31.0.12"): "node2"}
    pod = at("x/a")
    passes = {
        (way, node): judge(policies, flow(*((node, pod) if way == "in" else (pod, node)), "TCP", 80), nodes).allowed
        for way in ("in", "out")
        for node in ("172.31.0.11", "172.31.0.12")
    }
    assert passes == {
        ("in", "172.31.0.11"): True,
        ("in", "172.31.0.12"): False,
        ("out", "172.31.0.11"): True,
        ("out", "172.31.0.12"): False,
    }


@pytest.mark.parametrize("attached_first", [True, False])
def test_an_address_is_whose_the_daemon_says_whoever_was_created_later(attached_first: bool) -> None:
    """A pod that waited long for its node has the address of a younger one that is gone, but not from the API yet."""
    _, policies = started()
    put(policies, policy("x/deny", select={"pod": "a"}))
    younger = pod("x/b")
    younger["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z"
    younger["status"] = {"phase": "Running", "podIP": at("x/a")}
    changes: list[Callable[[], None]] = [
        lambda: policies.attach(("x", "a"), "uid-x-a", (ipaddress.ip_address(at("x/a")),)),
        lambda: put(policies, younger),
    ]
    for change in changes if attached_first else reversed(changes):
        change()
    assert not judge(policies, flow(at("y/b"), at("x/a"), "TCP", 80)).allowed
    policies.detach(("x", "a"))
    assert judge(policies, flow(at("y/b"), at("x/a"), "TCP", 80)).allowed
