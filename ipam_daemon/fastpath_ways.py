"""Where a packet of the fast path goes, and what becomes of it on the way. Pure.

    to a pod of this node    into its namespace, as it is
    from another node        the same, a hop less, between the gateway's MAC and the pod's
    to another node          a hop less, to the device that the routing table names: by VXLAN with the MACs that it
                             knows, by others to the neighbour, whose MAC is the kernel's to find

Source: the helpers in linux/bpf.h; bpf_ipv4_fib_lookup() in net/core/filter.c.
"""

from __future__ import annotations

from ipam_daemon.fastpath_part import (
    FROM_NODE,
    GSO_SIZE,
    HOPS6,
    LEN,
    LOOKUP,
    MACS,
    NEIGHBOUR,
    PACKET_HOST,
    TO_NODE,
    TO_POD,
    TUPLE,
    UDP,
    WAY,
    WORD,
    B,
    D,
    H,
    Part,
    W,
    check_length,
    packed,
)
from podwire.bpf.assembler import R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10, Sum, Test

# enum bpf_func_id
_REDIRECT, _CHANGE_TYPE, _FIB_LOOKUP, _REDIRECT_NEIGH, _REDIRECT_PEER = 23, 32, 69, 152, 155
_STORE_BYTES, _RECOMPUTE_CSUM = 9, 1
_TYPE, _TTL_AND_CHECKSUM = 12, 22  # in a frame
_WAY_BYTES, _NEIGHBOUR_BYTES = 64, 20  # struct bpf_fib_lookup, struct bpf_redir_neigh
_WAY_PROTOCOL, _WAY_PORTS, _WAY_LENGTH, _WAY_IFINDEX, _WAY_CLASS = 1, 2, 6, 8, 12
_WAY_SOURCE, _WAY_DESTINATION = 16, 32
_WAY_SOURCE_MAC, _WAY_DESTINATION_MAC = 52, 58


class Ways(Part):
    """The ways of a packet whose ends and connection are as they should be."""

    def write(self) -> None:
        """Adds them to the program."""
        if not self._from_pod:
            self._into_pod()
            return
        if self._ways:
            self._program.jump_if(Test.EQUAL, R8, 0, self._label("node"))
        self._to_pod()
        if self._ways:
            self._program.label(self._label("node"))
            self._to_node()

    def _count(self, place: int) -> None:
        program, label = self._program, self._label(f"counted{place}-")
        program.store_number(W, R10, WORD, place)
        program.load_map(R1, self._maps.counts)
        program.frame(R2, WORD)
        program.call(LOOKUP)
        program.jump_if(Test.EQUAL, R0, 0, label)
        program.load(D, R1, R0, 0)
        program.compute(Sum.ADD, R1, 1)
        program.store(D, R0, 0, R1)
        program.label(label)

    def _to_pod(self) -> None:
        program = self._program
        self._count(TO_POD)
        program.copy(R1, R6)
        program.set(R2, PACKET_HOST)  # its MAC is not the port's
        program.call(_CHANGE_TYPE)
        program.copy(R1, R8)
        program.set(R2, 0)
        program.call(_REDIRECT_PEER)
        program.exit()

    def _into_pod(self) -> None:
        program, mac = self._program, packed(self._node.bridge_mac)
        program.store_number(H, R10, MACS + 6, int.from_bytes(mac[:2], "little"))
        program.store_number(W, R10, MACS + 8, int.from_bytes(mac[2:], "little"))
        self._take_a_hop(framed=True)
        self._count(FROM_NODE)
        program.copy(R1, R8)
        program.set(R2, 0)
        program.call(_REDIRECT_PEER)
        program.exit()

    def _to_node(self) -> None:
        """The way is the routing table's."""
        program = self._program
        for offset in range(0, _WAY_BYTES, 8):
            program.store_number(D, R10, WAY + offset, 0)
        program.store_number(B, R10, WAY, self._family.number)
        program.store(B, R10, WAY + _WAY_PROTOCOL, R9)
        program.store_number(W, R10, WAY + _WAY_IFINDEX, self._node.bridge)
        for place, at in ((_WAY_SOURCE, TUPLE), (_WAY_DESTINATION, TUPLE + self._family.length)):
            for word in range(0, self._family.length, 4):
                program.load(W, R1, R10, at + word)
                program.store(W, R10, WAY + place + word, R1)
        for half in (0, 2):
            program.load(H, R1, R10, TUPLE + 2 * self._family.length + half)
            program.store(H, R10, WAY + _WAY_PORTS + half, R1)
        self._load_frame()
        self._tell_class()
        self._tell_length()
        program.copy(R1, R6)
        program.frame(R2, WAY)
        program.set(R3, _WAY_BYTES)
        program.set(R4, 0)
        program.call(_FIB_LOOKUP)
        program.jump_if(Test.DIFFERENT, R0, 0, "on")
        program.load(B, R1, R10, WAY)
        program.jump_if(Test.DIFFERENT, R1, self._family.number, "on")  # a gateway of the other family
        program.load(W, R8, R10, WAY + _WAY_IFINDEX)
        leaving, tunnel = self._label("leaving"), self._label("tunnel")
        for ifindex in self._ways:
            program.jump_if(Test.EQUAL, R8, ifindex, leaving)
        program.jump("on")
        program.label(leaving)
        self._count(TO_NODE)
        program.jump_if(Test.EQUAL, R8, self._node.vxlan, tunnel)
        self._by_neighbour()
        program.label(tunnel)
        self._by_tunnel()

    def _by_tunnel(self) -> None:
        """Its neighbours are permanent, so what the routing table says of their MACs holds."""
        program = self._program
        for half in range(0, 6, 2):
            program.load(H, R1, R10, WAY + _WAY_DESTINATION_MAC + half)
            program.store(H, R10, MACS + half, R1)
            program.load(H, R1, R10, WAY + _WAY_SOURCE_MAC + half)
            program.store(H, R10, MACS + 6 + half, R1)
        self._take_a_hop(framed=True)
        program.copy(R1, R8)
        program.set(R2, 0)
        program.call(_REDIRECT)
        program.exit()

    def _by_neighbour(self) -> None:
        """Its MAC is the kernel's to find, and to find out anew."""
        program = self._program
        self._take_a_hop(framed=False)
        program.store_number(W, R10, NEIGHBOUR, self._family.number)
        for word in range(0, 16, 4):
            program.load(W, R1, R10, WAY + _WAY_DESTINATION + word)
            program.store(W, R10, NEIGHBOUR + 4 + word, R1)
        program.copy(R1, R8)
        program.frame(R2, NEIGHBOUR)
        program.set(R3, _NEIGHBOUR_BYTES)
        program.set(R4, 0)
        program.call(_REDIRECT_NEIGH)
        program.exit()

    def _tell_class(self) -> None:
        """What rules about routes may ask for: the type of service, or of IPv6 the class and the flow."""
        program = self._program
        if self._family.version == 4:
            program.load(B, R1, R7, 15)
            program.store(B, R10, WAY + _WAY_CLASS, R1)
        else:
            program.load(W, R1, R7, 14)
            program.compute(Sum.AND, R1, 0xFFFFFF0F)
            program.store(W, R10, WAY + _WAY_CLASS, R1)

    def _tell_length(self) -> None:
        """Of the packet, or of each that the device is going to make of it: the routing table says whether it fits."""
        program, told, udp, whole = self._program, *map(self._label, ("told", "datagrams", "whole"))
        program.load(W, R3, R6, GSO_SIZE)
        program.jump_if(Test.EQUAL, R3, 0, whole)
        program.compute(Sum.ADD, R3, self._family.transport - 14 + 8)
        program.jump_if(Test.EQUAL, R9, UDP, udp)
        check_length(program, self._family.transport + 20)
        program.load(B, R1, R7, self._family.transport + 12)
        program.compute(Sum.RIGHT, R1, 4)
        program.compute(Sum.LEFT, R1, 2)
        program.compute_with(Sum.ADD, R3, R1)
        program.compute(Sum.SUBTRACT, R3, 8)
        program.label(udp)
        program.jump(told)
        program.label(whole)
        program.load(W, R3, R6, LEN)
        program.compute(Sum.SUBTRACT, R3, 14)
        program.label(told)
        program.store(H, R10, WAY + _WAY_LENGTH, R3)

    def _take_a_hop(self, *, framed: bool) -> None:
        """As ip_decrease_ttl() does it; `framed` with the MACs that are on the stack. The frame may have moved after
        this: r7 is no more."""
        program = self._program
        self._load_frame()
        if self._family.version == 6:
            program.load(B, R1, R7, HOPS6)
            program.compute(Sum.SUBTRACT, R1, 1)
            program.store(B, R10, WORD, R1)
            self._store(HOPS6, WORD, 1, _RECOMPUTE_CSUM)
            if framed:
                self._store(0, MACS, _TYPE, 0)
            return
        self._compute_hop("tunnelled" if framed else "routed")
        if not framed:
            program.store(W, R10, WORD, R1)
            self._store(_TTL_AND_CHECKSUM, WORD, 4, 0)
            return
        for half in (_TTL_AND_CHECKSUM, _TTL_AND_CHECKSUM + 2):
            program.store(H, R10, MACS + half, R1)
            program.compute(Sum.RIGHT, R1, 16)
        for half in range(_TYPE, _TTL_AND_CHECKSUM, 2):  # what is between is written as it is: one call instead of two
            program.load(H, R1, R7, half)
            program.store(H, R10, MACS + half, R1)
        self._store(0, MACS, _TTL_AND_CHECKSUM + 4, 0)

    def _compute_hop(self, word: str) -> None:
        """r1 = the hops left, the protocol and the checksum of IPv4. Its sum stays what it was, and so does that of a
        device that has summed the whole packet."""
        program, done = self._program, self._label(word)
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

    def _store(self, place: int, at: int, length: int, flags: int) -> None:
        program = self._program
        program.copy(R1, R6)
        program.set(R2, place)
        program.frame(R3, at)
        program.set(R4, length)
        program.set(R5, flags)
        program.call(_STORE_BYTES)
        program.jump_if(Test.DIFFERENT, R0, 0, "on")
