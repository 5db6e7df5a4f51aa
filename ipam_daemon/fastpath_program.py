"""The programs of the fast path: what becomes of a packet at the port of its pod, and where it comes from a node. Pure.

    pod ── port ─▶ FROM_POD ─┬─▶ another pod of this node       past bridge and firewall, into its namespace
                             ├─▶ a pod of another node          past bridge and firewall, to the device that leads there
                             └─▶ everything else                on, as if there were no program
    VXLAN, underlay ─▶ ARRIVING ─┬─▶ a pod of this node         past routing, firewall and bridge
                                 └─▶ everything else            on

Nothing is decided here: whether a packet belongs to a connection that the firewall has let pass is asked of conntrack,
for each packet, and where it goes of the routing table. So whoever cuts a connection (`conntrack -D`, a policy that now
forbids it) cuts it here, and a route that changes changes here. A packet takes the fast way when all of this holds:

    the daemon lives               it renews a lease, after which the programs pass everything on
    TCP or UDP, whole              no option, fragment, extension header, VLAN tag; of TCP no SYN, FIN or RST
    its sender is who it says      port, MAC and address are those of one pod (FROM_POD)
    conntrack knows it             answered, and established where it is TCP; not translated by anybody, IPVS
                                   included, no helper, no other end in sight for 20 s
    it fits                        no larger than what it leaves by takes, its hop limit above 1

What conntrack does not see it does not count, and the window of TCP it does not know (nf_conntrack_tcp_be_liberal). An
assured entry is renewed by the program, as a packet on the long way would; any other by a packet that goes the long way
when 20 s are left of it.

The order within the program is the cheapest question first, since a packet that goes on has paid for those that it was
asked. docs/performance.md has what they cost.

Source: struct __sk_buff and the helpers in linux/bpf.h; bpf_skb_ct_lookup() in net/netfilter/nf_conntrack_bpf.c; enum
ip_conntrack_status in linux/netfilter/nf_conntrack_common.h; TCP's states in nf_conntrack_tcp.h.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from enum import Enum

import msgspec

from ipam_daemon.model import Address, Network
from podwire.bpf.assembler import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Assembler, Size, Sum, Test

B, H, W, D = Size.BYTE, Size.HALF, Size.WORD, Size.DOUBLE

ON = -1
"""What a program returns for a packet that goes on (TC_ACT_UNSPEC, TCX_NEXT)."""
REDIRECTED = 7
"""The same for one that took the fast way (TC_ACT_REDIRECT)."""
KEY_BYTES, POD_BYTES, LEASE_BYTES, COUNT_BYTES = 16, 12, 8, 8
TO_POD, TO_NODE, FROM_NODE = range(3)
"""Places in the map of counters: which fast way a packet took."""
LEAST_LEFT = 20
"""Seconds. A connection that conntrack would forget earlier is shown to it."""
_SELDOM = 2  # seconds between two renewals of an entry
_MOST_SECONDS = 1_000_000  # half of what 32 bits of jiffies can tell apart, at 1,000 a second

# struct __sk_buff
_LEN, _PKT_TYPE, _VLAN_PRESENT, _IFINDEX, _DATA, _DATA_END, _GSO_SIZE = 0, 4, 20, 40, 76, 80, 176
# enum bpf_func_id
_LOOKUP, _STORE_BYTES, _REDIRECT, _CHANGE_TYPE, _FIB_LOOKUP, _JIFFIES, _REDIRECT_NEIGH, _REDIRECT_PEER, _COARSE_NS = (
    1, 9, 23, 32, 69, 118, 152, 155, 160,
)  # fmt: skip
_RECOMPUTE_CSUM, _PACKET_HOST = 1, 0
# enum ip_conntrack_status
_SEEN_REPLY, _ASSURED, _CONFIRMED = 1 << 1, 1 << 2, 1 << 3
_IN_THE_WAY = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13
"""Source or destination translated, sequence numbers changed, dying, a template, untracked, a helper."""
_TCP, _UDP, _TCP_ESTABLISHED = 6, 17, 3
_FIN_SYN_RST = 0x07
_AF_INET, _AF_INET6 = 2, 10
_TTL_AND_CHECKSUM, _TTL4, _HOPS6 = 22, 22, 21

# the stack
_TUPLE, _SENDER, _RECEIVER, _OPTIONS, _STATE, _LEFT, _WAY, _NEIGHBOUR, _MACS, _WORD, _ENTRY = (
    -48, -64, -80, -96, -100, -104, -168, -192, -208, -216, -224,
)  # fmt: skip
_WAY_BYTES, _NEIGHBOUR_BYTES = 64, 20  # struct bpf_fib_lookup, struct bpf_redir_neigh
_WAY_PROTOCOL, _WAY_PORTS, _WAY_LENGTH, _WAY_IFINDEX, _WAY_CLASS = 1, 2, 6, 8, 12
_WAY_SOURCE, _WAY_DESTINATION = 16, 32
_WAY_SOURCE_MAC, _WAY_DESTINATION_MAC = 52, 58


class Where(Enum):
    """Which program."""

    FROM_POD = "podwire_pod"
    ARRIVING = "podwire_arrival"


class Conntrack(msgspec.Struct, frozen=True, kw_only=True):
    """What the running kernel says of its connection tracking: the numbers of its functions and the module that has
    them (0: the kernel itself), and where members of nf_conn are, in bytes. `original_to` and `reply_from` are an
    address and the port after it: where a connection was begun to, and who answers it. `hz` are jiffies a second."""

    lookup: int
    renew: int
    release: int
    module: int
    status: int
    timeout: int
    tcp_state: int
    original_to: tuple[int, int]
    reply_from: tuple[int, int]
    hz: int


class Maps(msgspec.Struct, frozen=True, kw_only=True):
    """The descriptors of the maps. `pods` has what `pod_key` and `pod_value` make; `lease` until when the daemon lives,
    in nanoseconds of CLOCK_MONOTONIC; `counts` packets, per CPU."""

    pods: int
    lease: int
    counts: int


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What the programs are for: the bridge, the pools of the cluster, and the devices by which packets may
    leave, by their indexes; 0 for no VXLAN. Conntrack keeps an established connection of TCP for `tcp_lasts` seconds
    after its last packet, and one of UDP for `udp_lasts`."""

    bridge: int
    bridge_mac: str
    pools: tuple[Network, ...]
    vxlan: int
    underlay: tuple[int, ...]
    tcp_lasts: int
    udp_lasts: int


class _Family(msgspec.Struct, frozen=True, kw_only=True):
    """Where things are in a frame."""

    version: int
    number: int
    ethertype: int
    source: int
    destination: int
    length: int  # of an address
    transport: int


_FAMILIES = (
    _Family(version=4, number=_AF_INET, ethertype=0x0800, source=26, destination=30, length=4, transport=34),
    _Family(version=6, number=_AF_INET6, ethertype=0x86DD, source=22, destination=38, length=16, transport=54),
)


def pod_key(address: Address) -> bytes:
    """An address in the map of pods: one of IPv4 as IPv6 maps it (RFC 4291, 2.5.5.2)."""
    return address.packed if address.version == 6 else ipaddress.IPv6Address(f"::ffff:{address}").packed


def pod_value(ifindex: int, mac: str) -> bytes:
    """The port of the pod on the node, and its MAC."""
    return struct.pack("=I6sH", ifindex, _packed(mac), 0)


def render(where: Where, conntrack: Conntrack, maps: Maps, node: Node) -> bytes:
    """The program, for podwire.bpf.kernel.load()."""
    program = Assembler()
    program.copy(R6, R1)
    _check_lease(program, maps)
    _check_frame(program, where)
    program.load(H, R1, R7, 12)
    families = [each for each in _FAMILIES if any(pool.version == each.version for pool in node.pools)]
    for family in families:
        program.jump_if(Test.EQUAL, R1, _swapped(family.ethertype), f"v{family.version}")
    program.jump("on")
    for family in families:
        program.label(f"v{family.version}")
        _Part(program, where, conntrack, maps, node, family).write()
    program.label("on")
    program.set(R0, ON)
    program.exit()
    return program.assemble()


def render_nothing() -> bytes:
    """A program that passes everything on."""
    program = Assembler()
    program.set(R0, ON)
    program.exit()
    return program.assemble()


def _check_lease(program: Assembler, maps: Maps) -> None:
    program.load_map_value(R1, maps.lease)
    program.load(D, R7, R1, 0)
    program.call(_COARSE_NS)
    program.jump_if_with(Test.GREATER, R0, R7, "on")


def _check_frame(program: Assembler, where: Where) -> None:
    program.load(W, R1, R6, _VLAN_PRESENT)
    program.jump_if(Test.DIFFERENT, R1, 0, "on")
    if where is Where.ARRIVING:
        program.load(W, R1, R6, _PKT_TYPE)
        program.jump_if(Test.DIFFERENT, R1, _PACKET_HOST, "on")
    program.load(W, R7, R6, _DATA)
    _check_length(program, _FAMILIES[0].transport + 8)


def _check_length(program: Assembler, length: int) -> None:
    """That the frame at r7 has so many bytes in one piece."""
    program.load(W, R2, R6, _DATA_END)
    program.copy(R1, R7)
    program.compute(Sum.ADD, R1, length)
    program.jump_if_with(Test.GREATER, R1, R2, "on")


class _Part:
    """The program's part for one family.

    r6: the context; r7: the frame; r8: the port of the receiver, 0 for one on another node; r9: TCP or UDP.
    """

    def __init__(
        self, program: Assembler, where: Where, conntrack: Conntrack, maps: Maps, node: Node, family: _Family
    ) -> None:
        self._program = program
        self._from_pod = where is Where.FROM_POD
        self._conntrack = conntrack
        self._maps = maps
        self._node = node
        self._family = family
        self._ways = tuple(filter(None, (node.vxlan, *node.underlay))) if self._from_pod else ()

    def write(self) -> None:
        """Adds it to the program."""
        self._check_header()
        self._check_pools()
        self._check_transport()
        self._copy_tuple()
        self._check_sender()
        self._find_receiver()
        self._check_conntrack()
        if not self._from_pod:
            self._into_pod()
            return
        if self._ways:
            self._program.jump_if(Test.EQUAL, R8, 0, self._label("node"))
        self._to_pod()
        if self._ways:
            self._program.label(self._label("node"))
            self._to_node()

    def _label(self, word: str) -> str:
        return f"{word}{self._family.version}"

    def _load_frame(self) -> None:
        """r7 = the frame, with all that is asked of it in one piece."""
        self._program.load(W, R7, R6, _DATA)
        _check_length(self._program, self._family.transport + 8)

    def _check_header(self) -> None:
        """No option, no fragment, and r9 = the protocol."""
        program = self._program
        if self._family.version == 4:
            program.load(B, R1, R7, 14)
            program.jump_if(Test.DIFFERENT, R1, 0x45, "on")
            program.load(H, R1, R7, 20)
            program.jump_if(Test.ANY_BIT, R1, _swapped(0x3FFF), "on")  # more fragments, or not the first
            program.load(B, R9, R7, 23)
        else:
            _check_length(program, self._family.transport + 8)
            program.load(B, R9, R7, 20)

    def _check_transport(self) -> None:
        program, udp = self._program, self._label("udp")
        program.jump_if(Test.EQUAL, R9, _UDP, udp)
        program.jump_if(Test.DIFFERENT, R9, _TCP, "on")
        _check_length(program, self._family.transport + 20)
        program.load(B, R1, R7, self._family.transport + 13)
        program.jump_if(Test.ANY_BIT, R1, _FIN_SYN_RST, "on")
        program.label(udp)

    def _copy_tuple(self) -> None:
        """As struct bpf_sock_tuple has it, and both addresses as keys."""
        program = self._program
        for place, key, at in (
            (self._family.source, _SENDER, _TUPLE),
            (self._family.destination, _RECEIVER, _TUPLE + self._family.length),
        ):
            if self._family.version == 4:
                program.store_number(D, R10, key, 0)
                program.store_number(W, R10, key + 8, _swapped(0xFFFF) << 16)
            for word in range(0, self._family.length, 4):
                program.load(W, R1, R7, place + word)
                program.store(W, R10, at + word, R1)
                program.store(W, R10, key + KEY_BYTES - self._family.length + word, R1)
        program.load(W, R1, R7, self._family.transport)
        program.store(W, R10, _TUPLE + 2 * self._family.length, R1)

    def _find(self, key: int) -> None:
        """r0 = the pod of this node that has the address, or 0."""
        program = self._program
        program.load_map(R1, self._maps.pods)
        program.frame(R2, key)
        program.call(_LOOKUP)

    def _check_sender(self) -> None:
        program = self._program
        self._find(_SENDER)
        if not self._from_pod:
            program.jump_if(Test.DIFFERENT, R0, 0, "on")  # a strict rp_filter would not let it in
            return
        program.jump_if(Test.EQUAL, R0, 0, "on")
        program.load(W, R1, R0, 0)
        program.load(W, R2, R6, _IFINDEX)
        program.jump_if_with(Test.DIFFERENT, R1, R2, "on")
        self._check_mac(6)

    def _check_mac(self, place: int) -> None:
        """That a MAC of the frame is that of the pod in r0."""
        program = self._program
        for size, offset in ((W, 0), (H, 4)):
            program.load(size, R1, R0, 4 + offset)
            program.load(size, R2, R7, place + offset)
            program.jump_if_with(Test.DIFFERENT, R1, R2, "on")

    def _find_receiver(self) -> None:
        program, elsewhere, found = self._program, self._label("elsewhere"), self._label("found")
        self._find(_RECEIVER)
        program.jump_if(Test.EQUAL, R0, 0, elsewhere if self._ways else "on")
        if not self._from_pod:
            program.load(W, R8, R0, 0)
            program.load(W, R1, R0, 4)
            program.store(W, R10, _MACS, R1)
            program.load(H, R1, R0, 8)
            program.store(H, R10, _MACS + 4, R1)
            self._check_hops()
            return
        self._check_mac(0)
        program.load(W, R8, R0, 0)
        if not self._ways:
            return
        program.jump(found)
        program.label(elsewhere)
        self._check_bridge_mac()
        self._check_hops()
        program.set(R8, 0)
        program.label(found)

    def _check_hops(self) -> None:
        self._program.load(B, R1, R7, _TTL4 if self._family.version == 4 else _HOPS6)
        self._program.jump_if(Test.AT_MOST, R1, 1, "on")

    def _check_pools(self) -> None:
        """That the receiver is a pod of the cluster, which spares a packet to a Service or the world the rest."""
        program, inside = self._program, self._label("inside")
        for number, pool in enumerate(pool for pool in self._node.pools if pool.version == self._family.version):
            outside = self._label(f"outside{number}-")
            for word, (address, mask) in enumerate(_masked_words(pool)):
                program.load(W, R1, R7, self._family.destination + 4 * word)
                program.compute32(Sum.AND, R1, mask)
                program.jump32_if(Test.DIFFERENT, R1, address, outside)
            program.jump(inside)
            program.label(outside)
        program.jump("on")
        program.label(inside)

    def _check_bridge_mac(self) -> None:
        program, mac = self._program, _packed(self._node.bridge_mac)
        program.load(W, R1, R7, 0)
        program.jump32_if(Test.DIFFERENT, R1, int.from_bytes(mac[:4], "little"), "on")
        program.load(H, R1, R7, 4)
        program.jump_if(Test.DIFFERENT, R1, int.from_bytes(mac[4:], "little"), "on")

    # --- conntrack

    def _check_conntrack(self) -> None:
        program, of = self._program, self._conntrack
        program.store_number(W, R10, _OPTIONS, -1)  # this namespace
        program.store_number(W, R10, _OPTIONS + 4, 0)
        program.store_number(W, R10, _OPTIONS + 8, 0)
        program.store(B, R10, _OPTIONS + 8, R9)
        program.copy(R1, R6)
        program.frame(R2, _TUPLE)
        program.set(R3, 2 * self._family.length + 4)
        program.frame(R4, _OPTIONS)
        program.set(R5, 12)
        program.call_kernel(of.lookup, of.module)
        program.jump_if(Test.EQUAL, R0, 0, "on")
        # it is held until it is released, so nothing may leave in between: r7 collects what is wrong of it
        program.load(D, R7, R0, of.status)
        program.compute(Sum.AND, R7, _SEEN_REPLY | _ASSURED | _CONFIRMED | _IN_THE_WAY)
        program.load(B, R1, R0, of.tcp_state)
        program.store(B, R10, _STATE, R1)
        program.load(W, R1, R0, of.timeout)
        program.store(W, R10, _LEFT, R1)
        self._compare_ends()
        program.store(D, R10, _ENTRY, R0)
        program.call(_JIFFIES)
        program.load(W, R1, R10, _LEFT)
        program.compute32_with(Sum.SUBTRACT, R1, R0)
        program.store(W, R10, _LEFT, R1)
        self._renew()
        program.load(D, R1, R10, _ENTRY)
        program.call_kernel(of.release, of.module)
        program.compute(Sum.AND, R7, ~_ASSURED)
        program.jump_if(Test.DIFFERENT, R7, _SEEN_REPLY | _CONFIRMED, "on")
        self._check_state()

    def _renew(self) -> None:
        """What a packet on the long way does to an entry: it lasts as if this were its first second. Once in a few
        seconds, and not for what is going to be shown to conntrack anyway. r1 is what is left of it."""
        program, of, udp, aged, fresh = self._program, self._conntrack, *map(self._label, ("sent", "aged", "fresh"))
        program.jump_if(Test.DIFFERENT, R7, _SEEN_REPLY | _ASSURED | _CONFIRMED, fresh)
        program.jump32_if(Test.LESS_SIGNED, R1, LEAST_LEFT * of.hz, fresh)
        program.jump_if(Test.EQUAL, R9, _UDP, udp)
        program.load(B, R2, R10, _STATE)
        program.jump_if(Test.DIFFERENT, R2, _TCP_ESTABLISHED, fresh)
        self._ask_age(self._node.tcp_lasts, aged)
        program.jump(fresh)
        program.label(udp)
        self._ask_age(self._node.udp_lasts, aged)
        program.jump(fresh)
        program.label(aged)
        program.load(D, R1, R10, _ENTRY)
        program.call_kernel(of.renew, of.module)
        program.label(fresh)

    def _ask_age(self, lasts: int, aged: str) -> None:
        """r2 = what the entry gets, in milliseconds, where it is `aged`."""
        seconds = min(lasts, _MOST_SECONDS)
        self._program.set(R2, seconds * 1000)
        self._program.jump32_if(Test.LESS_SIGNED, R1, max(seconds - _SELDOM, 0) * self._conntrack.hz, aged)

    def _compare_ends(self) -> None:
        """Who answers is who was asked. IPVS translates without saying so in the status."""
        program = self._program
        (asked, asked_port), (answers, answers_port) = self._conntrack.original_to, self._conntrack.reply_from
        pairs = [(W, asked + word, answers + word) for word in range(0, self._family.length, 4)]
        for size, one, other in (*pairs, (H, asked_port, answers_port)):
            program.load(size, R1, R0, one)
            program.load(size, R2, R0, other)
            program.compute32_with(Sum.SUBTRACT, R1, R2)
            program.compute(Sum.LEFT, R1, 32)
            program.compute_with(Sum.OR, R7, R1)

    def _check_state(self) -> None:
        program, lasting = self._program, self._label("lasting")
        program.jump_if(Test.EQUAL, R9, _UDP, lasting)
        program.load(B, R1, R10, _STATE)
        program.jump_if(Test.DIFFERENT, R1, _TCP_ESTABLISHED, "on")
        program.label(lasting)
        program.load(W, R1, R10, _LEFT)
        program.jump32_if(Test.LESS_SIGNED, R1, LEAST_LEFT * self._conntrack.hz, "on")

    # --- the ways

    def _count(self, place: int) -> None:
        program, label = self._program, self._label(f"counted{place}-")
        program.store_number(W, R10, _WORD, place)
        program.load_map(R1, self._maps.counts)
        program.frame(R2, _WORD)
        program.call(_LOOKUP)
        program.jump_if(Test.EQUAL, R0, 0, label)
        program.load(D, R1, R0, 0)
        program.compute(Sum.ADD, R1, 1)
        program.store(D, R0, 0, R1)
        program.label(label)

    def _to_pod(self) -> None:
        program = self._program
        self._count(TO_POD)
        program.copy(R1, R6)
        program.set(R2, _PACKET_HOST)  # its MAC is not the port's
        program.call(_CHANGE_TYPE)
        program.copy(R1, R8)
        program.set(R2, 0)
        program.call(_REDIRECT_PEER)
        program.exit()

    def _into_pod(self) -> None:
        program, mac = self._program, _packed(self._node.bridge_mac)
        program.store_number(H, R10, _MACS + 6, int.from_bytes(mac[:2], "little"))
        program.store_number(W, R10, _MACS + 8, int.from_bytes(mac[2:], "little"))
        self._take_a_hop()
        self._store(0, _MACS, 12, 0)
        self._count(FROM_NODE)
        program.copy(R1, R8)
        program.set(R2, 0)
        program.call(_REDIRECT_PEER)
        program.exit()

    def _to_node(self) -> None:
        """The way is the routing table's."""
        program = self._program
        for offset in range(0, _WAY_BYTES, 8):
            program.store_number(D, R10, _WAY + offset, 0)
        program.store_number(B, R10, _WAY, self._family.number)
        program.store(B, R10, _WAY + _WAY_PROTOCOL, R9)
        program.store_number(W, R10, _WAY + _WAY_IFINDEX, self._node.bridge)
        for place, at in ((_WAY_SOURCE, _TUPLE), (_WAY_DESTINATION, _TUPLE + self._family.length)):
            for word in range(0, self._family.length, 4):
                program.load(W, R1, R10, at + word)
                program.store(W, R10, _WAY + place + word, R1)
        for half in (0, 2):
            program.load(H, R1, R10, _TUPLE + 2 * self._family.length + half)
            program.store(H, R10, _WAY + _WAY_PORTS + half, R1)
        self._load_frame()
        self._tell_class()
        self._tell_length()
        program.copy(R1, R6)
        program.frame(R2, _WAY)
        program.set(R3, _WAY_BYTES)
        program.set(R4, 0)
        program.call(_FIB_LOOKUP)
        program.jump_if(Test.DIFFERENT, R0, 0, "on")
        program.load(B, R1, R10, _WAY)
        program.jump_if(Test.DIFFERENT, R1, self._family.number, "on")  # a gateway of the other family
        program.load(W, R8, R10, _WAY + _WAY_IFINDEX)
        leaving, tunnel = self._label("leaving"), self._label("tunnel")
        for ifindex in self._ways:
            program.jump_if(Test.EQUAL, R8, ifindex, leaving)
        program.jump("on")
        program.label(leaving)
        self._take_a_hop()
        self._count(TO_NODE)
        program.jump_if(Test.EQUAL, R8, self._node.vxlan, tunnel)
        self._by_neighbour()
        program.label(tunnel)
        self._by_tunnel()

    def _by_tunnel(self) -> None:
        """Its neighbours are permanent, so what the routing table says of their MACs holds."""
        program = self._program
        for half in range(0, 6, 2):
            program.load(H, R1, R10, _WAY + _WAY_DESTINATION_MAC + half)
            program.store(H, R10, _MACS + half, R1)
            program.load(H, R1, R10, _WAY + _WAY_SOURCE_MAC + half)
            program.store(H, R10, _MACS + 6 + half, R1)
        self._store(0, _MACS, 12, 0)
        program.copy(R1, R8)
        program.set(R2, 0)
        program.call(_REDIRECT)
        program.exit()

    def _by_neighbour(self) -> None:
        """Its MAC is the kernel's to find, and to find out anew."""
        program = self._program
        program.store_number(W, R10, _NEIGHBOUR, self._family.number)
        for word in range(0, 16, 4):
            program.load(W, R1, R10, _WAY + _WAY_DESTINATION + word)
            program.store(W, R10, _NEIGHBOUR + 4 + word, R1)
        program.copy(R1, R8)
        program.frame(R2, _NEIGHBOUR)
        program.set(R3, _NEIGHBOUR_BYTES)
        program.set(R4, 0)
        program.call(_REDIRECT_NEIGH)
        program.exit()

    def _tell_class(self) -> None:
        """What rules about routes may ask for: the type of service, or of IPv6 the class and the flow."""
        program = self._program
        if self._family.version == 4:
            program.load(B, R1, R7, 15)
            program.store(B, R10, _WAY + _WAY_CLASS, R1)
        else:
            program.load(W, R1, R7, 14)
            program.compute(Sum.AND, R1, 0xFFFFFF0F)
            program.store(W, R10, _WAY + _WAY_CLASS, R1)

    def _tell_length(self) -> None:
        """Of the packet, or of each that the device is going to make of it: the routing table says whether it fits."""
        program, told, udp, whole = self._program, *map(self._label, ("told", "datagrams", "whole"))
        program.load(W, R3, R6, _GSO_SIZE)
        program.jump_if(Test.EQUAL, R3, 0, whole)
        program.compute(Sum.ADD, R3, self._family.transport - 14 + 8)
        program.jump_if(Test.EQUAL, R9, _UDP, udp)
        _check_length(program, self._family.transport + 20)
        program.load(B, R1, R7, self._family.transport + 12)
        program.compute(Sum.RIGHT, R1, 4)
        program.compute(Sum.LEFT, R1, 2)
        program.compute_with(Sum.ADD, R3, R1)
        program.compute(Sum.SUBTRACT, R3, 8)
        program.label(udp)
        program.jump(told)
        program.label(whole)
        program.load(W, R3, R6, _LEN)
        program.compute(Sum.SUBTRACT, R3, 14)
        program.label(told)
        program.store(H, R10, _WAY + _WAY_LENGTH, R3)

    def _take_a_hop(self) -> None:
        """As ip_decrease_ttl() does it. The frame may have moved after this: r7 is no more."""
        program, done = self._program, self._label("hop")
        self._load_frame()
        if self._family.version == 6:
            program.load(B, R1, R7, _HOPS6)
            program.compute(Sum.SUBTRACT, R1, 1)
            program.store(B, R10, _WORD, R1)
            self._store(_HOPS6, _WORD, 1, _RECOMPUTE_CSUM)
            return
        program.load(W, R1, R7, _TTL_AND_CHECKSUM)
        program.copy(R2, R1)
        program.compute(Sum.RIGHT, R2, 16)
        program.compute(Sum.ADD, R2, 1)
        program.jump_if(Test.LESS, R2, 0xFFFF, done)
        program.compute(Sum.ADD, R2, 1)
        program.compute(Sum.AND, R2, 0xFFFF)
        program.label(done)
        program.compute(Sum.LEFT, R2, 16)
        program.compute(Sum.AND, R1, 0xFFFF)
        program.compute(Sum.SUBTRACT, R1, 1)
        program.compute_with(Sum.OR, R1, R2)
        program.store(W, R10, _WORD, R1)
        self._store(_TTL_AND_CHECKSUM, _WORD, 4, _RECOMPUTE_CSUM)

    def _store(self, place: int, at: int, length: int, flags: int) -> None:
        program = self._program
        program.copy(R1, R6)
        program.set(R2, place)
        program.frame(R3, at)
        program.set(R4, length)
        program.set(R5, flags)
        program.call(_STORE_BYTES)
        program.jump_if(Test.DIFFERENT, R0, 0, "on")


def _masked_words(pool: Network) -> Iterable[tuple[int, int]]:
    """The words of a network that count, and their masks, as a program loads them."""
    words = zip(_words(pool.network_address.packed), _words(pool.netmask.packed), strict=True)
    return [(address, mask) for address, mask in words if mask]


def _words(packed: bytes) -> Iterable[int]:
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]


def _swapped(number: int) -> int:
    """A number of two bytes in network order, as a program loads it. Podwire runs where the host's is the other."""
    return int.from_bytes(number.to_bytes(2, "big"), "little")


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))
