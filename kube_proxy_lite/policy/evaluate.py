"""The evaluator: what policies make of a flow, and which rule decided. Pure, and the only place that says so.

    egress of the source pod  ──allowed──▶  ingress of the destination pod  ──allowed──▶  passes

It answers from the state that the renderers are told from, so that the rules in the kernel, the repair of conntrack and
`explain` cannot disagree about what a policy means. The flow is as policies see it: the destination is the endpoint
after Service translation, the source the client before masquerade.

What is never filtered (Kubernetes documentation, "Network Policies"): traffic between a pod and its own node, and a
pod's traffic to itself. Other nodes are ordinary peers, with the addresses that they are known by.
"""

from __future__ import annotations

from collections.abc import Mapping

from kube_proxy_lite.model import Address
from kube_proxy_lite.policy.model import (
    ClassRule,
    Direction,
    Flow,
    Judgement,
    Member,
    PolicyClass,
    PortedPodSet,
    Ruling,
)
from kube_proxy_lite.policy.pods import PodFacts
from kube_proxy_lite.policy.policies import Policies

NodeAddresses = Mapping[Address, str]
"""Address of a node (on the underlay, its VTEP, its bridge) → the node's name."""


def judge(policies: Policies, flow: Flow, nodes: NodeAddresses | None = None) -> Judgement:
    """What becomes of `flow`. A side that is not a pod of a protected node has no say."""
    nodes = nodes or {}
    source, destination = policies.owner(flow.source), policies.owner(flow.destination)
    exempt = ""
    if flow.source == flow.destination:
        exempt = "a pod always reaches itself"
    elif _is_own_node(nodes, source, flow.destination) or _is_own_node(nodes, destination, flow.source):
        exempt = "a pod and its own node always reach each other"
    return Judgement(
        egress=_side(policies, Direction.EGRESS, source, flow, exempt),
        ingress=_side(policies, Direction.INGRESS, destination, flow, exempt),
    )


def _is_own_node(nodes: NodeAddresses, pod: PodFacts | None, other: Address) -> bool:
    return pod is not None and nodes.get(other) == pod.node


def _side(policies: Policies, way: Direction, pod: PodFacts | None, flow: Flow, exempt: str) -> Ruling:
    if exempt:
        return Ruling(direction=way, allowed=True, why=exempt)
    if pod is None or not policies.is_protected(pod):
        return Ruling(direction=way, allowed=True, why="no pod of this node")
    name = f"{pod.namespace}/{pod.name}"
    found = policies.classes(pod).get(way)
    if found is None:
        return Ruling(direction=way, allowed=True, why=f"no policy isolates {name} for {way}")
    return _rule(policies, found, name, flow)


def _rule(policies: Policies, found: PolicyClass, name: str, flow: Flow) -> Ruling:
    peer = flow.source if found.direction is Direction.INGRESS else flow.destination
    for rule in found.rules:
        if _opens(policies, rule, peer, flow):
            return Ruling(
                direction=found.direction,
                allowed=True,
                why=f"rule {rule.origin.index + 1} of {rule.origin} allows it",
                rule=rule.origin,
                policies=found.policies,
            )
    listed = ", ".join(map(str, found.policies))
    return Ruling(
        direction=found.direction,
        allowed=False,
        why=f"{name} is isolated for {found.direction} by {listed}, and no rule allows it",
        policies=found.policies,
    )


def _opens(policies: Policies, rule: ClassRule, peer: Address, flow: Flow) -> bool:
    if rule.ports is not None and not any(each.holds(flow.protocol, flow.port) for each in rule.ports):
        return False
    if rule.peers is None:
        return True
    member: Member = peer
    if isinstance(rule.peers, PortedPodSet):
        if rule.peers.protocol != flow.protocol:
            return False
        member = (peer, flow.port)
    return policies.has(rule.peers, member)
