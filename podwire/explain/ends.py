"""The ends of a path: a pod's interface, its wire to the bridge, what it may send as, and who listens. Pure.

    pod  eth0 ─── veth ─── port of pw0 ─── bridge podwire: port . MAC . address must be bound

Both ends of a connection send, so each is looked at in the same way; only the last hop asks for a listener.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

from ipam_daemon.plan import BRIDGE
from kube_proxy_lite.model import Address
from podwire.explain.hops import Ask, Finding, Hop, Reading, Steps, Where, fails, first_line, ok, unseen, warns

_REPAIR = "`podwire ipam check --fix` on {node}"
_RECREATE = "recreate the pod"


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A pod's interface. `peer` is the index of its other end on the node, 0 when not known."""

    name: str
    mac: str
    mtu: int
    peer: int


def interface(title: str, where: Where, address: Address, to: Address) -> Steps[tuple[Hop, Link | None]]:
    """The pod's interface, and its way to `to`. The link is None when it could not be read."""
    reading = yield Ask(where, ("ip", "-j", "-d", "addr", "show"))
    if not reading.seen:
        return Hop(title=title, where=str(where), findings=(unseen("its interface", reading),)), None
    found = _link_of(reading, address)
    if found is None:
        has = ", ".join(str(each) for each in _addresses(reading) if not each.is_loopback) or "none"
        gone = fails(f"no interface of the pod has {address}; it has {has}", _RECREATE, reading)
        return Hop(title=title, where=str(where), findings=(gone,)), None
    link = Link(
        name=found["ifname"], mac=found.get("address", ""), mtu=found.get("mtu", 0), peer=found.get("link_index", 0)
    )
    findings = [ok(f"{link.name} is up with {address}, MAC {link.mac}, MTU {link.mtu}", reading)]
    if "UP" not in found.get("flags", ()):
        findings = [fails(f"{link.name} is down", f"ip link set {link.name} up in the pod, or {_RECREATE}", reading)]
    findings.append((yield from _route(where, to)))
    return Hop(title=title, where=str(where), findings=tuple(findings)), link


def _route(where: Where, to: Address) -> Steps[Finding]:
    reading = yield Ask(where, ("ip", "-j", "route", "get", str(to)))
    routes = reading.items()
    if not routes:
        return fails(f"the pod has no route to {to}: {first_line(reading)}", _RECREATE, reading)
    via = f"via {routes[0]['gateway']}" if "gateway" in routes[0] else "directly"
    return ok(f"{to} {via} by {routes[0].get('dev', '?')}", reading)


def wire(where: Where, link: Link | None, address: Address) -> Steps[Hop]:
    """The pod's wire on the node: the other end of its interface in the bridge, and bound to what the pod is."""
    title = "wire, bridge and spoof guard"
    node = Where(where.node)
    reading = yield Ask(node, ("ip", "-j", "-d", "link", "show", "master", BRIDGE))
    if not reading.seen or link is None:
        why = Reading(seen=False, text="the pod's interface is not known")
        return Hop(title=title, where=where.node, findings=(unseen("the wire", why if reading.seen else reading),))
    repair = _REPAIR.format(node=where.node)
    if not reading.well:
        gone = fails(f"there is no bridge {BRIDGE}: {first_line(reading)}", repair, reading)
        return Hop(title=title, where=where.node, findings=(gone,))
    findings = []
    port = next((each for each in reading.items() if link.peer == each.get("ifindex")), None)
    if port is None:
        lost = fails(f"no port of {BRIDGE} is the other end of {link.name}", repair, reading)
        return Hop(title=title, where=where.node, findings=(lost,))
    name = port["ifname"]
    if "UP" not in port.get("flags", ()):
        findings.append(fails(f"{name} is down", f"ip link set {name} up, or {repair}", reading))
    elif port.get("mtu", 0) < link.mtu:
        text = f"{name} has MTU {port['mtu']} and the pod {link.mtu}: larger packets are lost"
        findings.append(fails(text, f"ip link set {name} mtu {link.mtu}", reading))
    else:
        findings.append(ok(f"{name} is a port of {BRIDGE}, up, MTU {port.get('mtu')}", reading))
    findings.append((yield from _gateway(node, address)))
    findings.append((yield from _guard(node, name, link.mac, address)))
    return Hop(title=title, where=where.node, findings=tuple(findings))


def _gateway(node: Where, address: Address) -> Steps[Finding]:
    """The bridge is up and has the gateway of the pod's block."""
    reading = yield Ask(node, ("ip", "-j", "addr", "show", "dev", BRIDGE))
    items = reading.items()
    up = bool(items) and "UP" in items[0].get("flags", ())
    networks = _networks(items[0]) if items else []
    if not up:
        return fails(f"{BRIDGE} is down", f"ip link set {BRIDGE} up", reading)
    if not any(address in each.network for each in networks):
        return fails(f"{BRIDGE} has no address of the block of {address}", _REPAIR.format(node=node.node), reading)
    own = next(each for each in networks if address in each.network)
    return ok(f"{BRIDGE} is up, the gateway is {own.ip}, MTU {items[0].get('mtu')}", reading)


def _guard(node: Where, port: str, mac: str, address: Address) -> Steps[Finding]:
    element = f'{{ "{port}" . {mac} . {address} }}'
    words = ("nft", "get", "element", "bridge", "podwire", f"bound{address.version}", element)
    reading = yield Ask(node, words)
    if reading.well:
        return ok(f"the spoof guard lets {port} send as {mac}, {address}", reading)
    tables = yield Ask(node, ("nft", "list", "tables", "bridge"))
    if tables.well and "podwire" not in tables.text:
        return warns("there is no spoof guard: pods may send as anybody", _REPAIR.format(node=node.node), tables)
    fix = f"the pod has changed its MAC or address: {_RECREATE}; or {_REPAIR.format(node=node.node)}"
    return fails(f"the spoof guard drops what comes from {port} as {mac}, {address}", fix, reading)


# --- who listens --------------------------------------------------------------------------------------------------


def listener(where: Where, address: Address, protocol: str, port: int, name: str) -> Steps[Hop]:
    """Whether somebody listens at the end."""
    title = "the listener"
    if protocol not in ("TCP", "UDP"):
        nothing = Reading(seen=False, text=f"ss does not list {protocol}")
        return Hop(title=title, where=str(where), findings=(unseen(f"who listens on {protocol} {port}", nothing),))
    reading = yield Ask(where, ("ss", "-H", "-l", "-n", "-t" if protocol == "TCP" else "-u"))
    if not reading.well:
        return Hop(title=title, where=str(where), findings=(unseen(f"who listens on {protocol} {port}", reading),))
    listening = _listening(reading.text)
    ends = [each for each, number in listening if number == port]
    if any(_takes(each, address) for each in ends):
        found = ok(f"somebody listens on {protocol} {port}", reading)
    elif ends:
        text = f"{protocol} {port} is listened on at {', '.join(sorted(set(ends)))} alone, not at {address}"
        found = fails(text, f"let {name} listen on all addresses", reading)
    else:
        others = ", ".join(str(number) for number in sorted({number for _, number in listening})) or "nothing"
        text = f"nothing listens on {protocol} {port} in {name}: connections are refused; it listens on {others}"
        found = fails(text, "a targetPort or port that is wrong, or a server that does not run: correct it", reading)
    return Hop(title=title, where=str(where), findings=(found,))


def _listening(text: str) -> list[tuple[str, int]]:
    """(address, port) of the fourth column of `ss -H -l`: `0.0.0.0:80`, `*:80`, `[::]:80`, `10.0.0.1%eth0:80`."""
    found = []
    for line in text.splitlines():
        columns = line.split()
        if len(columns) >= 4:
            address, _, port = columns[3].rpartition(":")
            if port.isdigit():
                found.append((address.strip("[]").partition("%")[0], int(port)))
    return found


def _takes(listening: str, address: Address) -> bool:
    if listening in ("*", "::"):  # `::` takes IPv4, too, unless it says no, which ss does not show
        return True
    if listening == "0.0.0.0":
        return address.version == 4
    try:
        there = ipaddress.ip_address(listening)
    except ValueError:
        return False
    return address in (there, getattr(there, "ipv4_mapped", None))


# --- what ip says -------------------------------------------------------------------------------------------------


def _link_of(reading: Reading, address: Address) -> dict[str, Any] | None:
    for item in reading.items():
        if any(each.ip == address for each in _networks(item)):
            return item
    return None


def _addresses(reading: Reading) -> list[Address]:
    return [each.ip for item in reading.items() for each in _networks(item)]


def _networks(item: dict[str, Any]) -> list[ipaddress.IPv4Interface | ipaddress.IPv6Interface]:
    return [
        ipaddress.ip_interface(f"{each['local']}/{each['prefixlen']}")
        for each in item.get("addr_info", ())
        if "local" in each
    ]
