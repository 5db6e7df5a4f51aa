"""The programs of the fast path: what becomes of a packet at the port of its pod, and where it comes from a node. Pure.

    pod ── port ─▶ FROM_POD ─┬─▶ another pod of this node       past bridge and firewall, into its namespace
                             ├─▶ a pod of another node          past bridge and firewall, to the device that leads there
                             └─▶ everything else                on, as if there were no program
    VXLAN, underlay ─▶ ARRIVING ─┬─▶ a pod of this node         past routing, firewall and bridge
                                 └─▶ everything else            on

Nothing is decided here: whether a packet belongs to a connection that the firewall has let pass is asked of conntrack,
for each packet, and of one that leaves for another node where it goes, of the routing table. So whoever cuts a
connection (`conntrack -D`, a policy that now forbids it) cuts it here, and a route that changes changes here. What
arrives for a pod goes to its port, without a question to the routing table: a route or a rule of the receiving node
that would keep it from the pod does not. A packet takes the fast way when all of this holds:

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

from ipam_daemon.fastpath_connection import LEAST_LEFT, Connection
from ipam_daemon.fastpath_part import (
    COUNT_BYTES,
    DATA,
    FAMILIES,
    FROM_NODE,
    HOPS6,
    IFINDEX,
    KEY_BYTES,
    LEASE_BYTES,
    MACS,
    PACKET_HOST,
    PKT_TYPE,
    POD_BYTES,
    RECEIVER,
    SENDER,
    TCP,
    TO_NODE,
    TO_POD,
    TTL4,
    TUPLE,
    UDP,
    VLAN_PRESENT,
    B,
    Conntrack,
    D,
    H,
    Maps,
    Node,
    Part,
    W,
    Where,
    check_length,
    packed,
    swapped,
)
from ipam_daemon.fastpath_ways import Ways
from ipam_daemon.model import Address, Network
from podwire.bpf.assembler import R0, R1, R2, R6, R7, R8, R9, R10, Assembler, Sum, Test

__all__ = [
    "COUNT_BYTES",
    "FROM_NODE",
    "KEY_BYTES",
    "LEASE_BYTES",
    "LEAST_LEFT",
    "ON",
    "POD_BYTES",
    "TO_NODE",
    "TO_POD",
    "Conntrack",
    "Maps",
    "Node",
    "Where",
    "pod_key",
    "pod_value",
    "render",
    "render_nothing",
]

ON = -1
"""What a program returns for a packet that goes on (TC_ACT_UNSPEC, TCX_NEXT)."""
_COARSE_NS = 160  # enum bpf_func_id
_FIN_SYN_RST = 0x07
_WHOLE_WORD = 0xFFFFFFFF


def pod_key(address: Address) -> bytes:
    """An address in the map of pods: one of IPv4 as IPv6 maps it (RFC 4291, 2.5.5.2)."""
    return address.packed if address.version == 6 else ipaddress.IPv6Address(f"::ffff:{address}").packed


def pod_value(ifindex: int, mac: str) -> bytes:
    """The port of the pod on the node, and its MAC."""
    return struct.pack("=I6sH", ifindex, packed(mac), 0)


def render(where: Where, conntrack: Conntrack, maps: Maps, node: Node) -> bytes:
    """The program, for podwire.bpf.kernel.load()."""
    program = Assembler()
    program.copy(R6, R1)
    _check_lease(program, maps)
    _check_frame(program, where)
    program.load(H, R1, R7, 12)
    had = {pool.version for pool in node.pools} & {block.version for block in node.blocks}
    families = [each for each in FAMILIES if each.version in had]
    for family in families:
        program.jump_if(Test.EQUAL, R1, swapped(family.ethertype), f"v{family.version}")
    program.jump("on")
    for family in families:
        program.label(f"v{family.version}")
        for part in (Ends, Connection, Ways):
            part(program, where, conntrack, maps, node, family).write()
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
    program.load(W, R1, R6, VLAN_PRESENT)
    program.jump_if(Test.DIFFERENT, R1, 0, "on")
    if where is Where.ARRIVING:
        program.load(W, R1, R6, PKT_TYPE)
        program.jump_if(Test.DIFFERENT, R1, PACKET_HOST, "on")
    program.load(W, R7, R6, DATA)
    check_length(program, FAMILIES[0].transport + 8)


class Ends(Part):
    """The questions about a frame and its two ends."""

    def write(self) -> None:
        """Adds them to the program."""
        self._check_header()
        self._check_pools()
        self._check_transport()
        self._copy_tuple()
        self._check_sender()
        self._find_receiver()

    def _check_header(self) -> None:
        """No option, no fragment, and r9 = the protocol."""
        program = self._program
        if self._family.version == 4:
            program.load(B, R1, R7, 14)
            program.jump_if(Test.DIFFERENT, R1, 0x45, "on")
            program.load(H, R1, R7, 20)
            program.jump_if(Test.ANY_BIT, R1, swapped(0x3FFF), "on")  # more fragments, or not the first
            program.load(B, R9, R7, 23)
        else:
            check_length(program, self._family.transport + 8)
            program.load(B, R9, R7, 20)

    def _check_transport(self) -> None:
        program, udp = self._program, self._label("udp")
        program.jump_if(Test.EQUAL, R9, UDP, udp)
        program.jump_if(Test.DIFFERENT, R9, TCP, "on")
        check_length(program, self._family.transport + 20)
        program.load(B, R1, R7, self._family.transport + 13)
        program.jump_if(Test.ANY_BIT, R1, _FIN_SYN_RST, "on")
        program.label(udp)

    def _copy_tuple(self) -> None:
        """As struct bpf_sock_tuple has it, and both addresses as keys."""
        program = self._program
        for place, key, at, asked in (
            (self._family.source, SENDER, TUPLE, self._from_pod),
            (self._family.destination, RECEIVER, TUPLE + self._family.length, True),
        ):
            if asked and self._family.version == 4:
                program.store_number(D, R10, key, 0)
                program.store_number(W, R10, key + 8, swapped(0xFFFF) << 16)
            for word in range(0, self._family.length, 4):
                program.load(W, R1, R7, place + word)
                program.store(W, R10, at + word, R1)
                if asked:
                    program.store(W, R10, key + KEY_BYTES - self._family.length + word, R1)
        program.load(W, R1, R7, self._family.transport)
        program.store(W, R10, TUPLE + 2 * self._family.length, R1)

    def _check_sender(self) -> None:
        program = self._program
        if not self._from_pod:
            self._jump_if_within(self._family.source, self._node.blocks, "on")  # no strict rp_filter would let it in
            return
        self._find(SENDER)
        program.jump_if(Test.EQUAL, R0, 0, "on")
        program.load(W, R1, R0, 0)
        program.load(W, R2, R6, IFINDEX)
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
        program, elsewhere, found, near = self._program, *map(self._label, ("elsewhere", "found", "near"))
        if self._ways:
            self._jump_if_within(self._family.destination, self._node.blocks, near)
            program.jump(elsewhere)
            program.label(near)
        self._find(RECEIVER)
        program.jump_if(Test.EQUAL, R0, 0, "on")
        if not self._from_pod:
            program.load(W, R8, R0, 0)
            program.load(W, R1, R0, 4)
            program.store(W, R10, MACS, R1)
            program.load(H, R1, R0, 8)
            program.store(H, R10, MACS + 4, R1)
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
        self._program.load(B, R1, R7, TTL4 if self._family.version == 4 else HOPS6)
        self._program.jump_if(Test.AT_MOST, R1, 1, "on")

    def _check_pools(self) -> None:
        """That the receiver is a pod of the cluster, which spares a packet to a Service or the world the rest."""
        inside = self._label("inside")
        self._jump_if_within(self._family.destination, self._node.pools, inside)
        self._program.jump("on")
        self._program.label(inside)

    def _jump_if_within(self, place: int, networks: Iterable[Network], label: str) -> None:
        """Where the address at a place of the frame is one of these networks'."""
        program = self._program
        for network in networks:
            if network.version != self._family.version:
                continue
            outside = self._label(f"not {label} {network} ")
            for word, (address, mask) in enumerate(_masked_words(network)):
                program.load(W, R1, R7, place + 4 * word)
                if mask != _WHOLE_WORD:
                    program.compute32(Sum.AND, R1, mask)
                program.jump32_if(Test.DIFFERENT, R1, address, outside)
            program.jump(label)
            program.label(outside)

    def _check_bridge_mac(self) -> None:
        program, mac = self._program, packed(self._node.bridge_mac)
        program.load(W, R1, R7, 0)
        program.jump32_if(Test.DIFFERENT, R1, int.from_bytes(mac[:4], "little"), "on")
        program.load(H, R1, R7, 4)
        program.jump_if(Test.DIFFERENT, R1, int.from_bytes(mac[4:], "little"), "on")


def _masked_words(pool: Network) -> Iterable[tuple[int, int]]:
    """The words of a network that count, and their masks, as a program loads them."""
    words = zip(_words(pool.network_address.packed), _words(pool.netmask.packed), strict=True)
    return [(address, mask) for address, mask in words if mask]


def _words(packed: bytes) -> Iterable[int]:
    return [int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4)]
