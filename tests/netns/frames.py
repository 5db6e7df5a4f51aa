"""Frames made by hand, put on a wire as they are, and heard where they arrive.

A raw socket inside a pod's namespace sends what a pod with CAP_NET_RAW can send. An ear is another one, at the place
that the frame would come to. Whether something was dropped is told by what is sent after it: when that arrives, what
went before either has or never will.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct

from podwire import netns

BROADCAST = "ff:ff:ff:ff:ff:ff"
IPV4, ARP, IPV6, VLAN, SERVICE_VLAN, LLDP, RARP, PPPOE = 0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8, 0x88CC, 0x8035, 0x8864
UDP, ICMPV6, HOP_BY_HOP, IGMP = 17, 58, 0, 2
_ALL = 3  # ETH_P_ALL
_PATIENCE = 60.0


class Raw:
    """A raw socket on an interface of a namespace."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, *frames: bytes) -> None:
        """Puts frames on the wire."""
        for frame in frames:
            self._socket.send(frame)

    async def hear(self, last: bytes) -> list[bytes]:
        """Everything that arrives until a frame that contains `last`; not what is sent from there."""
        heard: list[bytes] = []
        async with asyncio.timeout(_PATIENCE):
            while not heard or last not in heard[-1]:
                frame, about = await asyncio.get_running_loop().sock_recvfrom(self._socket, 65536)
                if about[2] != socket.PACKET_OUTGOING:
                    heard.append(frame)
        return heard

    def close(self) -> None:
        """Closes the socket, which pins its namespace."""
        self._socket.close()


def _open(path: str, ifname: str) -> Raw:
    fd = netns.open_netns(path)
    try:
        with netns.inside(fd):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ALL))
            sock.bind((ifname, 0))
    finally:
        os.close(fd)
    return Raw(sock)


async def raw(netns_path: str, ifname: str = "eth0") -> Raw:
    """A raw socket in a namespace, opened on a thread that does nothing else meanwhile."""
    return await asyncio.to_thread(_open, netns_path, ifname)


# --- what is sent ---------------------------------------------------------------------------------------------------


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(source: str, target: str, kind: int, payload: bytes) -> bytes:
    """A frame; without padding, which a bridge that hands packets to the firewall would take off."""
    return mac_bytes(target) + mac_bytes(source) + struct.pack("!H", kind) + payload


def tagged(frame: bytes, *kinds: int) -> bytes:
    """The frame with VLAN tags in front of its type; the last one is the outer."""
    for kind in kinds:
        frame = frame[:12] + struct.pack("!HH", kind, 7) + frame[12:]
    return frame


def ip(source: str, target: str, protocol: int, payload: bytes) -> bytes:
    """A packet of the family of `source`."""
    a, b = ipaddress.ip_address(source), ipaddress.ip_address(target)
    if a.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255) + a.packed + b.packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0) + a.packed + b.packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def udp(source: str, target: str, data: bytes, port: int = 7000) -> bytes:
    """A UDP datagram in its packet."""
    length = 8 + len(data)
    bare = struct.pack("!HHHH", 7001, port, length, 0) + data
    if ":" not in source:
        return ip(source, target, UDP, bare)
    return ip(source, target, UDP, bare[:6] + struct.pack("!H", _pseudo(source, target, UDP, bare)) + bare[8:])


def icmpv6(source: str, target: str, kind: int, body: bytes, hop_by_hop: bytes = b"") -> bytes:
    """An ICMPv6 message in its packet. `body` is what comes after the checksum; `hop_by_hop` are options before it."""
    bare = struct.pack("!BBH", kind, 0, 0) + body
    message = bare[:2] + struct.pack("!H", _pseudo(source, target, ICMPV6, bare)) + bare[4:]
    if hop_by_hop:
        return ip(source, target, HOP_BY_HOP, bytes([ICMPV6, 0]) + hop_by_hop + message)
    return ip(source, target, ICMPV6, message)


def advertisement(target: str, *options: bytes) -> bytes:
    """The body of a neighbour advertisement: override, and what it is about (RFC 4861, 4.4)."""
    return struct.pack("!I", 1 << 29) + ipaddress.ip_address(target).packed + b"".join(options)


def link_layer(mac: str) -> bytes:
    """The option "target link-layer address"."""
    return b"\2\1" + mac_bytes(mac)


def arp(operation: int, mac: str, sender: str, target: str, target_mac: str = "00:00:00:00:00:00") -> bytes:
    """An ARP message (1 asks, 2 answers)."""
    a, b = ipaddress.ip_address(sender), ipaddress.ip_address(target)
    return (
        struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + mac_bytes(mac) + a.packed + mac_bytes(target_mac) + b.packed
    )


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) & ~1])) + (
        data[-1] << 8 if len(data) % 2 else 0
    )
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def _pseudo(source: str, target: str, protocol: int, data: bytes) -> int:
    a, b = ipaddress.ip_address(source).packed, ipaddress.ip_address(target).packed
    return checksum(a + b + struct.pack("!II", len(data), protocol) + data)
