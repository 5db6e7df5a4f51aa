"""A node whose fast path is asked about one packet at a time, and the packets.

    pod a ── pwa ─┐                           ┌── pw-vxlan   to 10.244.2.0/24, a pod there is 10.244.2.9
                  ├── pw0 (bridge, 10.244.1.1)├── under0     to 10.244.3.0/24, directly
    pod b ── pwb ─┘                           └── aside      to 10.244.4.0/24, a way that is none of the fast path's

IPv6 has the same with fd00:1:0:N:: for 10.244.N.0. A Flow is a packet and the connection that it belongs to; by itself
it takes the fast way, and a case changes one thing of it. Connections are put into conntrack by its own tool, each with
a port of its own.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

import msgspec

from ipam_daemon import fastpath
from ipam_daemon.fastpath_program import (
    COUNT_BYTES,
    KEY_BYTES,
    LEASE_BYTES,
    POD_BYTES,
    Maps,
    Node,
    Where,
    pod_key,
    pod_value,
    render,
)
from ipam_daemon.netlink import index_of
from podwire import netns
from podwire.bpf import kernel
from podwire.nlattr import attribute, message, nested
from tests.netns.bpf_run import run
from tests.netns.frames import checksum, mac_bytes
from tests.netns.node_fixtures import Netns

FAST, ON = 7, -1
HEADER = {4: 20, 6: 40}
SYN, FIN, RST, PSH, ACK, URG, ECE, CWR = 0x02, 0x01, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80
TCP, UDP = 6, 17
MTU, UNDERLAY_MTU, NARROW_MTU = 1400, 1450, 1300
A_MAC, B_MAC, BRIDGE_MAC, VXLAN_MAC, THEIR_VTEP_MAC, UNDER_MAC, THEIR_MAC = (
    f"0a:58:0a:f4:{last}" for last in ("01:03", "01:04", "01:01", "01:02", "02:02", "99:01", "99:02")
)
_ETHERTYPES = {4: 0x0800, 6: 0x86DD}
_SECONDS = 600
_ports = itertools.count(20000)


def at(version: int, network: int, host: int) -> str:
    """An address of a pod, or of what belongs to pods."""
    return f"10.244.{network}.{host}" if version == 4 else f"fd00:1:0:{network}::{host}"


A, B, FAR, NEAR, ASIDE, NARROW, NOBODY = (1, 3), (1, 4), (2, 9), (3, 9), (4, 9), (10, 9), (1, 77)
POOLS = tuple(ipaddress.ip_network(each) for each in ("10.244.0.0/16", "10.250.8.0/22", "fd00:1::/48", "fd00:2:8::/45"))
BLOCKS = tuple(ipaddress.ip_network(each) for each in ("10.250.8.0/26", "10.244.1.0/24", "fd00:1:0:1::/64"))
ELSEWHERE = {4: "10.250.9.9", 6: "fd00:2:9::9"}
"""A pod of another node in the second pool."""
OUTSIDE = {4: "10.245.2.9", 6: "fd00:1:1:2::9"}
"""No pod, by a hair, though there is a route by VXLAN."""


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """A packet, and what conntrack has of its connection. Addresses are text; `begun` is the side that began it."""

    version: int
    where: Where
    port: str  # that the frame comes in by
    source: str
    target: str
    source_mac: str
    target_mac: str
    protocol: int = TCP
    flags: int = ACK
    hops: int = 64
    payload: int = 4
    identification: int = 1
    class_: int = 0
    gso_size: int = 0
    edit: Callable[[bytes], bytes] = bytes  # of the frame, at last
    # the connection
    known: bool = True
    answers: bool = False  # the packet goes from who was asked to who asked
    state: str = "ESTABLISHED"
    status: str = "SEEN_REPLY,ASSURED"
    seconds: int = _SECONDS
    more: tuple[str, ...] = ()
    asked: str = ""  # another address than that of who answers
    asked_port: int = 0
    by_hand: bytes = b""  # attributes that the tool does not know

    def but(self, **changes: object) -> Flow:
        """The same with changes."""
        return msgspec.structs.replace(self, **changes)


def frame(flow: Flow, source_port: int, target_port: int) -> bytes:
    """The packet on the wire."""
    head = struct.pack("!HH", source_port, target_port)
    data = bytes(index % 251 for index in range(flow.payload))
    if flow.protocol == TCP:
        segment = head + struct.pack("!IIBBHHH", 1, 1, 5 << 4, flow.flags, 512, 0xABCD, 0) + data
    else:
        segment = head + struct.pack("!HH", 8 + len(data), 0xABCD) + data
    source, target = (ipaddress.ip_address(each).packed for each in (flow.source, flow.target))
    if flow.version == 4:
        bare = struct.pack(
            "!BBHHHBBH", 0x45, flow.class_, 20 + len(segment), flow.identification, 0, flow.hops, flow.protocol, 0
        )
        packet = with_checksum(bare + source + target) + segment
    else:
        first = 6 << 28 | flow.class_ << 20 | flow.identification
        packet = struct.pack("!IHBB", first, len(segment), flow.protocol, flow.hops) + source + target + segment
    kind = struct.pack("!H", _ETHERTYPES[flow.version])
    return flow.edit(mac_bytes(flow.target_mac) + mac_bytes(flow.source_mac) + kind + packet)


def with_checksum(header: bytes) -> bytes:
    """An IPv4 header with the checksum that it should have."""
    bare = header[:10] + b"\0\0" + header[12:]
    return bare[:10] + struct.pack("!H", checksum(bare)) + bare[12:]


class Stage:
    """The node; both programs loaded, with the maps that they ask."""

    def __init__(self, node: Netns, a: Netns, b: Netns, descriptor: int) -> None:
        self.netns, self.a, self.b = node, a, b
        self._descriptor = descriptor
        self.conntrack, self.modules = fastpath.read_conntrack()
        self.pods = kernel.Map(kernel.MapKind.HASH, key=KEY_BYTES, value=POD_BYTES, entries=16, name="pods")
        self.lease = kernel.Map(kernel.MapKind.ARRAY, key=4, value=LEASE_BYTES, entries=1, name="lease")
        self.counts = kernel.Map(kernel.MapKind.ARRAY_PER_CPU, key=4, value=COUNT_BYTES, entries=3, name="counts")
        with self.inside():
            self.index = {name: index_of(name) for name in ("pw0", "pwa", "pwb", "pw-vxlan", "under0", "aside")}
        self.node = Node(
            bridge=self.index["pw0"],
            bridge_mac=BRIDGE_MAC,
            pools=POOLS,
            blocks=BLOCKS,
            vxlan=self.index["pw-vxlan"],
            underlay=(self.index["under0"],),
            tcp_lasts=432000,
            udp_lasts=120,
        )
        for host, port, mac in ((A, "pwa", A_MAC), (B, "pwb", B_MAC)):
            for version in (4, 6):
                key = pod_key(ipaddress.ip_address(at(version, *host)))
                self.pods.put(key, pod_value(self.index[port], mac))
        self.live(3600)
        self.programs = {where: self.load(where, self.node) for where in Where}

    def close(self) -> None:
        """Closes what is open."""
        for descriptor in (*self.programs.values(), *self.modules):
            os.close(descriptor)
        for each in (self.pods, self.lease, self.counts):
            each.close()

    def inside(self) -> AbstractContextManager[None]:
        """Has this thread in the node's namespace."""
        return netns.inside(self._descriptor)

    def load(self, where: Where, node: Node) -> int:
        """A program for such a node; the caller closes it."""
        maps = Maps(pods=self.pods.descriptor, lease=self.lease.descriptor, counts=self.counts.descriptor)
        return kernel.load(render(where, self.conntrack, maps, node), where.value, self.modules)

    def live(self, seconds: float) -> None:
        """The daemon lives for so long."""
        until = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(seconds * 1e9)
        self.lease.put(struct.pack("=I", 0), struct.pack("=Q", until))

    def taken(self) -> list[int]:
        """Packets that took the fast way to a pod, to a node, from a node."""
        values = [self.counts.get(struct.pack("=I", place)) or b"" for place in range(3)]
        return [sum(number for (number,) in struct.iter_unpack("=Q", each)) for each in values]

    def ask(self, flow: Flow) -> tuple[int, bytes, bytes]:
        """What the program says of a packet, whose connection is there now; the packet before and after."""
        before = self.begin(flow)
        returned, after = self.say(flow, before)
        return returned, before, after

    def begin(self, flow: Flow) -> bytes:
        """A new connection, and its packet."""
        source, target = next(_ports), next(_ports)
        if flow.known:
            self._remember(flow, source, target)
        return frame(flow, source, target)

    def say(self, flow: Flow, given: bytes, program: int = 0) -> tuple[int, bytes]:
        """What the program, or another, says of a frame that comes in as that of the flow does; the frame after it."""
        with self.inside():
            return run(program or self.programs[flow.where], given, self.index[flow.port], flow.gso_size)

    def _remember(self, flow: Flow, source: int, target: int) -> None:
        """Puts the connection into conntrack: who asked whom, and who answers."""
        one, other = (flow.source, source), (flow.target, target)
        client, server = (other, one) if flow.answers else (one, other)
        asked = (flow.asked or server[0], flow.asked_port or server[1])
        if flow.by_hand:
            self._remember_by_hand(flow, client, server)
            return
        words = ["conntrack", "-I", "-p", "tcp" if flow.protocol == TCP else "udp"]
        words += ["-s", client[0], "-d", asked[0], "--sport", str(client[1]), "--dport", str(asked[1])]
        if asked != server:
            words += ["-r", server[0], "-q", client[0]]
            words += ["--reply-port-src", str(server[1]), "--reply-port-dst", str(client[1])]
        words += ["-t", str(flow.seconds), "-u", flow.status] if flow.status else ["-t", str(flow.seconds)]
        words += ["--state", flow.state] if flow.protocol == TCP else []
        self.command(*words, *flow.more)

    def _remember_by_hand(self, flow: Flow, client: tuple[str, int], server: tuple[str, int]) -> None:
        family = socket.AF_INET if flow.version == 4 else socket.AF_INET6
        body = struct.pack("!BBH", family, 0, 0)
        body += _tuple(1, flow, client, server) + _tuple(2, flow, server, client)
        body += attribute(3, struct.pack("!I", 0xE)) + attribute(7, struct.pack("!I", flow.seconds))
        if flow.protocol == TCP:
            body += nested(4, nested(1, attribute(1, b"\3")))  # established
        with self.inside():
            asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12)  # NETLINK_NETFILTER
        with closing(asking):
            asking.send(message(0x100, 0x605, 1, body + flow.by_hand))  # IPCTNL_MSG_CT_NEW, exclusively
            (number,) = struct.unpack_from("=i", asking.recv(4096), 16)
        assert number == 0, os.strerror(-number)

    def command(self, *words: str) -> str:
        """A program in the node's namespace, which the child has from this thread."""
        with self.inside():
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout


def _tuple(kind: int, flow: Flow, source: tuple[str, int], target: tuple[str, int]) -> bytes:
    """CTA_TUPLE_ORIG or CTA_TUPLE_REPLY."""
    first = 1 if flow.version == 4 else 3
    ends = [attribute(first + each, ipaddress.ip_address(end[0]).packed) for each, end in enumerate((source, target))]
    ports = [attribute(2 + each, struct.pack("!H", end[1])) for each, end in enumerate((source, target))]
    return nested(kind, nested(1, b"".join(ends)) + nested(2, attribute(1, bytes([flow.protocol])) + b"".join(ports)))


HELPER = nested(5, attribute(1, b"ftp\0"))
"""CTA_HELP: somebody reads along."""
SEQUENCE = nested(15, b"".join(attribute(1 + each, struct.pack("!I", 7)) for each in range(3)))
"""CTA_SEQ_ADJ_ORIG: somebody has changed the sequence numbers."""

_SETUP = f"""
link add pw0 address {BRIDGE_MAC} mtu {MTU} type bridge
link set pw0 up
addr add 10.244.1.1/24 dev pw0
addr add fd00:1:0:1::1/64 dev pw0 nodad
link set under0 address {UNDER_MAC} mtu {UNDERLAY_MTU} up
addr add 192.0.2.1/24 dev under0
addr add 2001:db8::1/64 dev under0 nodad
neigh add 192.0.2.2 lladdr {THEIR_MAC} dev under0 nud permanent
neigh add 2001:db8::2 lladdr {THEIR_MAC} dev under0 nud permanent
link add pw-vxlan address {VXLAN_MAC} mtu {MTU} type vxlan id 1 dstport 4789 local 192.0.2.1 dev under0 nolearning
link set pw-vxlan up
addr add 10.244.1.2/32 dev pw-vxlan
addr add fd00:1:0:1::2/128 dev pw-vxlan nodad
neigh add 10.244.2.2 lladdr {THEIR_VTEP_MAC} dev pw-vxlan nud permanent
neigh add fd00:1:0:2::2 lladdr {THEIR_VTEP_MAC} dev pw-vxlan nud permanent
link set aside mtu {MTU} up
neigh add 10.244.4.2 lladdr {THEIR_MAC} dev aside nud permanent
neigh add fd00:1:0:4::2 lladdr {THEIR_MAC} dev aside nud permanent
route add 10.244.2.0/24 via 10.244.2.2 dev pw-vxlan onlink
route add fd00:1:0:2::/64 via fd00:1:0:2::2 dev pw-vxlan onlink
route add 10.244.3.0/24 via 192.0.2.2
route add fd00:1:0:3::/64 via 2001:db8::2
route add 10.244.4.0/24 via 10.244.4.2 dev aside onlink
route add fd00:1:0:4::/64 via fd00:1:0:4::2 dev aside onlink
neigh add 10.244.1.77 lladdr {THEIR_MAC} dev pw0 nud permanent
neigh add fd00:1:0:1::77 lladdr {THEIR_MAC} dev pw0 nud permanent
route add unreachable 10.244.5.0/24
route add unreachable fd00:1:0:5::/64
route add 10.244.6.0/24 via 10.244.6.2 dev pw-vxlan onlink
route add fd00:1:0:6::/64 via fd00:1:0:6::2 dev pw-vxlan onlink
route add 10.244.7.0/24 via inet6 2001:db8::2 dev under0
route add 10.244.10.0/24 via 10.244.2.2 dev pw-vxlan onlink mtu lock {NARROW_MTU}
route add fd00:1:0:10::/64 via fd00:1:0:2::2 dev pw-vxlan onlink mtu lock {NARROW_MTU}
route add {OUTSIDE[4]}/32 via 10.244.2.2 dev pw-vxlan onlink
route add {OUTSIDE[6]}/128 via fd00:1:0:2::2 dev pw-vxlan onlink
route add {ELSEWHERE[4]}/32 via 10.244.2.2 dev pw-vxlan onlink
route add {ELSEWHERE[6]}/128 via fd00:1:0:2::2 dev pw-vxlan onlink
"""
"""Networks 5, 6 and 7 are unreachable, behind a VTEP that nobody knows, and by way of a router of the other family; the
route to 10 has an MTU of its own."""


@contextmanager
def stage() -> Iterator[Stage]:
    """The node with its pods, nothing attached anywhere."""
    with ExitStack() as stack:
        node, a, b = (stack.enter_context(Netns(name)) for name in ("fast", "fast-a", "fast-b"))
        for name in ("under0", "aside"):
            node.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
            node.ip("link", "set", f"{name}-peer", "up")
        node.run("ip", "-batch", "-", stdin=_SETUP)
        for pod, port, mac, host in ((a, "pwa", A_MAC, A), (b, "pwb", B_MAC, B)):
            node.ip("link", "add", port, "master", "pw0", "type", "veth", "peer", "name", "eth0", "netns", pod.name)
            node.ip("link", "set", port, "up")
            pod.ip("link", "set", "eth0", "address", mac, "up")
            pod.ip("addr", "add", f"{at(4, *host)}/24", "dev", "eth0")
            pod.ip("addr", "add", f"{at(6, *host)}/64", "dev", "eth0", "nodad")
        node.run("bridge", "fdb", "add", THEIR_VTEP_MAC, "dev", "pw-vxlan", "dst", "192.0.2.2")
        node.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        descriptor = netns.open_netns(node.path)
        stack.callback(os.close, descriptor)
        made = Stage(node, a, b, descriptor)
        stack.callback(made.close)
        yield made


WAYS = {
    "to the pod beside": (Where.FROM_POD, "pwa", A, B, A_MAC, B_MAC),
    "to a pod of another node": (Where.FROM_POD, "pwa", A, FAR, A_MAC, BRIDGE_MAC),
    "to one on the same network": (Where.FROM_POD, "pwa", A, NEAR, A_MAC, BRIDGE_MAC),
    "from a pod of another node": (Where.ARRIVING, "pw-vxlan", FAR, A, THEIR_VTEP_MAC, VXLAN_MAC),
    "from one on the same network": (Where.ARRIVING, "under0", NEAR, A, THEIR_MAC, UNDER_MAC),
}
BESIDE, TO_NODE, TO_NEAR, FROM_NODE, FROM_NEAR = WAYS


def flow(way: str, version: int, protocol: int = TCP) -> Flow:
    """The packet that takes this way fast."""
    where, port, source, target, source_mac, target_mac = WAYS[way]
    return Flow(
        version=version,
        where=where,
        port=port,
        source=at(version, *source),
        target=at(version, *target),
        source_mac=source_mac,
        target_mac=target_mac,
        protocol=protocol,
    )


def expected(it: Flow, before: bytes) -> bytes:
    """The frame after it took the fast way."""
    if it.target == at(it.version, *B):
        return before
    macs = before[:12]
    if it.where is Where.ARRIVING:
        macs = mac_bytes(A_MAC) + mac_bytes(BRIDGE_MAC)
    elif it.target != at(it.version, *NEAR):  # on the underlay the kernel finds them later
        macs = mac_bytes(THEIR_VTEP_MAC) + mac_bytes(VXLAN_MAC)
    if it.version == 6:
        return macs + before[12:21] + bytes([before[21] - 1]) + before[22:]
    header = before[14:22] + bytes([before[22] - 1]) + before[23:34]
    return macs + before[12:14] + with_checksum(header) + before[34:]
