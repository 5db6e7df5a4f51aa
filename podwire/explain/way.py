"""Between the ends: forwarding, routes, the tunnel and the underlay, and who leaves with which address. Pure.

node A   ip_forward · route to B's block ─▶ via the VTEP of B ─▶ its MAC (neighbour) ─▶ B's address (FDB)
underlay A ─────────────▶ B    B takes VXLAN from A alone if it knows A (@vteps)
node B   ip_forward · route to the pod by pw0
"""

from __future__ import annotations

import ipaddress
from typing import Any

import msgspec

from ipam_daemon.plan import BRIDGE, VXLAN, VXLAN_OVERHEAD
from kube_proxy_lite.model import Address
from podwire.explain.hops import (
    Ask,
    Finding,
    Hop,
    NodeFacts,
    Reading,
    Steps,
    Where,
    fails,
    first_line,
    ok,
    unseen,
    warns,
)

_SYSCTL = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What `ip route get` chose."""

    device: str
    gateway: Address | None


def _repair(node: str) -> str:
    return f"`podwire ipam check --fix` on {node}"


def forwarding(node: str, version: int) -> Steps[Finding]:
    """Whether the node forwards packets at all."""
    name = _SYSCTL[version]
    reading = yield Ask(Where(node), ("sysctl", "-n", name))
    if not reading.well:
        return unseen("whether the node forwards", reading)
    if reading.text.strip() == "0":
        return fails(
            f"{node} forwards nothing: {name} is 0", f"sysctl -w {name}=1 on {node}, or {_repair(node)}", reading
        )
    return ok(f"{name} is {reading.text.strip()}", reading)


def leave(
    node: str, source: Address, destination: Address, other: NodeFacts | None, *, own: bool, way: str
) -> Steps[tuple[Hop, Route | None]]:
    """The route of a packet that leaves a node for a pod of `other`, or for anywhere when that is None.

    `own`: it is the node's own packet, and not one that comes from a pod.
    """
    findings = [] if own else [(yield from forwarding(node, destination.version))]
    words = ["ip", "-j", "route", "get", str(destination)]
    if not own:
        words += ["from", str(source), "iif", BRIDGE]
    reading = yield Ask(Where(node), tuple(words))
    title = f"{way}: forwarding and route"
    if not reading.seen:
        return Hop(title=title, where=node, findings=(*findings, unseen("the route", reading))), None
    items = reading.items()
    if not items:
        if not any(each.state.value == "fails" for each in findings):  # without forwarding there is no route either
            text = f"{node} has no route to {destination}: {first_line(reading)}"
            findings.append(fails(text, _repair(node), reading))
        return Hop(title=title, where=node, findings=tuple(findings)), None
    route = _route(items[0])
    findings.append(_right_way(node, destination, other, route, reading))
    return Hop(title=title, where=node, findings=tuple(findings)), route


def _route(item: dict[str, Any]) -> Route:
    gateway = item.get("gateway") or (item.get("via") or {}).get("host")
    return Route(device=item.get("dev", ""), gateway=ipaddress.ip_address(gateway) if gateway else None)


def _right_way(node: str, destination: Address, other: NodeFacts | None, route: Route, reading: Reading) -> Finding:
    shown = (
        f"{destination} via {route.gateway} by {route.device}" if route.gateway else f"{destination} by {route.device}"
    )
    if other is None or not (other.addresses or other.vteps):
        return ok(shown, reading)
    right = (*other.vteps, *other.addresses) if route.gateway else ()
    if route.gateway in right or (route.gateway is None and destination in other.addresses):
        return ok(f"{shown}, to {other.name}", reading)
    if destination in other.addresses:
        return ok(shown, reading)  # an address of the underlay: whatever router leads there
    blocks = ", ".join(each for each in other.blocks if destination in ipaddress.ip_network(each)) or "its block"
    text = f"{node} has no route to {blocks} of {other.name}: the packet goes {shown.removeprefix(f'{destination} ')}"
    return fails(text, _repair(node), reading)


def tunnel(node: str, gateway: Address, other: NodeFacts) -> Steps[Hop]:
    """The VTEP of the other node: its MAC, and where on the underlay that MAC is."""
    findings: list[Finding] = []
    here = Where(node)
    reading = yield Ask(here, ("ip", "-j", "neigh", "show", "to", str(gateway), "dev", VXLAN))
    truth = yield Ask(Where(other.name), ("ip", "-j", "-d", "addr", "show", "dev", VXLAN))
    macs = tuple(item["address"] for item in truth.items() if "address" in item) or other.macs
    mac = next((item["lladdr"] for item in reading.items() if "lladdr" in item), "")
    if not reading.seen:
        findings.append(unseen("the neighbour", reading))
    elif not mac:
        text = f"{node} has no neighbour entry for {gateway}, the tunnel of {other.name}"
        findings.append(fails(text, _repair(node), reading))
    elif macs and mac not in macs:
        text = f"the neighbour entry of {gateway} is {mac}, and the tunnel of {other.name} has {' or '.join(macs)}"
        findings.append(fails(text, _repair(node), reading))
    else:
        findings.append(ok(f"{gateway} is {mac}", reading))
    if mac:
        findings.append((yield from _fdb(here, mac, other)))
    if truth.seen and not (truth.items() and "UP" in truth.items()[0].get("flags", ())):
        findings.append(fails(f"{VXLAN} of {other.name} is not up", _repair(other.name), truth))
    return Hop(title=f"tunnel to {other.name}", where=node, findings=tuple(findings))


def _fdb(here: Where, mac: str, other: NodeFacts) -> Steps[Finding]:
    reading = yield Ask(here, ("bridge", "-j", "fdb", "show", "dev", VXLAN))
    ends = [item["dst"] for item in reading.items() if item.get("mac") == mac and "dst" in item]
    own = ", ".join(map(str, other.addresses))
    if not reading.seen:
        return unseen("the FDB entry", reading)
    if not ends:
        return fails(
            f"{VXLAN} has no FDB entry for {mac}: it knows no way to {other.name}", _repair(here.node), reading
        )
    if other.addresses and not any(ipaddress.ip_address(end) in other.addresses for end in ends):
        text = f"the FDB entry of {mac} leads to {', '.join(ends)}, and {other.name} is {own}"
        return fails(text, _repair(here.node), reading)
    return ok(f"{mac} is at {ends[0]}, {other.name}", reading)


def underlay(node: NodeFacts, other: NodeFacts, mtu: int, *, tunnelled: bool) -> Steps[Hop]:
    """From node to node: a route, room for the pod's packets, and a node that takes them. `mtu` 0: not known."""
    title = f"underlay to {other.name}"
    family = next(
        (each for each in other.addresses if any(own.version == each.version for own in node.addresses)), None
    )
    if family is None:
        nothing = Reading(seen=False, text=f"the addresses of {other.name} are not known")
        return Hop(title=title, where=node.name, findings=(unseen("the underlay", nothing),))
    reading = yield Ask(Where(node.name), ("ip", "-j", "route", "get", str(family)))
    if not reading.seen:
        return Hop(title=title, where=node.name, findings=(unseen("the underlay", reading),))
    items = reading.items()
    if not items:
        text = f"{node.name} has no route to {family}, {other.name}: {first_line(reading)}"
        return Hop(title=title, where=node.name, findings=(fails(text, "mend the node's own network", reading),))
    route = _route(items[0])
    findings = [ok(f"{family} by {route.device}" + (f" via {route.gateway}" if route.gateway else ""), reading)]
    findings.append(
        (yield from _room(node.name, route.device, mtu, VXLAN_OVERHEAD[family.version] if tunnelled else 0))
    )
    if tunnelled:
        findings.append((yield from _taken(node, other, family.version)))
    return Hop(title=title, where=node.name, findings=tuple(findings))


def _room(node: str, device: str, mtu: int, overhead: int) -> Steps[Finding]:
    """Whether the underlay takes the largest packets that the pod sends."""
    reading = yield Ask(Where(node), ("ip", "-j", "link", "show", "dev", device))
    items = reading.items()
    if not items:
        return unseen(f"the MTU of {device}", reading)
    if "UP" not in items[0].get("flags", ()):
        return fails(f"{device} is down", "mend the node's own network", reading)
    room = int(items[0].get("mtu", 0))
    if mtu and mtu + overhead > room:
        text = (
            f"the pod sends packets of up to {mtu} bytes, with VXLAN {mtu + overhead}, and {device} takes {room}:"
            f" those of more than {room - overhead} bytes are lost"
        )
        if not overhead:
            text = f"the pod sends packets of up to {mtu} bytes, and {device} takes {room}: larger ones are lost"
        fix = f"pods that are made anew get MTU {room - overhead}; `mtu` of the daemon's configuration sets another"
        return fails(text, fix, reading)
    return ok(
        f"{device} has MTU {room}" + (f", the pod {mtu}, VXLAN adds {overhead}" if mtu and overhead else ""), reading
    )


def _taken(node: NodeFacts, other: NodeFacts, version: int) -> Steps[Finding]:
    """VXLAN is taken from known nodes alone."""
    own = next((each for each in node.addresses if each.version == version), None)
    reading = yield Ask(
        Where(other.name), ("nft", "get", "element", "inet", "podwire", f"vteps{version}", f"{{ {own} }}")
    )
    if not reading.seen:
        return unseen(f"whether {other.name} takes VXLAN from {own}", reading)
    if not reading.well:
        text = f"{other.name} does not know {own}, and drops its VXLAN"
        return fails(text, _repair(other.name), reading)
    return ok(f"{other.name} takes VXLAN from {own}", reading)


def arrive(facts: NodeFacts, source: Address, destination: Address, device: str, way: str) -> Steps[Hop]:
    """The node of the destination: its daemon, whether it forwards, and its route to the pod."""
    findings = [daemon(facts), (yield from forwarding(facts.name, destination.version))]
    words = ("ip", "-j", "route", "get", str(destination), "from", str(source), "iif", device)
    reading = yield Ask(Where(facts.name), words)
    items = reading.items()
    if not reading.seen:
        findings.append(unseen("its route to the pod", reading))
    elif not items:
        if not any(each.state.value == "fails" for each in findings):
            text = f"{facts.name} has no route to {destination} for what comes by {device}: {first_line(reading)}"
            findings.append(fails(text, _repair(facts.name), reading))
    elif items[0].get("dev") != BRIDGE:
        text = f"{facts.name} sends {destination} by {items[0].get('dev')}, and not to {BRIDGE}"
        findings.append(fails(text, _repair(facts.name), reading))
    else:
        findings.append(ok(f"{destination} by {BRIDGE}", reading))
    return Hop(title=way, where=facts.name, findings=tuple(findings))


def daemon(facts: NodeFacts) -> Finding:
    """Whether somebody looks after the node. Packets pass without."""
    if not facts.trouble:
        return ok(f"the daemon of {facts.name} answers")
    text = (
        f"the daemon of {facts.name} does not answer ({facts.trouble}): what is in the kernel stays, but no pod is"
        " added, and nothing that changes or breaks is put right"
    )
    return warns(text, f"start podwire-ipamd on {facts.name}; its log says why it ended")


def masquerade(node: str, source: Address, destination: Address, other: str) -> Steps[Hop]:
    """What leaves the cluster must leave with the node's address, or the answer goes nowhere.

    `other` is the node whose own address the destination is, if it is one: that may know a way back.
    """
    title = "masquerade"
    version, here = source.version, Where(node)
    amiss = warns if other else fails
    fate = (
        f"{other} sees the pod, and its answer comes past {node}" if other else "nobody outside can answer that address"
    )

    def element(name: str, member: Address) -> Ask:
        return Ask(here, ("nft", "get", "element", "inet", "podwire", f"{name}{version}", f"{{ {member} }}"))

    exempt = yield element("unmasqueraded", destination)
    if not exempt.seen:
        return Hop(title=title, where=node, findings=(unseen("the masquerade", exempt),))
    if exempt.well:
        return Hop(title=title, where=node, findings=(ok(f"{destination} sees the pod's own address", exempt),))
    local = yield element("local_blocks", source)
    if not local.well:
        text = f"{source} is in no block that is masqueraded, and leaves as it is: {fate}"
        return Hop(title=title, where=node, findings=(amiss(text, _repair(node), local),))
    chain = yield Ask(here, ("nft", "list", "chain", "inet", "podwire", "postrouting"))
    if not any("masquerade" in line and f"@local_blocks{version}" in line for line in chain.text.splitlines()):
        text = f"the rule that masquerades is missing, and {source} leaves as it is: {fate}"
        return Hop(title=title, where=node, findings=(amiss(text, _repair(node), chain),))
    return Hop(title=title, where=node, findings=(ok(f"{destination} sees the address of {node}", chain),))
