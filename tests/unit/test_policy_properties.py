"""Random clusters, policies and events: evaluator ≡ oracle, and state that grew ≡ state made at once.

Everything is drawn from little: two namespaces, a handful of labels and addresses, so that pods do meet, take over each
other's addresses, and policies do select them.
"""

from __future__ import annotations

import ipaddress
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kube_proxy_lite.policy.evaluate import judge
from kube_proxy_lite.policy.model import Flow
from kube_proxy_lite.policy.policies import Policies
from tests.policy_cases import Manifest
from tests.policy_oracle import World
from tests.unit.test_policy_evaluator import put, remove

ADDRESSES = ("10.0.0.1", "10.0.1.1", "fd00::1", "192.0.2.1")
FLOWS: list[tuple[str, str, str, int]] = [
    (pair[0], pair[1], protocol, port)
    for pair in itertools.product(ADDRESSES, repeat=2)
    if len({":" in each for each in pair}) == 1
    for protocol, port in (("TCP", 80), ("TCP", 81), ("UDP", 80))
]
labels = st.dictionaries(st.sampled_from("kl"), st.sampled_from("vw"), max_size=2)
requirement = st.builds(
    lambda key, operator, values: {
        "key": key,
        "operator": operator,
        **({"values": values} if operator in ("In", "NotIn") else {}),
    },
    st.sampled_from("kl"),
    st.sampled_from(("In", "NotIn", "Exists", "DoesNotExist")),
    st.lists(st.sampled_from("vw"), min_size=1, max_size=2),
)
selector = st.fixed_dictionaries(
    {}, optional={"matchLabels": labels, "matchExpressions": st.lists(requirement, max_size=2)}
)
blocks = st.sampled_from(
    (
        {"cidr": "10.0.0.0/8"},
        {"cidr": "10.0.0.0/16", "except": ["10.0.0.0/24"]},
        {"cidr": "10.0.0.0/30", "except": ["10.0.0.2/32", "10.0.0.0/31"]},
        {"cidr": "10.0.1.0/30", "except": ["10.0.1.2/32", "10.0.1.0/32"]},
        {"cidr": "0.0.0.0/0", "except": ["10.0.1.1/32"]},
        {"cidr": "::/0"},
        {"cidr": "fd00::/64", "except": ["fd00::1/128"]},
    )
)
peer = st.one_of(
    st.fixed_dictionaries({"podSelector": selector}),
    st.fixed_dictionaries({"namespaceSelector": selector}),
    st.fixed_dictionaries({"podSelector": selector, "namespaceSelector": selector}),
    st.fixed_dictionaries({"ipBlock": blocks}),
)
port = st.sampled_from(
    (
        {"port": 80},
        {"port": 80, "endPort": 81},
        {"protocol": "UDP"},
        {"protocol": "TCP"},
        {"port": "web"},
        {"port": "web", "protocol": "UDP"},
    )
)


def rule(direction: str) -> st.SearchStrategy[Manifest]:
    """A rule with at most two peers and two ports; either may be absent, or empty."""
    peers, ports = st.lists(peer, max_size=2), st.lists(port, max_size=2)
    return st.fixed_dictionaries({}, optional={direction: peers, "ports": ports})


def _meta(kind: str, namespace: str, name: str, **more: Any) -> Manifest:
    return {"kind": kind, "metadata": {"name": name, "namespace": namespace, **more}}


policies_drawn = st.builds(
    lambda namespace, name, spec: _meta("NetworkPolicy", namespace, name) | {"spec": spec},
    st.sampled_from("xy"),
    st.sampled_from(("p", "q")),
    st.fixed_dictionaries(
        {"podSelector": selector},
        optional={
            "policyTypes": st.sampled_from((["Ingress"], ["Egress"], ["Ingress", "Egress"], [])),
            "ingress": st.lists(rule("from"), max_size=2),
            "egress": st.lists(rule("to"), max_size=2),
        },
    ),
)
namespaces_drawn = st.builds(
    lambda name, found: _meta("Namespace", "", name, labels=found), st.sampled_from("xy"), labels
)
pods_drawn = st.builds(
    lambda namespace, name, found, node, ips, number, phase, uid, host: (
        _meta("Pod", namespace, name, labels=found, uid=f"{namespace}{name}{uid}", creationTimestamp=f"2026-01-0{uid}")
        | {
            "spec": {
                "nodeName": node,
                "hostNetwork": host,
                "containers": [{"ports": [{"name": "web", "containerPort": number}]}],
            },
            "status": {"phase": phase, "podIPs": [{"ip": each} for each in ips]},
        }
    ),
    st.sampled_from("xy"),
    st.sampled_from("ab"),
    labels,
    st.sampled_from(("n1", "n2")),
    st.lists(st.sampled_from(ADDRESSES[:3]), min_size=1, max_size=2, unique=True),
    st.sampled_from((80, 81)),
    st.sampled_from(("Running", "Running", "Running", "Failed")),
    st.integers(1, 3),
    st.sampled_from((False, False, False, True)),
)
removed = st.one_of(
    st.tuples(st.just("Pod"), st.sampled_from("xy"), st.sampled_from("ab")),
    st.tuples(st.just("NetworkPolicy"), st.sampled_from("xy"), st.sampled_from(("p", "q"))),
    st.tuples(st.just("Namespace"), st.just(""), st.sampled_from("xy")),
)
BEGIN = [_meta("Namespace", "", name, labels={"k": value}) for name, value in (("x", "v"), ("y", "w"))]
events = st.builds(
    lambda first, then: [*BEGIN, first, *then],
    policies_drawn,
    st.lists(st.one_of(pods_drawn, pods_drawn, policies_drawn, namespaces_drawn, removed), min_size=4, max_size=14),
)
many = settings(max_examples=300, deadline=None)


def happen(event: Any, world: World, *several: Policies) -> None:
    """One event, to the world and to whoever follows it."""
    if isinstance(event, tuple):
        world.remove(*event)
        for policies in several:
            remove(policies, *event)
        return
    world.put(event)
    for policies in several:
        put(policies, event)


@many
@given(events)
def test_the_evaluator_says_what_the_oracle_says(drawn: list[Any]) -> None:
    world, policies = World(), Policies(None)
    for event in drawn:
        happen(event, world, policies)
    for source, destination, protocol, number in FLOWS:
        flow = Flow(
            source=ipaddress.ip_address(source),
            destination=ipaddress.ip_address(destination),
            protocol=protocol,
            port=number,
        )
        assert judge(policies, flow).allowed is world.allows(source, destination, protocol, number), flow


@many
@given(events)
def test_what_grew_is_what_would_have_been_made_at_once(drawn: list[Any]) -> None:
    world, policies = World(), Policies("n1")
    known: dict[Any, Any] = {}
    for event in drawn:
        happen(event, world, policies)
        known.update(policies.drain())
        fresh = Policies("n1")
        for manifest in world.objects.values():
            put(fresh, manifest)
        assert policies.state() == fresh.state()
        assert {fact: value for fact, value in known.items() if value is not None} == fresh.state()
