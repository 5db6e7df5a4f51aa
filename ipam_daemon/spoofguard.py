"""What a pod may send as: the nft table `bridge podwire` as text, and the elements of each wire in its sets. Pure.

    pod ──▶ port of pw0 ──▶ bridge prerouting, priority -400 ──▶ learning, br_netfilter (0), the node's firewall
                              │
          prerouting ─┬─ IPv4 ──▶ port . MAC . saddr ∈ bound4
                      ├─ IPv6 ──▶ port . MAC . saddr ∈ bound6
                      │            └ ICMPv6 ─▶ v6_bound   no router advertisement or redirect
                      │                          └ neighbour advertisement ─▶ advert   target ∈ targets6, and the MAC of
                      │                                                       its option, the only one, ∈ options6
            from_pod ─┼─ IPv6 ──▶ v6         :: while an address is being checked
                      ├─ ARP ───▶ arp_v4     ether saddr and sender's MAC bound, sender's address too (or a probe)
                      └─ everything else, also what has a VLAN tag, is dropped

             forward ─── multicast from pod to pod ──▶ flooded   what routers are told goes to ports in `routers` alone

Services and policies know a pod by its address, so an address must be what the daemon gave, and not what a pod says. It
is bound to the port, which the pod cannot choose, and to the MAC that ADD set. The addresses of an attachment are its
own and the link-local one that its MAC makes (EUI-64, RFC 4291 appendix A); the source `::` passes for duplicate
address detection of those and for multicast listener reports (RFC 4861, 3810). What is not in a set is dropped: a pod
whose elements are missing is cut off, and not unguarded. A dropped frame is not learnt from either.

A neighbour advertisement in any other layout than "no option" and "the target's link-layer address alone" is dropped:
Linux sends no other. It has no extension headers, because it may then be anywhere in the packet. Frames to the reserved
group addresses (01:80:c2:00:00:0x), which a bridge takes for itself and learns from, are forwarded like others by a
pod's port (wires.FORWARDED_GROUPS), so that they come by here: a chain in `input`, for those alone, cost every packet
that leaves its node 0.08 µs.

Who listens to which group (IGMP, MLD), and who looks for a router (router solicitations), is for routers. A bridge
hands it to every port for as long as it knows of no querier, and every pod wakes up for eight packets of each new one.
RFC 4541 (2.1.1, 3) says who gets reports: ports behind which there is a router. It is known as the bridge itself knows
it, by its queries, by PIM, or by multicast router advertisements (RFC 4286); a port that is made a router's by hand
(mcast_router 2) is not. The bridge, the node, and whatever port is not a pod's get all of it as before; nor could a pod
answer a solicitation, as above. The rules fill `routers` themselves, with the bridge's own time for it. A new table
begins with all ports in it: a router among them hears what it heard until it has been heard itself. A unicast packet is
past this chain with its first comparison.

A pod's port is one whose name begins with `pw`, as no other bridge's should. The number of rules is constant, an
address is one element (of IPv6 two), a MAC is two. What is honest passes at the first look into a hash table: 0.12 µs
a packet of IPv4 and 0.17 of IPv6; asked first by port and then by type it was 0.05 more. The type is asked of the frame
itself, because what the kernel calls the protocol of one with a VLAN tag is that of what is inside. A verdict map is
avoided: with maps a packet that is on its way through while the table is exchanged would be lost. The table's hash is
the comment of a rule, as in ipam_daemon/ruleset.py; a table of another version, or one that somebody changed, is
exchanged whole, with its elements, in one transaction. nft before 1.0.8 has no name for the target of an advertisement,
hence `@th,64,128`.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from ipam_daemon.model import Address, Attachment
from podwire.nfelements import Family, Table, concat, ifname

TABLE = Table(Family.BRIDGE, "podwire")
REASONS = ("mac", "address", "arp", "neighbor", "router", "vlan", "ethertype")
"""Why a frame is dropped; a label of podwire_spoofed_packets_total."""
COUNTED = "dropped_"
"""What a counter's name has before its reason (`arp` and `vlan` alone are words of nft's)."""
PORT_PREFIX = "pw"
"""What the names of all wires begin with (plan.plan_attachment). `meta ibrname` would need a module of the kernel."""
_PRIORITY = -400  # before ebtables' NAT (-300) and connection tracking of bridges (-200), too
_FROM_POD = f'iifname "{PORT_PREFIX}*"'
_LISTENERS = ", ".join(("mld-listener-report", "mld-listener-done", "mld2-listener-report"))
_MEMBERS = ", ".join(("membership-report-v1", "membership-report-v2", "membership-report-v3", "leave-group"))
_PIM = 103  # a number, because a node may have no /etc/protocols
_ETHERNET_IPV4 = "arp htype 1 arp ptype ip arp hlen 6 arp plen 4"
_PORT_SIZE = 16


class Field(msgspec.Struct, frozen=True):
    """A field of a set's key. `type` is nft's, or the expression that it is typed by; `size` is in bytes."""

    type: str
    size: int
    text: Callable[[bytes], str]


class Element(msgspec.Struct, frozen=True, order=True):
    """An element of a set of the table. The first field of every key is the port."""

    set: str
    key: bytes


class Shape(msgspec.Struct, frozen=True):
    """What tells the rules of a table: the hash that they were made from, how many they are in each chain, and which
    chains are hooked in and let pass what no rule of theirs is about."""

    mark: str
    rules: tuple[tuple[str, int], ...]
    passing: tuple[str, ...]


class GuardState(msgspec.Struct, frozen=True):
    """What the kernel has of the table; None for `shape` when the table, or a set of it, is not there."""

    shape: Shape | None = None
    elements: frozenset[Element] = frozenset()


def _port_text(field: bytes) -> str:
    return f'"{field.rstrip(bytes(1)).decode()}"'


def _mac_text(field: bytes) -> str:
    return field.hex(":")


def _address_text(field: bytes) -> str:
    return str(ipaddress.ip_address(field))


def _number_text(field: bytes) -> str:
    return f"0x{field.hex()}"


_PORT, _MAC = Field("ifname", _PORT_SIZE, _port_text), Field("ether_addr", 6, _mac_text)
_TYPED_PORT = Field("meta iifname", _PORT_SIZE, _port_text)
_TARGET, _OPTION = Field("@th,64,128", 16, _number_text), Field("@th,208,48", 6, _number_text)
_BOUND = {4: "bound4", 6: "bound6"}

SETS: dict[str, tuple[Field, ...]] = {
    "macs": (_PORT, _MAC),
    "bound4": (_PORT, _MAC, Field("ipv4_addr", 4, _address_text)),
    "bound6": (_PORT, _MAC, Field("ipv6_addr", 16, _address_text)),
    "targets6": (_TYPED_PORT, _TARGET),
    "options6": (_TYPED_PORT, _OPTION),
}
"""Set → the fields of its key."""

LEARNT = {"routers": "type ifname; flags dynamic,timeout; timeout 255s; size 4096"}
"""Set that the rules fill themselves → its declaration. The time is RFC 3376's Other Querier Present Interval."""


# --- attachment → elements ------------------------------------------------------------------------------------------


def elements(attachment: Attachment) -> frozenset[Element]:
    """What the wire of an attachment may send as."""
    port, mac = ifname(attachment.host_ifname), bytes.fromhex(attachment.mac.replace(":", ""))
    found = {Element("macs", concat(port, mac)), Element("options6", concat(port, mac))}
    for address in (*(interface.ip for interface in attachment.addresses), link_local(attachment.mac)):
        found.add(Element(_BOUND[address.version], concat(port, mac, address.packed)))
        if address.version == 6:
            found.add(Element("targets6", concat(port, address.packed)))
    return frozenset(found)


def link_local(mac: str) -> Address:
    """The link-local address that an interface makes from its MAC (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([octets[0] ^ 2]) + octets[1:3] + b"\xff\xfe" + octets[3:]
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + identifier)


def port_of(element: Element) -> str:
    """The port that an element is about."""
    return element.key[:_PORT_SIZE].rstrip(b"\0").decode()


# --- rules ----------------------------------------------------------------------------------------------------------


def _drop(reason: str) -> str:
    return f"counter name {COUNTED}{reason} drop"


_HOOKS = {
    hook: f"{{ type filter hook {hook} priority {_PRIORITY}; policy accept; }}" for hook in ("prerouting", "forward")
}

RULES: dict[str, Sequence[str]] = {
    "blame": (f"iifname . ether saddr != @macs {_drop('mac')}", _drop("address")),
    "advert": (
        "ip6 nexthdr icmpv6 ip6 length 24 iifname . @th,64,128 @targets6 accept",
        "ip6 nexthdr icmpv6 ip6 length 32 @th,192,16 0x0201 iifname . @th,64,128 @targets6 "
        "iifname . @th,208,48 @options6 accept",
        _drop("neighbor"),
    ),
    "v6_bound": (
        "meta l4proto != icmpv6 accept",
        f"icmpv6 type {{ nd-router-advert, nd-redirect }} {_drop('router')}",
        "icmpv6 type nd-neighbor-advert goto advert",
        "accept",
    ),
    "v6_unspecified": (
        f"icmpv6 type {{ {_LISTENERS} }} iifname . ether saddr @macs accept",
        "icmpv6 type nd-neighbor-solicit iifname . ether saddr @macs iifname . @th,64,128 @targets6 accept",
        "goto blame",
    ),
    "v6": ("ip6 saddr :: goto v6_unspecified", "goto blame"),
    "arp_v4": (
        f"iifname . ether saddr != @macs {_drop('mac')}",
        f"{_ETHERNET_IPV4} iifname . arp saddr ether . arp saddr ip @bound4 accept",
        f"{_ETHERNET_IPV4} arp operation request arp saddr ip 0.0.0.0 iifname . arp saddr ether @macs accept",
        _drop("arp"),
    ),
    "from_pod": (
        "ether type ip goto blame",
        "ether type ip6 goto v6",
        "ether type arp goto arp_v4",
        f"ether type {{ 0x8100, 0x88a8, 0x9100 }} {_drop('vlan')}",
        _drop("ethertype"),
    ),
    "prerouting": (
        "ether type ip iifname . ether saddr . ip saddr @bound4 accept",
        "ether type ip6 iifname . ether saddr . ip6 saddr @bound6 goto v6_bound",
        f"{_FROM_POD} goto from_pod",
    ),
    "flooded": (
        "icmpv6 type { mld-listener-query, 151 } update @routers { iifname } accept",
        "igmp type { membership-query, 0x30 } update @routers { iifname } accept",
        f"meta l4proto {_PIM} update @routers {{ iifname }} accept",
        "oifname @routers accept",
        f"icmpv6 type {{ nd-router-solicit, {_LISTENERS} }} drop",
        f"igmp type {{ {_MEMBERS} }} drop",
    ),
    "forward": (f'meta pkttype multicast {_FROM_POD} oifname "{PORT_PREFIX}*" goto flooded',),
}
"""Chain → its rules, in an order in which each chain comes before those that go to it."""


def render(wanted: Collection[Element]) -> str:
    """The nft script, one transaction, that replaces the table by one with these elements."""
    table = str(TABLE)
    lines = [f"add table {table}", f"delete table {table}", f"add table {table}"]
    lines += [f"add counter {table} {COUNTED}{reason}" for reason in REASONS]
    lines += [f"add set {table} {declared}" for declared in _declared()]
    listed: dict[str, list[str]] = {}
    for element in sorted(wanted):
        listed.setdefault(element.set, []).append(text(element))
    listed["routers"] = sorted({f'"{port_of(element)}"' for element in wanted})
    lines += [f"add element {table} {name} {{ {', '.join(found)} }}" for name, found in listed.items() if found]
    lines += _chains()
    lines += [f"add chain {table} shape", f'add rule {table} shape counter comment "{shape().mark}"']
    return "\n".join(lines) + "\n"


def text(element: Element) -> str:
    """An element as nft writes it."""
    words, at = [], 0
    for field in SETS[element.set]:
        words.append(field.text(element.key[at : at + field.size]))
        at += field.size + -field.size % 4
    return " . ".join(words)


def shape() -> Shape:
    """The shape that the table has when nobody has changed it."""
    mark = hashlib.sha256("\n".join([*REASONS, *_declared(), *_chains()]).encode()).hexdigest()[:16]
    rules = {**{chain: len(rules) for chain, rules in RULES.items()}, "shape": 1}
    return Shape(mark, tuple(sorted(rules.items())), tuple(sorted(_HOOKS)))


def parse_shape(rules: Iterable[tuple[str, str]], chains: Mapping[str, bool | None]) -> Shape:
    """The shape of a table with these rules, each a chain and a comment, and these chains: whether their policy is to
    accept, None for those that are not hooked in."""
    mark, numbers = "", dict[str, int]()
    for chain, comment in rules:
        numbers[chain] = numbers.get(chain, 0) + 1
        if chain == "shape":
            mark = comment
    return Shape(mark, tuple(sorted(numbers.items())), tuple(sorted(name for name, passes in chains.items() if passes)))


def _chains() -> list[str]:
    lines = []
    for chain, rules in RULES.items():
        lines.append(f"add chain {TABLE} {chain} {_HOOKS.get(chain, '')}".rstrip())
        lines += [f"add rule {TABLE} {chain} {rule}" for rule in rules]
    return lines


def _declared() -> list[str]:
    known = {name: _declaration(fields) for name, fields in SETS.items()}
    return [f"{name} {{ {declaration}; }}" for name, declaration in (known | LEARNT).items()]


def _declaration(fields: Sequence[Field]) -> str:
    typed = any("@" in field.type for field in fields)
    return f"{'typeof' if typed else 'type'} {' . '.join(field.type for field in fields)}"
