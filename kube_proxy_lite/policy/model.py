"""The vocabulary of policies: flows, what a class of pods lets pass, and what was decided about a flow.

    local address ──▶ PolicyClass (one a direction, or none: not isolated)
                        └─ ClassRule … : from or to the members of a set, on these ports ──▶ accepted
                        └─ nothing matched ──▶ dropped

Pods with the same policies and the same numbers behind the same port names share a class, so classes grow with the
ways in which pods differ, and sets with pods. Sets are shared by the classes: a pod that starts anywhere is one member
of each set that selects it, whatever the number of pods that are protected. A class is its content: computed twice, on
two nodes or before and after a restart, it is the same, and so is its name.
"""

from __future__ import annotations

import hashlib
import ipaddress
from enum import StrEnum
from typing import Any

import msgspec

from kube_proxy_lite.model import Address, Network, Protocol
from kube_proxy_lite.policy.selectors import Selector

LAST_PORT = 65535


class Direction(StrEnum):
    """As seen from the pod that a policy selects."""

    INGRESS = "ingress"
    EGRESS = "egress"


class PortRange(msgspec.Struct, frozen=True, order=True):
    """Ports `first` to `last` of a protocol, both included; 0 to 65535 is all of them."""

    protocol: Protocol
    first: int = 0
    last: int = LAST_PORT

    def holds(self, protocol: str, port: int) -> bool:
        """Whether a packet of this protocol to this port is meant."""
        return self.protocol == protocol and self.first <= port <= self.last


# --- sets -------------------------------------------------------------------------------------------------------


class PodSet(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """Addresses of pods: of one `namespace`, or, when that is empty, of those that `namespaces` selects."""

    namespace: str
    namespaces: Selector
    pods: Selector


class PortedPodSet(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """(address, port) of those pods of `pods` that call a port of this protocol `port`."""

    pods: PodSet
    protocol: Protocol
    port: str


class BlockSet(msgspec.Struct, frozen=True, cache_hash=True):
    """Networks of both families that do not overlap: ranges less their exceptions."""

    networks: tuple[Network, ...]


SetKey = PodSet | PortedPodSet | BlockSet
Member = Address | tuple[Address, int]
"""What a PodSet has; of a PortedPodSet with the port."""


# --- classes ----------------------------------------------------------------------------------------------------


class RuleRef(msgspec.Struct, frozen=True, order=True):
    """Where a rule stands: the `index`-th of the direction's rules of a policy, counted from 0."""

    namespace: str
    policy: str
    index: int = 0

    def __str__(self) -> str:
        return f"{self.namespace}/{self.policy}"


class ClassRule(msgspec.Struct, frozen=True, cache_hash=True):
    """Opens a class to the members of `peers` (None: to anybody) on `ports` (None: on all, and for any protocol).

    With a PortedPodSet the ports are in the set, and `ports` is None.
    """

    peers: SetKey | None
    ports: tuple[PortRange, ...] | None
    origin: RuleRef


class PolicyClass(msgspec.Struct, frozen=True, cache_hash=True):
    """What pods let in, or out. `policies` are those that isolate them, sorted; without a rule nothing passes."""

    direction: Direction
    policies: tuple[RuleRef, ...]
    rules: tuple[ClassRule, ...]


def digest(value: PolicyClass | SetKey | tuple[PortRange, ...]) -> str:
    """A name for a value's content, 16 hexadecimal digits: the same in every process that computes it."""
    return hashlib.sha256(msgspec.json.encode(value, enc_hook=str)).hexdigest()[:16]


# --- flows ------------------------------------------------------------------------------------------------------


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """A new connection as policies see it: after Service translation, before masquerade."""

    source: Address
    destination: Address
    protocol: str
    port: int


class Ruling(msgspec.Struct, frozen=True, kw_only=True):
    """What one side says. `rule` is what opened it; None when nothing did, or when nobody isolates that side.

    `policies` are those that isolate it. `why` is a clause that a person can read.
    """

    direction: Direction
    allowed: bool
    why: str
    rule: RuleRef | None = None
    policies: tuple[RuleRef, ...] = ()


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a flow: both sides must allow it."""

    egress: Ruling
    ingress: Ruling

    @property
    def allowed(self) -> bool:
        """Whether the flow passes."""
        return self.egress.allowed and self.ingress.allowed

    @property
    def decided_by(self) -> Ruling:
        """The side that says why: the first that forbids, else the ingress."""
        return self.ingress if self.egress.allowed else self.egress


def subtract(network: Network, exceptions: tuple[Network, ...]) -> tuple[Network, ...]:
    """`network` less `exceptions`, as networks that do not overlap, sorted."""
    rest: list[Network] = [network]
    for hole in exceptions:
        if hole.version != network.version:
            continue
        rest = [piece for each in rest for piece in _less(each, hole)]
    return merge(rest)


def merge(networks: list[Network]) -> tuple[Network, ...]:
    """The same addresses, in as few networks as there can be, sorted by family and address."""
    v4 = [each for each in networks if isinstance(each, ipaddress.IPv4Network)]
    v6 = [each for each in networks if isinstance(each, ipaddress.IPv6Network)]
    return (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6))


def _less(network: Any, hole: Any) -> list[Network]:
    if not network.overlaps(hole):
        return [network]
    return list(network.address_exclude(hole)) if hole.prefixlen > network.prefixlen else []
