"""Which endpoints of a Service connections go to, as seen from this node: pure.

An EndpointSlice is read once, into a `Slice` that keeps what the choice needs and nothing else (an address, whether it
is of this node, and what state it is in), and the object is let go: about 150 bytes an endpoint. `choose` then says,
for one port of a Service, which endpoints the two traffic policies give:

    Cluster   the ready ones, after hints; when there is none, those that terminate and still serve
    Local     the same among those of this node, and hints do not count

**Hints** are all or nothing. Every ready endpoint carries a hint for nodes and one of them is for ours: those for our
node. Else every one carries a hint for zones and one is for ours: those for our zone. Else all. A node without a zone
has no zone to be hinted for. `trafficDistribution` is no matter of the proxy: the controller that writes the slices
turns it into hints.

**An endpoint that is in several slices**, as it may be while it moves, counts once; what does not terminate goes before
what does, since an address is given to a new pod when the old one is gone, and then the readier before the less ready.
Conditions that are absent are those of a healthy endpoint. A slice for FQDNs has no addresses to send packets to.

Source: discovery/v1 API reference v1.36; documentation "EndpointSlices", "Topology Aware Routing", "Virtual IPs and
Service Proxies".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from sys import intern

import msgspec

from kube_proxy_lite.model import Address, Backend, Problem, Protocol
from kube_proxy_lite.validation import Findings, Refused, read_address, read_port, read_protocol
from podwire.kube.objects import HEADLESS_LABEL, Endpoint, EndpointPort, EndpointSlice

VERSIONS = {"IPv4": 4, "IPv6": 6}


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """An endpoint of a slice. `draining` is serving while it terminates; `for_node` is None without hints for nodes."""

    address: Address
    ready: bool = True
    terminating: bool = False
    draining: bool = False
    local: bool = False
    for_node: bool | None = None
    zones: tuple[str, ...] = ()

    @property
    def serves(self) -> bool:
        """Whether it answers, be it only for as long as it takes to end."""
        return self.ready or self.draining

    @property
    def rank(self) -> tuple[object, ...]:
        """Of two candidates with one address the higher rank counts; the last parts make the choice a certain one."""
        return (
            not self.terminating,
            self.ready,
            self.draining,
            self.local,
            self.for_node is not None,
            bool(self.for_node),
            self.zones,
        )


class Slice(msgspec.Struct, frozen=True, gc=False):
    """An EndpointSlice, read. `ports` are (name, protocol, port); `candidates` are sorted by address, each once.

    `zoned` is whether any is hinted for a zone, so that the node's makes a difference.
    """

    name: str
    version: int
    ports: tuple[tuple[str, Protocol, int], ...]
    candidates: tuple[Candidate, ...]
    zoned: bool


def read_slice(obj: EndpointSlice, node: str) -> tuple[Slice | None, tuple[Problem, ...]]:
    """The slice as `node` sees it, None when it is not for a proxy; and what of it was passed over."""
    version = VERSIONS.get(obj.address_type)
    findings = Findings("EndpointSlice", obj.key)
    if version is None:
        if obj.address_type != "FQDN":
            findings.add("addressType", obj.address_type, "is none of IPv4, IPv6 and FQDN")
        return None, findings.problems()
    if HEADLESS_LABEL in (obj.metadata.labels or {}):
        return None, ()
    ports = tuple(port for port in (_read_port(port, findings) for port in obj.ports or ()) if port is not None)
    candidates: dict[int, Candidate] = {}
    for endpoint in obj.endpoints or ():
        if not endpoint.addresses:
            continue
        try:
            address = read_address(endpoint.addresses[0], version)
        except Refused as refused:
            findings.add("endpoints.addresses", endpoint.addresses[0], str(refused))
            continue
        candidate = _read_endpoint(endpoint, address, node)
        if candidates.setdefault(int(address), candidate) is not candidate:
            candidates[int(address)] = max(candidates[int(address)], candidate, key=lambda each: each.rank)
    in_order = tuple(candidates[number] for number in sorted(candidates))
    zoned = any(candidate.zones for candidate in in_order)
    return Slice(obj.metadata.name, version, tuple(sorted(set(ports))), in_order, zoned), findings.problems()


def _read_port(port: EndpointPort, findings: Findings) -> tuple[str, Protocol, int] | None:
    """None for a port that says no number: it means all ports, which is for others than Services."""
    if port.port is None:
        return None
    number = findings.read("ports.port", port.port, read_port)
    protocol = findings.read("ports.protocol", port.protocol or "", read_protocol)
    return (intern(port.name or ""), protocol, number) if number and protocol else None


def _read_endpoint(endpoint: Endpoint, address: Address, node: str) -> Candidate:
    conditions, hints = endpoint.conditions, endpoint.hints
    ready, terminating = conditions.ready is not False, bool(conditions.terminating)
    local = endpoint.node_name == node
    draining = terminating and conditions.serving is not False and not ready
    if hints is None:
        return Candidate(address, ready, terminating, draining, local)
    for_node = any(hint.name == node for hint in hints.for_nodes) if hints.for_nodes else None
    zones = tuple(sorted({intern(hint.name) for hint in hints.for_zones or ()}))
    return Candidate(address, ready, terminating, draining, local, for_node, zones)


def gather(slices: Iterable[Slice], port: str, protocol: Protocol, version: int) -> list[tuple[Candidate, int]]:
    """The endpoints of one port of a Service, with the port of each, sorted by address and port, each once."""
    parts = [
        (part, number)
        for part in slices
        if part.version == version
        for name, of_protocol, number in part.ports
        if name == port and of_protocol is protocol
    ]
    if len(parts) == 1:
        part, number = parts[0]
        return [(candidate, number) for candidate in part.candidates]
    found: dict[tuple[int, int], Candidate] = {}
    for part, number in parts:
        for candidate in part.candidates:
            place = int(candidate.address), number
            other = found.get(place)
            if other is None or candidate.rank > other.rank:
                found[place] = candidate
    return [(found[place], place[1]) for place in sorted(found)]


def choose(endpoints: Sequence[tuple[Candidate, int]], zone: str) -> tuple[tuple[Backend, ...], tuple[Backend, ...]]:
    """What the policies Cluster and Local give, to a node in `zone` (empty for none), from what `gather` gave."""
    ready = [each for each in endpoints if each[0].ready]
    cluster = _hinted(ready, zone) if ready else [each for each in endpoints if each[0].draining]
    local = [each for each in ready if each[0].local]
    if not local:
        local = [each for each in endpoints if each[0].draining and each[0].local]
    return _backends(cluster), _backends(local)


def _hinted(ready: list[tuple[Candidate, int]], zone: str) -> list[tuple[Candidate, int]]:
    if all(candidate.for_node is not None for candidate, _ in ready):
        of_node = [each for each in ready if each[0].for_node]
        if of_node:
            return of_node
    if zone and all(candidate.zones for candidate, _ in ready):
        of_zone = [each for each in ready if zone in each[0].zones]
        if of_zone:
            return of_zone
    return ready


def _backends(endpoints: list[tuple[Candidate, int]]) -> tuple[Backend, ...]:
    return tuple(Backend(candidate.address, port, candidate.local) for candidate, port in endpoints)


def count_ready_here(slices: Iterable[Slice]) -> int:
    """How many pods of this node are ready: addresses of one family, of the one that has more."""
    found: dict[int, dict[int, Candidate]] = {4: {}, 6: {}}
    for part in slices:
        of_version = found[part.version]
        for candidate in part.candidates:
            number = int(candidate.address)
            if number not in of_version or candidate.rank > of_version[number].rank:
                of_version[number] = candidate
    return max(sum(each.ready and each.local for each in candidates.values()) for candidates in found.values())
