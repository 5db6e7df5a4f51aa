"""Which addresses and ports a Service gets: ClusterIPs of the ServiceCIDRs, node ports, a port for health checks. Pure.

What is asked for is given when it is free, and refused when it is not. What is not asked for is chosen by a digest of
the Service's name, so that the same manifests get the same addresses in every lab, and one that is deleted leaves its
address to nobody in particular. The lower part of each range is left to those who ask for a certain one.

Source: k8s.io/kubernetes pkg/registry/core/service/storage/alloc.go, ipallocator, portallocator; documentation "Service
ClusterIP allocation".
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from podwire.lab.api.fields import Object, Problem, dicts, shown
from podwire.lab.api.services import is_headless, needs_cluster_ip, needs_health_port, needs_node_ports

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
NODE_PORTS = range(30000, 32768)
_NODE_PORT_BAND = 86  # the first ones, which only those get who ask for one
_FAMILIES = {4: "IPv4", 6: "IPv6"}


class Refused(ValueError):
    """What is asked for cannot be given: the field, and why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.problem: Problem = (field, why)


def networks_of(service_cidrs: Iterable[Mapping[str, Any]]) -> list[Network]:
    """The networks of some ServiceCIDRs, those of the one called `kubernetes` first: it has the main family."""
    in_order = sorted(service_cidrs, key=lambda one: (one["metadata"]["name"] != "kubernetes", one["metadata"]["name"]))
    return [ipaddress.ip_network(cidr) for one in in_order for cidr in (one.get("spec") or {}).get("cidrs") or ()]


def assign(new: Object, current: Object | None, others: Iterable[Object], networks: Sequence[Network]) -> None:
    """Gives `new`, in place, its addresses and ports. `current` is what it was; `others` are all other Services.

    A cluster without networks gives nothing. Raises Refused.
    """
    spec = new["spec"]
    if not networks or not needs_cluster_ip(spec):
        return
    before = current["spec"] if current is not None and needs_cluster_ip(current["spec"]) else None
    specs = [other.get("spec") or {} for other in others]
    seed = f"{new['metadata']['namespace']}/{new['metadata']['name']}"
    _assign_cluster_ips(seed, spec, before, {ip for other in specs for ip in other.get("clusterIPs") or ()}, networks)
    taken = {number for other in specs for number in _ports_of(other)}
    _assign_node_ports(seed, spec, taken)
    _assign_health_port(seed, spec, before, taken)


# --- ClusterIPs -------------------------------------------------------------------------------------------------


def _assign_cluster_ips(
    seed: str, spec: Object, before: Object | None, taken: Collection[str], networks: Sequence[Network]
) -> None:
    asked = list(spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else []))
    if spec.get("clusterIP") and asked[0] != spec["clusterIP"]:
        asked = [spec["clusterIP"]]
    had = list((before or {}).get("clusterIPs") or ())
    if had and asked and asked[0] != had[0]:
        raise Refused("spec.clusterIPs[0]", f"Invalid value: {shown(asked[0])}: may not change once set")
    families = _families(spec, asked, had, [_FAMILIES[v] for v in dict.fromkeys(each.version for each in networks)])
    spec["ipFamilies"] = families
    if is_headless(spec):
        spec["clusterIP"], spec["clusterIPs"] = "None", ["None"]
        return
    given: list[str] = []
    for number, family in enumerate(families):
        of_family = [network for network in networks if _FAMILIES[network.version] == family]
        if number < len(asked):
            if asked[number] not in had:
                _check_address(number, asked[number], of_family, taken)
            given.append(asked[number])
        else:
            given.append(str(choose_address(seed, of_family, taken, "spec.clusterIPs")))
    spec["clusterIP"], spec["clusterIPs"] = given[0], given


def _families(spec: Object, asked: Sequence[str], had: Sequence[str], known: Sequence[str]) -> list[str]:
    """The families of a Service, in order; writes the policy that this comes to."""
    families = list(spec.get("ipFamilies") or ())
    families += [_FAMILIES[_address(each).version] for each in asked[len(families) :] if each != "None"]
    free = is_headless(spec) and not spec.get("selector")
    for number, family in enumerate(families):
        if family not in known and not free:
            text = f"Invalid value: {shown(family)}: not configured on this cluster"
            raise Refused(f"spec.ipFamilies[{number}]", text)
    families = families or [known[0]]
    if not spec.get("ipFamilyPolicy"):
        spec["ipFamilyPolicy"] = "RequireDualStack" if len(families) > 1 or free else "SingleStack"
    policy = spec["ipFamilyPolicy"]
    if policy == "SingleStack":
        if len(families) > 1 and not had:
            raise Refused("spec.ipFamilyPolicy", f"Invalid value: {shown(policy)}: must be RequireDualStack or "
                          "PreferDualStack when multiple IP families are specified")  # fmt: skip
        return families[:1]
    if policy == "RequireDualStack" and len(known) < 2 and not free:
        text = f"Invalid value: {shown(policy)}: this cluster is not configured for dual-stack services"
        raise Refused("spec.ipFamilyPolicy", text)
    more = list(_FAMILIES.values()) if free else known
    return [*families, *(family for family in more if family not in families)][:2]


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(str(text))
    except ValueError:
        raise Refused("spec.clusterIPs", f"Invalid value: {shown(text)}: must be a valid IP address") from None


def _check_address(number: int, text: str, networks: Sequence[Network], taken: Collection[str]) -> None:
    address = _address(text)
    why = ""
    if not any(address in network for network in networks):
        ranges = ", ".join(map(str, networks))
        why = f"the provided IP ({text}) is not in the valid range. The range of valid IPs is {ranges}"
    elif str(address) in taken:
        why = "provided IP is already allocated"
    if why:
        at = f"spec.clusterIPs[{number}]" if number else "spec.clusterIPs"
        raise Refused(at, f"Invalid value: {shown(text)}: failed to allocate IP {text}: {why}")


def choose_address(seed: str, networks: Sequence[Network], taken: Collection[str], field: str) -> Address:
    """A free address for whoever `seed` is, of the first network that has one. Raises Refused."""
    for network in networks:
        size = network.num_addresses
        last = size - 1 if network.version == 4 else size  # not the broadcast address, which is none in IPv6
        band = min(max(16, size // 16), 256) if size > 32 else 1
        found = _choose(f"{seed}/{network}", band, last, lambda n, own=network: str(own[n]) in taken)  # type: ignore[misc]
        if found is not None:
            return network[found]
    ranges = ", ".join(map(str, networks)) or "none"
    raise Refused(field, f"Invalid value: []: failed to allocate IP: range is full ({ranges})")


def _choose(seed: str, band: int, end: int, is_taken: Callable[[int], bool]) -> int | None:
    """A number from `band` to `end`, not included, else one from 1 on; where it looks first is the seed's."""
    width = max(1, end - band)
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) % width
    candidates = (band + (start + step) % width for step in range(width))
    low = iter(range(1, band))
    return next((n for part in (candidates, low) for n in part if n < end and not is_taken(n)), None)


# --- ports ------------------------------------------------------------------------------------------------------


def _ports_of(spec: Mapping[str, Any]) -> set[int]:
    found = {port.get("nodePort") or 0 for port in dicts(spec.get("ports"))}
    return (found | {spec.get("healthCheckNodePort") or 0}) - {0}


def _assign_node_ports(seed: str, spec: Object, taken: set[int]) -> None:
    own: set[tuple[int, str]] = set()
    by_port: dict[int, int] = {}
    ports = dicts(spec.get("ports"))
    for number, port in enumerate(ports):
        asked = port.get("nodePort")
        if not asked:
            continue
        _check_node_port(f"spec.ports[{number}].nodePort", asked, taken)
        if (asked, port["protocol"]) in own:
            raise Refused(f"spec.ports[{number}].nodePort", f"Duplicate value: {asked}")
        own.add((asked, port["protocol"]))
        by_port.setdefault(port["port"], asked)
    if not needs_node_ports(spec):
        return
    for port in ports:
        if not port.get("nodePort"):
            shared = by_port.get(port["port"])  # TCP and UDP of one port have one node port
            if shared is None or (shared, port["protocol"]) in own:
                shared = _choose_port(f"{seed}/{port['port']}", taken | {each for each, _ in own})
            port["nodePort"] = by_port[port["port"]] = shared
            own.add((shared, port["protocol"]))


def _assign_health_port(seed: str, spec: Object, before: Object | None, taken: set[int]) -> None:
    if not needs_health_port(spec):
        return
    asked, had = spec.get("healthCheckNodePort"), (before or {}).get("healthCheckNodePort")
    own = {port["nodePort"] for port in dicts(spec.get("ports")) if port.get("nodePort")}
    if asked and had and asked != had:
        raise Refused("spec.healthCheckNodePort", f"Invalid value: {asked}: field is immutable")
    if asked:
        _check_node_port("spec.healthCheckNodePort", asked, taken | own)
    else:
        spec["healthCheckNodePort"] = _choose_port(f"{seed}/health", taken | own)


def _check_node_port(field: str, asked: Any, taken: Collection[int]) -> None:
    if isinstance(asked, bool) or not isinstance(asked, int) or asked not in NODE_PORTS:
        ranges = f"{NODE_PORTS.start}-{NODE_PORTS.stop - 1}"
        why = f"provided port is not in the valid range. The range of valid ports is {ranges}"
        raise Refused(field, f"Invalid value: {shown(asked)}: {why}")
    if asked in taken:
        raise Refused(field, f"Invalid value: {asked}: provided port is already allocated")


def _choose_port(seed: str, taken: Collection[int]) -> int:
    first = NODE_PORTS.start - 1
    found = _choose(seed, _NODE_PORT_BAND + 1, len(NODE_PORTS) + 1, lambda number: first + number in taken)
    if found is None:
        raise Refused("spec.ports", "Invalid value: []: failed to allocate a nodePort: range is full")
    return first + found
