"""The lab in which `podwire explain` walks: two nodes, a pod for every sort of end, Services and policies in its way.

Of the objects some are wrong on purpose: a Service without pods, one with a wrong port, one whose pod never becomes
ready, a pod that a policy shuts in and one that it shuts off. The lab is one a module, and is ready when packets and
both proxies agree with what it has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from podwire.lab import cluster, demo, process, state
from podwire.lab.state import LabState
from tests.netns.explain_stage import ECHO, PATIENCE, labelled, passes, policy, service, wait_served
from tests.netns.lab_fixtures import fresh_name, pod

UNREADY = {"readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1}}
LOCAL = {"name": "web", "command": [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "8000"]}

OBJECTS = [
    labelled(pod("a", ECHO, nodeName="node1")),
    labelled(pod("b", ECHO, nodeName="node2")),
    labelled(pod("near", ECHO, nodeName="node1")),
    labelled(pod("host", {**ECHO, "ports": [{"containerPort": 8080}]}, nodeName="node2", hostNetwork=True)),
    labelled(pod("caged", ECHO, nodeName="node1")),
    labelled(pod("closed", ECHO, nodeName="node2")),
    labelled(pod("loopback", LOCAL, nodeName="node2")),
    service("svc", "b"),
    service("self", "a"),
    service("ported", "b", type="NodePort", ports=[{"port": 80, "nodePort": 30080}]),
    service("bare", "b", clusterIP="None"),
    service("wrong", "b", 81),
    service("nobody", "ghost"),
    service("late", "late"),
    policy("cage", "caged", policyTypes=["Egress"], egress=[{"to": [{"podSelector": {"matchLabels": {"app": "a"}}}]}]),
    policy("shut", "closed", ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "near"}}}]}]),
]
LATE = labelled(pod("late", {**ECHO, **UNREADY}, nodeName="node2"))


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    made = cluster.up(LabState(name=fresh_name(), nodes=state.plan_nodes(2), proxy="nftables"))
    try:
        cluster.wait_ready(made, cluster.apply(made, OBJECTS))
        cluster.apply(made, [LATE])
        demo.start_outside(made)

        wait_served(made, {"svc", "self", "wrong", "late"})
        process.wait_for(lambda: passes(made, "near", "svc", "80"), PATIENCE, "the proxies to have the Services")
        process.wait_for(lambda: passes(made, "near", "closed", "80"), PATIENCE, "the proxies to have the policies")
        process.wait_for(lambda: passes(made, "host", "self", "80"), PATIENCE, "the other proxy to have them, too")
        yield made
    finally:
        cluster.down(made.name)
