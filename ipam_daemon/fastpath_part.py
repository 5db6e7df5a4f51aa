"""What the parts of the fast path's programs share: what they are told, and where things are. Pure.

    fastpath_program      the questions about the frame and its two ends          r7 the frame, r9 TCP or UDP
    fastpath_connection   the questions about its connection, to conntrack        r7 what is wrong of it
    fastpath_ways         where it goes, and what becomes of it on the way        r8 the port of the receiver

A part is of one family, and written for both. r6 is the context all the time.

Source: struct __sk_buff in linux/bpf.h.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from ipam_daemon.model import Network
from podwire.bpf.assembler import R1, R2, R6, R7, Assembler, Size, Sum, Test

B, H, W, D = Size.BYTE, Size.HALF, Size.WORD, Size.DOUBLE

KEY_BYTES, POD_BYTES, LEASE_BYTES, COUNT_BYTES = 16, 12, 8, 8
TO_POD, TO_NODE, FROM_NODE = range(3)
"""Places in the map of counters: which fast way a packet took."""

# struct __sk_buff
LEN, PKT_TYPE, VLAN_PRESENT, IFINDEX, DATA, DATA_END, GSO_SIZE = 0, 4, 20, 40, 76, 80, 176
PACKET_HOST = 0
LOOKUP = 1  # enum bpf_func_id
TCP, UDP = 6, 17
_AF_INET, _AF_INET6 = 2, 10
TTL4, HOPS6 = 22, 21

# the stack
TUPLE, SENDER, RECEIVER, OPTIONS, STATE, LEFT, WAY, NEIGHBOUR, MACS, WORD, ENTRY = (
    -48, -64, -80, -96, -100, -104, -168, -192, -256, -216, -224,
)  # fmt: skip


class Where(Enum):
    """Which program."""

    FROM_POD = "podwire_pod"
    ARRIVING = "podwire_arrival"


class Conntrack(msgspec.Struct, frozen=True, kw_only=True):
    """What the running kernel says of its connection tracking: the numbers of its functions and the module that has
    them (0: the kernel itself), and where members of nf_conn are, in bytes. `original_to` and `reply_from` are an
    address and the port after it: where a connection was begun to, and who answers it. `extensions` is the pointer to
    them, and `own_timeout` where they say that a rule has given the entry a time of its own (None: rules cannot). `hz`
    are jiffies a second."""

    lookup: int
    renew: int
    release: int
    module: int
    status: int
    timeout: int
    tcp_state: int
    original_to: tuple[int, int]
    reply_from: tuple[int, int]
    extensions: int
    own_timeout: int | None
    hz: int


class Maps(msgspec.Struct, frozen=True, kw_only=True):
    """The descriptors of the maps. `pods` has what `pod_key` and `pod_value` make; `lease` until when the daemon lives,
    in nanoseconds of CLOCK_MONOTONIC; `counts` packets, per CPU."""

    pods: int
    lease: int
    counts: int


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What the programs are for: the bridge, the pools of the cluster and the blocks of this node, and the devices by
    which packets may leave, by their indexes; 0 for no VXLAN. Conntrack keeps an established connection of TCP for
    `tcp_lasts` seconds after its last packet, and one of UDP for `udp_lasts`."""

    bridge: int
    bridge_mac: str
    pools: tuple[Network, ...]
    blocks: tuple[Network, ...]
    vxlan: int
    underlay: tuple[int, ...]
    tcp_lasts: int
    udp_lasts: int


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """Where things are in a frame."""

    version: int
    number: int
    ethertype: int
    source: int
    destination: int
    length: int  # of an address
    transport: int


FAMILIES = (
    Family(version=4, number=_AF_INET, ethertype=0x0800, source=26, destination=30, length=4, transport=34),
    Family(version=6, number=_AF_INET6, ethertype=0x86DD, source=22, destination=38, length=16, transport=54),
)


def check_length(program: Assembler, length: int) -> None:
    """That the frame at r7 has so many bytes in one piece."""
    program.load(W, R2, R6, DATA_END)
    program.copy(R1, R7)
    program.compute(Sum.ADD, R1, length)
    program.jump_if_with(Test.GREATER, R1, R2, "on")


def swapped(number: int) -> int:
    """A number of two bytes in network order, as a program loads it. Podwire runs where the host's is the other."""
    return int.from_bytes(number.to_bytes(2, "big"), "little")


def packed(mac: str) -> bytes:
    """A MAC in colon notation, as a frame has it."""
    return bytes.fromhex(mac.replace(":", ""))


class Part:
    """One family's part of a program."""

    def __init__(
        self, program: Assembler, where: Where, conntrack: Conntrack, maps: Maps, node: Node, family: Family
    ) -> None:
        self._program = program
        self._from_pod = where is Where.FROM_POD
        self._conntrack = conntrack
        self._maps = maps
        self._node = node
        self._family = family
        self._ways = tuple(filter(None, (node.vxlan, *node.underlay))) if self._from_pod else ()

    def _label(self, word: str) -> str:
        return f"{word}{self._family.version}"

    def _load_frame(self) -> None:
        """r7 = the frame, with all that is asked of it in one piece."""
        self._program.load(W, R7, R6, DATA)
        check_length(self._program, self._family.transport + 8)

    def _find(self, key: int) -> None:
        """r0 = the pod of this node that has the address, or 0."""
        program = self._program
        program.load_map(R1, self._maps.pods)
        program.frame(R2, key)
        program.call(LOOKUP)
