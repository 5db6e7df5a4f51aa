"""`podwire explain` by plain routes, with Services and policies in iptables, for pods of both families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from podwire.explain.hops import State
from podwire.lab import cluster, process, proxy, state
from podwire.lab.state import LabState
from tests.netns.explain_stage import ECHO, PATIENCE, labelled, look, on, passes, policy, service, wait_served
from tests.netns.lab_fixtures import fresh_name, pod

BOTH = "10.244.0.0/16,fd00:10:244::/56"
OBJECTS = [
    labelled(pod("a", ECHO, nodeName="node1")),
    labelled(pod("b", ECHO, nodeName="node2")),
    labelled(pod("closed", ECHO, nodeName="node2")),
    service("svc", "b"),
    policy("shut", "closed", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "b"}}}]}]),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    made = LabState(
        name=fresh_name(), nodes=state.plan_nodes(2, BOTH), pod_cidr=BOTH, proxy="iptables", backend="direct"
    )
    made = cluster.up(made)
    try:
        cluster.wait_ready(made, cluster.apply(made, OBJECTS))
        wait_served(made, {"svc"})
        process.wait_for(lambda: passes(made, "a", "svc", "80"), PATIENCE, "the proxies to have the Service")
        yield made
    finally:
        cluster.down(made.name)


def addresses(lab: LabState, name: str) -> list[str]:
    found = next(each for each in cluster.pods(lab) if each["metadata"]["name"] == name)
    return [each["ip"] for each in found["status"]["podIPs"]]


def test_plain_routes_of_both_families(lab: LabState) -> None:
    for address in addresses(lab, "b"):
        path = look(lab, "a", address)
        wrong = [(hop.title, each.text) for hop in path.hops for each in hop.findings if each.state is not State.OK]
        assert wrong == []
        titles = [hop.title for hop in path.hops]
        assert "underlay to node2" in titles
        assert not any("tunnel" in title for title in titles)


def test_a_policy_of_both_families(lab: LabState) -> None:
    for address in addresses(lab, "closed"):
        first = look(lab, "a", address).first(State.FAILS)
        assert first is not None
        assert first[1].title == "ingress policy"
    allowed = look(lab, "b", "closed")
    assert allowed.first(State.FAILS) is None
    (hop,) = (each for each in allowed.hops if each.title == "ingress policy")
    assert "the kernel sends it through PODWIRE-IN-" in hop.findings[1].text
    assert {each.state for each in hop.findings} == {State.OK}


def test_services_in_iptables(lab: LabState) -> None:
    path = look(lab, "a", "svc")
    (hop,) = (each for each in path.hops if each.title == "Service default/svc")
    assert any("there is a rule to each endpoint" in each.text for each in hop.findings)
    proxy.end(lab, "node1")
    try:
        on(lab, "node1", "iptables", "-t", "nat", "-F", "KUBE-SERVICES")
        first = look(lab, "a", "svc").first(State.FAILS)
        assert first is not None
        assert (first[1].title, "no rule of node1 that packets of pods meet" in first[2].text) == (
            "Service default/svc",
            True,
        )
    finally:
        proxy.start(lab, "node1")
        proxy.wait_healthy(lab, lab.node("node1"))
