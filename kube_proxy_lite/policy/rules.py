"""One NetworkPolicy, compiled: whom it selects, which directions it isolates, and what its rules open.

    NetworkPolicy ──▶ compile_policy() ──▶ CompiledPolicy ──▶ class_rules(direction, a pod's named ports)

Defaults (networking.k8s.io/v1): no `policyTypes` is Ingress, and Egress if there are egress rules; no protocol is TCP;
absent or empty `from`, `to` and `ports` are anybody and everything. The items of a list are alternatives, a namespace
selector and a pod selector in one item go together.

Policies fail closed. A peer or port that cannot be understood opens nothing, the rest of its policy stands, and the
problem is reported with its field and value. A rule all of whose peers are ill-formed opens nothing; an empty list
would open it to anybody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

import msgspec

from kube_proxy_lite.model import Network, Protocol
from kube_proxy_lite.policy.model import (
    LAST_PORT,
    BlockSet,
    ClassRule,
    Direction,
    PodSet,
    PortedPodSet,
    PortRange,
    RuleRef,
    merge,
    subtract,
)
from kube_proxy_lite.policy.selectors import EVERYTHING, Selector, parse
from podwire.kube.objects import IPBlock, LabelSelector, NetworkPolicy, PolicyPeer, PolicyPort

NamedPorts = Mapping[tuple[Protocol, str], tuple[int, ...]]
"""(protocol, name) → the numbers that a pod's containers give it; more than one when two containers use one name."""
_TYPES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}


class NamedPort(msgspec.Struct, frozen=True, order=True):
    """A port by the name that the receiving pod gives it."""

    protocol: Protocol
    name: str


class Rule(msgspec.Struct, frozen=True):
    """One rule of a policy. None for `peers` or `ports` is anybody, or everything; an empty tuple is nothing."""

    peers: tuple[PodSet | BlockSet, ...] | None
    ports: tuple[PortRange | NamedPort, ...] | None
    origin: RuleRef


class CompiledPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy of `ref.namespace`, as far as it could be understood; `problems` say what could not, in words."""

    ref: RuleRef
    selects: Selector
    isolates: frozenset[Direction]
    rules: Mapping[Direction, tuple[Rule, ...]]
    problems: tuple[str, ...] = ()


def compile_policy(policy: NetworkPolicy) -> CompiledPolicy:
    """The policy as values of this package. Never raises: what is ill-formed opens nothing, and is in `problems`."""
    problems: list[str] = []
    spec = policy.spec
    ref = RuleRef(policy.metadata.namespace, policy.metadata.name)
    given = {
        Direction.INGRESS: [(each.from_, each.ports) for each in spec.ingress or ()],
        Direction.EGRESS: [(each.to, each.ports) for each in spec.egress or ()],
    }
    return CompiledPolicy(
        ref=ref,
        selects=_selector(spec.pod_selector, "spec.podSelector", problems),
        isolates=_isolates(spec.policy_types, bool(spec.egress), problems),
        rules={
            direction: tuple(
                _rule(msgspec.structs.replace(ref, index=index), peers, ports, f"spec.{direction}[{index}]", problems)
                for index, (peers, ports) in enumerate(rules)
            )
            for direction, rules in given.items()
        },
        problems=tuple(problems),
    )


def compile_unreadable(namespace: str, name: str) -> CompiledPolicy:
    """What takes the place of a policy that cannot be decoded: everybody in its namespace is isolated, both ways."""
    return CompiledPolicy(
        ref=RuleRef(namespace, name),
        selects=EVERYTHING,
        isolates=frozenset(Direction),
        rules=dict.fromkeys(Direction, ()),
        problems=("it cannot be decoded, so it closes all pods of its namespace",),
    )


def class_rules(policy: CompiledPolicy, direction: Direction, named: NamedPorts) -> tuple[ClassRule, ...]:
    """What `policy` opens for a pod whose named ports are `named`.

    In ingress a named port is the pod's own; in egress it is that of the pod at the other end, so the set of peers says
    which port of which pod it is.
    """
    return tuple(
        opened
        for rule in policy.rules[direction]
        for opened in (_ingress(rule, named) if direction is Direction.INGRESS else _egress(rule))
    )


# --- rules of a class -------------------------------------------------------------------------------------------


def _ingress(rule: Rule, named: NamedPorts) -> list[ClassRule]:
    ports: tuple[PortRange, ...] | None = None
    if rule.ports is not None:
        found = set()
        for port in rule.ports:
            if isinstance(port, PortRange):
                found.add(port)
            else:
                found |= {
                    PortRange(port.protocol, number, number) for number in named.get((port.protocol, port.name), ())
                }
        if not found:
            return []
        ports = tuple(sorted(found))
    return [ClassRule(peer, ports, rule.origin) for peer in _peers(rule)]


def _egress(rule: Rule) -> list[ClassRule]:
    if rule.ports is None:
        return [ClassRule(peer, None, rule.origin) for peer in _peers(rule)]
    numbered = tuple(sorted({port for port in rule.ports if isinstance(port, PortRange)}))
    names = sorted({port for port in rule.ports if isinstance(port, NamedPort)})
    anybody = PodSet("", EVERYTHING, EVERYTHING)
    opened = [ClassRule(peer, numbered, rule.origin) for peer in _peers(rule)] if numbered else []
    for name in names:
        for peer in _peers(rule):
            pods = anybody if peer is None else peer
            if isinstance(pods, PodSet):  # there is no pod behind a block of addresses, and so no name
                opened.append(ClassRule(PortedPodSet(pods, name.protocol, name.name), None, rule.origin))
    return opened


def _peers(rule: Rule) -> tuple[PodSet | BlockSet | None, ...]:
    return (None,) if rule.peers is None else rule.peers


# --- reading the object -----------------------------------------------------------------------------------------


def _isolates(types: tuple[str, ...] | None, has_egress: bool, problems: list[str]) -> frozenset[Direction]:
    if not types:
        return frozenset(Direction) if has_egress else frozenset({Direction.INGRESS})
    unknown = [each for each in types if each not in _TYPES]
    if unknown:
        problems.append(f"spec.policyTypes has {unknown[0]!r}, expected Ingress or Egress")
    return frozenset(_TYPES[each] for each in types if each in _TYPES) or frozenset(Direction)


def _rule(
    origin: RuleRef,
    peers: tuple[PolicyPeer, ...] | None,
    ports: tuple[PolicyPort, ...] | None,
    where: str,
    problems: list[str],
) -> Rule:
    word = "from" if ".ingress[" in where else "to"
    return Rule(
        peers=_compile_peers(origin.namespace, peers, f"{where}.{word}", problems) if peers else None,
        ports=tuple(
            each
            for index, port in enumerate(ports)
            if (each := _port(port, f"{where}.ports[{index}]", problems)) is not None
        )
        if ports
        else None,
        origin=origin,
    )


def _compile_peers(
    namespace: str, peers: tuple[PolicyPeer, ...], where: str, problems: list[str]
) -> tuple[PodSet | BlockSet, ...]:
    """The pods of each item, and all blocks together: an exception holds for its own block alone."""
    pods: set[PodSet] = set()
    networks: list[Network] = []
    for index, peer in enumerate(peers):
        at = f"{where}[{index}]"
        selects_pods = peer.pod_selector is not None or peer.namespace_selector is not None
        if peer.ip_block is not None and not selects_pods:
            networks += _block(peer.ip_block, f"{at}.ipBlock", problems)
        elif peer.ip_block is not None or not selects_pods:
            problems.append(f"{at} says {'both' if selects_pods else 'neither'}, expected ipBlock or selectors")
        else:
            chosen = _selector(peer.pod_selector or LabelSelector(), f"{at}.podSelector", problems)
            if peer.namespace_selector is None:
                pods.add(PodSet(namespace, EVERYTHING, chosen))
            else:
                where_from = _selector(peer.namespace_selector, f"{at}.namespaceSelector", problems)
                pods.add(PodSet("", where_from, chosen))
    blocks = (BlockSet(merge(networks)),) if networks else ()
    return (*sorted(pods), *blocks)


def _block(block: IPBlock, where: str, problems: list[str]) -> tuple[Network, ...]:
    network = _network(block.cidr, f"{where}.cidr", problems)
    if network is None:
        return ()
    exceptions = []
    for index, text in enumerate(block.except_ or ()):
        at = f"{where}.except[{index}]"
        hole = _network(text, at, problems)
        if hole is None:
            return ()  # what it would have kept out must not get in
        if hole.version != network.version or hole == network or not network.overlaps(hole):
            problems.append(f"{at} is {text!r}, expected a part of {block.cidr}")
        exceptions.append(hole)
    return subtract(network, tuple(exceptions))


def _network(text: str, where: str, problems: list[str]) -> Network | None:
    """A network, as old objects may write it, too: with host bits, or with leading zeros in an IPv4 address."""
    address, _, length = text.strip().partition("/")
    if address.count(".") == 3 and ":" not in address:
        address = ".".join(part.lstrip("0") or "0" for part in address.split("."))
    try:
        if not length:
            raise ValueError("no prefix length")
        return ipaddress.ip_network(f"{address}/{length}", strict=False)
    except ValueError:
        problems.append(f"{where} is {text!r}, expected a network such as 10.0.0.0/8")
        return None


def _port(port: PolicyPort, where: str, problems: list[str]) -> PortRange | NamedPort | None:
    try:
        protocol = Protocol(port.protocol or "TCP")
    except ValueError:
        problems.append(f"{where}.protocol is {port.protocol!r}, expected TCP, UDP or SCTP")
        return None
    if port.port is None:
        if port.end_port is not None:
            problems.append(f"{where}.endPort is {port.end_port}, expected none without a port")
            return None
        return PortRange(protocol)
    if isinstance(port.port, str):
        if port.end_port is not None or not port.port:
            problems.append(f"{where}.port is {port.port!r}, expected a number where there is an endPort")
            return None
        return NamedPort(protocol, port.port)
    last = port.port if port.end_port is None else port.end_port
    if not 1 <= port.port <= last <= LAST_PORT:
        problems.append(f"{where} is {port.port} to {last}, expected 1 ≤ port ≤ endPort ≤ {LAST_PORT}")
        return None
    return PortRange(protocol, port.port, last)


def _selector(selector: LabelSelector, where: str, problems: list[str]) -> Selector:
    found, wrong = parse(selector)
    if wrong:
        problems.append(f"{where}: {wrong}")
    return found
