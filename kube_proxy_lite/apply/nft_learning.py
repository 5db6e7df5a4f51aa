"""The rules that remember IPv6 clients, as netlink messages: nft 1.0.6 cannot be asked for them.

    meta l4proto 6 update @affinity { ip6 saddr . ct original ip6 daddr . … timeout 600s : ip6 daddr . tcp dport }

It reserves 16 bytes for the key of such a statement, and for its value, and stops with a failed assertion where they
are longer, as two IPv6 addresses are. The kernel is content: 40 bytes of key and 20 of value, in the 64 that it has for
registers. nft lists the rule like any other.

A program of its own, standard library only, so that it can be run in the namespace that nft is run in. It is run once
for each timeout that Services have, not for each Service: `python -IS nft_learning.py TABLE CHAIN SET SECONDS`.

Source: linux/netfilter/nf_tables.h, linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys

_NETLINK_NETFILTER, _ERROR = 12, 2
_REQUEST, _ACK, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800
_NESTED = 0x8000
_BATCH_BEGIN, _BATCH_END, _NFTABLES, _NEWRULE = 0x10, 0x11, 10, 10 << 8 | 6
_PROTOCOLS = (6, 17, 132)  # all have their destination port in the same place
_NETWORK, _TRANSPORT = 1, 2  # NFT_PAYLOAD_*_HEADER
_L4PROTO, _DST_IP6, _PROTO_DST, _ORIGINAL = 16, 22, 12, 0
_UPDATE = 1
_REGISTER = 8  # NFT_REG32_00, of 4 bytes each
_KEY, _DATA = _REGISTER, _REGISTER + 10


def attribute(kind: int, value: bytes, nested: bool = False) -> bytes:
    """One netlink attribute, padded."""
    header = struct.pack("=HH", 4 + len(value), kind | (_NESTED if nested else 0))
    return header + value + bytes(-len(value) % 4)


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value))


def expression(name: str, *attributes: bytes) -> bytes:
    """One expression of a rule."""
    return attribute(1, text(1, name) + attribute(2, b"".join(attributes), nested=True), nested=True)


def payload(register: int, base: int, offset: int, length: int) -> bytes:
    return expression("payload", number(1, register), number(2, base), number(3, offset), number(4, length))


def conntrack(register: int, key: int) -> bytes:
    return expression("ct", number(1, register), number(2, key), attribute(3, bytes([_ORIGINAL])))


def learning(protocol: int, set_name: str, seconds: int) -> bytes:
    """The expressions of the rule of one protocol."""
    l4proto = expression("meta", number(1, _KEY), number(2, _L4PROTO))
    return b"".join(
        (
            l4proto,
            expression(
                "cmp", number(1, _KEY), number(2, 0), attribute(3, attribute(1, bytes([protocol])), nested=True)
            ),
            payload(_KEY, _NETWORK, 8, 16),  # saddr
            conntrack(_KEY + 4, _DST_IP6),
            expression("meta", number(1, _KEY + 8), number(2, _L4PROTO)),
            conntrack(_KEY + 9, _PROTO_DST),
            payload(_DATA, _NETWORK, 24, 16),  # daddr
            payload(_DATA + 4, _TRANSPORT, 2, 2),
            expression(
                "dynset",
                text(1, set_name),
                number(3, _UPDATE),
                number(4, _KEY),
                number(5, _DATA),
                attribute(6, struct.pack("!Q", seconds * 1000)),
            ),
        )
    )


def message(kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes = b"") -> bytes:
    header = struct.pack("=IHHII", 20 + len(body), kind, flags | _REQUEST, sequence, 0)
    return header + struct.pack("!BBH", family, 0, resource) + body


def batch(table: str, chain: str, set_name: str, seconds: int) -> bytes:
    """One transaction with a rule a protocol."""
    parts = [message(_BATCH_BEGIN, 0, 0, 0, _NFTABLES)]
    for sequence, protocol in enumerate(_PROTOCOLS, 1):
        rule = attribute(4, learning(protocol, set_name, seconds), nested=True)
        body = text(1, table) + text(2, chain) + rule
        parts.append(message(_NEWRULE, _CREATE | _APPEND | _ACK, sequence, socket.AF_INET6, 0, body))
    parts.append(message(_BATCH_END, 0, len(_PROTOCOLS) + 1, 0, _NFTABLES))
    return b"".join(parts)


def send(transaction: bytes) -> None:
    """Send it and hear what the kernel says. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as channel:
        channel.settimeout(5)
        channel.bind((0, 0))
        channel.send(transaction)
        heard = 0
        while heard < len(_PROTOCOLS):
            answer = channel.recv(1 << 16)
            at = 0
            while at < len(answer):
                length, kind = struct.unpack_from("=IH", answer, at)
                if kind == _ERROR:
                    (code,) = struct.unpack_from("=i", answer, at + 16)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    heard += 1
                at += (length + 3) & ~3


def main() -> int:
    table, chain, set_name, seconds = sys.argv[1:]
    try:
        send(batch(table, chain, set_name, int(seconds)))
    except OSError as error:
        print(f"{chain}: {errno.errorcode.get(error.errno or 0, '')} {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
